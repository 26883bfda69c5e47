// cpu_isa.h: which instruction set the ops of a CPU take now: the best of this machine, or what MINITUNE_CPU_ISA lowers
// it to.
#pragma once

// Each has all that those before it have. The last two: where MINITUNE_TILES is built.
enum CpuIsa : int { ISA_PORTABLE, ISA_AVX2, ISA_AVX512, ISA_AVX512_BF16, ISA_AMX };

// -1 where MINITUNE_CPU_ISA cannot be met, and then *error says why, until the next call on this thread.
int cpu_isa(const char** error);
int cpu_isa();                          // the same, which throws std::runtime_error
const char* cpu_isa_name(int isa);
