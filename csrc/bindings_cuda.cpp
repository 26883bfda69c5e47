// bindings_cuda.cpp: the module minitune._C_cuda: the CUDA half of the ops. -DUSE_CUDA shows the shim's stream call.
#include "bindings.h"

#include <torch/csrc/stable/accelerator.h>

namespace {
template <typename Work>
void run(const Work& work, const Tensor& on, int (*kernel)(const Work*, void*)) {
  const auto device = on.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (const int error = kernel(&work, stream)) fail("nf4: CUDA says: ", nf4_cuda_error(error));
}

void launch(const Nf4Dequantize& work, const Tensor& on) { run(work, on, nf4_cuda_dequantize); }
void launch(const Nf4Quantize& work, const Tensor& on) { run(work, on, nf4_cuda_quantize); }
void launch(const Nf4QuantizeAbsmax& work, const Tensor& on) { run(work, on, nf4_cuda_quantize_absmax); }
void expect_writes(void*, int64_t) {}      // a matter of a CPU's pages

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minitune, CUDA, library) { implement(library); }

// To import the module is to register the ops; minitune._C, which has their schemas, comes first.
PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
