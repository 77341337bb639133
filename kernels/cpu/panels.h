// Panels: products with more tokens. A vector has rows of a tile, so that a token's activation is one number for all of them, a
// group's sum takes its scales once, and nothing is summed within vectors.
//
// The words of a tile's chunk are transposed once, and their codes decoded once, for all tokens. In pairs (bfloat16 numbers) a
// vector has two neighbouring columns of each row, else one.
#pragma once

#include "pairs.h"

namespace {  // each instruction set has its own

constexpr int NV = W == 16 ? 2 : 16 / W;              // vectors of rows at a time: two tiles, or one
constexpr int TILES = NV * W / 16;                    // tiles at a time
constexpr int BLOCK = W == 16 ? 12 : W == 8 ? 6 : 4;  // the most tokens whose sums are in registers
constexpr int SPAN = 256;                             // columns of a panel

// What a panel has: fp32 numbers; pairs; or pairs with their scales in them, so that there are no groups to sum.
enum Form { SINGLE, PAIRED, SCALED };

template <Form FORM>
struct Panel {
  static constexpr int STEPS = SPAN / (FORM == SINGLE ? 1 : 2);  // the products that it takes
  F values[STEPS][NV];
};

template <int D>
void exchange(U* a) {  // the halves of 2 D x 2 D squares that are off the diagonal
  U low, high;
  for (uint32_t l = 0; l < W; l++) low[l] = l & D ? W + l - D : l, high[l] = l & D ? W + l : l + D;
  for (int i = 0; i < W; i++)
    if (!(i & D)) {
      U first = a[i], second = a[i + D];
      a[i] = __builtin_shuffle(first, second, low), a[i + D] = __builtin_shuffle(first, second, high);
    }
}

// COUNT dwords of 16 rows, as vectors of rows.
template <int COUNT>
void transposed(const uint16_t* rows, int words, U (*out)[16 / W]) {
  for (int v = 0; v < 16 / W; v++)
    for (int from = 0; from < COUNT; from += W) {
      constexpr int bytes = 4 * (COUNT < W ? COUNT : W);
      U a[W] = {};
      for (int r = 0; r < W; r++) memcpy(&a[r], rows + (v * W + r) * words + 2 * from, bytes);
      exchange<1>(a);
      exchange<2>(a);
      if constexpr (W > 4) exchange<4>(a);
      if constexpr (W > 8) exchange<8>(a);
      for (int i = 0; i < bytes / 4; i++) out[from + i][v] = a[i];
    }
}

template <class D, Form FORM>
struct Decoded {
  using Values = Context;
};
#if defined(__AVX512BF16__)
template <class D>
struct Decoded<D, PAIRED> {
  using Values = AsPairs<D>;
};
#endif

// A chunk of a tile, into vector `at` of the steps of a panel from `step` on. Columns k have their scales at (k >> shift) * 16.
template <class D, Form FORM>
void decode_tile(const uint16_t* tile, const typename Decoded<D, FORM>::Values& with, [[maybe_unused]] const float* scale,
                 [[maybe_unused]] int shift, int step, int at, Panel<FORM>& out) {
  U low[16][16 / W], high[16][16 / W];
  transposed<16>(tile, D::WORDS, low);
  if constexpr (D::PAIRS) transposed<16 / D::PAIRS>(tile + 32, D::WORDS, high);
  for (int i = 0; i < 16; i++)
    for (int v = 0; v < 16 / W; v++) {
      U more{};
      if constexpr (D::PAIRS) more = D::upper(high[i / D::PAIRS][v], U{} + (uint32_t)(i % D::PAIRS));
#if defined(__AVX512BF16__)
      if constexpr (FORM == PAIRED) {
        const __m512i upper = AsPairs<D>::by_words(more);
        for (int p = 0; p < D::PLANES; p++) out.values[step + 16 * p + i][at] = (F)with.value((__m512i)low[i][v], upper, p);
      } else
#endif
      for (int p = 0; p < D::PLANES; p++) {
        F even = D::value(low[i][v], more, p, false, with), odd = D::value(low[i][v], more, p, true, with);
        if constexpr (FORM == SINGLE) {
          out.values[step + 32 * p + 2 * i][at + v] = even;
          out.values[step + 32 * p + 2 * i + 1][at + v] = odd;
        }
#if defined(__AVX512BF16__)
        if constexpr (FORM == SCALED) {
          const F s = load(scale + ((32 * p + 2 * i) >> shift) * 16);
          out.values[step + 16 * p + i][at] = (F)rounded_pairs(even * s, odd * s);
        }
#endif
      }
    }
}

// T tokens by the first `all` steps of a panel: `x` has a token's numbers every STEPS dwords, `scales` a row for each group, which
// has `steps`; totals [T, NV].
template <Form FORM, int T>
void multiply(const Panel<FORM>& panel, const float* x, const F (*scales)[NV], int steps, int all, F* totals) {
  constexpr int STEPS = Panel<FORM>::STEPS;
  for (int from = 0; from < all; from += steps, scales++) {
    F sums[T][NV] = {};
    asm volatile("" ::: "memory");  // else compilers move totals to the stack and back for every call
    const int until = from + steps < all ? from + steps : all;
    for (int k = from; k < until; k++)
      for (int t = 0; t < T; t++)
        for (int v = 0; v < NV; v++) {
#if defined(__AVX512BF16__)
          if constexpr (FORM != SINGLE) {
            sums[t][v] = dot((__m512i)panel.values[k][v], (__m512i)splat(x[t * STEPS + k]), sums[t][v]);
            continue;
          }
#endif
          sums[t][v] = fma(panel.values[k][v], splat(x[t * STEPS + k]), sums[t][v]);
        }
    for (int t = 0; t < T; t++)
      for (int v = 0; v < NV; v++) totals[t * NV + v] = fma(sums[t][v], (*scales)[v], totals[t * NV + v]);
  }
}

// Up to T tokens at a time, as evenly as can be.
template <Form FORM, int T = BLOCK>
void multiply_some(int tokens, const Panel<FORM>& panel, const float* x, const F (*scales)[NV], int steps, int all, F* totals) {
  if (tokens == T) return multiply<FORM, T>(panel, x, scales, steps, all, totals);
  if constexpr (T > 1) multiply_some<FORM, T - 1>(tokens, panel, x, scales, steps, all, totals);
}

// The products of TILES tiles for the tokens from `first` on: totals [tokens, 16 TILES]. `scale` has those of the tiles, which
// are `apart` numbers apart; `tiles` is how many there are, for the last may be alone.
template <class D, Form FORM>
void add_panels(const Job& job, const uint16_t* tile, int tiles, const float* scale, int64_t apart, int64_t first, int count, F* totals) {
  constexpr int STEPS = Panel<FORM>::STEPS, CHUNKS = SPAN / D::COLUMNS, EACH = STEPS / CHUNKS;
  const Weight& w = job.weight;
  const typename Decoded<D, FORM>::Values with(w);
  const int group = w.shift >= 8 || FORM == SCALED ? SPAN : 1 << w.shift, steps = group * STEPS / SPAN;
  const int blocks = (count + BLOCK - 1) / BLOCK;
  Panel<FORM> panel{};
  for (int64_t c = 0; c < w.chunks; c += CHUNKS) {
    const int chunks = w.chunks - c < CHUNKS ? (int)(w.chunks - c) : CHUNKS, groups = (chunks * D::COLUMNS + group - 1) / group;
    F scales[SPAN / 16][NV] = {};
    const int64_t g = c * D::COLUMNS >> w.shift;
    for (int t = 0; t < tiles; t++) {
      for (int i = 0; i < chunks; i++) {
        const float* s = scale + t * apart + ((c + i) * D::COLUMNS >> w.shift) * 16;
        decode_tile<D, FORM>(tile + t * job.words + (c + i) * 16 * D::WORDS, with, s, w.shift, i * EACH, t * (16 / W), panel);
      }
      for (int i = 0; i < groups; i++)
        for (int v = 0; v < 16 / W; v++)
          scales[i][t * (16 / W) + v] = FORM == SCALED ? splat(1) : load(scale + t * apart + (g + i) * 16 + v * W);
    }
    // Columns beyond the last one are left out.
    const int64_t left = ((w.columns - c * D::COLUMNS) * STEPS + SPAN - 1) / SPAN;
    const int all = left < chunks * EACH ? (int)left : chunks * EACH;
    const float* x = (const float*)job.x + (c / CHUNKS * job.work.tokens + first) * STEPS;
    for (int b = 0, m = 0, next; b < blocks; b++, m = next) {
      next = count * (b + 1) / blocks;
      multiply_some<FORM>(next - m, panel, x + m * STEPS, scales, steps, all, totals + m * NV);
    }
  }
}

using AddPanels = void (*)(const Job&, const uint16_t*, int, const float*, int64_t, int64_t, int, F*);

AddPanels panels_for(const Weight& w, [[maybe_unused]] Form form) {
  return by_codes(w, [=](auto codes) -> AddPanels {
    using D = decltype(codes);
#if defined(__AVX512BF16__)
    if (form == SCALED) return add_panels<D, SCALED>;
    if (form == PAIRED) return add_panels<D, PAIRED>;
#endif
    return add_panels<D, SINGLE>;
  });
}

}  // namespace
