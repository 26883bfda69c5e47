// bindings_rows.cpp: the ops of rows.h under torch's dispatcher. Results go where the caller says, so nothing is made here.
#include "checks_rows.h"
#include "cpu_isa.h"

namespace rows {
const Path& path_of(int isa) {
#if defined(__x86_64__)
  static const Path* const paths[5] = {&kPortable, &kAvx2, &kAvx512, &kAvx512, &kAvx512};
  return *paths[isa];
#else
  return kPortable;
#endif
}
}  // namespace rows

namespace {
using namespace rows;

// About what one thread does in the time that waking another takes.
constexpr int64_t kValuesPerThread = 16384;

const void* weight_of(const char* op, const Tensor& weight, const Shape& shape) {
  return vector_of<void>(op, "weight", weight, shape.dtype == F32 ? ScalarType::Float : ScalarType::BFloat16,
                         shape.width);
}

template <typename Work>
void run(const Work& work, void (*function)(const Work&, int64_t, int64_t)) {
  const int64_t row = work.shape.inner * work.shape.width;
  if (work.shape.tokens == 0 || row == 0) return;
  const int64_t grain = row < kValuesPerThread ? kValuesPerThread / row : 1;
  torch::stable::parallel_for(0, work.shape.tokens, grain,
                              [&](int64_t first, int64_t last) { function(work, first, last); });
}

void rms_norm(const Tensor& x, const Optional& branch, const Tensor& weight, double eps, bool stored, const Tensor& rstd,
              const Optional& total, const Tensor& y) {
  const char* op = "rows_rms_norm";
  RmsNorm work{shape_of(op, "x", x)};
  work.x = rows_of(op, "x", x, work.shape);
  if (branch.has_value() != total.has_value()) fail(op, ": branch and total belong together");
  work.branch = rows_of(op, "branch", branch, work.shape);
  work.total = written(op, "total", total, work.shape);
  work.y = written(op, "y", y, work.shape);
  work.weight = weight_of(op, weight, work.shape);
  work.rstd = vector_of<float>(op, "rstd", rstd, ScalarType::Float, work.shape.tokens * work.shape.inner);
  work.eps = float(eps);
  work.stored = stored;
  run(work, path_of(cpu_isa()).rms_norm);
}

void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& weight, const Optional& past,
                       const Tensor& dx) {
  const char* op = "rows_rms_norm_backward";
  RmsNormBackward work{shape_of(op, "x", x)};
  work.x = rows_of(op, "x", x, work.shape);
  work.dy = rows_of(op, "dy", dy, work.shape);
  work.past = rows_of(op, "past", past, work.shape);
  work.dx = written(op, "dx", dx, work.shape);
  work.weight = weight_of(op, weight, work.shape);
  work.rstd = vector_of<float>(op, "rstd", rstd, ScalarType::Float, work.shape.tokens * work.shape.inner);
  run(work, path_of(cpu_isa()).rms_norm_backward);
}

Shape twice(const Shape& shape) { return {shape.tokens, shape.inner, 2 * shape.width, shape.dtype}; }

void swiglu(const Tensor& gate_up, const Tensor& h) {
  const char* op = "rows_swiglu";
  Swiglu work{shape_of(op, "h", h)};
  work.h = written(op, "h", h, work.shape);
  work.gate_up = rows_of(op, "gate_up", gate_up, twice(work.shape));
  run(work, path_of(cpu_isa()).swiglu);
}

void swiglu_backward(const Tensor& dh, const Tensor& gate_up, const Tensor& gradient, const Optional& h) {
  const char* op = "rows_swiglu_backward";
  SwigluBackward work{shape_of(op, "dh", dh)};
  work.dh = rows_of(op, "dh", dh, work.shape);
  work.h = written(op, "h", h, work.shape);
  work.gate_up = rows_of(op, "gate_up", gate_up, twice(work.shape));
  work.gradient = written(op, "gradient", gradient, twice(work.shape));
  run(work, path_of(cpu_isa()).swiglu_backward);
}

void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  const char* op = "rows_rope";
  Rope work{shape_of(op, "x", x)};
  if (work.shape.width % 2) fail(op, ": x has rows of ", work.shape.width, "; it must be an even number");
  work.x = written(op, "x", x, work.shape);
  const int64_t angles = work.shape.tokens * (work.shape.width / 2);
  work.cos = vector_of<float>(op, "cos", cos, ScalarType::Float, angles);
  work.sin = vector_of<float>(op, "sin", sin, ScalarType::Float, angles);
  work.back = back;
  run(work, path_of(cpu_isa()).rope);
}

