// cuda_on_cpu.h: as much of CUDA as csrc/nf4_cuda.cu takes, on a CPU: each thread of a block is a fiber, a block runs
// after the other. A warp runs until it waits for the others, the last one first and in the next turn the first, and
// shared memory is filled with 0xff before each block: without a barrier, what low threads fill for all is read too
// early.
// What a barrier or a shuffle waits for in vain, and a wide access to an address that is not aligned, is an error.
// Speed and the order of memory are a GPU's matter.
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
#define __shared__ static __attribute__((section("cuda_shared")))
#define __launch_bounds__(...)
using std::max;
using std::min;

// ---- threads -------------------------------------------------------------------------------------------------------
struct Index { unsigned x; };
inline Index threadIdx, blockIdx, gridDim;
constexpr unsigned kBlock = 256, kWarp = 32, kStack = 64 << 10;
enum State { kRuns, kAtBlock, kAtWarp, kEnded };
struct Fiber { ucontext_t context; State state; uint32_t offered; std::unique_ptr<char[]> stack{new char[kStack]}; };
inline std::vector<Fiber> fibers(kBlock);
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline void wait(State where) {
  const unsigned self = threadIdx.x;
  fibers[self].state = where;
  swapcontext(&fibers[self].context, &scheduler);
  threadIdx.x = self;
}

inline void __syncthreads() { wait(kAtBlock); }

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t x, int lane) {
  const unsigned self = threadIdx.x;
  fibers[self].offered = x;
  wait(kAtWarp);
  const uint32_t found = fibers[self ^ unsigned(lane)].offered;
  wait(kAtWarp);                 // nobody offers anew before all have read
  return found;
}

// Whether all of [first, first + count) are in `state`; they then go on.
inline bool release(unsigned first, unsigned count, State state) {
  for (unsigned i = first; i < first + count; ++i)
    if (fibers[i].state != state) return false;
  for (unsigned i = first; i < first + count; ++i) fibers[i].state = kRuns;
  return true;
}

// A warp, up to where its threads wait for other warps, or end.
inline void run_warp(unsigned first, bool backwards) {
  do {
    for (unsigned i = 0; i < kWarp; ++i) {
      threadIdx.x = first + (backwards ? kWarp - 1 - i : i);
      if (fibers[threadIdx.x].state == kRuns) swapcontext(&scheduler, &fibers[threadIdx.x].context);
    }
    backwards = !backwards;
  } while (release(first, kWarp, kAtWarp));
}

inline void run_fiber() {
  (*body)();
  wait(kEnded);
}

extern "C" char __start_cuda_shared[], __stop_cuda_shared[];       // the linker's names for the section's ends

inline void run_block() {
  std::memset(__start_cuda_shared, 0xff, size_t(__stop_cuda_shared - __start_cuda_shared));
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = kRuns;
    makecontext(&fiber.context, run_fiber, 0);
  }
  bool backwards = true;         // at first: it is the low threads that fill what all read
  do {
    for (unsigned i = 0; i < kBlock; i += kWarp) run_warp(backwards ? kBlock - kWarp - i : i, backwards);
    backwards = !backwards;
  } while (release(0, kBlock, kAtBlock));
}

inline void launch_on_cpu(unsigned blocks, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    run_block();
    if (release(0, kBlock, kEnded)) continue;
    std::fprintf(stderr, "threads wait for others that have ended or wait elsewhere\n");
    std::abort();
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
