// tiles_avx512.h: products of tiles (tiles.h) in the vector registers of AVX-512 with bf16 (AMD Zen 4, Intel Cooper
// Lake). A pair of values of a row of `left` is spread over the lanes and multiplied with the pairs of 16 columns.

struct Unit {
  Unit() {}       // nothing to set up
};

// kRows rows of sums, from those of `left` and `sums` on; kRows x 2 vectors of sums stay in registers.
template <bool kAdds, int kRows>
inline void multiply_rows(float* sums, const uint16_t* left, const uint16_t* right, int64_t right_panel,
                          int64_t steps) {
  __m512 sum[kRows][2];
  for (int row = 0; row < kRows; ++row)
    for (int panel = 0; panel < 2; ++panel)
      sum[row][panel] = kAdds ? _mm512_loadu_ps(sums + 32 * row + 16 * panel) : _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; ++step, left += kTile, right += kTile)
    for (int pair = 0; pair < 16; ++pair) {
      const __m512bh first = __m512bh(load_bits(right + 32 * pair));
      const __m512bh second = __m512bh(load_bits(right + right_panel + 32 * pair));
      for (int row = 0; row < kRows; ++row) {
        int32_t values;
        std::memcpy(&values, left + 32 * row + 2 * pair, sizeof values);
        const __m512bh spread = __m512bh(_mm512_set1_epi32(values));
        sum[row][0] = _mm512_dpbf16_ps(sum[row][0], spread, first);
        sum[row][1] = _mm512_dpbf16_ps(sum[row][1], spread, second);
      }
    }
  for (int row = 0; row < kRows; ++row)
    for (int panel = 0; panel < 2; ++panel) _mm512_storeu_ps(sums + 32 * row + 16 * panel, sum[row][panel]);
}

// sums [32, 32] = two panels of `left` times two of `right`, over `steps` tiles, added to what is there where kAdds;
// panels of one operand are so many values apart.
template <bool kAdds>
inline void multiply(float* sums, const uint16_t* left, int64_t left_panel, const uint16_t* right, int64_t right_panel,
                     int64_t steps) {
  constexpr int kRows = 4;
  for (int64_t row = 0; row < kSlab; row += kRows)
    multiply_rows<kAdds, kRows>(sums + 32 * row, left + row / 16 * left_panel + 32 * (row % 16), right, right_panel,
                                steps);
}
