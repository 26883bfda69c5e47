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
constexpr int kWords = 4;                  // words of 8 values that a thread has in flight
constexpr int kTile = kThreads * kWords;   // words that a thread block does at a time
constexpr int64_t kBlocksPerSm = 8;        // as many of kThreads as are resident on most GPUs
constexpr int64_t kMaxWords = 1u << 31;    // of the fast path: an index into words and a step beyond it fit 32 bits

int64_t ceil_div(int64_t n, int64_t by) { return n / by + (n % by != 0); }

// Thread blocks for `tiles`, which they go through in equally many rounds: what a block fills its tables for is then
// worth it, and none is left over alone.
unsigned grid(int64_t tiles) {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || processors < 1)
    processors = 1;
  return unsigned(ceil_div(tiles, ceil_div(tiles, kBlocksPerSm * processors)));
}

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

// The fast path: columns and pitch are multiples of 8, out lies at a multiple of 16 bytes, n words of 8 values in all.
template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads) dequantize_words(const Nf4Dequantize work, uint32_t n) {
  __shared__ Tables<kNested> tables;
  const float offset = load(tables, work);
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(work.packed);
  const uint32_t words = uint32_t(work.columns >> 3);          // of a row
  const int64_t gap = work.pitch - work.columns;
  for (uint32_t first = blockIdx.x * kTile + threadIdx.x; first < n; first += gridDim.x * kTile) {
    uint32_t word[kWords];
    float scale[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) {     // past the end the last word is read again, and not written
      const uint32_t at = min(first + k * kThreads, n - 1);
      word[k] = __ldg(packed + at);
      scale[k] = scale_of(tables, work, offset, at >> (work.block_shift - 3));
    }
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const uint32_t at = first + k * kThreads;
      if (at >= n) break;
      const uint32_t row = work.rows == 1 ? 0 : at / words;
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)          // within a byte the high half comes first
        x[i] = __fmul_rn(tables.levels[(word[k] >> (8 * (i / 2) + (i % 2 ? 0 : 4))) & 15], scale[k]);
      put8(static_cast<T*>(work.out) + 8 * int64_t(at) + row * gap, x);
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
  const int64_t n = work.rows * work.columns, words = n / 8;
  if (work.columns % 8 == 0 && work.pitch % 8 == 0 && aligned(work.out, 16) && aligned(work.packed, 4) &&
      words <= kMaxWords)
    dequantize_words<T, kNested><<<grid(ceil_div(words, kTile)), kThreads, 0, stream>>>(work, uint32_t(words));
  else
    dequantize_values<T, kNested><<<grid(ceil_div(n, kThreads)), kThreads, 0, stream>>>(work);
}

// ---- quantise ------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(__half x) { return __half2float(x); }
__device__ __forceinline__ float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }

// As integers: a NaN is larger than every number, so it is handed on.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Of `lanes` neighbours, a power of two.
__device__ __forceinline__ uint32_t largest_of(int lanes, uint32_t x) {
  for (int lane = lanes / 2; lane; lane >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, lane));
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

__device__ __forceinline__ void fill(float (&midpoints)[16], const float* table) {
  const int i = threadIdx.x;
  if (i < 16) midpoints[i] = between(table[max(i, 1) - 1], table[i]);
  __syncthreads();
}

