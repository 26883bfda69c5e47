// attention_avx512.cpp: attention.h in AVX-512 with bf16.
#include "attention.h"

#if defined(MINITUNE_TILES)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace attention {
namespace {
#include "tiles.h"
#include "tiles_avx512.h"
#include "attention_parts.h"
#include "attention_forward.h"
#include "attention_backward.h"
}  // namespace
const Path kAvx512Bf16 = {room_forward, room_backward, forward, backward};
}  // namespace attention
#endif
