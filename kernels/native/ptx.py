"""PTX: converts codes to half precision in registers, a plane at a time.

Legend: p a plane, b bits of a code, m mantissa bits of a half (10 in f16, 7 in bf16). A 32-bit register holds two words of a
row, and its halves the two codes of plane p at bits bp. A text takes such a register ($1) to the half-precision values of
the plane ($0), which a tensor core reads as they are:

    int        (code << s) under the exponent of 2^m is the number 2^m + 2^s code; times 2^-s less 2^(m - s) + zero it is the
               exact integer (code - zero), for any s that leaves the code inside the mantissa
    int3       the same, where one more mask lays the high bits ($2, their bytes turned by $3) above the low ones
    int8 bf16  seven bits fit a mantissa: 128 + (code & 127), less 128 or 256 as the high bit says
    floats     sign, exponent and mantissa moved to where a half has them: the value times `unit`, a power of two, as the
               exponents' biases differ. bf16 would fall below its normal numbers and is multiplied back
    nf4        four bytes at a time are looked up in registers by byte permutation, for low and high bytes of 16 values

With zero points, an operand holds `offset` - zero; if weights are scaled before they are multiplied, the last operand holds
the scale. Every operand but the words is a register of two equal halves.
"""

from __future__ import annotations

from functools import cache

import torch

from compress.kernels.native import tiles
from compress.kernels.native.kind import table

_MANTISSA = {"f16": 10, "bf16": 7}
_BIAS = {"f16": 15, "bf16": 127}
_DTYPE = {"f16": torch.float16, "bf16": torch.bfloat16}
FLOATS = {"e2m1": (1, 1), "e3m0": (0, 3), "e4m3": (3, 7), "e5m2": (2, 15)}
"""Mantissa bits and bias of the exponent, by grid."""
_AND_OR, _ANDN_OR = "0xea", "0xae"
"""Tables of lop3: (a & b) | c, and (~a & b) | c."""
KEEP, SWAP = 0x3210, 0x2301
"""Operands $3 of int3: high bits as they are, or with the bytes of each word swapped."""


def planes(bits: int) -> int:
    """Planes of a word."""
    return tiles.chunk(bits) // tiles.WORDS


def unit(grid: str, x: str, normal: bool) -> float:
    """The power of two by which a text's values must be divided; 1 if they are made `normal`."""
    return 2.0 ** (FLOATS[grid][1] - _BIAS[x]) if grid in FLOATS and not normal else 1.0


def offset(grid: str, bits: int, plane: int, x: str) -> float:
    """The operand of zero points holds this number less the zero point."""
    if bits == 8 and x == "bf16":
        return 128.0
    return -(2.0 ** (_MANTISSA[x] - _place(bits, plane, x)[1])) if grid == "int" else 0.0


@cache
def text(grid: str, bits: int, plane: int, x: str, zero: bool = False, scaled: bool = False, normal: bool = True) -> str:
    """The PTX of a plane: $0 from words $1, for 3 bits also $2 and $3, then zero points and scales if there are any."""
    operands = iter(range(4 if bits == 3 else 2, 6))
    z = f"${next(operands)}" if zero else None
    if grid == "int":
        lines = _byte(plane, z) if bits == 8 and x == "bf16" else _integer(bits, plane, x, z)
    else:
        lines = _float(grid, bits, plane, x, normal) if grid in FLOATS else _lookup(grid, plane, x)
    if scaled:
        lines += _fma(x, f"${next(operands)}", "n", [_constant("n", -0.0, x)])
    names = sorted({line.split()[1].rstrip(",") for line in lines})
    return "\n".join(["{", f".reg .b32 {', '.join(names)};", *lines, "mov.b32 $0, t;", "}"])


def _constant(name: str, value: float, x: str) -> str:
    """Both halves of a register."""
    half = int(torch.tensor(value, dtype=_DTYPE[x]).view(torch.int16)) & 0xFFFF
    return f"mov.b32 {name}, {half << 16 | half:#010x};"


def _fma(x: str, by: str, plus: str, constants: list[str]) -> list[str]:
    return [*constants, f"fma.rn.{x}x2 t, t, {by}, {plus};"]


def _twice(mask: int) -> str:
    return f"{mask << 16 | mask:#010x}"


