// cuda_on_cpu.h: as much of CUDA as csrc/nf4_cuda.cu takes, on a CPU: each thread of a block is a fiber, a block runs
// after the other. What a barrier or a shuffle waits for in vain, and a wide access to an address that is not aligned,
// is an error. Speed, races and the order of memory are a GPU's matter.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
using std::max;
using std::min;

// ---- threads -------------------------------------------------------------------------------------------------------
struct Index { unsigned x; };
inline Index threadIdx, blockIdx, gridDim;
constexpr int kStack = 64 << 10;
struct Fiber { ucontext_t context; bool done; std::unique_ptr<char[]> stack{new char[kStack]}; };
struct Meeting { int come = 0; unsigned round = 0; };
inline std::vector<Fiber> fibers(256);
inline ucontext_t scheduler;
inline const std::function<void()>* body;
inline Meeting of_block, of_warp[8];
inline uint32_t offered[2][256];
inline bool moved;             // some thread came to a barrier, left one or ended in this turn

inline void yield() {
  const unsigned self = threadIdx.x;
  swapcontext(&fibers[self].context, &scheduler);
  threadIdx.x = self;
}

inline void meet(Meeting& meeting, int all) {
  const unsigned round = meeting.round;
  moved = true;
  if (++meeting.come == all) meeting = {0, round + 1};
  while (meeting.round == round) yield();
  moved = true;
}

inline void __syncthreads() { meet(of_block, 256); }

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t x, int lane) {
  Meeting& warp = of_warp[threadIdx.x / 32];
  uint32_t* values = offered[warp.round % 2];       // the next round writes the other half
  values[threadIdx.x] = x;
  meet(warp, 32);
  return values[threadIdx.x ^ unsigned(lane)];
}

inline void run_fiber() {
  (*body)();
  fibers[threadIdx.x].done = moved = true;
}

inline void launch_on_cpu(unsigned blocks, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      fiber.done = false;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool left = true; left;) {
      left = moved = false;
      for (unsigned thread = 0; thread < fibers.size(); ++thread) {
        if (fibers[thread].done) continue;
        left = true;
        threadIdx.x = thread;
        swapcontext(&scheduler, &fibers[thread].context);
      }
      if (left && !moved) {
        std::fprintf(stderr, "threads wait for others that have ended or wait elsewhere\n");
        std::abort();
      }
    }
  }
}

// ---- values --------------------------------------------------------------------------------------------------------
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename To, typename From> To bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t __float_as_uint(float x) { return bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return bits<float>(x); }
template <typename T> T __ldg(const T* from) { return *from; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

struct __half { _Float16 value; };
struct __nv_bfloat16 { uint16_t value; };
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __half2float(__half x) { return float(x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t all = bits<uint32_t>(x);
  return {uint16_t(x != x ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return bits<float>(uint32_t(x.value) << 16); }
struct __half2 { __half x, y; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// ---- the runtime ---------------------------------------------------------------------------------------------------
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
