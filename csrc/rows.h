// rows.h: ops of a CPU that go row by row: norms, SwiGLU, rotation, softmax, cross-entropy, matrix times vector; and
// AdamW with moments in 8 bits, which goes block by block.
//
// Values are fp32 or bf16 in memory and fp32 in registers; each result is rounded once. A row is worked on by one thread
// and from left to right in lanes, so results do not depend on the number of threads. The same code (rows_kernels.h) is
// compiled for three instruction sets.
#pragma once
#include <cstdint>

namespace rows {

constexpr int64_t kMoment = 256;       // values of a block of 8-bit moments, and levels of a code

enum Dtype : int32_t { F32 = 0, BF16 = 1 };

// [tokens, inner, width]: the rows of a token lie side by side, tokens are `pitch` values apart.
struct Rows {
  void* data;
  int64_t pitch;
};

struct Shape {
  int64_t tokens, inner, width;
  int32_t dtype;
};

struct RmsNorm {          // y = (x + branch) · rstd · weight; `stored`: rstd is read, not computed
  Shape shape;
  Rows x, branch, total, y;     // branch and total may be null, both or none
  const void* weight;
  float* rstd;
  float eps;
  bool stored;
};

struct RmsNormBackward {  // dx = rstd · (g - x · rstd² · mean(g · x)) + past, g = dy · weight
  Shape shape;
  Rows dy, x, past, dx;         // past may be null
  const void* weight;
  const float* rstd;
};

struct Swiglu {           // h = silu(gate) · up; width: of h; gate and up lie side by side in a row of gate_up
  Shape shape;
  Rows gate_up, h;
};

struct SwigluBackward {
  Shape shape;
  Rows dh, gate_up, gradient, h;      // h may be null
};

struct Rope {             // width: head_dim; cos and sin fp32 [tokens, width / 2]
  Shape shape;
  Rows x;
  const float *cos, *sin;
  bool back;
};

struct Losses {           // rows of logits, one a token; with `gradient` they become the gradient of their loss
  Shape shape;
  Rows logits;
  const int64_t* labels;
  float* losses;
  float smoothing;
  bool gradient;
};

struct Softmax {          // in place; row i sees the columns [first(i), last(i)) of its row, others become 0
  Shape shape;                  // tokens: all rows
  Rows scores;
  int64_t queries, begin, window;   // row i is query begin + i % queries; window 0: none
};

struct SoftmaxBackward {  // dp becomes p · (dp - Σ p · dp)
  Shape shape;
  Rows dp, p;
};

struct Product {          // y = weight · x; tokens: rows of the weight, width: of one; x and y are of the same dtype
  Shape shape;
  Rows weight;
  const void* x;
  void* y;
};

struct Adamw8 {           // AdamW over n values with moments in 8 bits, in blocks of 256 (minitune/ops/moments8.py)
  int64_t n;
  float *param, *grad;
  uint8_t *mean, *square;       // codes
  float *mean_absmax, *square_absmax;
  const float *levels, *levels_square;      // 256 levels, and behind them the tree of the midpoints between
  double beta1, beta2;
  float eps, decay, root_scale, step_size, scale;
  bool scaled;                  // the gradients are multiplied by `scale` first, in place
};

// One instruction set: each function does the tokens, or blocks, [first, last).
struct Path {
  void (*rms_norm)(const RmsNorm&, int64_t first, int64_t last);
  void (*rms_norm_backward)(const RmsNormBackward&, int64_t first, int64_t last);
  void (*swiglu)(const Swiglu&, int64_t first, int64_t last);
  void (*swiglu_backward)(const SwigluBackward&, int64_t first, int64_t last);
  void (*rope)(const Rope&, int64_t first, int64_t last);
  void (*losses)(const Losses&, int64_t first, int64_t last);
  void (*softmax)(const Softmax&, int64_t first, int64_t last);
  void (*softmax_backward)(const SoftmaxBackward&, int64_t first, int64_t last);
  void (*product)(const Product&, int64_t first, int64_t last);
  void (*adamw_8bit)(const Adamw8&, int64_t first, int64_t last);
};
extern const Path kPortable, kAvx2, kAvx512;
const Path& path_of(int isa);     // of an instruction set (cpu_isa.h)

}  // namespace rows
