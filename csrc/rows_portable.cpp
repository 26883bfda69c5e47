// rows_portable.cpp: the loops of rows_kernels.h for any CPU.
#include "rows.h"

#include <memory>

#define ROWS_FMA 0
#define ROWS_RUN 64

namespace rows {
namespace {
#include "adamw_8bit_kernels.h"
#include "rows_kernels.h"
}  // namespace
const Path kPortable = path;
}  // namespace rows
