// Scales: those of a tile's 16 rows as fp32, and what zero points or minima add for each unit of a group's activations.
#pragma once

#include "arrange.h"

namespace {  // each instruction set has its own

// Numbers of a grid as fp32. Each loop has one dtype and no branch, so that compilers make vectors of it.
void stored(const void* from, int64_t at, int64_t count, int32_t dtype, float* out) {
  const uint8_t* bytes = (const uint8_t*)from + at;
  const uint16_t* words = (const uint16_t*)from + at;
  switch (dtype) {
    case F32:
      memcpy(out, (const float*)from + at, 4 * count);
      break;
    case BF16:
      for (int64_t i = 0; i < count; i++) out[i] = from_bits((uint32_t)words[i] << 16);
      break;
    case F16:
      for (int64_t i = 0; i < count; i++) out[i] = half_to_float(words[i]);
      break;
    case BYTE_E8M0:
      for (int64_t i = 0; i < count; i++) out[i] = from_bits(bytes[i] ? (uint32_t)bytes[i] << 23 : 0x00400000u);
      break;
    default:  // E4M3
      for (int64_t i = 0; i < count; i++)
        out[i] = from_bits((uint32_t)(int8_t)bytes[i] << 20 & 0x87f00000) * 0x1p120f;
  }
}

// Row r of two groups: that of the columns in the lower half of a vector, and of those in the upper.
inline F halves([[maybe_unused]] const float* s, [[maybe_unused]] int r) {
#if W == 16
  const S first = {0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
  return _mm512_permutex2var_ps(load(s), (__m512i)(first + r), load(s + 16));
#else
  return F{};  // others have no vectors of two groups
#endif
}

inline float divisor_of(const Weight& w, int64_t expert) { return w.divisor ? w.divisor[expert] : 1; }

void scales_of(const Weight& w, int64_t tile, float divisor, float* scale) {
  stored(w.scale, tile * w.groups * 16, w.groups * 16, w.scales, scale);
  for (int64_t i = 0; divisor != 1 && i < w.groups * 16; i++) scale[i] /= divisor;
}

// What decoded integers lack of what they are less their zero points; or minima.
void added(const Weight& w, int64_t tile, float* out) {
  const int64_t base = tile * w.groups * 16;
  if (w.minimum) return stored(w.minimum, base, w.groups * 16, w.scales, out);
  for (int64_t i = 0; i < w.groups * 16; i++) out[i] = (float)(w.middle - w.zero[base + i]);
}

// What a unit of a group's activations adds to products by decoded integers. Around the middle code it is small for minima, too.
void shifts_of(const Weight& w, int64_t tile, const float* scale, float* out) {
  added(w, tile, out);
  for (int64_t i = 0; i < w.groups * 16; i++) out[i] = w.minimum ? out[i] + scale[i] * (float)w.middle : out[i] * scale[i];
}

}  // namespace
