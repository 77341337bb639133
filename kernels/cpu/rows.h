// Rows: products with few tokens. A vector has columns of one row, so a tile is read in the order in which it lies in memory.
#pragma once

#include "pairs.h"

namespace {  // each instruction set has its own

constexpr int AHEAD = 48;  // rows of chunks that memory is asked for beforehand

// How a row of a chunk is multiplied: V its values in vectors, EACH of them to a group; with BOTH a vector has two groups.
template <class D, int FOLD>
struct Whole {
  using V = F;
  using Decoded = D;
  static constexpr int PER = 32 / W, VECTORS = D::PLANES * PER, EACH = FOLD ? FOLD * PER : PER > 2 ? PER / 2 : 2;
  static constexpr bool BOTH = !FOLD && PER == 2;
  const Context with;
  explicit Whole(const Weight& w) : with(w) {}
  void decode(const uint16_t* row, V* out) const { decode_row<D>(row, with, out); }
  static F first(V a, V b) { return a * b; }
  static F more(V a, V b, F c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// Products of values as bfloat16 numbers, columns as they are stored, in pairs and summed in fp32.
template <class D, int FOLD>
struct Pairs {
  using V = __m512i;
  using Decoded = D;
  static constexpr int VECTORS = D::PLANES, EACH = FOLD ? FOLD : 1;
  static constexpr bool BOTH = !FOLD;
  static F first(V a, V b) { return dot(a, b, F{}); }
  static F more(V a, V b, F c) { return dot(a, b, c); }
};

// Of up to 6 bits.
template <class D, int FOLD>
struct InPairs : Pairs<D, FOLD> {
  using typename Pairs<D, FOLD>::V;
  const Looked<D> with;
  V word, shift, byte;

  explicit InPairs(const Weight& w) : with(w) {
    uint16_t words[32], shifts[32];
    uint8_t bytes[64];
    // As in tiles.py: the word of a column's upper bits, and how far from its end they are; of 3 bits, whether its bytes are swapped.
    for (int r = 0; r < 32; r++) {
      words[r] = D::BITS == 3 ? 4 * (r / 8) + 2 * (r % 8 / 4) + r % 2 : D::BITS == 5 ? r / 4 : r / 2;
      shifts[r] = D::BITS == 5 ? 4 * (r % 4) : 8 * (r % 2);
    }
    for (int i = 0; i < 64; i++) bytes[i] = i % 16 ^ (i / 4 % 2);
    word = _mm512_loadu_si512(words), shift = _mm512_loadu_si512(shifts), byte = _mm512_loadu_si512(bytes);
  }

  void decode(const uint16_t* row, V* out) const {
    V low = _mm512_loadu_si512(row), high{};
    if constexpr (D::PAIRS) {
      constexpr int count = D::WORDS - 32;
      high = _mm512_permutexvar_epi16(word, _mm512_maskz_loadu_epi16((1u << count) - 1, row + 32));
      high = D::BITS == 3 ? _mm512_shuffle_epi8(high, byte) : _mm512_srlv_epi16(high, shift);
    }
    for (int p = 0; p < D::PLANES; p++) out[p] = with.value(low, high, p);
  }
};

// The same of 8 bits.
template <class D, int FOLD>
struct Bytes : Pairs<D, FOLD> {
  using typename Pairs<D, FOLD>::V;
  const AsPairs<D> with;
  explicit Bytes(const Weight& w) : with(w) {}

  void decode(const uint16_t* row, V* out) const {
    V low = _mm512_loadu_si512(row);
    for (int p = 0; p < 2; p++) out[p] = with.value(low, V{}, p);
  }
};
#endif

// Adds a tile's products for the tokens from `first` on to sums [tokens, 16], each a vector to be summed; ROWS rows at a time
// share a token's activations.
template <class P>
void add_rows(const Job& job, const uint16_t* tile, const float* scale, int64_t first, int count, F* sums) {
  using V = typename P::V;
  using D = typename P::Decoded;
  constexpr int VECTORS = P::VECTORS, GROUPS = VECTORS / P::EACH, ROWS = VECTORS * W <= 128 || VECTORS <= 4 ? 2 : 1;
  const Weight& w = job.weight;
  const P with(w);
  for (int64_t c = 0; c < w.chunks; c++) {
    const float* s = scale + (c * D::COLUMNS >> w.shift) * 16;
    const V* x = (const V*)job.x + (c * job.work.tokens + first) * VECTORS;
    for (int r = 0; r < 16; r += ROWS, tile += ROWS * D::WORDS) {
      V values[ROWS][VECTORS];
      F scales[ROWS][GROUPS];
      for (int i = 0; i < ROWS; i++) {
        __builtin_prefetch(tile + (i + AHEAD) * D::WORDS);
        with.decode(tile + i * D::WORDS, values[i]);
        for (int g = 0; g < GROUPS; g++)
          scales[i][g] = P::BOTH ? halves(s[2 * g * 16 + r + i], s[(2 * g + 1) * 16 + r + i]) : splat(s[g * 16 + r + i]);
      }
      for (int m = 0; m < count; m++, x += VECTORS)
        for (int i = 0; i < ROWS; i++) {
          F total = sums[m * 16 + r + i];
          for (int g = 0; g < GROUPS; g++) {
            const int from = g * P::EACH;
            F sum = P::first(values[i][from], x[from]);
            for (int j = from + 1; j < from + P::EACH; j++) sum = P::more(values[i][j], x[j], sum);
            total = fma(sum, scales[i][g], total);
          }
          sums[m * 16 + r + i] = total;
        }
      x -= count * VECTORS;
    }
  }
}

using AddRows = void (*)(const Job&, const uint16_t*, const float*, int64_t, int, F*);

template <template <class, int> class P, class D>
AddRows folded(int planes) {
  if constexpr (D::PLANES >= 8)
    if (planes >= 8) return add_rows<P<D, 8>>;
  if constexpr (D::PLANES >= 4)
    if (planes >= 4) return add_rows<P<D, 4>>;
  return planes >= 2 ? add_rows<P<D, 2>> : planes == 1 ? add_rows<P<D, 1>> : add_rows<P<D, 0>>;
}

AddRows rows_for(const Weight& w, [[maybe_unused]] bool pairs) {
  const int planes = w.shift >= 31 ? 32 : (1 << w.shift) / 32;
  return by_codes(w, [=](auto codes) {
    using D = decltype(codes);
#if defined(__AVX512BF16__)
    if (pairs) {
      if constexpr (D::BITS == 8) return folded<Bytes, D>(planes);
      else return folded<InPairs, D>(planes);
    }
#endif
    return folded<Whole, D>(planes);
  });
}

}  // namespace
