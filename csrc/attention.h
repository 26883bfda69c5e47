// attention.h: attention of a CPU with a matrix unit for bf16 (Intel AMX): packed documents, causal, grouped heads, and
// optionally a sliding window.
//
// Values are bf16 in memory; scores, probabilities and sums are fp32, and probabilities and their gradients are rounded
// to bf16 where they are multiplied. One thread does all of a document for a key head and the query heads that read it,
// from left to right, so results do not depend on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace attention {

struct Heads {            // [tokens, heads, head_dim]: heads side by side, tokens `pitch` values apart
  uint16_t* data;
  int64_t pitch;
};

struct Work {
  const int32_t* starts;              // [documents + 1], ascending
  int64_t documents, tokens, heads, kv_heads, head_dim;
  int64_t window;                     // a position sees itself and the window - 1 before it; at least `tokens`: all
  float scale;                        // of q·k
  Heads q, k, v, out;
  float* lse;                         // [heads, tokens], the natural log of Σ exp(scale · q·k)
  Heads dout, dq, dk, dv;             // the backward's alone
};

// Whether this compiler can build what follows, which is for the instruction set AMX (cpu_isa.h) alone.
extern const bool kBuilt;

// Bytes that a thread needs to work on the longest document, aligned to 64.
size_t room_forward(const Work& work);
size_t room_backward(const Work& work);

// Key head `task` % kv_heads of document `task` / kv_heads.
void forward(const Work& work, int64_t task, void* room);
void backward(const Work& work, int64_t task, void* room);

}  // namespace attention