// Eight values by loads of 16 bytes.
template <typename T>
__device__ __forceinline__ void get8(float (&x)[8], const T* from) {
  union { uint4 loaded; T values[8]; } eight = {__ldg(reinterpret_cast<const uint4*>(from))};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = value_of(eight.values[i]);
}
__device__ __forceinline__ void get8(float (&x)[8], const float* from) {
  const float4* halves = reinterpret_cast<const float4*>(from);
  const float4 low = __ldg(halves), high = __ldg(halves + 1);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// The fast path: full blocks, of values that lie at a multiple of 16 bytes. A lane has 8 values, so 2^lanes_shift lanes
// do a block; those larger than a warp's 256 values take rounds, and are read twice.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_full(const Nf4Quantize work, int64_t blocks) {
  __shared__ float midpoints[16];
  fill(midpoints, work.table);
  const int lanes_shift = min(work.block_shift - 3, 5), lane = threadIdx.x & ((1 << lanes_shift) - 1);
  const int rounds = 1 << (work.block_shift - 3 - lanes_shift);
  const int at_once = kThreads >> lanes_shift;           // blocks that a thread block does at a time
  for (int64_t begin = int64_t(blockIdx.x) * at_once; begin < blocks; begin += int64_t(gridDim.x) * at_once) {
    const int64_t block = begin + (threadIdx.x >> lanes_shift);
    const bool there = block < blocks;     // a lane without a block takes part in the exchange all the same
    const int64_t first = (block << work.block_shift) + 8 * lane;
    const T* values = static_cast<const T*>(work.values) + first;
    float x[8];
    uint32_t most = 0;
    for (int round = 0; there && round < rounds; ++round) {
      get8(x, values + 256 * round);
#pragma unroll
      for (int i = 0; i < 8; ++i) most = max(most, magnitude(x[i]));
    }
    const float absmax = __uint_as_float(largest_of(1 << lanes_shift, most));
    const float inverse = __fdiv_rn(1.0f, at_least_tiny(absmax));
    for (int round = 0; there && round < rounds; ++round) {
      if (rounds > 1) get8(x, values + 256 * round);
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i)          // within a byte the high half comes first
        word |= code_of<16>(__fmul_rn(x[i], inverse), midpoints) << (8 * (i / 2) + (i % 2 ? 0 : 4));
      reinterpret_cast<uint32_t*>(work.packed)[(first >> 3) + 32 * round] = word;
    }
    if (there && lane == 0) work.absmax[block] = absmax;
  }
}

// Blocks from `begin` on, wherever they lie; a warp does one. A last block that is not full is divided, and its absmax
// stored as it divides.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_any(const Nf4Quantize work, int64_t begin, int64_t blocks) {
  __shared__ float midpoints[16];
  fill(midpoints, work.table);
  const int lane = threadIdx.x % 32;
  for (int64_t block = begin + int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; block < blocks;
       block += int64_t(gridDim.x) * kWarps) {
    const int64_t first = block << work.block_shift;
    const int whole = 1 << work.block_shift, size = int(min(int64_t(whole), work.n - first));
    const T* values = static_cast<const T*>(work.values) + first;
    uint32_t most = 0;
    for (int i = lane; i < size; i += 32) most = max(most, magnitude(value_of(values[i])));
    const float absmax = __uint_as_float(largest_of(32, most)), divisor = at_least_tiny(absmax);
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

template <typename T>
void quantize(const Nf4Quantize& work, cudaStream_t stream) {
  const int64_t blocks = ceil_div(work.n, int64_t(1) << work.block_shift);
  const int64_t full = aligned(work.values, 16) && aligned(work.packed, 4) ? work.n >> work.block_shift : 0;
  const int at_once = kThreads >> std::min(work.block_shift - 3, 5);
  if (full) quantize_full<T><<<grid(ceil_div(full, at_once)), kThreads, 0, stream>>>(work, full);
  if (full < blocks)
    quantize_any<T><<<grid(ceil_div(blocks - full, kWarps)), kThreads, 0, stream>>>(work, full, blocks);
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
    const uint32_t of_warp = largest_of(32, magnitude(centred));
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
  if (work->dtype == NF4_F32) quantize<float>(*work, stream);
  if (work->dtype == NF4_F16) quantize<__half>(*work, stream);
  if (work->dtype == NF4_BF16) quantize<__nv_bfloat16>(*work, stream);
  return int(cudaGetLastError());
}

int nf4_cuda_quantize_absmax(const Nf4QuantizeAbsmax* work, void* on) {
  const int64_t blocks = ceil_div(work->n, int64_t(1) << kNf4NestedShift);
  quantize_absmax<<<grid(blocks), kThreads, 0, static_cast<cudaStream_t>(on)>>>(*work, blocks);
  return int(cudaGetLastError());
}

const char* nf4_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
