// bindings.h: the ops over torch's stable ABI (one build for torch >= 2.11), every argument checked before use.
//
// bindings.cpp (CPU) and bindings_cuda.cpp (CUDA) include it, and define `launch` and `expect_writes` for their device.
#pragma once
#include "checks.h"
#include "nf4.h"

#include <tuple>

namespace {

// What a device has to offer: it does the work, which is checked and not empty. `on` lies on the device.
void launch(const Nf4Dequantize& work, const Tensor& on);
void launch(const Nf4Quantize& work, const Tensor& on);
void launch(const Nf4QuantizeAbsmax& work, const Tensor& on);
void expect_writes(void* data, int64_t bytes);

// ---- checks --------------------------------------------------------------------------------------------------------
int32_t dtype_of(const char* op, const char* name, ScalarType dtype) {
  if (dtype == ScalarType::Float) return NF4_F32;
  if (dtype == ScalarType::Half) return NF4_F16;
  if (dtype == ScalarType::BFloat16) return NF4_BF16;
  fail(op, ": ", name, " is ", toString(dtype), "; it must be float32, float16 or bfloat16");
}

int32_t block_shift_of(const char* op, int64_t blocksize) {
  for (int32_t shift = 5; shift <= 12; ++shift)
    if (blocksize == int64_t(1) << shift) return shift;
  fail(op, ": blocksize is ", blocksize, "; it must be a power of two from 32 to 4096");
}

template <typename T>
const T* checked(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel,
                 const Tensor& beside) {
  if (tensor.scalar_type() != dtype)
    fail(op, ": ", name, " is ", toString(tensor.scalar_type()), "; it must be ", toString(dtype));
  if (tensor.device() != beside.device()) fail(op, ": ", name, " lies on another device than the first argument");
  if (!tensor.is_contiguous()) fail(op, ": ", name, " is not contiguous");
  if (tensor.numel() != numel) fail(op, ": ", name, " has ", tensor.numel(), " elements; it must have ", numel);
  return static_cast<const T*>(address(op, name, tensor, numel));
}

// Everything but out: a tensor of n values.
Nf4Dequantize operands(const char* op, const Tensor& packed, const Tensor& absmax, const Optional& nested_absmax,
                       const Optional& nested_code, const Optional& nested_offset, const Tensor& table,
                       int64_t blocksize, int64_t n) {
  Nf4Dequantize work{};
  work.block_shift = block_shift_of(op, blocksize);
  const int64_t blocks = ceil_div(n, blocksize);
  work.packed = checked<uint8_t>(op, "packed", packed, ScalarType::Byte, ceil_div(n, 2), packed);
  work.table = checked<float>(op, "table", table, ScalarType::Float, 16, packed);
  const int given = nested_absmax.has_value() + nested_code.has_value() + nested_offset.has_value();
  if (given == 0) {
    work.absmax = checked<float>(op, "absmax", absmax, ScalarType::Float, blocks, packed);
    return work;
  }
  if (given != 3) fail(op, ": of nested_absmax, nested_code and nested_offset ", given, " are given; give all or none");
  const int64_t nested = ceil_div(blocks, int64_t(1) << kNf4NestedShift);
  work.absmax_codes = checked<uint8_t>(op, "absmax", absmax, ScalarType::Byte, blocks, packed);
  work.nested_absmax = checked<float>(op, "nested_absmax", *nested_absmax, ScalarType::Float, nested, packed);
  work.nested_code = checked<float>(op, "nested_code", *nested_code, ScalarType::Float, 256, packed);
  work.nested_offset = checked<float>(op, "nested_offset", *nested_offset, ScalarType::Float, 1, packed);
  return work;
}

// ---- the ops -------------------------------------------------------------------------------------------------------
// Rows that lie without a gap are one row to a kernel.
void decode(Nf4Dequantize& work, const Tensor& out, int64_t rows, int64_t columns, int64_t pitch, const Tensor& on) {
  if (rows == 0 || columns == 0) return;
  const bool flat = rows == 1 || pitch == columns;
  work.rows = flat ? 1 : rows;
  work.columns = flat ? rows * columns : columns;
  work.pitch = flat ? work.columns : pitch;
  work.out = out.mutable_data_ptr();
  launch(work, on);
}

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Optional& nested_absmax,
                      const Optional& nested_code, const Optional& nested_offset, const Tensor& table,
                      int64_t blocksize, int64_t rows, int64_t columns, ScalarType dtype) {
  const char* op = "nf4_dequantize";
  int64_t n = 0;
  if (rows < 0 || columns < 0 || __builtin_mul_overflow(rows, columns, &n))
    fail(op, ": rows is ", rows, ", columns is ", columns, "; neither may be negative, nor their product over 2^63");
  Nf4Dequantize work =
      operands(op, packed, absmax, nested_absmax, nested_code, nested_offset, table, blocksize, n);
  work.dtype = dtype_of(op, "dtype", dtype);
  const Tensor out = torch::stable::new_empty(packed, {rows, columns}, dtype);
  expect_writes(out.mutable_data_ptr(), n * (dtype == ScalarType::Float ? 4 : 2));
  decode(work, out, rows, columns, columns, packed);
  return out;
}

