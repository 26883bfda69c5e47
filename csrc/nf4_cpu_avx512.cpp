// nf4_cpu_avx512.cpp: the AVX-512 path: a block's 16 values are formed once, then looked up by a register permute.
#if defined(__x86_64__)
#include "nf4_cpu.h"

#include <immintrin.h>

#include <algorithm>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

namespace nf4 {
namespace {

// ---- dequantise ----------------------------------------------------------------------------------------------------
AVX512 inline __m256i rounded16(__m512 x, BFloat16) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

AVX512 inline __m256i rounded16(__m512 x, Half) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Whether an output of 16 bits a value is so large (64 MiB) that its beginning has left the caches when its end is
// written. Then stores that go to memory at once, without reading the line first, are more than twice as fast. Fresh
// memory is in the caches, where the system has just zeroed it: there they are slower.
bool goes_past_caches(const Nf4Dequantize& work) {
  return work.reused && work.rows * work.pitch >= (int64_t(32) << 20);
}

template <typename T, bool kStream>
AVX512 void decode_to(const Nf4Dequantize& given, int64_t first, int64_t last, void* out) {
  const Nf4Dequantize work = given;      // a copy, which the stores below cannot change
  const __m512 levels = _mm512_loadu_ps(work.table);
  T* to = static_cast<T*>(out);
  for (int64_t i = first; i < last;) {
    const int64_t block = i >> work.block_shift;
    const int64_t stop = std::min(last, (block + 1) << work.block_shift);
    const __m512 products = _mm512_mul_ps(levels, _mm512_set1_ps(scale_of(work, block)));
    const __m512i values = _mm512_broadcast_i64x4(rounded16(products, T{}));
    for (; i < stop; i += kChunk, to += kChunk) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(work.packed + i / 2));
      const __m512i wide = _mm512_cvtepu8_epi32(bytes);
      // The permute reads 5 bits of an index; the values lie there twice, so the fifth may be anything.
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
      const __m512i chunk = _mm512_permutexvar_epi16(codes, values);
      if constexpr (kStream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), chunk);
      } else {
        _mm512_storeu_si512(to, chunk);
      }
    }
  }
  if constexpr (kStream) _mm_sfence();      // before another thread is told that it is done
}

template <typename T>
AVX512 void decode(const Nf4Dequantize& work, int64_t first, int64_t last, void* out) {
  if (goes_past_caches(work) && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    decode_to<T, true>(work, first, last, out);
  } else {
    decode_to<T, false>(work, first, last, out);
  }
}

template <>
AVX512 void decode<float>(const Nf4Dequantize& given, int64_t first, int64_t last, void* out) {
  const Nf4Dequantize work = given;
  const __m512 levels = _mm512_loadu_ps(work.table);
  const __m512i source = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  float* to = static_cast<float*>(out);
  for (int64_t i = first; i < last;) {
    const int64_t block = i >> work.block_shift;
    const int64_t stop = std::min(last, (block + 1) << work.block_shift);
    const __m512 values = _mm512_mul_ps(levels, _mm512_set1_ps(scale_of(work, block)));
    for (; i < stop; i += 16, to += 16) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(work.packed + i / 2));
      const __m512i wide = _mm512_permutexvar_epi32(source, _mm512_castsi128_si512(bytes));
      _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_srlv_epi32(wide, shifts), values));
    }
  }
}

// ---- multiply ------------------------------------------------------------------------------------------------------
AVX512 inline __m512 rounded32(__m512 x, float) { return x; }

AVX512 inline __m512 rounded32(__m512 x, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded16(x, BFloat16{})), 16));
}

