// rows_kernels.h: the loops of rows.h, for whatever instruction set the including file has set. No include guard: each
// including file has a namespace of its own for it. Plain loops that a compiler turns into lanes (-fopenmp-simd).
// That file also says ROWS_FMA (1: products and sums in one rounding) and ROWS_RUN (values summed in fp32, see `summed`):
// in C++ gcc does not define __FMA__ or __AVX512F__ for a target that a pragma sets.

struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline float load(const float* at) { return *at; }
inline float load(const BFloat16* at) { return from_bits(uint32_t(at->bits) << 16); }
inline void store(float* at, float x) { *at = x; }

// To the nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* at, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  at->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

// a · b + c, rounded once where the CPU can.
inline float fused(float a, float b, float c) {
#if ROWS_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x within two ulp: 2^n · p(r), the polynomial of Cephes' expf. Below the smallest normal number it is 0.
inline float exponential(float x) {
  const float inside = x > 88.0f ? 88.0f : (x < -87.33f ? -87.33f : x);
  const float shifted = fused(inside, 1.44269504f, 12582912.0f);      // n in its lowest bits, rounded to the nearest
  const float n = shifted - 12582912.0f;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, inside));
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  const float power = (fused(p, r * r, r) + 1.0f) * from_bits((bits_of(shifted) + 127u) << 23);
  return x < -87.33f ? 0.0f : power;
}

// 0 where e^-x is no number any more, so that x · sigmoid(x) is 0 for any x.
inline float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)); }

// Σ term(i) over [first, last): short runs in lanes, the runs in fp64, so that a long row loses nothing.
template <typename Term>
inline float summed(int64_t first, int64_t last, Term term) {
  double total = 0.0;
  for (int64_t begin = first; begin < last; begin += ROWS_RUN) {
    const int64_t end = last - begin < ROWS_RUN ? last : begin + ROWS_RUN;
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += term(i);
    total += part;
  }
  return float(total);
}

// A NaN is passed over here: whoever asks finds it in the sum.
template <typename T>
inline float largest(const T* values, int64_t first, int64_t last) {
  float peak = -__builtin_inff();
#pragma omp simd reduction(max : peak)
  for (int64_t i = first; i < last; ++i) peak = load(values + i) > peak ? load(values + i) : peak;
  return peak;
}

template <typename T>
T* row(const Rows& rows, const Shape& shape, int64_t token, int64_t inner) {
  return static_cast<T*>(rows.data) + token * rows.pitch + inner * shape.width;
}

template <typename T>
void rms_norm_row(const RmsNorm& work, int64_t token, int64_t inner) {
  const int64_t d = work.shape.width;
  const T* x = row<T>(work.x, work.shape, token, inner);
  const T* weight = static_cast<const T*>(work.weight);
  T* y = row<T>(work.y, work.shape, token, inner);
  if (work.branch.data) {
    const T* branch = row<T>(work.branch, work.shape, token, inner);
    T* total = row<T>(work.total, work.shape, token, inner);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) store(total + i, load(x + i) + load(branch + i));
    x = total;
  }
  float* rstd = work.rstd + token * work.shape.inner + inner;
  if (!work.stored) {
    const float sum = summed(0, d, [=](int64_t i) { return load(x + i) * load(x + i); });
    *rstd = 1.0f / __builtin_sqrtf(sum / float(d) + work.eps);
  }
  const float scale = *rstd;
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) store(y + i, load(x + i) * scale * load(weight + i));
}

template <typename T>
void rms_norm_backward_row(const RmsNormBackward& work, int64_t token, int64_t inner) {
  const int64_t d = work.shape.width;
  const T* dy = row<T>(work.dy, work.shape, token, inner);
  const T* x = row<T>(work.x, work.shape, token, inner);
  const T* weight = static_cast<const T*>(work.weight);
  T* dx = row<T>(work.dx, work.shape, token, inner);
  const float scale = work.rstd[token * work.shape.inner + inner];
  const float sum = summed(0, d, [=](int64_t i) { return load(dy + i) * load(weight + i) * load(x + i); });
  const float pull = sum * scale * scale / float(d);
  if (work.past.data) {
    const T* past = row<T>(work.past, work.shape, token, inner);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i)
      store(dx + i, (load(dy + i) * load(weight + i) - load(x + i) * pull) * scale + load(past + i));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) store(dx + i, (load(dy + i) * load(weight + i) - load(x + i) * pull) * scale);
}

