// nf4_cuda.cu: the NF4 kernels for CUDA. No torch headers, so it compiles wherever nvcc is.
//
// Sums and products go through intrinsics that the compiler does not fuse: the bits are those of the CPU.
#include "nf4.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace {
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWords = 4;                  // words of 8 codes that a thread has in flight
constexpr int kTile = kThreads * kWords;   // words that a thread block does at a time
constexpr int64_t kMaxGrid = 1 << 24;      // what is left of the work a thread block does in further rounds

unsigned grid(int64_t wanted) { return unsigned(std::min(wanted, kMaxGrid)); }

int64_t ceil_div(int64_t n, int64_t by) { return n / by + (n % by != 0); }

bool aligned(const void* address, uintptr_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

// ---- dequantise ----------------------------------------------------------------------------------------------------
template <bool kNested>
struct Tables {
  float levels[16];                        // as many banks: lookups do not collide
  float code[kNested ? 256 : 1];
};

// Fills the tables and returns the offset. All threads of the block call it.
template <bool kNested>
__device__ __forceinline__ float load(Tables<kNested>& tables, const Nf4Dequantize& work) {
  static_assert(kThreads == 256, "a thread copies one entry of the nested code");
  if (threadIdx.x < 16) tables.levels[threadIdx.x] = work.table[threadIdx.x];
  if constexpr (kNested) tables.code[threadIdx.x] = work.nested_code[threadIdx.x];
  __syncthreads();
  if constexpr (kNested) return __ldg(work.nested_offset);
  return 0.0f;
}

template <bool kNested>
__device__ __forceinline__ float scale_of(const Tables<kNested>& tables, const Nf4Dequantize& work, float offset,
                                          int64_t block) {
  if constexpr (!kNested) return __ldg(work.absmax + block);
  const float code = tables.code[__ldg(work.absmax_codes + block)];
  return __fadd_rn(__fmul_rn(code, __ldg(work.nested_absmax + (block >> kNf4NestedShift))), offset);
}

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(__half* out, float x) { *out = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

__device__ __forceinline__ uint32_t pair(__half*, float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pair(__nv_bfloat16*, float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Eight values in stores of 16 bytes.
template <typename T>
__device__ __forceinline__ void put8(T* out, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(out) =
      make_uint4(pair(out, x[0], x[1]), pair(out, x[2], x[3]), pair(out, x[4], x[5]), pair(out, x[6], x[7]));
}
__device__ __forceinline__ void put8(float* out, const float (&x)[8]) {
  reinterpret_cast<float4*>(out)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// The fast path: columns and pitch are multiples of 8, out lies at a multiple of 16 bytes. A tile is within one row.
template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads) dequantize_words(const Nf4Dequantize work, int64_t words, int64_t tiles) {
  __shared__ Tables<kNested> tables;
  const float offset = load(tables, work);
  for (int64_t tile = blockIdx.x; tile < tiles * work.rows; tile += gridDim.x) {
    const int64_t row = work.rows == 1 ? 0 : tile / tiles;
    const int64_t first = (tile - row * tiles) * kTile + threadIdx.x;      // word in the row
    const uint32_t* packed = reinterpret_cast<const uint32_t*>(work.packed) + row * words;
    T* out = static_cast<T*>(work.out) + row * work.pitch;
    uint32_t word[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = first + k * kThreads < words ? __ldg(packed + first + k * kThreads) : 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const int64_t at = first + k * kThreads;
      if (at >= words) break;
      const float scale = scale_of(tables, work, offset, (row * words + at) >> (work.block_shift - 3));
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)          // within a byte the high half comes first
        x[i] = __fmul_rn(tables.levels[(word[k] >> (8 * (i / 2) + (i % 2 ? 0 : 4))) & 15], scale);
      put8(out + 8 * at, x);
    }
  }
}

// Any shape: a thread per value.
template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads) dequantize_values(const Nf4Dequantize work) {
  __shared__ Tables<kNested> tables;
  const float offset = load(tables, work);
  const int64_t n = work.rows * work.columns, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const int64_t row = work.rows == 1 ? 0 : i / work.columns;
    const uint32_t code = (__ldg(work.packed + (i >> 1)) >> (i & 1 ? 0 : 4)) & 15;
    const float scale = scale_of(tables, work, offset, i >> work.block_shift);
    put(static_cast<T*>(work.out) + row * work.pitch + (i - row * work.columns),
        __fmul_rn(tables.levels[code], scale));
  }
}

template <typename T, bool kNested>
void dequantize(const Nf4Dequantize& work, cudaStream_t stream) {
  if (work.columns % 8 == 0 && work.pitch % 8 == 0 && aligned(work.out, 16) && aligned(work.packed, 4)) {
    const int64_t words = work.columns / 8, tiles = ceil_div(words, kTile);
    dequantize_words<T, kNested><<<grid(tiles * work.rows), kThreads, 0, stream>>>(work, words, tiles);
  } else {
    dequantize_values<T, kNested><<<grid(ceil_div(work.rows * work.columns, kThreads)), kThreads, 0, stream>>>(work);
  }
}

// ---- quantise ------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(__half x) { return __half2float(x); }
__device__ __forceinline__ float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }

// As integers: a NaN is larger than every number, so it is handed on.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t x) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

