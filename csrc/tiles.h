// tiles.h: how the operands of a product of tiles are laid out. tiles_amx.h and tiles_avx512.h multiply them.
//
// A tile is 16 rows of 64 bytes: 16 x 32 bf16 of a left operand; 16 pairs of rows x 16 columns of a right one, a pair's
// two values of a column side by side; or 16 x 16 fp32 of a result. Rows are packed by slabs of 32. Operands lie in
// panels of 16 rows (left) or 16 columns (right), a panel's tiles one behind the other along the axis that is summed.
// No include guard: the including file has set its target, and a namespace of its own for it.

constexpr int64_t kSlab = 32;         // rows or columns of a product: two tiles by two
constexpr int64_t kTile = 512;        // bf16 values of a tile
constexpr int64_t kSquare = 1024;     // fp32 values of a slab of sums, [32, 32]

// rows[i] becomes column i: 16 x 16 values of 32 bits.
inline void transpose(__m512i rows[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      fours[4 * i + 2 * half] = _mm512_unpacklo_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
      fours[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
    }
  for (int j = 0; j < 4; ++j) {       // lane l of fours[4 i + j]: column 4 l + j of the rows 4 i to 4 i + 3
    const __m512i even0 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}

inline __m512i load_bits(const void* at) { return _mm512_loadu_si512(at); }
inline void store_bits(void* at, __m512i bits) { _mm512_storeu_si512(at, bits); }

// a0 b0 a1 b1 …: `half` 0 of the first 16 values of each, 1 of the last 16.
inline __m512i interleave(__m512i a, __m512i b, int half) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_or_si512(lanes, _mm512_set1_epi32(32)), 16));
  return _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(short(16 * half))), b);
}

// ---- operands from a slab: 32 rows of `width` values, a multiple of 32, side by side ------------------------------
// Slab `i` of the rows of a left operand, which sums along the width.
inline void rows_as_left(const uint16_t* slab, int64_t width, int64_t i, uint16_t* left) {
  uint16_t* tile = left + i * kSlab * width;
  for (int64_t panel = 0; panel < 2; ++panel)
    for (int64_t step = 0; step < width / 32; ++step, tile += kTile)
      for (int64_t row = 0; row < 16; ++row)
        store_bits(tile + 32 * row, load_bits(slab + (16 * panel + row) * width + 32 * step));
}

// Slab `i` of the columns of a right operand, which sums along the width: the slab's transpose.
inline void rows_as_right(const uint16_t* slab, int64_t width, int64_t i, uint16_t* right) {
  uint16_t* tile = right + i * kSlab * width;
  for (int64_t panel = 0; panel < 2; ++panel)
    for (int64_t step = 0; step < width / 32; ++step, tile += kTile) {
      __m512i rows[16];
      for (int64_t row = 0; row < 16; ++row) rows[row] = load_bits(slab + (16 * panel + row) * width + 32 * step);
      transpose(rows);
      for (int64_t row = 0; row < 16; ++row) store_bits(tile + 32 * row, rows[row]);
    }
}

// Two rows of the slab, a pair's two values of a column side by side: 16 columns from `column` on.
inline __m512i row_pair(const uint16_t* slab, int64_t width, int64_t pair, int64_t column) {
  const uint16_t* even = slab + 2 * pair * width + column / 32 * 32;
  return interleave(load_bits(even), load_bits(even + width), int(column / 16 % 2));
}

// Step `i` of `steps` of a right operand, which sums along the rows.
inline void columns_as_right(const uint16_t* slab, int64_t width, int64_t i, int64_t steps, uint16_t* right) {
  for (int64_t panel = 0; panel < width / 16; ++panel)
    for (int64_t pair = 0; pair < 16; ++pair)
      store_bits(right + (panel * steps + i) * kTile + 32 * pair, row_pair(slab, width, pair, 16 * panel));
}

// Step `i` of `steps` of a left operand, which sums along the rows: the slab's transpose.
inline void columns_as_left(const uint16_t* slab, int64_t width, int64_t i, int64_t steps, uint16_t* left) {
  for (int64_t panel = 0; panel < width / 16; ++panel) {
    __m512i pairs[16];
    for (int64_t pair = 0; pair < 16; ++pair) pairs[pair] = row_pair(slab, width, pair, 16 * panel);
    transpose(pairs);
    for (int64_t row = 0; row < 16; ++row) store_bits(left + (panel * steps + i) * kTile + 32 * row, pairs[row]);
  }
}
