// Arrange: activations in the order in which decoded columns come, padded with zeros; and what becomes of results.
#pragma once

#include "vector.h"
#include "weight.h"

namespace {  // each instruction set has its own

inline float from_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

inline float half_to_float(uint16_t h) {
  const uint32_t bits = (uint32_t)(h & 0x7fff) << 13, special = bits >= 0x0f800000u ? 0x7f800000u : 0;
  const uint32_t plain = bits_of(from_bits(bits) * 0x1p112f);  // exact, and also for what has no leading one
  return from_bits(plain | special | (uint32_t)(h & 0x8000) << 16);
}

inline uint16_t bf16_of(float v) {  // to nearest, ties to even
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_of(float v) {  // to nearest, ties to even
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000u) return (uint16_t)(sign | (bits_of(from_bits(rest) + 0.5f) - 0x3f000000u));  // the sum's last bits
  return (uint16_t)(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000u) >> 13));
}

inline float read(const void* x, int64_t i, int32_t dtype) {
  if (dtype == F32) return ((const float*)x)[i];
  uint16_t h = ((const uint16_t*)x)[i];
  return dtype == BF16 ? from_bits((uint32_t)h << 16) : half_to_float(h);
}

inline void write(void* x, int64_t i, float v, int32_t dtype) {
  if (dtype == F32)
    ((float*)x)[i] = v;
  else
    ((uint16_t*)x)[i] = dtype == BF16 ? bf16_of(v) : half_of(v);
}

// Rounded to a dtype.
inline float as(float v, int32_t dtype) {
  return dtype == F32 ? v : dtype == BF16 ? from_bits((uint32_t)bf16_of(v) << 16) : half_to_float(half_of(v));
}

// W neighbouring numbers as fp32.
template <int32_t DTYPE>
F numbers(const void* x, int64_t i) {
  if (DTYPE == F32) return load((const float*)x + i);
  const U high = widened((const uint16_t*)x + i) << 16;
  return DTYPE == BF16 ? (F)high : from_half(high);
}

// The columns from `from` on of a chunk, padded with zeros, as fp32; if `split`, of each 2 W the even ones, then the odd ones.
void arranged(const Work& work, int64_t m, int64_t from, int64_t count, int64_t padded, bool split, float* out) {
  const int64_t base = m * work.stride + from;
  float plain[256] = {};
  float* to = split ? plain : out;
  if (work.dtype == F32)
    memcpy(to, (const float*)work.x + base, 4 * count);
  else if (work.dtype == BF16)
    for (int64_t i = 0; i < count; i++) to[i] = from_bits((uint32_t)((const uint16_t*)work.x)[base + i] << 16);
  else
    for (int64_t i = 0; i < count; i++) to[i] = half_to_float(((const uint16_t*)work.x)[base + i]);
  for (int64_t i = count; i < padded; i++) to[i] = 0;
  for (int64_t block = 0; split && block < padded; block += 2 * W)
    for (int i = 0; i < W; i++) out[block + i] = plain[block + 2 * i], out[block + W + i] = plain[block + 2 * i + 1];
}

void copied(const Work& work, int64_t m, int64_t from, int64_t count, int64_t padded, uint16_t* out) {
  memcpy(out, (const uint16_t*)work.x + m * work.stride + from, 2 * count);
  memset(out + count, 0, 2 * (padded - count));
}

// Sums of the activations of each group.
void totalled(const Work& work, int64_t m, const Weight& w, float* out) {
  const int64_t group = w.shift >= 31 ? w.columns : (int64_t)1 << w.shift;
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t from = g * group, until = from + group < w.columns ? from + group : w.columns;
    float sum = 0;
    for (int64_t k = from; k < until; k++) sum += read(work.x, m * work.stride + k, work.dtype);
    out[g] = sum;
  }
}

void add_outliers(const Weight& w, const Work& work, int64_t m, int64_t row, int rows, float* out) {
  const uint16_t* narrow = (const uint16_t*)w.outlier_columns;
  const int32_t* wide = (const int32_t*)w.outlier_columns;
  for (int r = 0; r < rows; r++)
    for (int32_t i = w.outlier_offsets[row + r]; i < w.outlier_offsets[row + r + 1]; i++)
      out[r] += w.outliers[i] * read(work.x, m * work.stride + (w.wide ? wide[i] : narrow[i]), work.dtype);
}

// W numbers into neighbours of a dtype.
template <int32_t DTYPE>
void put_numbers(void* x, int64_t i, F v) {
  if (DTYPE == F32) return store((float*)x + i, v);
  const U bits = (U)v, plain = bits + 0x7fff + (bits >> 16 & 1), special = (U)((bits & 0x7fffffffu) > 0x7f800000u);
  const Narrow h = __builtin_convertvector(((plain & ~special) | ((bits | 0x400000) & special)) >> 16, Narrow);
  memcpy((uint16_t*)x + i, &h, sizeof h);
}

template <int32_t DTYPE>
void put_tile(const Work& work, int64_t at, int64_t row, const float* sums) {
  for (int r = 0; r < 16; r += W) {
    F v = load(sums + r);
    if (work.bias) v += numbers<DTYPE>(work.bias, row + r);
    put_numbers<DTYPE>(work.out, at + r, v);
  }
}

void put(const Work& work, int64_t at, int64_t row, const float* sums, int rows) {
  if (rows == 16 && work.dtype == BF16) return put_tile<BF16>(work, at, row, sums);
  if (rows == 16 && work.dtype == F32) return put_tile<F32>(work, at, row, sums);
  for (int r = 0; r < rows; r++)
    write(work.out, at + r, sums[r] + (work.bias ? read(work.bias, row + r, work.dtype) : 0), work.dtype);
}

}  // namespace
