// nf4_cpu.cpp: NF4 on a CPU: the portable path, and the work of all paths that is not their core.
#include "nf4_cpu.h"

#include <algorithm>

namespace nf4 {
namespace {

// Any range of values, from the middle of a byte or block too.
template <typename T>
void decode(const Nf4Dequantize& work, int64_t first, int64_t last, void* out) {
  T* to = static_cast<T*>(out);
  const uint8_t* packed = work.packed;
  for (int64_t i = first; i < last;) {
    const int64_t block = i >> work.block_shift;
    const int64_t stop = std::min(last, (block + 1) << work.block_shift);
    const float scale = scale_of(work, block);
    T values[16];        // a block has no more than 16 different values
    for (int code = 0; code < 16; ++code) values[code] = rounded<T>(work.table[code] * scale);
    if (i & 1) *to++ = values[packed[i++ >> 1] & 15];
    for (; i + 1 < stop; i += 2) {
      const uint8_t byte = packed[i >> 1];
      *to++ = values[byte >> 4];
      *to++ = values[byte & 15];
    }
    if (i < stop) *to++ = values[packed[i++ >> 1] >> 4];
  }
}

// The largest magnitude; compared as integers a NaN is larger than every number, so it is handed on.
template <typename T>
float largest(const T* values, int64_t n) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits = std::max(bits, bits_of(value_of(values[i])) & 0x7fffffffu);
  return from_bits(bits);
}

template <typename T>
void encode(const Nf4Quantize& work, const float* midpoints, int64_t first, int64_t last) {
  const int64_t size = int64_t(1) << work.block_shift;
  for (int64_t block = first; block < last; ++block) {
    const T* values = static_cast<const T*>(work.values) + block * size;
    uint8_t* packed = work.packed + block * size / 2;
    work.absmax[block] = largest(values, size);
    const float inverse = 1.0f / at_least_tiny(work.absmax[block]);
    for (int64_t i = 0; i < size; i += 2) {
      const uint32_t high = code_of(value_of(values[i]) * inverse, midpoints);
      packed[i >> 1] = uint8_t(high << 4 | code_of(value_of(values[i + 1]) * inverse, midpoints));
    }
  }
}

// A last block that is not full: its values are divided, and its absmax is stored as it divides.
template <typename T>
void encode_last(const Nf4Quantize& work, const float* midpoints) {
  const int64_t block = work.n >> work.block_shift, start = block << work.block_shift, rest = work.n - start;
  const T* values = static_cast<const T*>(work.values) + start;
  const float absmax = at_least_tiny(largest(values, rest));
  work.absmax[block] = absmax;
  for (int64_t i = 0; i < rest; i += 2) {
    const uint32_t high = code_of(value_of(values[i]) / absmax, midpoints);
    const uint32_t low = code_of(i + 1 < rest ? value_of(values[i + 1]) / absmax : 0.0f, midpoints);
    work.packed[(start + i) >> 1] = uint8_t(high << 4 | low);
  }
}

const Path kPortable = {
    "portable", {decode<float>, decode<Half>, decode<BFloat16>}, {encode<float>, encode<Half>, encode<BFloat16>}, {}};
constexpr void (*kEncodeLast[3])(const Nf4Quantize&, const float*) = {encode_last<float>, encode_last<Half>,
                                                                     encode_last<BFloat16>};
constexpr int64_t kBytes[3] = {4, 2, 2};

#if defined(__x86_64__)
const Path* const kPaths[5] = {&kPortable, &kAvx2, &kAvx512, &kAvx512, &kAvx512};
#else
const Path* const kPaths[5] = {&kPortable, &kPortable, &kPortable, &kPortable, &kPortable};
#endif

// Values [first, last) of one row, or of the whole where it has no gaps, to out.
void decode_range(const Nf4Dequantize& work, const Path& path, int64_t first, int64_t last, uint8_t* out) {
  const int64_t bytes = kBytes[work.dtype];
  const int64_t head = std::min(last, (first + kChunk - 1) / kChunk * kChunk);
  const int64_t tail = std::max(head, last / kChunk * kChunk);
  kPortable.decode[work.dtype](work, first, head, out);
  path.decode[work.dtype](work, head, tail, out + (head - first) * bytes);
  kPortable.decode[work.dtype](work, tail, last, out + (tail - first) * bytes);
}

}  // namespace
}  // namespace nf4

using namespace nf4;

void nf4_cpu_dequantize(const Nf4Dequantize* work, int isa, int64_t first, int64_t last) {
  const int64_t n = work->rows * work->columns;
  const int64_t end = std::min(n, last << work->block_shift);
  for (int64_t i = first << work->block_shift; i < end;) {
    const int64_t row = i / work->columns, column = i % work->columns;
    const int64_t stop = std::min(end, i - column + work->columns);
    uint8_t* out = static_cast<uint8_t*>(work->out) + (row * work->pitch + column) * kBytes[work->dtype];
    decode_range(*work, *kPaths[isa], i, stop, out);
    i = stop;
  }
}

void nf4_cpu_decode(const Nf4Dequantize* work, int isa, int64_t first, int64_t last, void* out) {
  decode_range(*work, *kPaths[isa], first, last, static_cast<uint8_t*>(out));
}

bool nf4_cpu_multiply(const Nf4Dequantize* work, int isa, const float* x, int64_t columns, int64_t first, int64_t last,
                      float* sums) {
  const auto multiply = kPaths[isa]->multiply[work->dtype];
  if (!multiply || columns % (int64_t(1) << work->block_shift)) return false;
  if (last > first) multiply(*work, x, columns, first, last, sums);
  return true;
}

void nf4_cpu_quantize(const Nf4Quantize* work, int isa, int64_t first, int64_t last) {
  float midpoints[16] = {0};
  for (int i = 1; i < 16; ++i) midpoints[i] = (work->table[i - 1] + work->table[i]) / 2;
  const int64_t full = work->n >> work->block_shift;
  kPaths[isa]->encode[work->dtype](*work, midpoints, first, std::min(last, full));
  if (last > full) kEncodeLast[work->dtype](*work, midpoints);
}

void nf4_cpu_quantize_absmax(const Nf4QuantizeAbsmax* work, int64_t first, int64_t last) {
  const float offset = *work->offset;
  float midpoints[256] = {0};
  for (int i = 1; i < 256; ++i) midpoints[i] = (work->code[i - 1] + work->code[i]) / 2;
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block << kNf4NestedShift;
    const int64_t stop = std::min(work->n, start + (int64_t(1) << kNf4NestedShift));
    uint32_t bits = 0;
    for (int64_t i = start; i < stop; ++i) bits = std::max(bits, bits_of(work->absmax[i] - offset) & 0x7fffffffu);
    work->nested_absmax[block] = from_bits(bits);
    const float divisor = at_least_tiny(from_bits(bits));
    for (int64_t i = start; i < stop; ++i) {
      const float x = (work->absmax[i] - offset) / divisor;
      uint32_t code = 0;
      for (uint32_t bit = 128; bit; bit >>= 1) code |= midpoints[code | bit] >= x ? 0 : bit;
      work->codes[i] = uint8_t(code);
    }
  }
}
