// Decode: codes of a chunk as fp32 vectors, without their scales.
//
// A word of 16 bits holds the columns r, 32 + r, ... of a chunk, so 32 bits hold two neighbouring columns of each plane of 32: pair
// i of plane p has the columns 32 p + 2 i and one more. `value` takes them out of lanes that hold pairs, of one row or of many.
#pragma once

#include "vector.h"
#include "weight.h"

namespace {  // each instruction set has its own

struct Context {
  Table table;
  F middle;
  explicit Context(const Weight& w) : table(w.table), middle(splat(w.middle)) {}
};

template <int BITS_>
struct Codes {  // integers of 5, 6 and 8 bits, and tables of up to 16 values
  static constexpr bool FLOAT = false;
  static constexpr int BITS = BITS_, LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS, MORE = BITS - LOW;
  static constexpr int PLANES = 16 / LOW, COLUMNS = 32 * PLANES;
  static constexpr int PAIRS = MORE ? BITS == 5 ? 4 : 2 : 0;  // that share 32 of the upper bits
  static constexpr int WORDS = 32 + (PAIRS ? 32 / PAIRS : 0);

  // The second column of a pair if `odd`; `high` is what `upper` makes.
  static F value(U low, U high, int p, bool odd, const Context& with) {
    U code = low >> ((odd ? 16 : 0) + LOW * p);
    if constexpr (BITS == 2 || BITS == 4) return with.table.at(code);
    if constexpr (BITS == 3) return with.table.at((code & 3) | (high >> ((odd ? 16 : 0) + 2 * (p % 4) + p / 4) & 4));
    code &= (1 << LOW) - 1;
    if constexpr (MORE) code |= (high >> ((odd ? 4 * MORE : 0) + MORE * p) & ((1 << MORE) - 1)) << LOW;
    return number(code) - with.middle;
  }

  // Of words with upper bits in pairs, all that belongs to the pair of each lane, numbered by its place among those that share.
  static U upper(U words, U place) {
    if constexpr (BITS != 3) return words >> (place * (32 / (PAIRS ? PAIRS : 1)));
    U kept = place * 0xff00ff00u ^ 0xffffffffu, shift = place * 8;  // every second has its bits in the other byte of a word
    return (words >> shift & kept) | (words << shift & ~kept);
  }
};

template <bool E4>
struct Float8 {
  static constexpr bool FLOAT = true;
  static constexpr int BITS = 8, PLANES = 2, COLUMNS = 64, PAIRS = 0, WORDS = 32, FRACTION = E4 ? 3 : 2;

  // E5M2 is the high byte of an fp16; E4M3 has one bit of exponent less, and its values are 2^-8 of those of its bits there.
  static F value(U low, U, int p, bool odd, const Context&) {
    U top = low << ((odd ? 0 : 16) + (p ? 0 : 8)) & 0xff000000u;
    if constexpr (!E4) return from_half(top);
    return from_half((U)((S)top >> 1) & 0xbf800000u) * splat(0x1p8f);
  }

  static U upper(U words, U) { return words; }
};

// What `then` makes of codes of so many bits.
template <class Then>
auto by_bits(int bits, Then then) {
  switch (bits) {
    case 2: return then(Codes<2>{});
    case 3: return then(Codes<3>{});
    case 4: return then(Codes<4>{});
    case 5: return then(Codes<5>{});
    case 6: return then(Codes<6>{});
    default: return then(Codes<8>{});
  }
}

// What `then` makes of the kind of codes that a weight has.
template <class Then>
auto by_codes(const Weight& w, Then then) {
  if (w.grid == E4M3) return then(Float8<true>{});
  if (w.grid == E5M2) return then(Float8<false>{});
  return by_bits(w.bits, then);
}

// The upper bits of W pairs of a row from pair `first` on.
template <class D>
U upper_of(const uint16_t* row, int first) {
  if constexpr (!D::PAIRS) return U{};
  constexpr int lanes = D::PAIRS ? D::PAIRS : 1;
  const U found = beginning<4 * W / lanes>(row + 32 + 2 * first / lanes);
  U index, place;
  for (uint32_t l = 0; l < W; l++) index[l] = l / lanes, place[l] = l % lanes;
  return D::upper(__builtin_shuffle(found, index), place);
}

// A row of a chunk. Vector (p (16 / W) + h) 2 + o has the columns 32 p + 2 W h + 2 l + o of lanes l: of a block of 2 W columns the
// even ones, then the odd ones. Activations are put into the same order by `arranged`.
template <class D>
void decode_row(const uint16_t* row, const Context& with, F* out) {
  for (int h = 0; h < 16 / W; h++) {
    U low = words(row + 2 * W * h), high = upper_of<D>(row, W * h);
    for (int p = 0; p < D::PLANES; p++)
      for (int o = 0; o < 2; o++) out[2 * (p * (16 / W) + h) + o] = D::value(low, high, p, o, with);
  }
}

}  // namespace
