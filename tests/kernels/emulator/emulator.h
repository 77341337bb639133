// Emulator: CUDA's words, and the twin of intrinsics.cuh, for C++ on a CPU.
#pragma once

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared")))
#define ALL_LANES 0xffffffffu

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Place { u32 x, y, z; };

extern "C" {
extern Place threadIdx, blockIdx, gridDim;
void __syncthreads();
float __shfl_xor_sync(u32 lanes, float value, int apart);
u32 __byte_perm(u32 low, u32 high, u32 selector);
u32 emulated_fma2(u32 a, u32 b, u32 c, bool bfloat);
void emulated_mma(float* sum, const u32* a, const u32* b, int depth, bool bfloat);
float emulated_float(u16 half, bool bfloat);
u16 emulated_half(float value, bool bfloat);
void emulated_load(void* to, const void* from, int bytes);

extern char __start_shared[] __attribute__((weak)), __stop_shared[] __attribute__((weak));
// What a block finds in shared memory is nothing that it may use.
inline __attribute__((used, visibility("default"))) void spoil() {
    for (char* at = __start_shared; at < __stop_shared; at++) *at = char(0xff);
}
}

static inline int min(int a, int b) { return a < b ? a : b; }
static inline float __uint_as_float(u32 word) { return __builtin_bit_cast(float, word); }
static inline u32 __float_as_uint(float value) { return __builtin_bit_cast(u32, value); }

static inline u32 masked(u32 word, u32 mask, u32 flip) { return (word & mask) ^ flip; }
static inline u32 fma2(u32 a, u32 b, u32 c) { return emulated_fma2(a, b, c, BF16); }
static inline u32 mul2(u32 a, u32 b) { return emulated_fma2(a, b, 0x80008000u, BF16); }
static inline void load_once(u32 (&to)[4], const void* from) { emulated_load(to, from, 16); }
static inline void load_once(u32 (&to)[2], const void* from) { emulated_load(to, from, 8); }
static inline void load(u32 (&to)[4], const u16* from) { emulated_load(to, from, 16); }
static inline void store(u16* to, const u32 (&from)[4]) { *reinterpret_cast<uint4*>(to) = {from[0], from[1], from[2], from[3]}; }
static inline float float_of(u16 half) { return emulated_float(half, BF16); }
static inline float float_of_f16(u16 half) { return emulated_float(half, false); }
static inline u16 half_of(float value) { return emulated_half(value, BF16); }
static inline u32 halves_of(float low, float high) { return half_of(low) | u32(half_of(high)) << 16; }

static inline void mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, bool plus) {
    for (float& each : sum) each = plus ? each : 0;
    const u32 b[2] = {b0, b1};
#ifdef TURING
    emulated_mma(sum, a, b, 8, BF16);
    emulated_mma(sum, a + 2, b + 1, 8, BF16);
#else
    emulated_mma(sum, a, b, 16, BF16);
#endif
}