template <typename T>
void swiglu_row(const Swiglu& work, int64_t token, int64_t) {
  const int64_t f = work.shape.width;
  const T* gate = static_cast<const T*>(work.gate_up.data) + token * work.gate_up.pitch;
  T* h = static_cast<T*>(work.h.data) + token * work.h.pitch;
#pragma omp simd
  for (int64_t i = 0; i < f; ++i) {
    const float g = load(gate + i);
    store(h + i, g * sigmoid(g) * load(gate + f + i));
  }
}

template <typename T>
void swiglu_backward_row(const SwigluBackward& work, int64_t token, int64_t) {
  const int64_t f = work.shape.width;
  const T* dh = static_cast<const T*>(work.dh.data) + token * work.dh.pitch;
  const T* gate = static_cast<const T*>(work.gate_up.data) + token * work.gate_up.pitch;
  T* gradient = static_cast<T*>(work.gradient.data) + token * work.gradient.pitch;
  if (work.h.data) {
    T* h = static_cast<T*>(work.h.data) + token * work.h.pitch;
#pragma omp simd
    for (int64_t i = 0; i < f; ++i) {
      const float g = load(gate + i), up = load(gate + f + i), upstream = load(dh + i), s = sigmoid(g);
      store(gradient + i, upstream * up * s * (1.0f + g * (1.0f - s)));
      store(gradient + f + i, upstream * (g * s));
      store(h + i, g * s * up);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < f; ++i) {
    const float g = load(gate + i), up = load(gate + f + i), upstream = load(dh + i), s = sigmoid(g);
    store(gradient + i, upstream * up * s * (1.0f + g * (1.0f - s)));
    store(gradient + f + i, upstream * (g * s));
  }
}

template <typename T>
void rope_row(const Rope& work, int64_t token, int64_t inner) {
  const int64_t half = work.shape.width / 2;
  const float *cos = work.cos + token * half, *sin = work.sin + token * half;
  const float sign = work.back ? -1.0f : 1.0f;
  T* a = row<T>(work.x, work.shape, token, inner);
  T* b = a + half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float left = load(a + i), right = load(b + i), turn = sin[i] * sign;
    store(a + i, left * cos[i] - right * turn);
    store(b + i, right * cos[i] + left * turn);
  }
}

// Room for a row of fp32 values, one a thread.
inline float* scratch(int64_t width) {
  thread_local std::unique_ptr<float[]> room;
  thread_local int64_t size = 0;
  if (size < width) {
    room.reset(new float[size_t(width)]);
    size = width;
  }
  return room.get();
}

// e^(x - peak) of [first, last) into powers, and their sum. Runs of whole lanes, so that no value is worked on alone.
template <typename T>
inline float exponentials(const T* values, float peak, int64_t first, int64_t last, float* powers) {
  return summed(first, last, [=](int64_t i) { return powers[i] = exponential(load(values + i) - peak); });
}

template <typename T>
void losses_row(const Losses& work, int64_t token, int64_t) {
  const int64_t vocab = work.shape.width, label = work.labels[token];
  T* logits = static_cast<T*>(work.logits.data) + token * work.logits.pitch;
  float* powers = scratch(vocab);
  const float peak = largest(logits, 0, vocab);
  const float sum = exponentials(logits, peak, 0, vocab, powers);
  const float own = load(logits + label), smoothing = work.smoothing, each = smoothing / float(vocab);
  float all = 0.0f;      // about the label's, which may be large
  if (smoothing != 0.0f) all = summed(0, vocab, [=](int64_t i) { return load(logits + i) - own; });
  work.losses[token] = __builtin_logf(sum) + (peak - own) - each * all;
  if (!work.gradient) return;
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < vocab; ++i) store(logits + i, powers[i] * inverse - each);
  store(logits + label, powers[label] * inverse - 1.0f + smoothing - each);   // in fp32: 1 - p may be small
}

