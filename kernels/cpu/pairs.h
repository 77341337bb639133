// Pairs: codes as bfloat16 numbers, two to a lane, without their scales: for the instruction that multiplies and adds such pairs.
//
// A vector has words as a chunk stores them, of one row or of 16, and `value` takes a plane of theirs out of it.
#pragma once

#include "job.h"

#if defined(__AVX512BF16__)
namespace {  // each instruction set has its own

// Codes of up to 6 bits, looked up.
template <class D>
struct Looked {
  __m512i table, above;

  explicit Looked(const Weight& w) {
    uint16_t values[64];
    for (int i = 0; i < 64; i++) {
      const int code = (D::BITS <= 3 && i >= 32 ? i / 4 : i) & ((1 << D::BITS) - 1);
      values[i] = bits_of(D::BITS <= 4 ? w.table[code] : code - w.middle) >> 16;
    }
    table = _mm512_loadu_si512(values), above = _mm512_loadu_si512(values + 32);
  }

  // `high` has the upper bits of a word's columns at its end, by planes.
  __m512i value(__m512i low, __m512i high, int p) const {
    // A lookup takes five bits, in which two planes of 2 bits are, and `above` passes over the first.
    if constexpr (D::BITS == 2) return _mm512_permutexvar_epi16(_mm512_srli_epi16(low, p / 2 * 4), p % 2 ? above : table);
    if constexpr (D::BITS == 3) {
      // Every second plane has its upper bit where the next one has its lower ones: one word for the even planes, one for the odd.
      __m512i lower = _mm512_srli_epi16(low, p / 4 * 8), upper = _mm512_srli_epi16(high, p / 4);
      __m512i every = _mm512_ternarylogic_epi32(_mm512_set1_epi16(p % 2 ? 0xcc : 0x33), lower, upper, 0xca);
      return _mm512_permutexvar_epi16(_mm512_srli_epi16(every, p % 4 / 2 * 4), p % 2 ? above : table);
    }
    __m512i code = _mm512_srli_epi16(low, D::LOW * p);
    if constexpr (D::PAIRS) {
      // Where the upper bits lie, less where they belong; a lookup passes over what is above them.
      const int off = D::MORE * p - 4;
      __m512i upper = off < 0 ? _mm512_slli_epi16(high, off < 0 ? -off : 0) : _mm512_srli_epi16(high, off < 0 ? 0 : off);
      code = _mm512_ternarylogic_epi32(_mm512_set1_epi16((1 << D::LOW) - 1), code, upper, 0xca);  // the first chooses
    }
    return D::BITS == 6 ? _mm512_permutex2var_epi16(table, code, above) : _mm512_permutexvar_epi16(code, table);
  }

  // That `high`, from what `D::upper` makes.
  static __m512i by_words(U upper) {
    if constexpr (!D::PAIRS || D::BITS == 3) return (__m512i)upper;
    return (__m512i)((upper & 0xffffu) | (upper << (16 - 4 * D::MORE) & 0xffff0000u));
  }
};

// FP8: the bits behind the sign are moved to where a bfloat16 has them, and what has no leading one is looked up.
template <class D>
struct Moved {
  static constexpr int FRACTION = D::FRACTION, BIAS = (1 << (6 - FRACTION)) - 1;
  __m512i small;

  explicit Moved(const Weight&) {
    uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = bits_of((float)i / (1 << (BIAS - 1 + FRACTION))) >> 16;
    small = _mm512_loadu_si512(values);
  }

  __m512i value(__m512i low, __m512i, int p) const {
    __m512i byte = p ? _mm512_srli_epi16(low, 8) : low, rest = _mm512_and_si512(byte, _mm512_set1_epi16(127));
    __m512i found = _mm512_add_epi16(_mm512_slli_epi16(rest, 7 - FRACTION), _mm512_set1_epi16((127 - BIAS) << 7));
    found = _mm512_mask_permutexvar_epi16(found, _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(1 << FRACTION)), rest, small);
    __m512i sign = p ? low : _mm512_slli_epi16(low, 8);
    return _mm512_ternarylogic_epi32(found, sign, _mm512_set1_epi16((int16_t)0x8000), 0xf8);  // with the sign's bit
  }

  static __m512i by_words(U) { return __m512i{}; }
};

// Integers of 8 bits: the last bits of 2^23, or those before the last 8 of 2^15, less that; upper halves of two are joined.
template <class D>
struct Halved {
  F less[2];
  explicit Halved(const Weight& w) : less{splat(0x1p23f + w.middle), splat(0x1p15f + w.middle)} {}

  __m512i value(__m512i low, __m512i, int p) const {
    const uint32_t bits = p ? 0xff00 : 0xff, base = p ? 0x47000000 : 0x4b000000;
    const U first = ((U)low & bits) | base, second = ((U)low >> 16 & bits) | base;
    return (__m512i)joined((F)first - less[p], (F)second - less[p]);
  }

  static __m512i by_words(U) { return __m512i{}; }
};

template <class D, bool FLOAT, int BITS>
struct Kinds { using Values = Looked<D>; };
template <class D>
struct Kinds<D, true, 8> { using Values = Moved<D>; };
template <class D>
struct Kinds<D, false, 8> { using Values = Halved<D>; };

// What has the codes D as pairs.
template <class D>
using AsPairs = typename Kinds<D, D::FLOAT, D::BITS>::Values;

// fp32 numbers of even and odd columns as pairs, rounded to nearest.
inline __m512i rounded_pairs(F even, F odd) {
  uint16_t order[32];
  for (int l = 0; l < 32; l++) order[l] = l / 2 + l % 2 * 16;
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

}  // namespace
#endif
