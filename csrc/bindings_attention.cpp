// bindings_attention.cpp: the ops of attention.h under torch's dispatcher. Results go where the caller says.
#include "attention.h"
#include "checks_rows.h"
#include "cpu_isa.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

namespace {
using attention::Heads;
using attention::Path;
using attention::Work;

Heads heads_of(const Rows& rows) { return {static_cast<uint16_t*>(rows.data), rows.pitch}; }

// Shapes and documents; q, k and v.
Work operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, int64_t window) {
  if (cpu_isa() < ISA_AVX512_BF16)
    fail(op, ": no products of bf16 here: the CPU, its kernel or the compiler has none, or MINITUNE_CPU_ISA lowers it");
  Work work{};
  const Shape queries = shape_of(op, "q", q), keys = shape_of(op, "k", k);
  if (queries.dtype != BF16 || keys.dtype != BF16)
    fail(op, ": q is ", toString(q.scalar_type()), ", k ", toString(k.scalar_type()), "; both must be bfloat16");
  if (q.dim() != 3 || k.dim() != 3) fail(op, ": q and k have ", q.dim(), " and ", k.dim(), " dimensions, not 3 each");
  if (keys.tokens != queries.tokens || keys.width != queries.width)
    fail(op, ": k is ", keys.tokens, " x ", keys.inner, " x ", keys.width, " beside q, ", queries.tokens, " x ",
         queries.inner, " x ", queries.width, "; tokens and head_dim must be the same");
  if (keys.inner == 0 || queries.inner % keys.inner)
    fail(op, ": q has ", queries.inner, " heads, k ", keys.inner, "; the first must be a multiple of the second");
  if (queries.width == 0) fail(op, ": q has heads without values");
  work.tokens = queries.tokens;
  work.heads = queries.inner;
  work.kv_heads = keys.inner;
  work.head_dim = queries.width;
  work.splits = 1;
  work.scale = 1.0f / std::sqrt(float(work.head_dim));
  if (window < 0) fail(op, ": window is ", window, "; it must not be negative");
  work.window = window == 0 || window > work.tokens ? std::max(work.tokens, int64_t(1)) : window;
  work.documents = starts.numel() - 1;
  if (work.documents < 0) fail(op, ": starts is empty; it must be where each document begins, and where the last ends");
  work.starts = vector_of<int32_t>(op, "starts", starts, ScalarType::Int, starts.numel());
  const bool ascend = std::is_sorted(work.starts, work.starts + work.documents + 1);
  if (!ascend || work.starts[0] != 0 || work.starts[work.documents] != work.tokens)
    fail(op, ": starts must ascend from 0 to the ", work.tokens, " tokens of q");
  work.q = heads_of(rows_of(op, "q", q, queries));
  work.k = heads_of(rows_of(op, "k", k, keys));
  work.v = heads_of(rows_of(op, "v", v, keys));
  return work;
}

const Path& path() {
#if defined(MINITUNE_TILES)
  return cpu_isa() == ISA_AMX ? attention::kAmx : attention::kAvx512Bf16;
#else
  static const Path none{};       // `operands` has thrown
  return none;
#endif
}

// Every task, the longest documents first. Whichever thread is free takes the next one, which changes no result.
void run(const Work& work, size_t (*room_of)(const Work&), void (*function)(const Work&, int64_t, void*),
         const Tensor& beside) {
  if (work.tokens == 0) return;
  const int64_t room = int64_t(room_of(work));
  std::vector<int64_t> documents(size_t(work.documents));
  std::iota(documents.begin(), documents.end(), 0);
  const auto length = [&](int64_t document) { return work.starts[document + 1] - work.starts[document]; };
  std::stable_sort(documents.begin(), documents.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
  const int64_t of_each = work.kv_heads * work.splits, tasks = work.documents * of_each;
  const int64_t workers = std::min(tasks, int64_t(torch::stable::get_num_threads()));
  const Tensor rooms = torch::stable::new_empty(beside, {workers, room}, ScalarType::Byte);
  uint8_t* first_room = static_cast<uint8_t*>(rooms.mutable_data_ptr());
  std::atomic<int64_t> next_room{0}, next_task{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    uint8_t* own = first_room + next_room++ * room;
    for (int64_t task = next_task++; task < tasks; task = next_task++)
      function(work, documents[size_t(task / of_each)] * of_each + task % of_each, own);
  });
}

void attention_tiles(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, int64_t window,
                   const Tensor& out, const Tensor& lse) {
  const char* op = "attention_tiles";
  Work work = operands(op, q, k, v, starts, window);
  work.out = heads_of(written(op, "out", out, shape_of(op, "q", q)));
  vector_of<float>(op, "lse", lse, ScalarType::Float, work.heads * work.tokens);
  work.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t pairs = std::max(int64_t(1), work.documents * work.kv_heads);
  work.splits = std::min(work.heads / work.kv_heads, ceil_div(int64_t(torch::stable::get_num_threads()), pairs));
  run(work, path().room_forward, path().forward, q);
}

void attention_tiles_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const Tensor& lse, const Tensor& starts, int64_t window, const Tensor& dq, const Tensor& dk,
                            const Tensor& dv) {
  const char* op = "attention_tiles_backward";
  Work work = operands(op, q, k, v, starts, window);
  const Shape queries = shape_of(op, "q", q), keys = shape_of(op, "k", k);
  work.dout = heads_of(rows_of(op, "dout", dout, queries));
  work.out = heads_of(rows_of(op, "out", out, queries));
  work.lse = vector_of<float>(op, "lse", lse, ScalarType::Float, work.heads * work.tokens);
  work.dq = heads_of(written(op, "dq", dq, queries));
  work.dk = heads_of(written(op, "dk", dk, keys));
  work.dv = heads_of(written(op, "dv", dv, keys));
  run(work, path().room_backward, path().backward, q);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minitune, library) {
  library.def("attention_tiles(Tensor q, Tensor k, Tensor v, Tensor starts, int window, Tensor(a!) out, Tensor(b!) lse)"
              " -> ()");
  library.def("attention_tiles_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts,"
              " int window, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minitune, CPU, library) {
  library.impl("attention_tiles", TORCH_BOX(&attention_tiles));
  library.impl("attention_tiles_backward", TORCH_BOX(&attention_tiles_backward));
}
