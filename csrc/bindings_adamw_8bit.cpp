// bindings_adamw_8bit.cpp: AdamW with moments in 8 bits under torch's dispatcher.
#include "checks_rows.h"
#include "cpu_isa.h"

#include <algorithm>

namespace {
using rows::kMoment;
constexpr int64_t kBlocksPerThread = 64;     // about what one thread does in the time that waking another takes

// The memory of a flat tensor that is written to.
template <typename T>
T* changed(const char* name, const Tensor& x, ScalarType dtype, int64_t numel) {
  return vector_of<T>("rows_adamw_8bit", name, x, dtype, numel) ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

void adamw_8bit(const Tensor& param, const Tensor& grad, const Tensor& mean, const Tensor& mean_absmax,
                const Tensor& square, const Tensor& square_absmax, const Tensor& levels, const Tensor& levels_square,
                double beta1, double beta2, double eps, double decay, double root_scale, double step_size,
                std::optional<double> scale) {
  const int64_t n = param.numel(), blocks = ceil_div(n, kMoment);
  rows::Adamw8 work{n};
  work.param = changed<float>("param", param, ScalarType::Float, n);
  work.grad = changed<float>("grad", grad, ScalarType::Float, n);
  work.mean = changed<uint8_t>("mean", mean, ScalarType::Byte, n);
  work.square = changed<uint8_t>("square", square, ScalarType::Byte, n);
  work.mean_absmax = changed<float>("mean_absmax", mean_absmax, ScalarType::Float, blocks);
  work.square_absmax = changed<float>("square_absmax", square_absmax, ScalarType::Float, blocks);
  work.levels = vector_of<float>("rows_adamw_8bit", "levels", levels, ScalarType::Float, 2 * kMoment);
  work.levels_square = vector_of<float>("rows_adamw_8bit", "levels_square", levels_square, ScalarType::Float,
                                        2 * kMoment);
  work.beta1 = beta1;
  work.beta2 = beta2;
  work.eps = float(eps);
  work.decay = float(decay);
  work.root_scale = float(root_scale);
  work.step_size = float(step_size);
  work.scaled = scale.has_value();
  work.scale = work.scaled ? float(*scale) : 1.0f;
  const rows::Path& path = rows::path_of(std::min<int>(cpu_isa(), ISA_AVX2));    // gathers of AVX-512 are no faster
  if (n)
    torch::stable::parallel_for(0, blocks, kBlocksPerThread,
                                [&](int64_t first, int64_t last) { path.adamw_8bit(work, first, last); });
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minitune, library) {
  library.def("rows_adamw_8bit(Tensor(a!) param, Tensor(b!) grad, Tensor(c!) mean, Tensor(d!) mean_absmax, "
              "Tensor(e!) square, Tensor(f!) square_absmax, Tensor levels, Tensor levels_square, float beta1, "
              "float beta2, float eps, float decay, float root_scale, float step_size, float? scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minitune, CPU, library) { library.impl("rows_adamw_8bit", TORCH_BOX(&adamw_8bit)); }
