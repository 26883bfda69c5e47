// nf4_cpu.h: what the CPU paths share: a block's scale, roundings and codes of single values, the functions of a path.
#pragma once
#include "nf4.h"

#include <cstring>

// Everything here is compiled for the plainest CPU; the wide paths mark their own functions with a target.
namespace nf4 {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int64_t kChunk = 32;   // what a wide path decodes at a time: no block is shorter, so a chunk has one scale

// The functions of one path, by Nf4Dtype.
struct Path {
  const char* name;
  // Flat values [first, last), both multiples of kChunk, to out, which is where value `first` goes.
  void (*decode[3])(const Nf4Dequantize& work, int64_t first, int64_t last, void* out);
  // Whole blocks [first, last). midpoints[i] lies between levels i - 1 and i; midpoints[0] is not used.
  void (*encode[3])(const Nf4Quantize& work, const float* midpoints, int64_t first, int64_t last);
  // Rows [first, last) of whole blocks times x; null where there is none.
  void (*multiply[3])(const Nf4Dequantize& work, const float* x, int64_t columns, int64_t first, int64_t last,
                      float* sums);
};
extern const Path kAvx2, kAvx512;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The build must say -ffp-contract=off: a fused multiply-add here would change up to a fifth of the results.
inline float scale_of(const Nf4Dequantize& work, int64_t block) {
  if (work.absmax) return work.absmax[block];
  const float product = work.nested_code[work.absmax_codes[block]] * work.nested_absmax[block >> kNf4NestedShift];
  return product + *work.nested_offset;
}

// NaN stays NaN: a comparison with it is false.
inline float at_least_tiny(float absmax) { return absmax < kNf4Tiny ? kNf4Tiny : absmax; }

// ---- to the dtype of the output: to the nearest, ties to even ------------------------------------------------------
template <typename T>
T rounded(float x);

template <>
inline float rounded(float x) {
  return x;
}

template <>
inline BFloat16 rounded(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Half rounded(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  uint32_t bits = bits_of(x) & 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u | ((bits >> 13) & 0x3ffu))};   // NaN, as F16C has it
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};                            // from 65520: infinity
  if (bits < 0x38800000u)    // denormal: beside 0.5 a float's last bit is worth 2^-24, as a denormal's is
    return {uint16_t(sign | (bits_of(from_bits(bits) + 0.5f) - 0x3f000000u))};
  bits += 0xc8000fffu + ((bits >> 13) & 1u);             // the exponent's bias less 112, and half of the last bit
  return {uint16_t(sign | (bits >> 13))};
}

// ---- from the dtype of the input -----------------------------------------------------------------------------------
inline float value_of(float x) { return x; }

inline float value_of(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

inline float value_of(Half x) {
  uint32_t bits = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = bits & 0x0f800000u;
  bits += 112u << 23;
  if (exponent == 0x0f800000u) bits += 112u << 23;       // infinity and NaN
  if (exponent == 0) bits = bits_of(from_bits(bits + (1u << 23)) - from_bits(113u << 23));
  return from_bits(bits | uint32_t(x.bits & 0x8000u) << 16);
}

// The number of midpoints strictly below x, as torch.bucketize counts them (all of them where x is NaN).
inline uint32_t code_of(float x, const float* midpoints) {
  uint32_t code = 0;
  for (uint32_t bit = 8; bit; bit >>= 1)
    if (!(midpoints[code | bit] >= x)) code |= bit;
  return code;
}

}  // namespace nf4
