// bindings.cpp: the module minitune._C: the schemas of the ops and their CPU half.
#include "bindings.h"
#include "cpu_isa.h"
#include "nf4_cpu.h"
#include "rows.h"

#include <algorithm>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {
// About what one thread does in the time that waking another takes.
constexpr int64_t kValuesPerThread = 131072;

// Fresh memory that is about to be written whole. To touch its pages for the first time costs more than the decoding;
// of the huge ones there are 512 times fewer. Only pages that lie whole within the tensor are asked for.
void expect_writes(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge, last = (start + bytes) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);   // a hint: it may be refused
#endif
}

void launch(const Nf4Dequantize& work, const Tensor&) {
  const int isa = cpu_isa();
  const int64_t blocks = ceil_div(work.rows * work.columns, int64_t(1) << work.block_shift);
  torch::stable::parallel_for(0, blocks, kValuesPerThread >> work.block_shift, [&](int64_t first, int64_t last) {
    nf4_cpu_dequantize(&work, isa, first, last);
  });
}

void launch(const Nf4Quantize& work, const Tensor&) {
  const int isa = cpu_isa();
  const int64_t blocks = ceil_div(work.n, int64_t(1) << work.block_shift);
  torch::stable::parallel_for(0, blocks, kValuesPerThread >> work.block_shift, [&](int64_t first, int64_t last) {
    nf4_cpu_quantize(&work, isa, first, last);
  });
}

void launch(const Nf4QuantizeAbsmax& work, const Tensor&) {
  const int64_t blocks = ceil_div(work.n, int64_t(1) << kNf4NestedShift);
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t first, int64_t last) {
    nf4_cpu_quantize_absmax(&work, first, last);
  });
}

// Rows [first, last) of W · x, decoded a few at a time into a cache's first level and multiplied there.
void decode_and_multiply(const Nf4Dequantize& work, int isa, const void* x, int64_t columns, int64_t first,
                         int64_t last, uint8_t* y) {
  constexpr int64_t kCached = 32768;      // bytes: what fits a first level as a rule
  const int64_t bytes = work.dtype == NF4_F32 ? 4 : 2, at_once = std::max(int64_t(1), kCached / (bytes * columns));
  std::vector<uint8_t> room(size_t(at_once * columns * bytes));
  for (int64_t row = first; row < last; row += at_once) {
    const int64_t count = std::min(at_once, last - row);
    nf4_cpu_decode(&work, isa, row * columns, (row + count) * columns, room.data());
    rows::path_of(isa).product({{count, 1, columns, work.dtype == NF4_F32 ? rows::F32 : rows::BF16},
                                {room.data(), columns}, x, y + row * bytes}, 0, count);
  }
}

// y = W · x with W [rows of y, values of x] in NF4, as decoding W and multiplying it, but W is nowhere whole.
void nf4_product(const Tensor& packed, const Tensor& absmax, const Optional& nested_absmax, const Optional& nested_code,
                 const Optional& nested_offset, const Tensor& table, int64_t blocksize, const Tensor& x,
                 const Tensor& y) {
  const char* op = "nf4_product";
  const ScalarType dtype = x.scalar_type();
  if (dtype == ScalarType::Half) fail(op, ": x is ", toString(dtype), "; it must be float32 or bfloat16");
  const int32_t kind = dtype_of(op, "x", dtype);
  const int64_t columns = x.numel(), rows = y.numel();
  int64_t n = 0;
  if (__builtin_mul_overflow(rows, columns, &n)) fail(op, ": y has ", rows, " elements, x ", columns, "; too many");
  const void* given = checked<void>(op, "x", x, dtype, columns, packed);
  checked<void>(op, "y", y, dtype, rows, packed);
  Nf4Dequantize work = operands(op, packed, absmax, nested_absmax, nested_code, nested_offset, table, blocksize, n);
  work.dtype = kind;
  if (columns == 0) fail(op, ": x has no elements");
  uint8_t* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int isa = cpu_isa();
  std::vector<float> wide(static_cast<size_t>(columns)), sums(static_cast<size_t>(rows));
  for (int64_t i = 0; i < columns; ++i)
    wide[i] = kind == NF4_F32 ? static_cast<const float*>(given)[i]
                              : nf4::value_of(static_cast<const nf4::BFloat16*>(given)[i]);
  torch::stable::parallel_for(0, rows, std::max(int64_t(1), kValuesPerThread / columns),
                              [&](int64_t first, int64_t last) {
    if (!nf4_cpu_multiply(&work, isa, wide.data(), columns, first, last, sums.data() + first))
      return decode_and_multiply(work, isa, given, columns, first, last, out);
    for (int64_t row = first; row < last; ++row)
      if (kind == NF4_F32) reinterpret_cast<float*>(out)[row] = sums[row];
      else reinterpret_cast<nf4::BFloat16*>(out)[row] = nf4::rounded<nf4::BFloat16>(sums[row]);
  });
}

PyObject* isa_name(PyObject*, PyObject*) {
  const char* error = "";
  const int isa = cpu_isa(&error);
  if (isa >= 0) return PyUnicode_FromString(cpu_isa_name(isa));
  PyErr_SetString(PyExc_RuntimeError, error);
  return nullptr;
}

PyMethodDef methods[] = {
    {"cpu_isa", isa_name, METH_NOARGS, "The instruction set that the CPU ops take now: portable, avx2, avx512, "
                                      "avx512_bf16 or amx."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
}  // namespace

STABLE_TORCH_LIBRARY(minitune, library) {
  library.def("nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
              "Tensor? nested_offset, Tensor table, int blocksize, int rows, int columns, ScalarType dtype) -> Tensor");
  library.def("nf4_dequantize_out(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
              "Tensor? nested_offset, Tensor table, int blocksize, Tensor(a!) out) -> ()");
  library.def("nf4_product(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
              "Tensor? nested_offset, Tensor table, int blocksize, Tensor x, Tensor(a!) y) -> ()");
  library.def("nf4_quantize(Tensor weight, Tensor table, int blocksize) -> (Tensor, Tensor)");
  library.def("nf4_quantize_absmax(Tensor absmax, Tensor offset, Tensor code) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minitune, CPU, library) {
  implement(library);
  library.impl("nf4_product", TORCH_BOX(&nf4_product));
}

// To import the module is to register the ops.
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
