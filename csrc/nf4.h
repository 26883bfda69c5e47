// nf4.h: the NF4 format, and the plain C border between the bindings (torch) and the kernels (no torch headers).
//
// A matrix [rows, columns] is cut into blocks of 2^block_shift values (32 to 4096), in row-major order and across its
// rows; the last block may be short. Value i is table[code i] * absmax[i >> block_shift] in fp32, rounded once to the
// dtype of the output. Code i is a half byte: the high half of packed[i / 2] where i is even, the low half where odd.
// With double quantisation absmax is 8 bits: absmax = nested_code[absmax_codes[b]] * nested_absmax[b / 256] + offset,
// the product rounded to fp32, then the sum: no fused multiply-add.
//
// The 16 levels are an argument. Their one home is minitune/ops/nf4.py, whose reference defines every bit below.
#pragma once
#include <cstdint>

enum Nf4Dtype : int32_t { NF4_F32 = 0, NF4_F16 = 1, NF4_BF16 = 2 };

constexpr int kNf4NestedShift = 8;       // 256 absmax values share one nested_absmax
constexpr float kNf4Tiny = 1e-38f;       // an absmax below this is taken for this where it divides

struct Nf4Dequantize {
  const uint8_t* packed;                 // [ceil(rows * columns / 2)]
  const float* absmax;                   // [blocks]; null with double quantisation
  const uint8_t* absmax_codes;           // [blocks]; null without double quantisation, as the three below
  const float* nested_absmax;            // [ceil(blocks / 256)]
  const float* nested_code;              // [256]
  const float* nested_offset;            // [1], read on the device
  const float* table;                    // [16], ascending
  void* out;                             // row r begins at element r * pitch
  int64_t rows, columns, pitch;          // rows is 1 where the values lie without a gap
  int32_t block_shift;
  int32_t dtype;                         // of out
  int32_t reused;                        // whether a caller gave out, as one does to decode into it again and again
};

struct Nf4Quantize {
  const void* values;                    // [n]
  const float* table;                    // [16], ascending
  uint8_t* packed;                       // [ceil(n / 2)]
  float* absmax;                         // [ceil(n / blocksize)]
  int64_t n;
  int32_t block_shift;
  int32_t dtype;                         // of values
};

struct Nf4QuantizeAbsmax {
  const float* absmax;                   // [n]
  const float* offset;                   // [1], read on the device
  const float* code;                     // [256], ascending
  uint8_t* codes;                        // [n]
  float* nested_absmax;                  // [ceil(n / 256)]
  int64_t n;
};

extern "C" {
// Blocks [first, last) of the work, by the instruction set `isa` (cpu_isa.h): a caller may split it over threads as it
// likes.
void nf4_cpu_dequantize(const Nf4Dequantize* work, int isa, int64_t first, int64_t last);
// Flat values [first, last) to out, where value `first` goes; rows and pitch say nothing here.
void nf4_cpu_decode(const Nf4Dequantize* work, int isa, int64_t first, int64_t last, void* out);
// sums[i] = row first + i, each of `columns` values, times x, the values rounded as work->dtype says. False
// where a row is not of whole blocks, or the path has no loop of its own: then decode, and multiply.
bool nf4_cpu_multiply(const Nf4Dequantize* work, int isa, const float* x, int64_t columns, int64_t first, int64_t last,
                      float* sums);
void nf4_cpu_quantize(const Nf4Quantize* work, int isa, int64_t first, int64_t last);
void nf4_cpu_quantize_absmax(const Nf4QuantizeAbsmax* work, int64_t first, int64_t last);   // blocks of 256

// All of the work, put in line on a cudaStream_t; they return a cudaError_t.
int nf4_cuda_dequantize(const Nf4Dequantize* work, void* stream);
int nf4_cuda_quantize(const Nf4Quantize* work, void* stream);
int nf4_cuda_quantize_absmax(const Nf4QuantizeAbsmax* work, void* stream);
const char* nf4_cuda_error(int error);
}
