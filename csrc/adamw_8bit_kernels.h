// adamw_8bit_kernels.h: AdamW with moments in 8 bits (minitune/ops/moments8.py), block by block, for whatever instruction
// set the including file has set; see rows_kernels.h. Each operation is rounded by itself, as in the reference in Python.

// x[i] becomes level · absmax.
inline void decoded(const uint8_t* codes, int64_t n, float absmax, const float* levels, float* x) {
  for (int64_t i = 0; i < kMoment; ++i) x[i] = 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = levels[codes[i]] * absmax;
}

// The largest magnitude; NaN where there is one.
inline float largest(const float* x) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {}, most = 0.0f;
  for (int64_t begin = 0; begin < kMoment; begin += kLanes)
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const float a = __builtin_fabsf(x[begin + i]);
      lanes[i] = a > lanes[i] || a != a ? a : lanes[i];
    }
  for (const float a : lanes) most = a > most || a != a ? a : most;
  return most;
}

// The number of midpoints below each x / absmax; without a sign, above 0 at least 1. Their tree has eight steps: the
// first four are counted at once, against its 15 topmost midpoints, the others go down.
inline void encoded(const float* x, int64_t n, const float* tree, bool sign, uint8_t* codes, float* absmax) {
  alignas(64) float scaled[kMoment];
  alignas(64) int32_t node[kMoment];
  *absmax = largest(x);
  const float inverse = 1.0f / (*absmax < 1e-38f ? 1e-38f : *absmax);
  float top[15];
  for (int k = 1; k < 16; ++k) {        // in ascending order: node (1 << depth) + place of each depth
    const int below = __builtin_ctz(unsigned(k));
    top[k - 1] = tree[(8 >> below) + (k >> (below + 1))];
  }
#pragma omp simd
  for (int64_t i = 0; i < kMoment; ++i) {
    const float value = x[i] * inverse;
    int32_t count = 0;
    for (int k = 0; k < 15; ++k) count += int32_t(!(top[k] >= value));
    scaled[i] = value;
    node[i] = 16 + count;
  }
  for (int step = 4; step < 8; ++step)
#pragma omp simd
    for (int64_t i = 0; i < kMoment; ++i) node[i] = 2 * node[i] + int32_t(!(tree[node[i]] >= scaled[i]));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int32_t code = node[i] - int32_t(kMoment);
    codes[i] = uint8_t(!sign && x[i] > 0.0f && code < 1 ? 1 : code);
  }
}

void adamw_8bit(const Adamw8& work, int64_t first, int64_t last) {
  alignas(64) float m[kMoment], v[kMoment], g[kMoment];
  const float keep1 = float(1.0 - work.beta1), keep2 = float(1.0 - work.beta2);
  const float beta1 = float(work.beta1), beta2 = float(work.beta2);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kMoment, n = begin + kMoment < work.n ? kMoment : work.n - begin;
    float *param = work.param + begin, *grad = work.grad + begin;
    decoded(work.mean + begin, n, work.mean_absmax[block], work.levels, m);
    decoded(work.square + begin, n, work.square_absmax[block], work.levels_square, v);
    for (int64_t i = 0; i < kMoment; ++i) g[i] = 0.0f;
    if (work.scaled)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) grad[i] *= work.scale;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g[i] = grad[i];
#pragma omp simd
    for (int64_t i = 0; i < kMoment; ++i) {
      m[i] = m[i] * beta1 + g[i] * keep1;
      v[i] = v[i] * beta2 + g[i] * keep2 * g[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float root = __builtin_sqrtf(v[i]) * work.root_scale + work.eps;
      param[i] = param[i] * work.decay - m[i] / root * work.step_size;
    }
    encoded(m, n, work.levels + kMoment, true, work.mean + begin, work.mean_absmax + block);
    encoded(v, n, work.levels_square + kMoment, false, work.square + begin, work.square_absmax + block);
  }
}
