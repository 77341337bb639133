// Rows: products with few tokens. A vector has columns of one row, so a tile is read in the order in which it lies in memory.
#pragma once

#include "pairs.h"

namespace {  // each instruction set has its own

constexpr int JOINED = 4;  // tokens from which it pays to join the parts of a value

// Asks the first and the second cache for what follows a row of a chunk.
inline void ask(const uint16_t* row) {
  constexpr int SOON = 3 << 9, LATER = 3 << 12;  // words
  __builtin_prefetch(row + SOON);
  __builtin_prefetch(row + LATER, 0, 2);
}

// How a row of a chunk is multiplied: V its values in vectors, EACH of them to a group; with BOTH a vector has two groups. Values
// are sums of PARTS, each a vector.
template <class D, int FOLD>
struct Whole {
  using V = F;
  using Decoded = D;
  static constexpr int PER = 32 / W, VECTORS = D::PLANES * PER, PARTS = 1;
  static constexpr int EACH = FOLD ? FOLD * PER : PER > 2 ? PER / 2 : 2;
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
  static constexpr int VECTORS = D::PLANES, EACH = FOLD ? FOLD : 1, PARTS = 1;
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
      high = _mm512_permutexvar_epi16(word, (V)beginning<64 / D::PAIRS>(row + 32));
      high = D::BITS == 3 ? _mm512_shuffle_epi8(high, byte) : _mm512_srlv_epi16(high, shift);
    }
    for (int p = 0; p < D::PLANES; p++) out[p] = with.value(low, high, p);
  }
};

// Integers of 8 bits for a few tokens: their five upper bits and their three lower ones, which takes less than to join them.
template <class D, int FOLD>
struct Parted : Pairs<D, FOLD> {
  using typename Pairs<D, FOLD>::V;
  static constexpr int PARTS = 2;
  V upper, lower;

  explicit Parted(const Weight& w) {
    uint16_t values[32], rest[32];
    for (int i = 0; i < 32; i++) values[i] = bits_of((float)(8 * i - w.middle)) >> 16, rest[i] = bits_of((float)(i % 8)) >> 16;
    upper = _mm512_loadu_si512(values), lower = _mm512_loadu_si512(rest);
  }

  void decode(const uint16_t* row, V* out) const {
    const V low = _mm512_loadu_si512(row);
    for (int p = 0; p < 2; p++) {
      out[2 * p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8 * p + 3), upper);
      out[2 * p + 1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8 * p), lower);
    }
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

// The scales of row r's groups in a chunk, whose first are at `s`.
template <class P>
void row_scales(const float* s, int r, F* out) {
  for (int g = 0; g < P::VECTORS / P::EACH; g++) out[g] = P::BOTH ? halves(s + 2 * g * 16, r) : splat(s[g * 16 + r]);
}

// What a row of a chunk adds to a token's sum.
template <class P>
F added_to(F total, const typename P::V* values, const typename P::V* x, const F* scales) {
  for (int g = 0; g < P::VECTORS / P::EACH; g++) {
    const int from = g * P::EACH;
    F sum = P::first(values[P::PARTS * from], x[from]);
    for (int j = P::PARTS * from + 1; j < P::PARTS * (from + P::EACH); j++) sum = P::more(values[j], x[j / P::PARTS], sum);
    total = fma(sum, scales[g], total);
  }
  return total;
}

// Adds a tile's products for the token `first` to sums [16], each a vector to be summed. Activations of a chunk stay in
// registers where there are enough of them.
template <class P>
void add_token(const Job& job, const uint16_t* tile, const float* scale, int64_t first, F* sums) {
  using V = typename P::V;
  using D = typename P::Decoded;
  const Weight& w = job.weight;
  const P with(w);
  for (int64_t c = 0; c < w.chunks; c++) {
    const float* s = scale + (c * D::COLUMNS >> w.shift) * 16;
    const V* x = (const V*)job.x + (c * job.work.tokens + first) * P::VECTORS;
    V held[P::VECTORS], values[P::PARTS * P::VECTORS];
    F scales[P::VECTORS / P::EACH];
    for (int i = 0; i < P::VECTORS; i++) held[i] = x[i];
#pragma GCC unroll 2  // of more loads than two in turn the processor does not see the order
    for (int r = 0; r < 16; r++, tile += D::WORDS) {
      ask(tile);
      with.decode(tile, values);
      row_scales<P>(s, r, scales);
      sums[r] = added_to<P>(sums[r], values, W == 16 ? held : x, scales);
    }
  }
}

// The same for some tokens from `first` on; ROWS rows at a time share a token's activations.
template <class P>
void add_tokens(const Job& job, const uint16_t* tile, const float* scale, int64_t first, int count, F* sums) {
  using V = typename P::V;
  using D = typename P::Decoded;
  constexpr int VECTORS = P::VECTORS, ROWS = VECTORS * W <= 128 || VECTORS <= 4 ? 2 : 1;
  const Weight& w = job.weight;
  const P with(w);
  for (int64_t c = 0; c < w.chunks; c++) {
    const float* s = scale + (c * D::COLUMNS >> w.shift) * 16;
    const V* x = (const V*)job.x + (c * job.work.tokens + first) * VECTORS;
    for (int r = 0; r < 16; r += ROWS, tile += ROWS * D::WORDS) {
      V values[ROWS][P::PARTS * VECTORS];
      F scales[ROWS][VECTORS / P::EACH];
      for (int i = 0; i < ROWS; i++) {
        ask(tile + i * D::WORDS);
        with.decode(tile + i * D::WORDS, values[i]);
        row_scales<P>(s, r + i, scales[i]);
      }
      for (int m = 0; m < count; m++)
        for (int i = 0; i < ROWS; i++) {
          F& total = sums[m * 16 + r + i];
          total = added_to<P>(total, values[i], x + m * VECTORS, scales[i]);
        }
    }
  }
}

template <class P>
void add_rows(const Job& job, const uint16_t* tile, const float* scale, int64_t first, int count, F* sums) {
  if (count == 1)
    add_token<P>(job, tile, scale, first, sums);
  else
    add_tokens<P>(job, tile, scale, first, count, sums);
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

AddRows rows_for(const Weight& w, [[maybe_unused]] bool pairs, [[maybe_unused]] int64_t tokens) {
  const int planes = w.shift >= 31 ? 32 : (1 << w.shift) / 32;
  return by_codes(w, [=](auto codes) {
    using D = decltype(codes);
#if defined(__AVX512BF16__)
    if (pairs) {
      if constexpr (D::BITS == 8 && !D::FLOAT)
        if (tokens < JOINED) return folded<Parted, D>(planes);
      if constexpr (D::BITS == 8) return folded<Bytes, D>(planes);
      else return folded<InPairs, D>(planes);
    }
#endif
    return folded<Whole, D>(planes);
  });
}

}  // namespace
