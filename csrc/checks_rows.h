// checks_rows.h: what the bindings of ops on rows ask of their tensors: where the rows lie, and of what.
#pragma once
#include "checks.h"
#include "rows.h"

#include <type_traits>

namespace {
using rows::BF16;
using rows::F32;
using rows::Rows;
using rows::Shape;

// The shape of [tokens, width] or [tokens, inner, width].
Shape shape_of(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16)
    fail(op, ": ", name, " is ", toString(dtype), "; it must be float32 or bfloat16");
  if (x.dim() != 2 && x.dim() != 3) fail(op, ": ", name, " has ", x.dim(), " dimensions; it must have 2 or 3");
  return {x.size(0), x.dim() == 3 ? x.size(1) : 1, x.size(x.dim() - 1), dtype == ScalarType::Float ? F32 : BF16};
}

// Where the rows of x lie, which must have `shape`, heads side by side and values side by side.
Rows rows_of(const char* op, const char* name, const Tensor& x, const Shape& shape) {
  const Shape own = shape_of(op, name, x);
  if (own.tokens != shape.tokens || own.inner != shape.inner || own.width != shape.width || own.dtype != shape.dtype)
    fail(op, ": ", name, " is ", own.tokens, " x ", own.inner, " x ", own.width, " of ", toString(x.scalar_type()),
         "; it must be ", shape.tokens, " x ", shape.inner, " x ", shape.width, " of the first argument's dtype");
  const int64_t row = own.inner * own.width, pitch = own.tokens > 1 ? x.stride(0) : row;
  const bool heads = x.dim() == 2 || own.inner < 2 || x.stride(1) == own.width;
  int64_t extent = 0;
  if ((own.width > 1 && x.stride(x.dim() - 1) != 1) || !heads || pitch < row ||
      __builtin_mul_overflow(own.tokens - 1, pitch, &extent) || __builtin_add_overflow(extent, row, &extent))
    fail(op, ": ", name, " has rows that are not contiguous, or overlap");
  return {const_cast<void*>(address(op, name, x, own.tokens && row ? extent : 0)), pitch};
}

[[maybe_unused]] Rows rows_of(const char* op, const char* name, const Optional& x, const Shape& shape) {
  return x.has_value() ? rows_of(op, name, *x, shape) : Rows{nullptr, 0};
}

// The same of what is written to: memory that is shared until then becomes its own.
template <typename T>
Rows written(const char* op, const char* name, const T& x, const Shape& shape) {
  const Rows rows = rows_of(op, name, x, shape);
  if constexpr (std::is_same_v<T, Tensor>) return rows.data ? Rows{x.mutable_data_ptr(), rows.pitch} : rows;
  else return rows.data ? Rows{x->mutable_data_ptr(), rows.pitch} : rows;
}

template <typename T>
T* vector_of(const char* op, const char* name, const Tensor& x, ScalarType dtype, int64_t numel) {
  if (x.scalar_type() != dtype)
    fail(op, ": ", name, " is ", toString(x.scalar_type()), "; it must be ", toString(dtype));
  if (!x.is_contiguous()) fail(op, ": ", name, " is not contiguous");
  if (x.numel() != numel) fail(op, ": ", name, " has ", x.numel(), " elements; it must have ", numel);
  return static_cast<T*>(const_cast<void*>(address(op, name, x, numel)));
}
}  // namespace
