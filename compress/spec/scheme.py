"""Scheme: how codes become numbers, and its text form.

Grammar (parses and prints back to the same text; names of other tools, such as W4A16, are in presets.py):

    scheme  = ( integer | float [ "-afp8" ] ) [ "-h" size ] | "q" (2 | 3 | 4 | 5 | 6) "_k"
    integer = "w" bits "a" (16 | 8 | 4) [ "g" group ] [ "-asym" | "-min" ] [ "-afp8" | "-aasym" ]
    float   = "fp8" [ "-e5m2" ] [ "-tensor" | "-block" ]     E4M3 or E5M2, one scale per output channel, for the
                                                             whole matrix, or per block of 128 rows and columns
            | "nf" (2 | 3 | 4) [ "g" group ]                 quantiles of a Gaussian (QLoRA, LoftQ), scale = absmax
            | ("fp4" | "e3m0") [ "g" group ] [ rule ]        E2M1 (largest 6) or powers of two (largest 16)
            | "mxfp4" [ "-floor" | "-even" | "-mse" ] [ "-amxfp4" ]   E2M1, an E8M0 scale (a power of two) per 32
            | "nvfp4" [ "-4over6" ] [ "-anvfp4" ]            E2M1, an E4M3 scale per 16 and an fp32 one per matrix
            | "iq4_nl"                                       16 values of llama.cpp, none of them zero, a scale per 32
    rule    = ( "-m1" | "-m2" ) [ "-ceil" ]                  scales of a row a power of two apart (ZeroQuant-FP)
    bits    = 2 | 3 | 4 | 5 | 6 | 8                          integer codes
    group   = columns that share one scale; without it one scale per output channel
    size    = 16 | 32 | 64 | 128                             inputs that a Hadamard matrix mixes before they are multiplied

`w4a16g128` is symmetric 4-bit with groups of 128 along the input dimension, `w3a16g64-asym` has an integer zero point
per group, `w4a16g32-min` a minimum in the weight's dtype, scale * code + minimum (MLX's affine codes, GGUF's Q4_1), which
-scale * zero could be only up to rounding; no code of it need mean zero. `w8a16` is per channel. Activations stay in 16 bits,
unless they are rounded to int8 (`w8a8`, `w4a8g128`), to int4 (`w4a4`, `w3a4g64`) or, with `-afp8`, to FP8 E4M3 (`fp8-afp8`,
`w4a8g128-afp8`), with a dynamic scale per token; `fp8-block-afp8` has one per token and 128 inputs, as readers of such blocks
expect. `-aasym` gives integer activations a zero point per token as well (`w4a4-aasym`). `mxfp4-amxfp4` and `nvfp4-anvfp4` round
activations in blocks like their weights: E2M1 with a dynamic scale for 32 or 16 inputs of a token, and for nvfp4 a number for all
inputs of a weight, which is measured on calibration tokens.

`-h32` has codes of W R, where R mixes each 32 inputs by a Hadamard matrix: as the model runs inputs are multiplied by R, too,
before they are rounded, if they are. So no input and no weight of these 32 stands out (numerics/input_rotation.py).

The K-quants of GGUF, `q2_k` to `q6_k`, are whole codes with scales of two levels: small whole numbers for 16 or 32 columns, times
one in fp16 for 256; all but q3_k and q6_k have minima. What they mean: compress/numerics/kquants.py. Where 256 does not divide
the columns, another scheme takes their place, as in llama.cpp.

Scales that are powers of two: `-m1` makes all of them so, `-m2` divides the row's largest scale by powers of two, so that
E2M1 times the power is an E4M3 number. Both take the nearest power or, with `-ceil` as in the paper, the next one: then
-m1 never clips, and -m2 may by up to 2x. For mxfp4 the power is the least that clips nothing (`-rceil`, the default),
OCP's `-floor`, `-even`, which first rounds the largest value to the element's mantissa, or, with `-mse`, the one of
least error.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from compress.errors import UsageError
from compress.spec.presets import PRESETS, near, preset
from compress.spec.text_form import TextForm

BITS = (2, 3, 4, 5, 6, 8)
FP8 = ("e4m3", "e5m2")
"""Grids whose codes are the bytes of FP8."""
SUPER = 256
"""Columns that share the upper level of a K-quant's scales."""
BLOCK = 128
"""Rows and columns of a block of `fp8-block`."""
ROTATED = (16, 32, 64, 128)
"""Inputs that a Hadamard matrix may mix."""
_GROUP = r"(?:g(?P<group>\d{1,7}))?"
_ROTATED = rf"(?:-h(?P<hadamard>{'|'.join(map(str, ROTATED))}))?"
_INTEGER = re.compile(
    rf"w(?P<bits>\d{{1,3}})a(?P<act>\d{{1,3}}){_GROUP}(?P<kind>-asym|-min)?(?:-a(?P<inputs>fp8|asym))?{_ROTATED}",
    re.ASCII,
)
_FLOATS = tuple(
    re.compile((text if "<inputs>" in text else text + r"(?:-a(?P<inputs>fp8))?") + _ROTATED, re.ASCII)
    for text in (
        r"(?P<grid>fp8)(?P<rule>-e5m2)?(?:-(?P<scales>tensor|block))?",
        rf"(?P<grid>nf[234]){_GROUP}",
        rf"(?P<grid>fp4|e3m0){_GROUP}(?P<rule>-m[12](?:-ceil)?)?",
        r"(?P<grid>mxfp4)(?P<rule>-floor|-rceil|-even|-mse)?(?:-a(?P<inputs>fp8|mxfp4))?",
        r"(?P<grid>nvfp4)(?P<rule>-4over6)?(?:-a(?P<inputs>fp8|nvfp4))?",
        r"(?P<grid>iq4_nl)",
    )
)
_K = re.compile(r"q(?P<bits>[2-6])_k", re.ASCII)
_FIXED = {"mxfp4": (32, "e2m1", "e8m0"), "nvfp4": (16, "e2m1", "e4m3"), "iq4_nl": (32, "iq4", "row")}
"""(group, grid, kind of scales) of the names that fix them."""


