// attention.h: attention of a CPU that multiplies bf16 (Intel AMX, or AVX-512 with bf16): packed documents, causal,
// grouped heads, and optionally a sliding window.
//
// Values are bf16 in memory; scores, probabilities and sums are fp32, and probabilities and their gradients are rounded
// to bf16 where they are multiplied. A task is a document's key head and the query heads that read it, of the forward
// perhaps a part of them; one thread does it from left to right, so results do not depend on the number of threads.
// The same code is compiled for both units (attention_amx.cpp, attention_avx512.cpp); their sums differ in order.
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
  int64_t splits;                     // of the query heads of a key head, for the forward; the backward has one
  int64_t window;                     // a position sees itself and the window - 1 before it; at least `tokens`: all
  float scale;                        // of q·k
  Heads q, k, v, out;
  float* lse;                         // [heads, tokens], the natural log of Σ exp(scale · q·k)
  Heads dout, dq, dk, dv;             // the backward's alone
};

// Both halves for one unit.
struct Path {
  // Bytes that a thread needs to work on the longest document, aligned to 64.
  size_t (*room_forward)(const Work&);
  size_t (*room_backward)(const Work&);
  // A task of documents · kv_heads · splits, in this order.
  void (*forward)(const Work&, int64_t task, void* room);
  void (*backward)(const Work&, int64_t task, void* room);
};

// Built where the compiler knows AMX (setup.py asks it, and defines MINITUNE_TILES).
extern const Path kAmx, kAvx512Bf16;

}  // namespace attention
