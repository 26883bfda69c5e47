// attention_amx.cpp: attention.h in the tile registers of Intel AMX.
#include "attention.h"

#if defined(MINITUNE_TILES)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace attention {
namespace {
#include "tiles.h"
#include "tiles_amx.h"
#include "attention_parts.h"
#include "attention_forward.h"
#include "attention_backward.h"
}  // namespace
const Path kAmx = {room_forward, room_backward, forward, backward};
}  // namespace attention
#endif
