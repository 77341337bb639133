// Vector: the few operations on vectors of fp32 that differ between instruction sets. W is the number of fp32 in a vector.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define W 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define W 8
#elif defined(__ARM_NEON) && !defined(PORTABLE)
#include <arm_neon.h>
#define NEON
#define W 4
#else
#define W 4
#endif

namespace {  // each instruction set has its own

typedef float F __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t S __attribute__((vector_size(4 * W)));
typedef uint16_t Narrow __attribute__((vector_size(2 * W)));
typedef F Unaligned __attribute__((aligned(4)));

inline F splat(float v) { return v - F{}; }
inline F load(const float* p) { return *(const Unaligned*)p; }
inline void store(float* p, F v) { *(Unaligned*)p = v; }
inline U words(const uint16_t* p) {  // words in pairs, the even one in the low half
  U v;
  memcpy(&v, p, sizeof v);
  return v;
}

// So many bytes, half or a quarter of a vector, and anything behind them. Copied to a vector in memory they would be waited for.
template <int BYTES>
U beginning(const void* p) {
#if defined(__AVX512F__)
  if constexpr (BYTES == 32) return (U)_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return (U)_mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  if constexpr (BYTES == 16) return (U)_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return (U)_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)p));
#else
  U v{};
  memcpy(&v, p, BYTES);
  return v;
#endif
}

// W neighbouring numbers of 16 bits as 32; compilers make several operations of a conversion.
inline U widened(const uint16_t* p) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  Narrow h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, U);
#endif
}

inline F number(U v) { return __builtin_convertvector((S)v, F); }  // below 2^31

// The upper halves of fp32 numbers, which are all of them where they are bfloat16 numbers: the even ones in the low halves.
inline U joined(F even, F odd) { return (U)even >> 16 | ((U)odd & 0xffff0000u); }

inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(NEON)
  return vfmaq_f32(c, a, b);
#else
  F d;
  for (int i = 0; i < W; i++) d[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return d;
#endif
}

// A table of 16 fp32, looked up by the low four bits of each lane.
struct Table {
#if defined(__AVX512F__)
  F values;
  explicit Table(const float* t) : values(load(t)) {}
  F at(U code) const { return _mm512_permutexvar_ps((__m512i)code, values); }
#elif defined(__AVX2__)
  F low, high;
  explicit Table(const float* t) : low(load(t)), high(load(t + 8)) {}
  F at(U code) const {
    F upper = _mm256_permutevar8x32_ps(high, (__m256i)code), lower = _mm256_permutevar8x32_ps(low, (__m256i)code);
    return _mm256_blendv_ps(lower, upper, (__m256)(code << 28));
  }
#elif defined(NEON)
  uint8x16x4_t bytes;
  explicit Table(const float* t) : bytes(vld1q_u8_x4((const uint8_t*)t)) {}
  F at(U code) const { return (F)vqtbl4q_u8(bytes, (uint8x16_t)((code & 15) * 0x04040404u + 0x03020100u)); }
#else
  const float* values;
  explicit Table(const float* t) : values(t) {}
  F at(U code) const {
    F found;
    for (int i = 0; i < W; i++) found[i] = values[code[i] & 15];
    return found;
  }
#endif
};

// fp16 numbers in the high halves of lanes, whose low halves are ignored, as fp32.
inline F from_half(U v) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(v >> 16)));
#elif defined(__AVX2__)
  __m256i t = (__m256i)(v >> 16);
  t = _mm256_permute4x64_epi64(_mm256_packus_epi32(t, t), 0xd8);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(t));
#else
  U sign = v & 0x80000000u, bits = (v & 0x7fff0000u) >> 3;
  F plain = (F)bits * splat(0x1p112f);  // exact, and also for what has no leading one
  U kept = (U)plain;
  U special = (bits >= 0x0f800000u) & ((bits & 0x007fffffu) | 0x7f800000u);
  kept = (kept & ~(U)(bits >= 0x0f800000u)) | special;
  return (F)(kept | sign);
#endif
}

inline F chosen(S first, F a, F b) { return (F)(((U)a & (U)first) | ((U)b & ~(U)first)); }

// exp(x) for x <= 0 to 1e-7 of it, and 0 below -87; a NaN stays one.
inline F exponential(F x) {
  const F low = splat(-87.0f);
  const S below = x < low;
  x = chosen(below, low, x);
  const F moved = fma(x, splat(1.44269504f), splat(12582912.0f)), n = moved - splat(12582912.0f);  // rounds to an integer
  const F r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F p = splat(1.0f / 5040);
  for (float factor : factors) p = fma(p, r, splat(factor));
  const S power = ((S)moved - (S)splat(12582912.0f) + 127) << 23;
  return chosen(below, F{}, p * (F)power);
}

// The sums of 16 accumulators.
inline void sums(const F* from, float* out) {
#if W == 16
  F a[16];
  for (int i = 0; i < 16; i++) a[i] = from[i];
  for (int i = 0; i < 8; i++) {  // 16 lanes of each become 8 of two
    F low = __builtin_shuffle(a[i], a[i + 8], (U){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
    F high = __builtin_shuffle(a[i], a[i + 8], (U){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    a[i] = low + high;
  }
  for (int i = 0; i < 4; i++) {
    F low = __builtin_shuffle(a[i], a[i + 4], (U){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27});
    F high = __builtin_shuffle(a[i], a[i + 4], (U){4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
    a[i] = low + high;
  }
  for (int i = 0; i < 2; i++) {
    F low = __builtin_shuffle(a[i], a[i + 2], (U){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
    F high = __builtin_shuffle(a[i], a[i + 2], (U){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    a[i] = low + high;
  }
  F low = __builtin_shuffle(a[0], a[1], (U){0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30});
  F high = __builtin_shuffle(a[0], a[1], (U){1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
  // Lane 8 i + 4 j + 2 k + l has row 8 i + 4 j + 2 k + l.
  store(out, low + high);
#else
  for (int i = 0; i < 16; i++) {
    F v = from[i];
    float sum = 0;
    for (int j = 0; j < W; j++) sum += v[j];
    out[i] = sum;
  }
#endif
}

}  // namespace