// As decode<float>, but what it would store is multiplied at once.
template <typename T>
AVX512 void multiply(const Nf4Dequantize& work, const float* x, int64_t columns, int64_t first, int64_t last,
                     float* sums) {
  const __m512 levels = _mm512_loadu_ps(work.table);
  const __m512i source = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  constexpr int64_t kRun = sizeof(T) == 4 ? 256 : 2048;       // as in rows_kernels.h
  const int64_t blocks = columns >> work.block_shift, size = int64_t(1) << work.block_shift;
  for (int64_t row = first; row < last; ++row) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    double total = 0.0;     // of runs in fp32, so that a long row loses nothing
    const uint8_t* packed = work.packed + row * columns / 2;
    const float* at = x;
    int64_t run = kRun;
    for (int64_t block = row * blocks; block < (row + 1) * blocks; ++block) {
      if (at - x >= run) {
        total += _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
        even = odd = _mm512_setzero_ps();
        run = at - x + kRun;
      }
      _mm_prefetch(reinterpret_cast<const char*>(packed) + 4096, _MM_HINT_T1);      // over the ends of rows
      const __m512 values = rounded32(_mm512_mul_ps(levels, _mm512_set1_ps(scale_of(work, block))), T{});
      for (int64_t i = 0; i < size; i += kChunk, packed += kChunk / 2, at += kChunk) {
        const __m512i left = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
        const __m512i right = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8)));
        const __m512i first_codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(source, left), shifts);
        const __m512i last_codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(source, right), shifts);
        even = _mm512_fmadd_ps(_mm512_permutexvar_ps(first_codes, values), _mm512_loadu_ps(at), even);
        odd = _mm512_fmadd_ps(_mm512_permutexvar_ps(last_codes, values), _mm512_loadu_ps(at + 16), odd);
      }
    }
    sums[row - first] = float(total + _mm512_reduce_add_ps(_mm512_add_ps(even, odd)));
  }
}

// ---- quantise ------------------------------------------------------------------------------------------------------
AVX512 inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

AVX512 inline __m512 load(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

AVX512 inline __m512 load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// code_of for 16 values: four steps of a binary search in one register.
AVX512 inline __m128i codes_of(__m512 x, __m512 midpoints) {
  __m512i codes = _mm512_setzero_si512();
  for (int bit = 8; bit; bit >>= 1) {
    const __m512i higher = _mm512_or_si512(codes, _mm512_set1_epi32(bit));
    const __m512 probes = _mm512_permutexvar_ps(higher, midpoints);
    codes = _mm512_mask_mov_epi32(codes, _mm512_cmp_ps_mask(probes, x, _CMP_NGE_UQ), higher);
  }
  return _mm512_cvtepi32_epi8(codes);
}

template <typename T>
AVX512 void encode(const Nf4Quantize& given, const float* midpoints, int64_t first, int64_t last) {
  const Nf4Quantize work = given;
  const int64_t size = int64_t(1) << work.block_shift;
  const __m512 bounds = _mm512_loadu_ps(midpoints);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t block = first; block < last; ++block) {
    const T* values = static_cast<const T*>(work.values) + block * size;
    uint8_t* packed = work.packed + block * size / 2;
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += 16)
      most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(load(values + i)), magnitude));
    const float absmax = from_bits(_mm512_reduce_max_epu32(most));
    work.absmax[block] = absmax;
    const __m512 inverse = _mm512_set1_ps(1.0f / at_least_tiny(absmax));
    for (int64_t i = 0; i < size; i += kChunk) {
      const __m128i left = codes_of(_mm512_mul_ps(load(values + i), inverse), bounds);
      const __m128i right = codes_of(_mm512_mul_ps(load(values + i + 16), inverse), bounds);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set_m128i(right, left), _mm256_set1_epi16(0x0110));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm256_cvtepi16_epi8(pairs));
    }
  }
}

}  // namespace

const Path kAvx512 = {
    "avx512", {decode<float>, decode<Half>, decode<BFloat16>}, {encode<float>, encode<Half>, encode<BFloat16>},
    {multiply<float>, nullptr, multiply<BFloat16>}};

}  // namespace nf4
#endif
