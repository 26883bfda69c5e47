// bindings.cpp: the module minitune._C: the schemas of the ops and their CPU half.
#include "bindings.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {
// About what one thread does in the time that waking another takes.
constexpr int64_t kValuesPerThread = 131072;

int chosen_isa() {
  const char* error = "";
  const int isa = nf4_cpu_isa(&error);
  if (isa < 0) throw std::runtime_error(error);
  return isa;
}

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
  const int isa = chosen_isa();
  const int64_t blocks = ceil_div(work.rows * work.columns, int64_t(1) << work.block_shift);
  torch::stable::parallel_for(0, blocks, kValuesPerThread >> work.block_shift, [&](int64_t first, int64_t last) {
    nf4_cpu_dequantize(&work, isa, first, last);
  });
}

void launch(const Nf4Quantize& work, const Tensor&) {
  const int isa = chosen_isa();
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

PyObject* cpu_isa(PyObject*, PyObject*) {
  const char* error = "";
  const int isa = nf4_cpu_isa(&error);
  if (isa >= 0) return PyUnicode_FromString(nf4_cpu_isa_name(isa));
  PyErr_SetString(PyExc_RuntimeError, error);
  return nullptr;
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set that the CPU ops would take now: portable, avx2 or avx512."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
}  // namespace

STABLE_TORCH_LIBRARY(minitune, library) {
  library.def("nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
              "Tensor? nested_offset, Tensor table, int blocksize, int rows, int columns, ScalarType dtype) -> Tensor");
  library.def("nf4_dequantize_out(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
              "Tensor? nested_offset, Tensor table, int blocksize, Tensor(a!) out) -> ()");
  library.def("nf4_quantize(Tensor weight, Tensor table, int blocksize) -> (Tensor, Tensor)");
  library.def("nf4_quantize_absmax(Tensor absmax, Tensor offset, Tensor code) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minitune, CPU, library) { implement(library); }

// To import the module is to register the ops.
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
