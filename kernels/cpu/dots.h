// Dots: plain numbers, a vector at a time, multiplied and summed in fp32: each by itself, or bfloat16 numbers in pairs.
#pragma once

#include "arrange.h"

namespace {  // each instruction set has its own

template <int32_t DTYPE>
struct Each {
  using V = F;
  static constexpr int COUNT = W, BYTES = W * (DTYPE == F32 ? 4 : 2);
  static V read(const void* x, int64_t i) { return numbers<DTYPE>(x, i); }
  static F more(V a, V b, F c) { return fma(a, b, c); }
};

// The faster of both.
template <int32_t DTYPE>
struct Dots : Each<DTYPE> {};

#if defined(__AVX512BF16__)
inline F dot(__m512i a, __m512i b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

template <>
struct Dots<BF16> {
  using V = __m512i;
  static constexpr int COUNT = 32, BYTES = 64;
  static V read(const void* x, int64_t i) { return _mm512_loadu_si512((const uint16_t*)x + i); }
  static F more(V a, V b, F c) { return dot(a, b, c); }
};
#endif

}  // namespace
