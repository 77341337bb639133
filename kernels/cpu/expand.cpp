// Expand: rows of a packed weight as dense numbers: for products with many tokens, lookups, and whoever asks for the values.
//
// The values are those of QTensor.values, rounded once.
#include <stdlib.h>

#include "arrange.h"
#include "decode.h"
#include "scales.h"
#include "turns.h"

namespace {

U rounded(F v) {
  U bits = (U)v;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// The columns of a block of 2 W, of which the even and the odd ones are given.
template <int DTYPE>
void put_block(F even, F odd, char* out, int64_t at, int64_t count) {
  constexpr int size = DTYPE == F32 ? 4 : 2;
  alignas(64) char room[8 * W];
  char* to = count >= 2 * W ? out + at * size : room;
  if constexpr (DTYPE == BF16) {
    U pairs = rounded(even) | rounded(odd) << 16;
    memcpy(to, &pairs, sizeof pairs);
  } else {
    U low, high;
    for (uint32_t l = 0; l < W; l++) low[l] = l / 2 + l % 2 * W, high[l] = W / 2 + l / 2 + l % 2 * W;
    F parts[2] = {__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, high)};
    if constexpr (DTYPE == F32) {
      memcpy(to, parts, sizeof parts);
    } else {
#if defined(__AVX512F__)
      for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i*)to + i, _mm512_cvtps_ph(parts[i], 0));
#elif defined(__F16C__)
      for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i*)to + i, _mm256_cvtps_ph(parts[i], 0));
#else
      for (int i = 0; i < 2 * W; i++) ((uint16_t*)to)[i] = half_of(parts[i / W][i % W]);
#endif
    }
  }
  if (to == room) memcpy(out + at * size, room, size * count);
}

// Row r of a tile in a chunk. With BOTH a block of 2 W columns has two groups.
template <class D, int DTYPE, bool BOTH>
void put_row(const Weight& w, const uint16_t* words, const Context& with, int64_t c, int r, const float* scale, const float* shift,
             char* out) {
  F values[D::COLUMNS / W];
  decode_row<D>(words, with, values);
  for (int v = 0; v < D::COLUMNS / W; v += 2) {
    const int64_t column = c * D::COLUMNS + v * W, g = column >> w.shift;
    if (column >= w.columns) return;
    F s = BOTH ? halves(scale + g * 16, r) : splat(scale[g * 16 + r]);
    F even = values[v], odd = values[v + 1];
    if (shift) {
      F add = BOTH ? halves(shift + g * 16, r) : splat(shift[g * 16 + r]);
      even = w.minimum ? (even + with.middle) * s + add : (even + add) * s;
      odd = w.minimum ? (odd + with.middle) * s + add : (odd + add) * s;
    } else {
      even *= s, odd *= s;
    }
    put_block<DTYPE>(even, odd, out, column, w.columns - column);
  }
}

template <class D, int DTYPE, bool BOTH>
void put_rows(Rows& rows) {
  const Weight& w = *rows.weight;
  const Context with(w);
  const int64_t bytes = w.columns * (DTYPE == F32 ? 4 : 2);
  float* scale = (float*)aligned_alloc(64, 4 * 32 * w.groups);
  float* shift = w.zero || w.minimum ? scale + 16 * w.groups : nullptr;
  for (;;) {
    const int64_t from = __atomic_fetch_add(&rows.next, rows.index ? 1 : 16, __ATOMIC_RELAXED);
    if (from >= rows.count) break;
    const int64_t row = rows.index ? rows.index[from] : rows.first + from, tile = row / 16, lane = row % 16;
    const int64_t left = rows.count - from < 16 ? rows.count - from : 16, count = rows.index ? 1 : left;
    scales_of(w, tile, divisor_of(w, 0), scale);
    if (shift) added(w, tile, shift);
    for (int64_t c = 0; c < w.chunks; c++)
      for (int64_t r = 0; r < count; r++) {
        const uint16_t* at = w.tiles + ((tile * w.chunks + c) * 16 + lane + r) * D::WORDS;
        put_row<D, DTYPE, BOTH>(w, at, with, c, (int)(lane + r), scale, shift, (char*)rows.out + (from + r) * bytes);
      }
  }
  free(scale);
}

template <class D>
void put_all(Rows& rows) {
  const bool both = rows.weight->shift == 4 && W == 16;
  if (rows.dtype == F32) return both ? put_rows<D, F32, true>(rows) : put_rows<D, F32, false>(rows);
  if (rows.dtype == BF16) return both ? put_rows<D, BF16, true>(rows) : put_rows<D, BF16, false>(rows);
  return both ? put_rows<D, F16, true>(rows) : put_rows<D, F16, false>(rows);
}

void worker(void* given) {
  Rows& rows = *(Rows*)given;
  by_codes(*rows.weight, [&](auto codes) { put_all<decltype(codes)>(rows); });
}

}  // namespace

EXPORT void NAME(expand, ISA)(Rows* rows) {
  rows->next = 0;
  by_threads(*rows, worker, rows);
}
