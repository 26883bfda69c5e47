// tiles_amx.h: products of tiles (tiles.h) in the tile registers of Intel AMX.

// Gives all eight registers their full size, for as long as it lives.
struct Unit {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Unit() {
    const Config config;
    asm volatile("" : : "r"(&config) : "memory");     // gcc's intrinsics do not say all that they read
    _tile_loadconfig(&config);
    asm volatile("" : : "r"(&config) : "memory");
  }
  ~Unit() { _tile_release(); }
};

// sums [32, 32] = two panels of `left` times two of `right`, over `steps` tiles, added to what is there where kAdds;
// panels of one operand are so many values apart.
template <bool kAdds>
inline void multiply(float* sums, const uint16_t* left, int64_t left_panel, const uint16_t* right, int64_t right_panel,
                     int64_t steps) {
  asm volatile("" : : : "memory");
  if (kAdds) {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    _tile_loadd(2, sums + 512, 128);
    _tile_loadd(3, sums + 528, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, left += kTile, right += kTile) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + right_panel, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + left_panel, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 512, 128);
  _tile_stored(3, sums + 528, 128);
  asm volatile("" : : : "memory");
}