def _place(bits: int, plane: int, x: str) -> tuple[int, int]:
    """(the right shift of words for a plane, s)."""
    at = max(2, bits & ~1) * plane
    shift = at & ~7
    return (shift, at - shift) if at - shift + bits <= _MANTISSA[x] else (at, 0)


def _integer(bits: int, plane: int, x: str, zero: str | None) -> list[str]:
    m = _MANTISSA[x]
    shift, s = _place(bits, plane, x)
    low = max(2, bits & ~1)
    magic = _twice((_BIAS[x] + m) << m)
    lines = [f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;"]
    lines += [f"lop3.b32 t, t, {_twice((1 << low) - 1 << s)}, {magic}, {_AND_OR};"]
    if bits == 3:
        # The high bit of planes 0 to 3 is two bits above the low ones' place, that of the others a byte lower but one.
        lines += ["prmt.b32 u, $2, $2, $3;", f"shr.u32 u, u, {shift if plane < 4 else shift - 7};"]
        lines += [f"lop3.b32 t, u, {_twice(4 << s)}, t, {_AND_OR};"]
    constants = [_constant("f", 2.0**-s, x)]
    if zero is None:
        constants.append(_constant("o", offset("int", bits, plane, x) - (1 << bits - 1), x))
    return lines + _fma(x, "f", zero or "o", constants)


def _byte(plane: int, zero: str | None) -> list[str]:
    lines = [f"shr.u32 u, $1, {8 * plane};", f"lop3.b32 t, u, 0x007f007f, 0x43004300, {_AND_OR};"]
    lines += [f"lop3.b32 u, u, 0x00800080, 0xc300c300, {_ANDN_OR};"]
    one = [_constant("f", 1.0, "bf16")]
    return lines + _fma("bf16", "f", "u", one) + (_fma("bf16", "f", zero, []) if zero else [])


def _float(grid: str, bits: int, plane: int, x: str, normal: bool) -> list[str]:
    mantissa, bias = FLOATS[grid]
    at, m = bits * plane, _MANTISSA[x]
    magnitude = _twice((1 << bits - 1) - 1 << m - mantissa)
    lines = [_shift("t", m - mantissa - at), _shift("u", 16 - bits - at), "and.b32 u, u, 0x80008000;"]
    lines += [f"lop3.b32 t, t, {magnitude}, u, {_AND_OR};"]
    if not normal or bias == _BIAS[x]:
        return lines
    return lines + _fma(x, "f", "o", [_constant("f", 2.0 ** (_BIAS[x] - bias), x), _constant("o", -0.0, x)])


def _shift(name: str, left: int) -> str:
    return f"shl.b32 {name}, $1, {left};" if left > 0 else f"shr.u32 {name}, $1, {-left};"


def _lookup(grid: str, plane: int, x: str) -> list[str]:
    halves = table(grid).to(_DTYPE[x]).view(torch.uint8).view(16, 2)
    # Planes 2j and 2j + 1 are byte j of each word: four codes of a selector, of which the lower three bits look up in the
    # first and the last eight values, and the fourth takes one of both.
    lines = ["prmt.b32 t, $1, $1, 0x3120;", "shr.u32 u, t, 1;", "and.b32 t, t, 0x77777777;"]
    # A zero that the compiler cannot know, so that constants stay in registers instead of being loaded each time.
    lines += ["mov.u32 z, %lanemask_lt;", "shr.u32 z, z, 31;", "add.u32 c, z, 0x32103210;"]
    lines += [f"lop3.b32 u, u, 0x44444444, c, {_AND_OR};"]
    lines += ["shr.u32 t, t, 16;", "shr.u32 u, u, 16;"] if plane > 1 else []
    for byte, name in enumerate("lh"):
        quads = [int.from_bytes(halves[i : i + 4, byte].numpy().tobytes(), "little") for i in range(0, 16, 4)]
        lines += [f"add.u32 {name}{i}, z, {quad:#010x};" for i, quad in enumerate(quads)]
        lines += [f"prmt.b32 {name}a, {name}0, {name}1, t;", f"prmt.b32 {name}b, {name}2, {name}3, t;"]
        lines += [f"prmt.b32 {name}c, {name}a, {name}b, u;"]
    return [*lines, f"prmt.b32 t, lc, hc, {0x7351 if plane % 2 else 0x6240:#06x};"]
