// Intrinsics: the few instructions that CUDA C++ has no words for.
//
// With EMULATED the sources are C++ for a CPU, and an emulator gives these and CUDA's own words.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE static __device__ __forceinline__

#ifdef EMULATED
#include "emulator.h"
#else

#if BF16 && __CUDA_ARCH__ < 800
#error "bfloat16 needs compute capability 8.0"
#endif

#define ALL_LANES 0xffffffffu

// The bits of a word under a mask, some of them flipped: one instruction, with what is constant in registers.
DEVICE u32 masked(u32 word, u32 mask, u32 flip) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(word), "r"(mask), "r"(flip));
    return d;
}

// a * b + c in pairs of halves, rounded once.
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

// a * b; adding a zero with a sign leaves the sign of a zero.
DEVICE u32 mul2(u32 a, u32 b) { return fma2(a, b, 0x80008000u); }

// sum [16, 8] = a [16, 16] b [16, 8], plus what sum was; halves into fp32. A lane holds what PTX says of m16n8k16.
DEVICE void mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, bool plus) {
    const float in[4] = {plus ? sum[0] : 0, plus ? sum[1] : 0, plus ? sum[2] : 0, plus ? sum[3] : 0};
#if __CUDA_ARCH__ < 800
    // Halves of 8: the fragments of both lie in the same order.
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(in[0]), "f"(in[1]), "f"(in[2]), "f"(in[3]));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
#if BF16
#define HALVES "bf16.bf16"
#else
#define HALVES "f16.f16"
#endif
    asm("mma.sync.aligned.m16n8k16.row.col.f32." HALVES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(in[0]), "f"(in[1]), "f"(in[2]), "f"(in[3]));
#endif
}

// What is read once: volatile, so that it stays as far ahead of its use as it is written.
DEVICE void load_once(u32 (&to)[4], const void* from) {
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

DEVICE void load_once(u32 (&to)[2], const void* from) {
    asm volatile("ld.global.cs.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}

// Eight halves, which other warps read too.
DEVICE void load(u32 (&to)[4], const u16* from) {
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

DEVICE void store(u16* to, const u32 (&from)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
}

DEVICE float float_of(u16 half) {
#if BF16
    return __uint_as_float(u32(half) << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
    return f;
#endif
}

DEVICE float float_of_f16(u16 half) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
    return f;
}

// To the nearest half, ties to even.
DEVICE u16 half_of(float f) {
    u16 half;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(f));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(f));
#endif
    return half;
}

DEVICE u32 halves_of(float low, float high) {
    return half_of(low) | u32(half_of(high)) << 16;
}

#endif
