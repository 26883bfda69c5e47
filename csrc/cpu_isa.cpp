// cpu_isa.cpp: the instruction sets of this CPU, by name and in order.
#include "cpu_isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
constexpr const char* kNames[5] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
#if defined(MINITUNE_TILES)
constexpr bool kTiles = true;       // attention.h is built
#else
constexpr bool kTiles = false;
#endif

#if defined(__x86_64__)
// Whether there are tile registers for bf16, and this process may use them: Linux wants to be asked, once and for all.
bool has_amx() {
#if defined(__linux__)
  constexpr int kPermit = 0x1023, kTileData = 18;      // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx >> 22 & 5u) != 5u) return false;    // BF16 and TILE
  return syscall(SYS_arch_prctl, kPermit, kTileData) == 0;
#else
  return false;
#endif
}

// Without tile registers: who asks for less gets by without that permission.
int best_isa() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2")) return ISA_PORTABLE;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return ISA_AVX2;
  const bool bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1u);
  return kTiles && bf16 ? ISA_AVX512_BF16 : ISA_AVX512;
}
#else
bool has_amx() { return false; }

int best_isa() { return ISA_PORTABLE; }
#endif
}  // namespace

// The variable is read at every call, so that a test can go through the paths within one process.
int cpu_isa(const char** error) {
  static const int plain = best_isa();
  thread_local char message[160];
  const char* asked = std::getenv("MINITUNE_CPU_ISA");
  int isa = ISA_AMX;
  if (asked && *asked)
    for (isa = ISA_PORTABLE; isa <= ISA_AMX && std::strcmp(asked, kNames[isa]);) ++isa;
  if (isa <= plain) return isa;
  if (isa == ISA_AMX) {
    static const bool tiles = plain == ISA_AVX512_BF16 && has_amx();
    if (tiles) return isa;
    if (!asked || !*asked) return plain;
  }
  *error = message;
  if (isa <= ISA_AMX)
    std::snprintf(message, sizeof message, "MINITUNE_CPU_ISA is %s, but no more than %s can be used here", asked,
                  kNames[plain]);
  else
    std::snprintf(message, sizeof message, "MINITUNE_CPU_ISA is '%.40s'; it must be portable, avx2, avx512, "
                  "avx512_bf16 or amx", asked);
  return -1;
}

int cpu_isa() {
  const char* error = "";
  const int isa = cpu_isa(&error);
  if (isa < 0) throw std::runtime_error(error);
  return isa;
}

const char* cpu_isa_name(int isa) { return kNames[isa]; }
