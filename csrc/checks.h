// checks.h: what every binding asks of its tensors before their memory is touched, and how it says no.
#pragma once
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "minitune::";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

[[maybe_unused]] int64_t ceil_div(int64_t n, int64_t by) { return n / by + (n % by != 0); }

// The address of a tensor of which elements [0, extent) are used; a storage can be smaller than its tensor says.
[[maybe_unused]] const void* address(const char* op, const char* name, const Tensor& tensor, int64_t extent) {
  if (extent == 0) return nullptr;
  int64_t bytes = 0, end = 0;
  const int64_t size = int64_t(tensor.element_size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (__builtin_add_overflow(tensor.storage_offset(), extent, &end) || end > bytes / size)
    fail(op, ": ", name, " needs ", extent, " elements, but its storage ends before: ", bytes, " bytes");
  const void* data = tensor.const_data_ptr();
  if (!data || reinterpret_cast<uintptr_t>(data) % uintptr_t(size))
    fail(op, ": ", name, " lies at address ", data, "; it must be a multiple of its element size, ", size);
  return data;
}
}  // namespace
