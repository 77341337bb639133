// The best of the instruction sets for which there are kernels, on the CPU at hand.

#include "weight.h"

EXPORT const char* isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return "avx512bf16";
  if (avx512) return "avx512";
  return avx2 ? "avx2" : "plain";
#elif defined(__ARM_NEON)
  return "neon";
#else
  return "plain";
#endif
}

EXPORT const char* sources() { return SOURCES; }