void losses(const Tensor& logits, const Tensor& labels, const Tensor& out, double smoothing, bool gradient) {
  const char* op = "rows_losses";
  Losses work{shape_of(op, "logits", logits)};
  if (logits.dim() != 2) fail(op, ": logits has ", logits.dim(), " dimensions; it must have 2");
  work.logits = written(op, "logits", logits, work.shape);
  work.labels = vector_of<int64_t>(op, "labels", labels, ScalarType::Long, work.shape.tokens);
  work.losses = vector_of<float>(op, "losses", out, ScalarType::Float, work.shape.tokens);
  work.smoothing = float(smoothing);
  work.gradient = gradient;
  for (int64_t i = 0; i < work.shape.tokens; ++i)
    if (work.labels[i] < 0 || work.labels[i] >= work.shape.width)
      fail(op, ": label ", i, " is ", work.labels[i], "; it must be from 0 to ", work.shape.width - 1);
  run(work, path_of(cpu_isa()).losses);
}

void softmax(const Tensor& scores, int64_t queries, int64_t begin, int64_t window) {
  const char* op = "rows_softmax";
  Softmax work{shape_of(op, "scores", scores)};
  if (scores.dim() != 2) fail(op, ": scores has ", scores.dim(), " dimensions; it must have 2");
  if (queries < 1 || begin < 0 || window < 0 || begin > INT64_MAX - queries)
    fail(op, ": queries is ", queries, ", begin is ", begin, ", window is ", window, "; they must not be negative");
  if (begin > work.shape.width - queries)
    fail(op, ": query ", begin, " + ", queries, " - 1 lies beyond the ", work.shape.width, " columns of scores");
  work.scores = written(op, "scores", scores, work.shape);
  work.queries = queries;
  work.begin = begin;
  work.window = window;
  run(work, path_of(cpu_isa()).softmax);
}

void softmax_backward(const Tensor& dp, const Tensor& p) {
  const char* op = "rows_softmax_backward";
  SoftmaxBackward work{shape_of(op, "dp", dp)};
  work.dp = written(op, "dp", dp, work.shape);
  work.p = rows_of(op, "p", p, work.shape);
  run(work, path_of(cpu_isa()).softmax_backward);
}

void product(const Tensor& weight, const Tensor& x, const Tensor& y) {
  const char* op = "rows_product";
  Product work{shape_of(op, "weight", weight)};
  if (weight.dim() != 2) fail(op, ": weight has ", weight.dim(), " dimensions; it must have 2");
  if (work.shape.width == 0) fail(op, ": weight has rows without elements");
  work.weight = rows_of(op, "weight", weight, work.shape);
  const ScalarType dtype = weight.scalar_type();
  work.x = vector_of<void>(op, "x", x, dtype, work.shape.width);
  vector_of<void>(op, "y", y, dtype, work.shape.tokens);
  work.y = y.mutable_data_ptr();
  run(work, path_of(cpu_isa()).product);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minitune, library) {
  library.def("rows_rms_norm(Tensor x, Tensor? branch, Tensor weight, float eps, bool stored, Tensor(a!) rstd, "
              "Tensor(b!)? total, Tensor(c!) y) -> ()");
  library.def("rows_rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor weight, Tensor? past, Tensor(a!) dx)"
              " -> ()");
  library.def("rows_swiglu(Tensor gate_up, Tensor(a!) h) -> ()");
  library.def("rows_swiglu_backward(Tensor dh, Tensor gate_up, Tensor(a!) gradient, Tensor(b!)? h) -> ()");
  library.def("rows_rope(Tensor(a!) x, Tensor cos, Tensor sin, bool back) -> ()");
  library.def("rows_losses(Tensor(a!) logits, Tensor labels, Tensor(b!) out, float smoothing, bool gradient) -> ()");
  library.def("rows_softmax(Tensor(a!) scores, int queries, int begin, int window) -> ()");
  library.def("rows_softmax_backward(Tensor(a!) dp, Tensor p) -> ()");
  library.def("rows_product(Tensor weight, Tensor x, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minitune, CPU, library) {
  library.impl("rows_rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rows_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("rows_swiglu", TORCH_BOX(&swiglu));
  library.impl("rows_swiglu_backward", TORCH_BOX(&swiglu_backward));
  library.impl("rows_rope", TORCH_BOX(&rope));
  library.impl("rows_losses", TORCH_BOX(&losses));
  library.impl("rows_softmax", TORCH_BOX(&softmax));
  library.impl("rows_softmax_backward", TORCH_BOX(&softmax_backward));
  library.impl("rows_product", TORCH_BOX(&product));
}
