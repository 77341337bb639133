// Decode: words of tiles to pairs of halves that mean their codes exactly, and stored scales to fp32.
//
// Legend: p a plane of 32 columns, i one of the four pairs of words 8t + 2i, 8t + 2i + 1 that a lane owns of a row; z a zero point.
// A variant has GRID, BITS, ZERO (whether there are zero points), FOLD (planes with the same scale, 0 where half a plane has),
// SCALE and BF16 (whether halves are bfloat16).
//
// Integers lie in the mantissa of a number 2^10 (bfloat16: 2^7), s bits up, so that times 2^-s and less 2^(10-s) + z they are
// exact. Small floats are shifted to where a half has sign, exponent and mantissa, which makes them 2^-POWER of what they are; as
// bfloat16 they would be too small for what follows, so that there they are multiplied at once. Codes of NaN and infinity, which no
// quantizer writes, may become numbers.
#pragma once
#include "intrinsics.cuh"

#define GRID_INT 0
#define GRID_E2M1 1
#define GRID_E4M3 2
#define GRID_E5M2 3
#define GRID_TABLE 4
#define SCALE_F16 0
#define SCALE_BF16 1
#define SCALE_F32 2
#define SCALE_E8M0 3
#define SCALE_E4M3 4

constexpr int LOW = BITS == 3 ? 2 : BITS;  // bits of a code in a plane
constexpr int PLANES = 16 / LOW, CHUNK = 32 * PLANES;
constexpr int RUN = FOLD ? FOLD : 1;                   // planes that are scaled together
constexpr int GROUPS = PLANES / RUN * (FOLD ? 1 : 2);  // of a chunk, with scales of their own
constexpr int ROW = BITS == 3 ? 6 : 4;                 // uint4 of a row of a chunk
constexpr int MANTISSA = BF16 ? 7 : 10;
constexpr u32 ONE = BF16 ? 0x3f80 : 0x3c00, LARGE = BF16 ? 0x4300 : 0x6400;  // 1, and the number whose last bit is 1
constexpr int MIDDLE = 1 << (BITS - 1);                                      // the zero of codes without zero points

// Of small floats: bits of the mantissa, and the power of two that their halves lack.
constexpr int FRACTION = GRID == GRID_E2M1 ? 1 : GRID == GRID_E4M3 ? 3 : 2;
constexpr int BIAS = GRID == GRID_E2M1 ? 1 : GRID == GRID_E4M3 ? 7 : 15;
constexpr int POWER = GRID == GRID_INT || GRID == GRID_TABLE || BF16 ? 0 : 15 - BIAS;
constexpr u32 LIFT = (254 - BIAS) << 7;  // in bfloat16, that power

// Whether a code times its scale is a half exactly, by six bits of mantissa at most. Then halves are scaled, and not sums.
constexpr bool SCALED = GRID == GRID_E2M1 && SCALE == SCALE_E4M3;
static_assert(!SCALED || !FOLD, "scales of E4M3 are those of groups of 16");

// The words of a lane in a row of a chunk.
struct Words {
    u32 low[4];
#if BITS == 3
    u32 high[2];
#endif
};

DEVICE void load(Words& words, const uint4* chunk, int row, int t) {
    load_once(words.low, chunk + row * ROW + t);
#if BITS == 3
    load_once(words.high, reinterpret_cast<const uint2*>(chunk + row * ROW + 4) + t);
#endif
}

DEVICE constexpr u32 both(u32 half) { return half * 0x10001u; }

// A shift to the left, or by a negative number to the right.
DEVICE u32 shifted(u32 word, int left) { return left < 0 ? word >> -left : word << left; }

// The codes of pair i in plane p as two halves, less the zero point `with`, or if SCALED times its two halves. `pairs` is, of a
// table, what a byte of two codes means, for this lane every 32nd. i and p are known when this is compiled, and so is s.
DEVICE u32 decode(const Words& words, int i, int p, u32 with, const u32* pairs) {
    const u32 word = words.low[i];
#if GRID == GRID_TABLE
    const u32 first = pairs[32 * (word >> 8 * (p / 2) & 0xff)], second = pairs[32 * (word >> (16 + 8 * (p / 2)) & 0xff)];
    return __byte_perm(first, second, p % 2 ? 0x7632 : 0x5410);
#elif GRID != GRID_INT
    const int sign = 16 - BITS - BITS * p, rest = MANTISSA - FRACTION - BITS * p;
    const u32 mask = both(((1 << (BITS - 1)) - 1) << (MANTISSA - FRACTION));
    const u32 half = masked(shifted(word, sign), 0x80008000u, shifted(word, rest) & mask);
    const u32 lifted = BF16 ? mul2(half, both(LIFT)) : half;
    return SCALED ? mul2(lifted, with) : lifted;
#elif BITS == 8 && BF16
    // 128 + the low seven bits, less 128 or 256 by the eighth.
    const u32 byte = word >> 8 * p;
    const u32 less = masked(byte, 0x00800080u, 0xc380c380u);
    const u32 centred = fma2(masked(byte, 0x007f007fu, both(LARGE)), both(ONE), less);
    // 128 - the zero point is an integer that fp32 has in its upper half.
    const u32 offset = __float_as_uint(8388736.f - __uint_as_float(0x4b000000u + with));
    return ZERO ? fma2(centred, both(ONE), __byte_perm(offset, offset, 0x3232)) : centred;
#else
    const int at = LOW * p, in = at % 8, s = in + BITS > MANTISSA ? 0 : in;
#if BITS == 8
    const u32 code = __byte_perm(word, 0x64646464u, p ? 0x4341 : 0x4240);
#else
    u32 code = masked(word >> (at - s), both(((1 << LOW) - 1) << s), both(LARGE));
#endif
#if BITS == 3
    u32 high = words.high[i / 2];
    if (i % 2) high = __byte_perm(high, high, 0x2301);
    if (p >= 4) high >>= 1;
    code = masked(high >> (in - s), both(4 << s), code);
#endif
    const u32 offset = both(0x8000 | LARGE) - both(s << MANTISSA) + with * (0x10001u << s);
    return fma2(code, both(ONE - (s << MANTISSA)), offset);
#endif
}

#if SCALE == SCALE_F32
typedef u32 Stored;
#elif SCALE == SCALE_F16 || SCALE == SCALE_BF16
typedef u16 Stored;
#else
typedef u8 Stored;
#endif

// What a stored scale means: 2^-127 as 0 and NaN of E8M0 as infinity, NaN of E4M3 as 480.
DEVICE float meant_scale(u32 stored) {
#if SCALE == SCALE_F32
    return __uint_as_float(stored);
#elif SCALE == SCALE_F16
    return float_of_f16(stored);
#elif SCALE == SCALE_BF16
    return __uint_as_float(stored << 16);
#elif SCALE == SCALE_E8M0
    return __uint_as_float(stored << 23);
#else
    return __uint_as_float((stored & 0x80) << 24 | (stored & 0x7f) << 20) * 0x1p120f;
#endif
}

// A scale of E4M3, without a sign, as two halves.
DEVICE u32 scale_halves(u32 stored) {
    return mul2((stored << (MANTISSA - 3)) * 0x10001u, both(BF16 ? 247 << 7 : 23 << 10));
}
