// rows_avx512.cpp: the loops of rows_kernels.h for CPUs with AVX-512.
#include "rows.h"

#include <memory>

#if defined(__clang__)     // which does not read the pragma below, and would call a function for each product
#define ROWS_FMA 0
#else
#define ROWS_FMA 1
#endif
#define ROWS_RUN 256

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")

namespace rows {
namespace {
#include "adamw_8bit_kernels.h"
#include "rows_kernels.h"
}  // namespace
const Path kAvx512 = path;
}  // namespace rows
#endif
