// nf4_cpu_avx2.cpp: the AVX2 path: a block's 16 values are formed once, then looked up by byte shuffles.
#if defined(__x86_64__)
#include "nf4_cpu.h"

#include <immintrin.h>

#include <algorithm>

#define AVX2 __attribute__((target("avx2,f16c")))

namespace nf4 {
namespace {

// ---- dequantise ----------------------------------------------------------------------------------------------------
AVX2 inline __m256i rounded32(__m256 x) {    // bf16 in the low half of each 32 bits
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
}

AVX2 inline __m256i rounded16(__m256 low, __m256 high, BFloat16) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded32(low), rounded32(high)), 0xd8);
}

AVX2 inline __m256i rounded16(__m256 low, __m256 high, Half) {
  return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}

template <typename T>
AVX2 void decode(const Nf4Dequantize& given, int64_t first, int64_t last, void* out) {
  const Nf4Dequantize work = given;      // a copy, which the stores below cannot change
  const __m256 low_levels = _mm256_loadu_ps(work.table), high_levels = _mm256_loadu_ps(work.table + 8);
  T* to = static_cast<T*>(out);
  for (int64_t i = first; i < last;) {
    const int64_t block = i >> work.block_shift;
    const int64_t stop = std::min(last, (block + 1) << work.block_shift);
    const __m256 scale = _mm256_set1_ps(scale_of(work, block));
    const __m256i values = rounded16(_mm256_mul_ps(low_levels, scale), _mm256_mul_ps(high_levels, scale), T{});
    // The 16 values as a table of their low bytes and one of their high bytes, each in both lanes.
    const __m256i split = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(values, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(values, 8)), 0xd8);
    const __m256i low = _mm256_permute2x128_si256(split, split, 0x00);
    const __m256i high = _mm256_permute2x128_si256(split, split, 0x11);
    for (; i < stop; i += kChunk, to += kChunk) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(work.packed + i / 2));
      // Four bytes change places so that the unpacking below, lane by lane, leaves the values in order.
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_shuffle_epi32(bytes, 0xd8));
      const __m256i codes = _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8)),
                                             _mm256_set1_epi8(15));
      const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi8(l, h));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_unpackhi_epi8(l, h));
    }
  }
}

template <>
AVX2 void decode<float>(const Nf4Dequantize& given, int64_t first, int64_t last, void* out) {
  const Nf4Dequantize work = given;
  const __m256 low_levels = _mm256_loadu_ps(work.table), high_levels = _mm256_loadu_ps(work.table + 8);
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  float* to = static_cast<float*>(out);
  for (int64_t i = first; i < last;) {
    const int64_t block = i >> work.block_shift;
    const int64_t stop = std::min(last, (block + 1) << work.block_shift);
    const __m256 scale = _mm256_set1_ps(scale_of(work, block));
    const __m256 low = _mm256_mul_ps(low_levels, scale), high = _mm256_mul_ps(high_levels, scale);
    for (; i < stop; i += 8, to += 8) {
      int32_t word;
      std::memcpy(&word, work.packed + i / 2, 4);
      const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
      // The permutes read 3 bits of a code; the fourth, moved to the sign, picks between them.
      _mm256_storeu_ps(to, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes),
                                            _mm256_permutevar8x32_ps(high, codes),
                                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28))));
    }
  }
}

// ---- quantise ------------------------------------------------------------------------------------------------------
AVX2 inline __m256 load(const float* from) { return _mm256_loadu_ps(from); }

AVX2 inline __m256 load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

AVX2 inline __m256 load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// code_of for 8 values: the first step picks a half of the midpoints, three more search in it.
AVX2 inline __m256i codes_of(__m256 x, __m256 low, __m256 high, __m256 middle) {
  const __m256 upper = _mm256_cmp_ps(middle, x, _CMP_NGE_UQ);
  __m256i codes = _mm256_setzero_si256();
  for (int bit = 4; bit; bit >>= 1) {
    const __m256i next = _mm256_or_si256(codes, _mm256_set1_epi32(bit));
    const __m256 probes =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, next), _mm256_permutevar8x32_ps(high, next), upper);
    codes = _mm256_blendv_epi8(codes, next, _mm256_castps_si256(_mm256_cmp_ps(probes, x, _CMP_NGE_UQ)));
  }
  return _mm256_or_si256(codes, _mm256_and_si256(_mm256_castps_si256(upper), _mm256_set1_epi32(8)));
}

// 32 codes -> 16 bytes. The packs work lane by lane, so groups of four have to be put back in order.
AVX2 inline __m128i packed_codes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i mixed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
  const __m256i codes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
  return _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

AVX2 inline float largest_of(__m256i magnitudes) {
  uint32_t lanes[8], most = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), magnitudes);
  for (uint32_t lane : lanes) most = std::max(most, lane);
  return from_bits(most);
}

template <typename T>
AVX2 void encode(const Nf4Quantize& given, const float* midpoints, int64_t first, int64_t last) {
  const Nf4Quantize work = given;
  const int64_t size = int64_t(1) << work.block_shift;
  const __m256 low = _mm256_loadu_ps(midpoints), high = _mm256_loadu_ps(midpoints + 8);
  const __m256 middle = _mm256_set1_ps(midpoints[8]);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t block = first; block < last; ++block) {
    const T* values = static_cast<const T*>(work.values) + block * size;
    uint8_t* packed = work.packed + block * size / 2;
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < size; i += 8)
      most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(load(values + i)), magnitude));
    const float absmax = largest_of(most);
    work.absmax[block] = absmax;
    const __m256 inverse = _mm256_set1_ps(1.0f / at_least_tiny(absmax));
    for (int64_t i = 0; i < size; i += kChunk) {
      __m256i codes[4];
      for (int k = 0; k < 4; ++k)
        codes[k] = codes_of(_mm256_mul_ps(load(values + i + 8 * k), inverse), low, high, middle);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2),
                       packed_codes(codes[0], codes[1], codes[2], codes[3]));
    }
  }
}

}  // namespace

const Path kAvx2 = {
    "avx2", {decode<float>, decode<Half>, decode<BFloat16>}, {encode<float>, encode<Half>, encode<BFloat16>}, {}};

}  // namespace nf4
#endif
