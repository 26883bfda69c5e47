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
using attention::Work;

Heads heads_of(const Rows& rows) { return {static_cast<uint16_t*>(rows.data), rows.pitch}; }

// Shapes and documents; q, k and v.
Work operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, int64_t window) {
  if (cpu_isa() != AMX) fail(op, ": this CPU has no AMX, or MINITUNE_CPU_ISA lowers its instruction set");
  Work work{};
  const Shape queries = shape_of(op, "q", q), keys = shape_of(op, "k", k);
  if (queries.dtype != BF16) fail(op, ": q is ", toString(q.scalar_type()), "; it must be bfloat16");
  if (q.dim() != 3 || k.dim() != 3) fail(op, ": q and k have ", q.dim(), " and ", k.dim(), " dimensions, not 3 each");
  if (keys.tokens != queries.tokens || keys.width != queries.width)
    fail(op, ": k is ", keys.tokens, " x ", keys.inner, " x ", keys.width, " beside q, ", queries.tokens, " x ",
         queries.inner, " x ", queries.width, "; tokens and head_dim must be the same");
  if (keys.inner == 0 || queries.inner % keys.inner)
    fail(op, ": q has ", queries.inner, " heads, k ", keys.inner, "; the first must be a multiple of the second");
  work.tokens = queries.tokens;
  work.heads = queries.inner;
  work.kv_heads = keys.inner;
  work.head_dim = queries.width;
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

// Every task, on as many threads as there are, the longest documents first. Whoever is free takes the next one: which
// thread that is changes no result.
void run(const Work& work, size_t room, void (*function)(const Work&, int64_t, void*), const Tensor& beside) {
  if (work.tokens == 0 || work.head_dim == 0) return;
  std::vector<int64_t> documents(size_t(work.documents));
  std::iota(documents.begin(), documents.end(), 0);
  const auto length = [&](int64_t document) { return work.starts[document + 1] - work.starts[document]; };
  std::stable_sort(documents.begin(), documents.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
  const int64_t tasks = work.documents * work.kv_heads;
  const int64_t workers = std::min(tasks, int64_t(torch::stable::get_num_threads()));
  const Tensor rooms = torch::stable::new_empty(beside, {workers, int64_t(room)}, ScalarType::Byte);
  uint8_t* first_room = static_cast<uint8_t*>(rooms.mutable_data_ptr());
  std::atomic<int64_t> next_room{0}, next_task{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    uint8_t* own = first_room + next_room++ * int64_t(room);
    for (int64_t task = next_task++; task < tasks; task = next_task++)
      function(work, documents[size_t(task / work.kv_heads)] * work.kv_heads + task % work.kv_heads, own);
  });
}

void attention_amx(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, int64_t window,
                   const Tensor& out, const Tensor& lse) {
  const char* op = "attention_amx";
  Work work = operands(op, q, k, v, starts, window);
  work.out = heads_of(written(op, "out", out, shape_of(op, "q", q)));
  vector_of<float>(op, "lse", lse, ScalarType::Float, work.heads * work.tokens);
  work.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(work, attention::room_forward(work), attention::forward, q);
}

void attention_amx_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const Tensor& lse, const Tensor& starts, int64_t window, const Tensor& dq, const Tensor& dk,
                            const Tensor& dv) {
  const char* op = "attention_amx_backward";
  Work work = operands(op, q, k, v, starts, window);
  const Shape queries = shape_of(op, "q", q), keys = shape_of(op, "k", k);
  work.dout = heads_of(rows_of(op, "dout", dout, queries));
  work.out = heads_of(rows_of(op, "out", out, queries));
  work.lse = vector_of<float>(op, "lse", lse, ScalarType::Float, work.heads * work.tokens);
  work.dq = heads_of(written(op, "dq", dq, queries));
  work.dk = heads_of(written(op, "dk", dk, keys));
  work.dv = heads_of(written(op, "dv", dv, keys));
  run(work, attention::room_backward(work), attention::backward, q);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minitune, library) {
  library.def("attention_amx(Tensor q, Tensor k, Tensor v, Tensor starts, int window, Tensor(a!) out, Tensor(b!) lse)"
              " -> ()");
  library.def("attention_amx_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, "
              "int window, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minitune, CPU, library) {
  library.impl("attention_amx", TORCH_BOX(&attention_amx));
  library.impl("attention_amx_backward", TORCH_BOX(&attention_amx_backward));
}
