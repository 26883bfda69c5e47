// amx_on_cpu.h: as much of Intel AMX as csrc/tiles_amx.h takes, on a CPU without it: eight registers of 16 rows of 64
// bytes. A product adds pair by pair, in fp32; the order of a real unit's sums is its own. To use a register before it
// is configured is an error.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace amx_on_cpu {
inline thread_local unsigned char tiles[8][16][64];
inline thread_local bool ready = false;

inline void need(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline void configure(const void* config) {
  const unsigned char* bytes = static_cast<const unsigned char*>(config);
  need(bytes[0] == 1 && bytes[1] == 0, "palette or start row");
  for (int tile = 0; tile < 8; ++tile)
    need(bytes[16 + 2 * tile] == 64 && bytes[17 + 2 * tile] == 0 && bytes[48 + tile] == 16, "a register's size");
  std::memset(tiles, 0xff, sizeof tiles);
  ready = true;
}

inline void move(int tile, unsigned char* memory, int64_t pitch, bool loads) {
  need(ready, "a register is used before it is configured");
  for (int row = 0; row < 16; ++row)
    if (loads) std::memcpy(tiles[tile][row], memory + row * pitch, 64);
    else std::memcpy(memory + row * pitch, tiles[tile][row], 64);
}

inline float wide(const unsigned char* at) {
  const uint32_t bits = uint32_t(at[0] | at[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void multiply(int sums, int left, int right) {
  need(ready, "a register is used before it is configured");
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float sum;
      std::memcpy(&sum, tiles[sums][row] + 4 * column, sizeof sum);
      for (int pair = 0; pair < 16; ++pair)
        for (int one = 0; one < 2; ++one)
          sum += wide(tiles[left][row] + 4 * pair + 2 * one) * wide(tiles[right][pair] + 4 * column + 2 * one);
      std::memcpy(tiles[sums][row] + 4 * column, &sum, sizeof sum);
    }
}
}  // namespace amx_on_cpu

#define _tile_loadconfig(config) amx_on_cpu::configure(config)
#define _tile_release() (amx_on_cpu::ready = false)
#define _tile_zero(tile) std::memset(amx_on_cpu::tiles[tile], 0, sizeof amx_on_cpu::tiles[tile])
#define _tile_loadd(tile, from, pitch) amx_on_cpu::move(tile, (unsigned char*)(from), pitch, true)
#define _tile_stored(tile, to, pitch) amx_on_cpu::move(tile, (unsigned char*)(to), pitch, false)
#define _tile_dpbf16ps(sums, left, right) amx_on_cpu::multiply(sums, left, right)