void nf4_dequantize_out(const Tensor& packed, const Tensor& absmax, const Optional& nested_absmax,
                        const Optional& nested_code, const Optional& nested_offset, const Tensor& table,
                        int64_t blocksize, const Tensor& out) {
  const char* op = "nf4_dequantize_out";
  const int32_t dtype = dtype_of(op, "out", out.scalar_type());
  if (out.dim() != 2) fail(op, ": out has ", out.dim(), " dimensions; it must have 2");
  if (out.device() != packed.device()) fail(op, ": out lies on another device than packed");
  const int64_t rows = out.size(0), columns = out.size(1), n = out.numel();
  Nf4Dequantize work =
      operands(op, packed, absmax, nested_absmax, nested_code, nested_offset, table, blocksize, n);
  work.dtype = dtype;
  work.reused = 1;
  if (n == 0) return;
  const int64_t pitch = rows > 1 ? out.stride(0) : columns;
  int64_t extent = 0;
  if ((columns > 1 && out.stride(1) != 1) || pitch < columns || __builtin_mul_overflow(rows - 1, pitch, &extent) ||
      __builtin_add_overflow(extent, columns, &extent))
    fail(op, ": out has strides ", out.stride(0), " and ", out.stride(1), " for ", rows, " rows of ", columns,
         "; its rows must be contiguous and must not overlap");
  address(op, "out", out, extent);
  decode(work, out, rows, columns, pitch, packed);
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, const Tensor& table, int64_t blocksize) {
  const char* op = "nf4_quantize";
  Nf4Quantize work{};
  work.n = weight.numel();
  work.block_shift = block_shift_of(op, blocksize);
  work.dtype = dtype_of(op, "weight", weight.scalar_type());
  work.values = checked<void>(op, "weight", weight, weight.scalar_type(), work.n, weight);
  work.table = checked<float>(op, "table", table, ScalarType::Float, 16, weight);
  const Tensor packed = torch::stable::new_empty(weight, {ceil_div(work.n, 2)}, ScalarType::Byte);
  const Tensor absmax = torch::stable::new_empty(weight, {ceil_div(work.n, blocksize)}, ScalarType::Float);
  work.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  work.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  if (work.n) launch(work, weight);
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax(const Tensor& absmax, const Tensor& offset, const Tensor& code) {
  const char* op = "nf4_quantize_absmax";
  Nf4QuantizeAbsmax work{};
  work.n = absmax.numel();
  work.absmax = checked<float>(op, "absmax", absmax, ScalarType::Float, work.n, absmax);
  work.offset = checked<float>(op, "offset", offset, ScalarType::Float, 1, absmax);
  work.code = checked<float>(op, "code", code, ScalarType::Float, 256, absmax);
  const int64_t blocks = ceil_div(work.n, int64_t(1) << kNf4NestedShift);
  const Tensor codes = torch::stable::new_empty(absmax, {work.n}, ScalarType::Byte);
  const Tensor nested_absmax = torch::stable::new_empty(absmax, {blocks}, ScalarType::Float);
  work.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  work.nested_absmax = static_cast<float*>(nested_absmax.mutable_data_ptr());
  if (work.n) launch(work, absmax);
  return {codes, nested_absmax};
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  library.impl("nf4_dequantize_out", TORCH_BOX(&nf4_dequantize_out));
  library.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  library.impl("nf4_quantize_absmax", TORCH_BOX(&nf4_quantize_absmax));
}
}  // namespace
