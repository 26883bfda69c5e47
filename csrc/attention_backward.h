// attention_backward.h: attention.h's backward in tiles, FlashAttention-2's (Dao, arXiv 2307.08691, alg. 2).
// With s = scale · k·q, keys x queries: p = exp(s - lse), dv = Σ p do, dp = v·do, ds = p (dp - do·o),
// dq = scale Σ ds k, dk = scale Σ ds q. No include guard, as tiles.h.

constexpr int64_t kBlock = 4;       // slabs of keys and of queries whose probabilities are kept to be multiplied

struct BackwardRoom {
  uint16_t *keys, *keys_across, *values;                      // left operands, that sum along the head or across keys
  uint16_t *query, *query_across, *dout, *dout_across;        // right operands of one head
  uint16_t *p, *ds, *ds_across;                               // left, left, right: kBlock slabs of keys, of queries
  uint16_t* slab;                                             // rows as they came
  float *scores, *dp, *dq, *dk, *dv, *lse, *delta;            // sums; lse · log2(e); delta: do·o

  BackwardRoom(const Part& part, Pieces pieces, size_t* used = nullptr) {
    const int64_t rows = part.slabs * kSlab;
    for (uint16_t** piece : {&keys, &keys_across, &values, &query, &query_across, &dout, &dout_across})
      *piece = pieces.take<uint16_t>(rows * part.width);
    for (float** piece : {&dq, &dk, &dv}) *piece = pieces.take<float>(rows * part.width);
    for (uint16_t** piece : {&p, &ds, &ds_across}) *piece = pieces.take<uint16_t>(2 * kBlock * kBlock * kTile);
    for (float** piece : {&scores, &dp}) *piece = pieces.take<float>(kSquare);
    for (float** piece : {&lse, &delta}) *piece = pieces.take<float>(rows);
    slab = pieces.take<uint16_t>(kSlab * part.width);
    if (used) *used = pieces.used;
  }
};

// One head's queries and what comes back to its outputs, as operands.
void read_head(const Work& work, const Part& part, const BackwardRoom& room, int64_t head) {
  for (int64_t i = 0; i < part.slabs; ++i) {
    read_slab(work, part, work.q, head, i, room.slab);
    rows_as_right(room.slab, part.width, i, room.query);
    columns_as_right(room.slab, part.width, i, part.slabs, room.query_across);
    read_slab(work, part, work.dout, head, i, room.slab);
    rows_as_right(room.slab, part.width, i, room.dout);
    columns_as_right(room.slab, part.width, i, part.slabs, room.dout_across);
    for (int64_t row = 0; row < kSlab; ++row) {
      const int64_t token = kSlab * i + row;
      room.lse[token] = room.delta[token] = 0.0f;
      if (token >= part.length) continue;
      const uint16_t* out = work.out.data + (part.start + token) * work.out.pitch + head * work.head_dim;
      __m512 delta = _mm512_setzero_ps();
      for (int64_t column = 0; column < part.width; column += 32)
        delta = _mm512_dpbf16_ps(delta, __m512bh(load_bits(room.slab + row * part.width + column)),
                                 __m512bh(_mm512_maskz_loadu_epi16(columns_of(work, column), out + column)));
      room.delta[token] = _mm512_reduce_add_ps(delta);
      room.lse[token] = work.lse[head * work.tokens + part.start + token] * 1.44269504089f;
    }
  }
}

// p and ds of slab j of keys and slab i of queries, number b and a of their blocks, from room.scores and room.dp.
template <bool kHides>
void form_gradients(const Work& work, const BackwardRoom& room, int64_t i, int64_t j, int64_t a, int64_t b) {
  const __m512 times = _mm512_set1_ps(log2_scale(work));
  const __m512 lse[2] = {_mm512_loadu_ps(room.lse + kSlab * i), _mm512_loadu_ps(room.lse + kSlab * i + 16)};
  const __m512 delta[2] = {_mm512_loadu_ps(room.delta + kSlab * i), _mm512_loadu_ps(room.delta + kSlab * i + 16)};
  uint16_t* across = room.ds_across + (2 * a * kBlock + b) * kTile;
  __m512i even = _mm512_setzero_si512();
  for (int64_t key = 0; key < kSlab; ++key) {
    __m512 p[2], ds[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = 32 * key + 16 * half;
      const __m512 log_p = _mm512_fmsub_ps(_mm512_loadu_ps(room.scores + at), times, lse[half]);
      p[half] = power_of_two(_mm512_min_ps(_mm512_setzero_ps(), log_p));      // of huge scores lse is a rough one
      if (kHides) p[half] = _mm512_maskz_mov_ps(seeing(kSlab * (i - j) + 16 * half - key, work.window), p[half]);
      ds[half] = _mm512_mul_ps(p[half], _mm512_sub_ps(_mm512_loadu_ps(room.dp + at), delta[half]));
    }
    const int64_t tile = ((2 * b + key / 16) * kBlock + a) * kTile + 32 * (key % 16);
    store_bits(room.p + tile, __m512i(_mm512_cvtne2ps_pbh(p[1], p[0])));
    const __m512i row = __m512i(_mm512_cvtne2ps_pbh(ds[1], ds[0]));
    store_bits(room.ds + tile, row);
    if (key % 2 == 0) {
      even = row;
      continue;
    }
    store_bits(across + 16 * (key - 1), interleave(even, row, 0));
    store_bits(across + kBlock * kTile + 16 * (key - 1), interleave(even, row, 1));
  }
}

