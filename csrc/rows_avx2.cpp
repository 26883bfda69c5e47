// rows_avx2.cpp: the loops of rows_kernels.h for CPUs with AVX2.
#include "rows.h"

#include <memory>

#if defined(__clang__)     // which does not read the pragma below, and would call a function for each product
#define ROWS_FMA 0
#else
#define ROWS_FMA 1
#endif
#define ROWS_RUN 64

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

namespace rows {
namespace {
#include "adamw_8bit_kernels.h"
#include "rows_kernels.h"
}  // namespace
const Path kAvx2 = path;
}  // namespace rows
#endif