__device__ __forceinline__ float at_least_tiny(float absmax) { return absmax < kNf4Tiny ? kNf4Tiny : absmax; }

__device__ __forceinline__ float between(float low, float high) { return __fmul_rn(__fadd_rn(low, high), 0.5f); }

// The number of midpoints strictly below x; midpoints[i] lies between levels i - 1 and i.
template <int kLevels>
__device__ __forceinline__ uint32_t code_of(float x, const float* midpoints) {
  uint32_t code = 0;
#pragma unroll
  for (uint32_t bit = kLevels / 2; bit; bit >>= 1)
    if (!(midpoints[code | bit] >= x)) code |= bit;
  return code;
}

// A warp does a block. A last block that is not full is divided, and its absmax stored as it divides.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_blocks(const Nf4Quantize work, int64_t blocks) {
  __shared__ float midpoints[16];
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread < 16) midpoints[thread] = between(work.table[max(thread, 1) - 1], work.table[thread]);
  __syncthreads();
  for (int64_t block = int64_t(blockIdx.x) * kWarps + thread / 32; block < blocks;
       block += int64_t(gridDim.x) * kWarps) {
    const int64_t first = block << work.block_shift;
    const int whole = 1 << work.block_shift, size = int(min(int64_t(whole), work.n - first));
    const T* values = static_cast<const T*>(work.values) + first;
    uint32_t most = 0;
    for (int i = lane; i < size; i += 32) most = max(most, magnitude(value_of(values[i])));
    const float absmax = __uint_as_float(largest_of_warp(most)), divisor = at_least_tiny(absmax);
    const float inverse = __fdiv_rn(1.0f, divisor);
    const auto code = [&](int i) -> uint32_t {
      if (i >= size) return code_of<16>(0.0f, midpoints);
      const float x = value_of(values[i]);
      return code_of<16>(size == whole ? __fmul_rn(x, inverse) : __fdiv_rn(x, divisor), midpoints);
    };
    for (int i = 2 * lane; i < size; i += 64) work.packed[(first + i) >> 1] = uint8_t(code(i) << 4 | code(i + 1));
    if (lane == 0) work.absmax[block] = size == whole ? absmax : divisor;
  }
}

// A thread block does a nested block, a thread a value.
__global__ void __launch_bounds__(kThreads) quantize_absmax(const Nf4QuantizeAbsmax work, int64_t blocks) {
  __shared__ float midpoints[256];
  __shared__ uint32_t most[kWarps];
  const int thread = threadIdx.x;
  midpoints[thread] = between(work.code[max(thread, 1) - 1], work.code[thread]);
  const float offset = __ldg(work.offset);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t i = (block << kNf4NestedShift) + thread;
    const float centred = i < work.n ? __fsub_rn(work.absmax[i], offset) : 0.0f;
    const uint32_t of_warp = largest_of_warp(magnitude(centred));
    __syncthreads();                       // the midpoints are written, the last round's `most` is read
    if (thread % 32 == 0) most[thread / 32] = of_warp;
    __syncthreads();
    uint32_t largest = 0;
    for (int warp = 0; warp < kWarps; ++warp) largest = max(largest, most[warp]);
    const float absmax = __uint_as_float(largest);
    if (i < work.n) work.codes[i] = uint8_t(code_of<256>(__fdiv_rn(centred, at_least_tiny(absmax)), midpoints));
    if (thread == 0) work.nested_absmax[block] = absmax;
  }
}
}  // namespace

// ---- the C border --------------------------------------------------------------------------------------------------
int nf4_cuda_dequantize(const Nf4Dequantize* work, void* on) {
  const auto stream = static_cast<cudaStream_t>(on);
  const bool nested = !work->absmax;
  if (work->dtype == NF4_F32) (nested ? dequantize<float, true> : dequantize<float, false>)(*work, stream);
  if (work->dtype == NF4_F16) (nested ? dequantize<__half, true> : dequantize<__half, false>)(*work, stream);
  if (work->dtype == NF4_BF16)
    (nested ? dequantize<__nv_bfloat16, true> : dequantize<__nv_bfloat16, false>)(*work, stream);
  return int(cudaGetLastError());
}

int nf4_cuda_quantize(const Nf4Quantize* work, void* on) {
  const auto stream = static_cast<cudaStream_t>(on);
  const int64_t blocks = ceil_div(work->n, int64_t(1) << work->block_shift);
  const unsigned size = grid(ceil_div(blocks, kWarps));
  if (work->dtype == NF4_F32) quantize_blocks<float><<<size, kThreads, 0, stream>>>(*work, blocks);
  if (work->dtype == NF4_F16) quantize_blocks<__half><<<size, kThreads, 0, stream>>>(*work, blocks);
  if (work->dtype == NF4_BF16) quantize_blocks<__nv_bfloat16><<<size, kThreads, 0, stream>>>(*work, blocks);
  return int(cudaGetLastError());
}

int nf4_cuda_quantize_absmax(const Nf4QuantizeAbsmax* work, void* on) {
  const int64_t blocks = ceil_div(work->n, int64_t(1) << kNf4NestedShift);
  quantize_absmax<<<grid(blocks), kThreads, 0, static_cast<cudaStream_t>(on)>>>(*work, blocks);
  return int(cudaGetLastError());
}

const char* nf4_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