// What the queries of the slabs from i0 on and the keys of those from j0 on, kBlock of each, add to the gradients.
void backward_block(const Work& work, const Part& part, const BackwardRoom& room, int64_t i0, int64_t j0) {
  const int64_t i1 = std::min(i0 + kBlock, part.slabs), j1 = std::min(j0 + kBlock, part.slabs);
  const int64_t head_panel = part.steps * kTile, slab_panel = part.slabs * kTile, block_panel = kBlock * kTile;
  for (int64_t j = j0; j < j1; ++j) {
    const int64_t first = std::max(i0, j), end = std::min(i1, part.last_seeing(work, j) + 1);
    for (int64_t i = first; i < end; ++i) {
      const int64_t keys = 2 * j * head_panel, queries = 2 * i * head_panel;
      multiply<false>(room.scores, room.keys + keys, head_panel, room.query + queries, head_panel, part.steps);
      multiply<false>(room.dp, room.values + keys, head_panel, room.dout + queries, head_panel, part.steps);
      (hides(work, i, j) ? form_gradients<true> : form_gradients<false>)(work, room, i, j, i - i0, j - j0);
    }
    if (first >= end) continue;
    const int64_t tile = 2 * (j - j0) * block_panel + (first - i0) * kTile;
    for (int64_t step = 0; step < part.steps; ++step) {
      const int64_t from = 2 * step * slab_panel + first * kTile, to = (j * part.steps + step) * kSquare;
      multiply<true>(room.dv + to, room.p + tile, block_panel, room.dout_across + from, slab_panel, end - first);
      multiply<true>(room.dk + to, room.ds + tile, block_panel, room.query_across + from, slab_panel, end - first);
    }
  }
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t first = std::max(j0, part.first_seen(work, i)), end = std::min(j1, i + 1);
    for (int64_t step = 0; step < part.steps && first < end; ++step)
      multiply<true>(room.dq + (i * part.steps + step) * kSquare,
                     room.keys_across + 2 * step * slab_panel + first * kTile, slab_panel,
                     room.ds_across + 2 * (i - i0) * block_panel + (first - j0) * kTile, block_panel, end - first);
  }
}

size_t room_backward(const Work& work) {
  size_t used = 0;
  BackwardRoom(longest_part(work), {nullptr}, &used);
  return used;
}

void backward(const Work& work, int64_t task, void* memory) {
  const Unit unit;
  const Part part = part_of(work, task);
  const BackwardRoom room(part, {static_cast<uint8_t*>(memory)});
  const size_t sums = size_t(part.slabs * part.steps * kSquare) * sizeof(float);
  for (int64_t i = 0; i < part.slabs; ++i) {
    read_slab(work, part, work.k, part.kv_head, i, room.slab);
    rows_as_left(room.slab, part.width, i, room.keys);
    columns_as_left(room.slab, part.width, i, part.slabs, room.keys_across);
    read_slab(work, part, work.v, part.kv_head, i, room.slab);
    rows_as_left(room.slab, part.width, i, room.values);
  }
  std::memset(room.dk, 0, sums);
  std::memset(room.dv, 0, sums);
  for (int64_t head = part.first_head; head < part.end_head; ++head) {
    read_head(work, part, room, head);
    std::memset(room.dq, 0, sums);
    for (int64_t i = 0; i < part.slabs; i += kBlock)
      for (int64_t j = part.first_seen(work, i) / kBlock * kBlock; j <= i; j += kBlock)
        backward_block(work, part, room, i, j);
    for (int64_t i = 0; i < part.slabs; ++i)
      for (int64_t step = 0; step < part.steps; ++step) {
        const float* square = room.dq + (i * part.steps + step) * kSquare;
        write_transposed(work, part, work.dq, head, i, 32 * step, square, work.scale);
      }
  }
  for (int64_t i = 0; i < part.slabs; ++i)
    for (int64_t step = 0; step < part.steps; ++step) {
      const int64_t square = (i * part.steps + step) * kSquare;
      write_square(work, part, work.dk, part.kv_head, i, 32 * step, room.dk + square, work.scale);
      write_square(work, part, work.dv, part.kv_head, i, 32 * step, room.dv + square, 1.0f);
    }
}
