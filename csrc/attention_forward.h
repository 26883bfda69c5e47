// attention_forward.h: attention.h's forward in tiles, FlashAttention's (Dao et al., arXiv 2205.14135, alg. 1).
// Scores are formed transposed, keys x queries: all that a softmax does over the keys is done lane by lane, and the
// probabilities are the right operand of the product that follows as they come. No include guard, as tiles.h.

constexpr int64_t kChunk = 8;       // slabs of keys between two looks at the largest score of a query

struct ForwardRoom {
  uint16_t *keys, *values;            // left operands, that sum along the head and along the keys
  uint16_t *query, *p;                // right operands of one slab of queries
  uint16_t* slab;                     // rows as they came
  float *scores, *sums;               // [kChunk slabs of keys, queries], [width, queries]

  ForwardRoom(const Part& part, Pieces pieces, size_t* used = nullptr) {
    keys = pieces.take<uint16_t>(part.slabs * kSlab * part.width);
    values = pieces.take<uint16_t>(part.slabs * kSlab * part.width);
    query = pieces.take<uint16_t>(kSlab * part.width);
    slab = pieces.take<uint16_t>(kSlab * part.width);
    p = pieces.take<uint16_t>(2 * kChunk * kTile);
    scores = pieces.take<float>(kChunk * kSquare);
    sums = pieces.take<float>(part.steps * kSquare);
    if (used) *used = pieces.used;
  }
};

// Scores of `count` slabs of keys from `first` on and of the queries of slab i, hidden ones -inf.
void form_scores(const Work& work, const Part& part, const ForwardRoom& room, int64_t i, int64_t first, int64_t count) {
  const __m512 hidden = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < count; ++j) {
    float* scores = room.scores + j * kSquare;
    const int64_t panel = part.steps * kTile;
    multiply<false>(scores, room.keys + 2 * (first + j) * panel, panel, room.query, panel, part.steps);
    if (!hides(work, i, first + j)) continue;
    for (int64_t key = 0; key < kSlab; ++key)
      for (int64_t half = 0; half < 2; ++half) {
        float* at = scores + 32 * key + 16 * half;
        const __mmask16 seen = seeing(kSlab * (i - first - j) + 16 * half - key, work.window);
        _mm512_storeu_ps(at, _mm512_mask_blend_ps(seen, hidden, _mm512_loadu_ps(at)));
      }
  }
}

// What 16 queries have seen so far: their largest score, and Σ exp(scale · (score - the largest)).
struct Seen {
  __m512 peak, total;
};

// The scores of one half of the queries become probabilities, as a right operand, still to be divided by their sum.
// -> by what all that was summed before is to be multiplied.
__m512 exponentials(const ForwardRoom& room, int64_t half, int64_t count, float scale, Seen& seen) {
  const __m512 times = _mm512_set1_ps(scale);
  const float* scores = room.scores + 16 * half;
  __m512 peak = seen.peak;
  for (int64_t key = 0; key < kSlab * count; ++key) peak = _mm512_max_ps(peak, _mm512_loadu_ps(scores + 32 * key));
  const __mmask16 any = _mm512_cmp_ps_mask(peak, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
  const __m512 base = _mm512_maskz_mov_ps(any, peak);
  const auto p_of = [&](__m512 score) {       // the difference first: exact where it matters, however large both are
    return power_of_two(_mm512_mul_ps(_mm512_sub_ps(score, base), times));
  };
  const __m512 past = p_of(seen.peak);
  __m512 total = _mm512_mul_ps(seen.total, past);
  for (int64_t pair = 0; pair < kSlab * count / 2; ++pair) {
    const __m512 even = p_of(_mm512_loadu_ps(scores + 64 * pair));
    const __m512 odd = p_of(_mm512_loadu_ps(scores + 64 * pair + 32));
    total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
    const __m512i both = __m512i(_mm512_cvtne2ps_pbh(odd, even));
    store_bits(room.p + half * kChunk * kTile + 32 * pair, interleave(both, _mm512_alignr_epi64(both, both, 4), 0));
  }
  seen = {peak, total};
  return past;
}

void scale_sums(const Part& part, float* sums, int64_t half, __m512 factor) {
  for (int64_t row = 0; row < part.width; ++row) {
    float* at = sums + 32 * row + 16 * half;
    _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
  }
}

// The queries of slab i of one head.
void forward_slab(const Work& work, const Part& part, const ForwardRoom& room, int64_t head, int64_t i) {
  read_slab(work, part, work.q, head, i, room.slab);
  rows_as_right(room.slab, part.width, 0, room.query);
  const int64_t begin = part.first_seen(work, i);
  const Seen nothing = {_mm512_set1_ps(-INFINITY), _mm512_setzero_ps()};
  Seen seen[2] = {nothing, nothing};
  for (int64_t first = begin; first <= i; first += kChunk) {
    const int64_t count = std::min(kChunk, i + 1 - first);
    form_scores(work, part, room, i, first, count);
    for (int64_t half = 0; half < 2; ++half) {
      const __m512 past = exponentials(room, half, count, log2_scale(work), seen[half]);
      if (first > begin) scale_sums(part, room.sums, half, past);
    }
    for (int64_t step = 0; step < part.steps; ++step) {
      const uint16_t* values = room.values + (2 * step * part.slabs + first) * kTile;
      (first > begin ? multiply<true> : multiply<false>)(room.sums + step * kSquare, values, part.slabs * kTile,
                                                         room.p, kChunk * kTile, count);
    }
  }
  for (int64_t half = 0; half < 2; ++half) {
    alignas(64) float peak[16], total[16];
    _mm512_store_ps(peak, seen[half].peak);
    _mm512_store_ps(total, seen[half].total);
    scale_sums(part, room.sums, half, _mm512_div_ps(_mm512_set1_ps(1.0f), seen[half].total));
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int64_t token = kSlab * i + 16 * half + lane;
      if (token < part.length)
        work.lse[head * work.tokens + part.start + token] = peak[lane] * work.scale + std::log(total[lane]);
    }
  }
  for (int64_t step = 0; step < part.steps; ++step)
    write_transposed(work, part, work.out, head, i, 32 * step, room.sums + step * kSquare, 1.0f);
}
size_t room_forward(const Work& work) {
  size_t used = 0;
  ForwardRoom(longest_part(work), {nullptr}, &used);
  return used;
}

void forward(const Work& work, int64_t task, void* memory) {
  const Unit unit;
  const Part part = part_of(work, task);
  const ForwardRoom room(part, {static_cast<uint8_t*>(memory)});
  for (int64_t i = 0; i < part.slabs; ++i) {
    read_slab(work, part, work.k, part.kv_head, i, room.slab);
    rows_as_left(room.slab, part.width, i, room.keys);
    read_slab(work, part, work.v, part.kv_head, i, room.slab);
    columns_as_left(room.slab, part.width, i, part.slabs, room.values);
  }
  for (int64_t head = part.first_head; head < part.end_head; ++head)
    for (int64_t i = 0; i < part.slabs; ++i) forward_slab(work, part, room, head, i);
}