template <typename T>
void softmax_row(const Softmax& work, int64_t token, int64_t) {
  constexpr int64_t kLanes = 16;
  const int64_t keys = work.shape.width, query = work.begin + token % work.queries;
  const int64_t last = query + 1 < keys ? query + 1 : keys;
  const int64_t first = work.window > 0 && query - work.window + 1 > 0 ? query - work.window + 1 : 0;
  // Whole lanes around what is seen: -inf in those that are not, so that their power is 0.
  const int64_t from = first / kLanes * kLanes, rounded = (last + kLanes - 1) / kLanes * kLanes;
  const int64_t to = rounded < keys ? rounded : keys;
  T* scores = static_cast<T*>(work.scores.data) + token * work.scores.pitch;
  float* powers = scratch(keys);
  for (int64_t i = from; i < first; ++i) store(scores + i, -__builtin_inff());
  for (int64_t i = last; i < to; ++i) store(scores + i, -__builtin_inff());
  const float peak = largest(scores, from, to);
  const float sum = exponentials(scores, peak, from, to, powers);
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t i = from; i < to; ++i) store(scores + i, powers[i] * inverse);
  __builtin_memset(scores, 0, size_t(from) * sizeof(T));
  __builtin_memset(scores + to, 0, size_t(keys - to) * sizeof(T));
}

template <typename T>
void softmax_backward_row(const SoftmaxBackward& work, int64_t token, int64_t) {
  const int64_t keys = work.shape.width;
  T* dp = static_cast<T*>(work.dp.data) + token * work.dp.pitch;
  const T* p = static_cast<const T*>(work.p.data) + token * work.p.pitch;
  const float sum = summed(0, keys, [=](int64_t i) { return load(p + i) * load(dp + i); });
#pragma omp simd
  for (int64_t i = 0; i < keys; ++i) store(dp + i, load(p + i) * (load(dp + i) - sum));
}

// What bounds it is the memory, and one core asks for too little of it by itself: each line of the weight is asked for
// 8 KiB ahead, into the second-level cache, over the ends of rows.
template <typename T>
void product_rows(const Product& work, int64_t first, int64_t last) {
  constexpr int64_t kLanes = 32, kRun = sizeof(T) == 4 ? 256 : 2048, kAhead = 8192 / sizeof(T), kLine = 64 / sizeof(T);
  const int64_t k = work.shape.width, whole = k - k % kLanes;
  const T* given = static_cast<const T*>(work.x);
  float* x = scratch(k);
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) x[i] = load(given + i);
  for (int64_t token = first; token < last; ++token) {
    const T* weight = row<T>(work.weight, work.shape, token, 0);
    double total = 0.0;     // of runs in fp32, so that a long row loses nothing; they are short where y shows it
    for (int64_t run = 0; run < whole; run += kRun) {
      const int64_t end = whole - run < kRun ? whole : run + kRun;
      float lanes[kLanes] = {}, sum = 0.0f;
      for (int64_t begin = run; begin < end; begin += kLanes) {
        for (int64_t line = begin; line < begin + kLanes; line += kLine) __builtin_prefetch(weight + line + kAhead, 0, 2);
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] = fused(load(weight + begin + i), x[begin + i], lanes[i]);
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
      total += sum;
    }
    for (int64_t i = whole; i < k; ++i) total += double(load(weight + i)) * x[i];
    store(static_cast<T*>(work.y) + token, float(total));
  }
}

void product(const Product& work, int64_t first, int64_t last) {
  work.shape.dtype == F32 ? product_rows<float>(work, first, last) : product_rows<BFloat16>(work, first, last);
}

template <typename Work, void (*Plain)(const Work&, int64_t, int64_t), void (*Narrow)(const Work&, int64_t, int64_t)>
void all_rows(const Work& work, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token)
    for (int64_t inner = 0; inner < work.shape.inner; ++inner)
      work.shape.dtype == F32 ? Plain(work, token, inner) : Narrow(work, token, inner);
}

const Path path = {
    all_rows<RmsNorm, rms_norm_row<float>, rms_norm_row<BFloat16>>,
    all_rows<RmsNormBackward, rms_norm_backward_row<float>, rms_norm_backward_row<BFloat16>>,
    all_rows<Swiglu, swiglu_row<float>, swiglu_row<BFloat16>>,
    all_rows<SwigluBackward, swiglu_backward_row<float>, swiglu_backward_row<BFloat16>>,
    all_rows<Rope, rope_row<float>, rope_row<BFloat16>>,
    all_rows<Losses, losses_row<float>, losses_row<BFloat16>>,
    all_rows<Softmax, softmax_row<float>, softmax_row<BFloat16>>,
    all_rows<SoftmaxBackward, softmax_backward_row<float>, softmax_backward_row<BFloat16>>,
    product,
    adamw_8bit,
};
