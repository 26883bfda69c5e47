// bindings_products.cpp: the library's matrix product, a part of the rows on each thread.
#include "checks.h"

#include <algorithm>
#include <array>

namespace {
constexpr int64_t kBlock = 32;             // rows of a part are a multiple of it, as the library works on them

// The library's own product; within a parallel loop it takes one thread. That thread knows nothing of the caller's grad
// or inference mode, so operands must be detached, and no tensors of inference mode.
void multiply(const Tensor& x, const Tensor& right, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(right),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);         // ours to release
}

void product_apart(const Tensor& x, const Tensor& right, const Tensor& out) {
  const char* op = "product_apart";
  if (x.dim() != 2 || right.dim() != 2 || out.dim() != 2)
    fail(op, ": x, right and out have ", x.dim(), ", ", right.dim(), " and ", out.dim(), " dimensions, not 2 each");
  const int64_t rows = x.size(0);
  if (x.size(1) != right.size(0) || out.size(0) != rows || out.size(1) != right.size(1))
    fail(op, ": x is ", rows, " x ", x.size(1), ", right ", right.size(0), " x ", right.size(1), ", out ", out.size(0),
         " x ", out.size(1), "; they must be n x k, k x m and n x m");
  if (x.scalar_type() != right.scalar_type() || x.scalar_type() != out.scalar_type())
    fail(op, ": x is ", toString(x.scalar_type()), ", right ", toString(right.scalar_type()), ", out ",
         toString(out.scalar_type()), "; they must be of one dtype");
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t part = ceil_div(ceil_div(rows, threads), kBlock) * kBlock;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * part; begin < std::min(last * part, rows); begin += part) {
      const int64_t length = std::min(part, rows - begin);
      Tensor of_x = x, of_out = out;
      multiply(torch::stable::narrow(of_x, 0, begin, length), right,
               torch::stable::narrow(of_out, 0, begin, length));
    }
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minitune, library) {
  library.def("product_apart(Tensor x, Tensor right, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minitune, CPU, library) { library.impl("product_apart", TORCH_BOX(&product_apart)); }
