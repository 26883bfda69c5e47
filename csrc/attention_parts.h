// attention_parts.h: what attention.h's forward and backward share: a task, its memory, rows in and out, and what is
// done lane by lane. No include guard, as tiles.h.

// ---- what a task works on -----------------------------------------------------------------------------------------
struct Part {
  int64_t start, length, slabs, kv_head, first_head, end_head;      // heads: of the queries
  int64_t width, steps;                                             // head_dim, rounded up to `steps` tiles

  // The slabs that a position of slab i may see, and those that may see it: [first, i], [i, last].
  int64_t first_seen(const Work& work, int64_t i) const {
    return std::max(int64_t(0), kSlab * i - work.window + 1) / kSlab;
  }
  int64_t last_seeing(const Work& work, int64_t i) const {
    return std::min(slabs - 1, (kSlab * i + kSlab - 1 + work.window - 1) / kSlab);
  }
};

Part part_of(const Work& work, int64_t task) {
  const int64_t document = task / (work.kv_heads * work.splits), kv_head = task / work.splits % work.kv_heads;
  const int64_t split = task % work.splits, group = work.heads / work.kv_heads, head = kv_head * group;
  const int64_t start = work.starts[document], length = work.starts[document + 1] - start;
  const int64_t steps = (work.head_dim + 31) / 32;
  return {start, length, (length + kSlab - 1) / kSlab, kv_head, head + group * split / work.splits,
          head + group * (split + 1) / work.splits, 32 * steps, steps};
}

Part longest_part(const Work& work) {
  Part longest = part_of(work, 0);
  for (int64_t document = 1; document < work.documents; ++document) {
    const Part part = part_of(work, document * work.kv_heads * work.splits);
    if (part.length > longest.length) longest = part;
  }
  return longest;
}

// Pieces of a thread's room, one behind the other; without a room they are only counted.
struct Pieces {
  uint8_t* room;
  size_t used = 0;

  template <typename T>
  T* take(int64_t n) {
    T* piece = room ? reinterpret_cast<T*>(room + used) : nullptr;
    used += (size_t(n) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// ---- in and out ---------------------------------------------------------------------------------------------------
inline __mmask32 columns_of(const Work& work, int64_t column) {
  const int64_t n = work.head_dim - column;
  return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
}

// Slab i of a head's rows, zeros where the document or the head ends.
void read_slab(const Work& work, const Part& part, const Heads& x, int64_t head, int64_t i, uint16_t* slab) {
  for (int64_t row = 0; row < kSlab; ++row) {
    const int64_t token = kSlab * i + row;
    const uint16_t* from = x.data + (part.start + token) * x.pitch + head * work.head_dim;
    for (int64_t column = 0; column < part.width; column += 32)
      store_bits(slab + row * part.width + column,
                 token < part.length ? _mm512_maskz_loadu_epi16(columns_of(work, column), from + column)
                                     : _mm512_setzero_si512());
  }
}

// [32 rows, 32 columns] of slab i, from `column` on, times `factor`.
void write_square(const Work& work, const Part& part, const Heads& x, int64_t head, int64_t i, int64_t column,
                  const float* square, float factor) {
  const __m512 times = _mm512_set1_ps(factor);
  for (int64_t row = 0; row < kSlab && kSlab * i + row < part.length; ++row) {
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(square + 32 * row), times);
    const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(square + 32 * row + 16), times);
    uint16_t* to = x.data + (part.start + kSlab * i + row) * x.pitch + head * work.head_dim + column;
    _mm512_mask_storeu_epi16(to, columns_of(work, column), __m512i(_mm512_cvtne2ps_pbh(high, low)));
  }
}

void write_transposed(const Work& work, const Part& part, const Heads& x, int64_t head, int64_t i, int64_t column,
                      const float* square, float factor) {
  alignas(64) float turned[kSquare];
  for (int64_t down = 0; down < 32; down += 16)
    for (int64_t across = 0; across < 32; across += 16) {
      __m512i rows[16];
      for (int64_t row = 0; row < 16; ++row) rows[row] = load_bits(square + 32 * (down + row) + across);
      transpose(rows);
      for (int64_t row = 0; row < 16; ++row) store_bits(turned + 32 * (across + row) + down, rows[row]);
    }
  write_square(work, part, x, head, i, column, turned, factor);
}

// ---- lane by lane -------------------------------------------------------------------------------------------------
// 2^x within two ulp (the polynomial of Cephes' exp2f); 0 below the smallest normal number.
inline __m512 power_of_two(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.535336188e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, n);
}

// Which of 16 queries, the first of them `distance` behind a key, see it.
inline __mmask16 seeing(int64_t distance, int64_t window) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i behind = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(distance)));
  return _mm512_cmplt_epu32_mask(behind, _mm512_set1_epi32(int(window)));     // one ahead is a large number here
}

// Whether some pair of slab i of queries and slab j of keys is hidden.
inline bool hides(const Work& work, int64_t i, int64_t j) {
  return i == j || kSlab * (i - j) + kSlab > work.window;
}

float log2_scale(const Work& work) { return work.scale * 1.44269504089f; }