@dataclass(frozen=True)
class Scheme(TextForm):
    """Weight codes of `bits` bits: `group` columns per scale (None: one per output channel)."""

    bits: int
    group: int | None = None
    symmetric: bool = True
    """Whether codes are balanced about zero: no zero point and no minimum; floats have neither."""
    grid: str = "int"
    """The values of codes before scaling: int, k (whole numbers too), nf, iq4, e2m1, e3m0, e4m3 or e5m2."""
    scales: str = "row"
    """row: in the weight's dtype, per row and group; tensor, block: one for each; e8m0; e4m3: with one more for the matrix;
    k: int8 per row and group, with one in fp16 for each 256 columns."""
    rule: str = ""
    """The rule by which scales are chosen, for grids with several: m1, m2-ceil, floor, even, mse, 4over6."""
    inputs: str = ""
    """Rounding of activations as the model runs: empty for none; int8, int4, int8-asym or int4-asym, fp8, mxfp4, nvfp4."""
    minimum: bool = False
    """Whether each scale has a minimum, the value of code 0, instead of an integer zero point."""
    hadamard: int = 0
    """Inputs that a Hadamard matrix mixes before they are multiplied by codes; 0 for none."""

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Reads the text form, or the name of a preset. Raises UsageError that names the wrong part."""
        if isinstance(text, Scheme):
            return text
        known = isinstance(text, str)
        found = _integer(text, match) if known and (match := _INTEGER.fullmatch(text)) else None
        if known and (match := _K.fullmatch(text)):
            bits = int(match["bits"])
            found = Scheme(bits, 32 if bits in (4, 5) else 16, bits in (3, 6), "k", "k", minimum=bits not in (3, 6))
        for pattern in _FLOATS if known and found is None else ():
            found = found or (_float(match) if (match := pattern.fullmatch(text)) else None)
        if found is None and known and (named := preset(text)):
            return cls.parse(named)
        if found is None:
            guess = _guess(text) if known else ""
            expected = "a scheme such as w4a16g128, w3a16g64-asym, w4a16g32-min, w8a8, fp8, nf4g64, mxfp4 or nvfp4"
            meant = f" (did you mean '{guess}'?)" if guess else f", or {near(str(text))}"
            raise UsageError(
                f"scheme '{text}'", expected + meant, "text outside the grammar, w<bits>a16[g<group>][-asym|-min] for integers"
            )
        if found.group is not None and found.group < 8:
            raise UsageError(f"scheme '{text}'", "a group of at least 8 columns", f"g{found.group}")
        if found.hadamard and (found.scales in ("tensor", "block") or found.grid == "iq4"):
            raise UsageError(f"scheme '{text}'", "scales of rows or groups beside -h", str(replace(found, hadamard=0)))
        return found

    @cached_property
    def _hash(self) -> int:
        return hash(
            (self.bits, self.group, self.symmetric, self.grid, self.scales, self.rule, self.inputs, self.minimum, self.hadamard)
        )

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self._unrotated() + (f"-h{self.hadamard}" if self.hadamard else "")

    def _unrotated(self) -> str:
        group = f"g{self.group}" if self.group and self.scales == "row" else ""
        inputs = "" if self.inputs in ("", "int8", "int4") else f"-a{self.inputs.rpartition('-')[2]}"
        rule = f"-{self.rule}" if self.rule else ""
        if self.integer:
            kind = "" if self.symmetric else "-min" if self.minimum else "-asym"
            return f"w{self.bits}a{self.input_bits}{group}{kind}{inputs}"
        if self.grid == "k":
            return f"q{self.bits}_k"
        if self.grid == "iq4":
            return f"iq4_nl{inputs}"
        if self.grid == "nf":
            return f"nf{self.bits}{group}{inputs}"
        if self.bits == 8:
            return f"fp8{'-e5m2' if self.grid == 'e5m2' else ''}{'' if self.scales == 'row' else f'-{self.scales}'}{inputs}"
        name = {"row": "fp4", "e8m0": "mxfp4", "e4m3": "nvfp4"}[self.scales] if self.grid == "e2m1" else self.grid
        return f"{name}{group}{rule}{inputs}"

    @property
    def input_bits(self) -> int:
        """Bits of activations as the model runs."""
        return 16 if not self.inputs else 4 if "4" in self.inputs else 8

    @property
    def input_divisor(self) -> bool:
        """Whether a number that all inputs of a weight share is stored beside it."""
        return self.inputs == "nvfp4"

    @property
    def integer(self) -> bool:
        return self.grid == "int"

    @property
    def whole(self) -> bool:
        """Whether codes are whole numbers, with scales of one level or two."""
        return self.grid in ("int", "k")

    @property
    def zeros(self) -> bool:
        """Whether each scale has an integer zero point."""
        return not self.symmetric and not self.minimum

    @property
    def scale_bits(self) -> int:
        """Bits of the small whole numbers among a K-quant's scales and minima; 0 for other schemes."""
        return {2: 4, 6: 8}.get(self.bits, 6) if self.scales == "k" else 0

    @property
    def fixed(self) -> bool:
        """Whether its name says how many columns share a scale."""
        return self.scales in ("e8m0", "e4m3", "k") or self.grid == "iq4"

    @property
    def zeroless(self) -> bool:
        """Whether no code need mean zero."""
        return self.minimum or self.grid == "iq4"

    @property
    def levels(self) -> int:
        """The number of codes, which are stored unsigned, 0 .. levels - 1."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The code that means zero in a symmetric scheme of integers."""
        return 1 << (self.bits - 1)

    @property
    def powers(self) -> bool:
        """Whether scales depend on each other, are powers of two or have few bits, so that a single one cannot be trained."""
        return bool(self.rule) or self.scales in ("e8m0", "e4m3", "k")

    def groups(self, columns: int) -> int:
        """Scales per output row for a weight with `columns` inputs (a ragged last group counts)."""
        return 1 if self.group is None else -(-columns // self.group)

    def rows_per_scale(self, rows: int) -> int:
        """Rows that share a scale."""
        return max(1, rows) if self.scales == "tensor" else BLOCK if self.scales == "block" else 1

    def grid_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a matrix."""
        return -(-rows // self.rows_per_scale(rows)), self.groups(columns)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        exact = _INTEGER.pattern.replace(r"(?P<bits>\d{1,3})a(?P<act>\d{1,3})", r"(2|3|4|5|6|8)a(16|8|4)")
        patterns = (re.sub(r"\?P<\w+>", "", text) for text in (exact, *(pattern.pattern for pattern in (*_FLOATS, _K))))
        return {
            "type": "string",
            "pattern": f"^({'|'.join([*patterns, *PRESETS])})$",
            "examples": ["w4a16g128", "nf4g64", "nvfp4"],
        }


def _guess(text: str) -> str:
    """The scheme that a text nearly spells: it may differ in case, in joining characters, or lack the activations."""
    plain = re.sub(r"[-_ ]+", "", text.lower())
    match = re.fullmatch(r"w(\d)(?:a(\d+))?(?:g(\d+))?(asym|sym|min)?", plain, re.ASCII)
    if match:
        kind = f"-{match[4]}" if match[4] in ("asym", "min") else ""
        plain = f"w{match[1]}a{match[2] or 16}{f'g{match[3]}' if match[3] else ''}{kind}"
    # Bits alone seldom mean one scale per output channel; presets are the better suggestion.
    guesses = {text.lower(), text.lower().replace("_", "-"), plain} if not match or match[3] else {text.lower()}
    for guess in sorted(guesses - {text}):
        if any(pattern.fullmatch(guess) for pattern in (_INTEGER, *_FLOATS, _K)):
            with suppress(UsageError):
                return str(Scheme.parse(guess))
    return ""


def _integer(text: str, match: re.Match[str]) -> Scheme:
    bits, activation = int(match["bits"]), match["act"]
    if bits not in BITS:
        raise UsageError(f"scheme '{text}'", f"bits among {', '.join(map(str, BITS))}", f"{bits} bits")
    fits = {"fp8": ("8",), "asym": ("8", "4")}.get(match["inputs"] or "", ("16", "8", "4"))
    if activation not in fits:
        words = {"fp8": "a8 where activations are FP8", "asym": "a8 or a4 where activations have zero points"}
        expected = words.get(match["inputs"] or "", "a16, a8 or a4 (activations in 16, 8 or 4 bits)")
        raise UsageError(f"scheme '{text}'", expected, f"a{activation}")
    whole = f"int{activation}" if activation != "16" else ""
    inputs = {"fp8": "fp8", "asym": f"{whole}-asym"}.get(match["inputs"] or "", whole)
    group, kind = int(match["group"]) if match["group"] else None, match["kind"]
    return Scheme(bits, group, kind is None, inputs=inputs, minimum=kind == "-min", hadamard=int(match["hadamard"] or 0))


def _float(match: re.Match[str]) -> Scheme:
    parts = match.groupdict()
    grid, rule = parts["grid"], (parts.get("rule") or "").removeprefix("-").removeprefix("rceil")
    group = int(parts["group"]) if parts.get("group") else None
    inputs, mixed = parts["inputs"] or "", int(parts["hadamard"] or 0)
    if grid in _FIXED:
        group, grid, scales = _FIXED[grid]
        return Scheme(4, group, True, grid, scales, rule, inputs, hadamard=mixed)
    if grid == "fp8":
        scales = parts["scales"] or "row"
        return Scheme(8, BLOCK if scales == "block" else None, True, rule or "e4m3", scales, "", inputs, hadamard=mixed)
    if grid.startswith("nf"):
        return Scheme(int(grid[2]), group, True, "nf", "row", "", inputs, hadamard=mixed)
    return Scheme(4, group, True, "e2m1" if grid == "fp4" else "e3m0", "row", rule, inputs, hadamard=mixed)
