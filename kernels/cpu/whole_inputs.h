// Whole inputs: activations rounded to whole numbers of 8 or 4 bits.
//
// By token, as readers round them (numerics/inputs.py): every step is rounded to the activations' dtype. By spans of columns:
// s = peak / 127 in fp32, for weights whose scheme leaves activations as they are.
#pragma once

#include "arrange.h"

namespace {  // each instruction set has its own

struct Whole {
  int64_t padded, apart;  // columns, a multiple of 32; bytes from token to token
  int64_t spans;
  int span;               // columns whose products are summed as integers
  int8_t* q;              // [M, padded], rows `apart` bytes apart
  float* scale;           // [M, spans]
  int32_t* total;         // [M, spans]: sums of q
  float* lean;            // [M]: scale times zero point
};

inline float not_zero(float s, int32_t dtype) {
  return s != 0 ? s : dtype == F32 ? 0x1p-23f : dtype == BF16 ? 0x1p-7f : 0x1p-10f;
}

// The largest magnitude. NaN comes out as such, for its bits are the largest.
inline float peak(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return from_bits(most);
}

// To the nearest whole number, ties to even, as int8; for magnitudes below 2^22. Of NaN anything.
inline int8_t whole(float v) { return (int8_t)(uint8_t)(bits_of(v + 0x1.8p23f) & 0xff); }

template <int32_t DTYPE>
void divided(const float* x, int64_t count, float s, float z, float least, float most, int8_t* q) {
  for (int64_t i = 0; i < count; i++) {
    float v = as(x[i] / s, DTYPE);
    v = as(v + z, DTYPE);
    v = v < least ? least : v;
    q[i] = whole(v > most ? most : v);
  }
}

inline void divide(const float* x, int64_t count, float s, float z, int bits, int32_t dtype, int8_t* q) {
  const float least = -(float)(1 << (bits - 1)), most = -least - 1;
  if (dtype == F32) return divided<F32>(x, count, s, z, least, most, q);
  if (dtype == BF16) return divided<BF16>(x, count, s, z, least, most, q);
  divided<F16>(x, count, s, z, least, most, q);
}

// Rounds token m; `x` has room for its columns.
void round_token(const Work& work, const Rounding& how, int64_t columns, int64_t m, float* x, const Whole& out) {
  for (int64_t i = 0; i < columns; i++) x[i] = read(work.x, m * work.stride + i, work.dtype);
  int8_t* q = out.q + m * out.apart;
  float* scale = out.scale + m * out.spans;
  memset(q + columns, 0, out.padded - columns);
  if (how.span) {
    for (int64_t g = 0; g < out.spans; g++) {
      const int64_t from = g * out.span, left = columns - from, count = left < 0 ? 0 : left < out.span ? left : out.span;
      scale[g] = peak(x + from, count) / 127;
      divide(x + from, count, scale[g] != 0 ? scale[g] : 1, 0, 8, F32, q + from);
    }
  } else {
    const int32_t dtype = work.dtype;
    const float steps = (float)((1 << how.bits) - 1);
    float s, z = 0;
    if (how.asymmetric) {
      float low = 0, high = 0;
      for (int64_t i = 0; i < columns; i++) low = low < x[i] ? low : x[i], high = high > x[i] ? high : x[i];
      const float least = -(float)(1 << (how.bits - 1));
      const float most = peak(x, columns);
      s = most != most ? most : as(as(high - low, dtype) / steps, dtype);
      z = s == 0 ? 0 : as(least - as(low / s, dtype), dtype);
      z = z < least ? least : z > -least - 1 ? -least - 1 : z;
      z = z + 0x1.8p23f - 0x1.8p23f;
    } else {
      s = as(peak(x, columns) / (steps / 2), dtype);
    }
    s = not_zero(s, dtype);
    divide(x, columns, s, z, how.bits, dtype, q);
    for (int64_t g = 0; g < out.spans; g++) scale[g] = s;
    out.lean[m] = s * z;
  }
  for (int64_t g = 0; g < out.spans; g++) {
    const int64_t from = g * out.span, until = from + out.span < out.padded ? from + out.span : out.padded;
    int32_t sum = 0;
    for (int64_t k = from; k < until; k++) sum += q[k];
    out.total[m * out.spans + g] = sum;
  }
}

}  // namespace
