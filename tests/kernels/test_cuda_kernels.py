"""The CUDA kernels, emulated: every kind of weight against fp64, ends of matrices, splits, experts, outliers, and every bit trick."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from variants import covering, every

from compress.kernels.native import tiles
from compress.kernels.native.kind import HALVES, WHOLE, Kind, table
from compress.numerics.floats import decode
from compress.numerics.scales import steps
from compress.spec.scheme import Scheme
from emulated import Emulator, Memory

DTYPES = {name: dtype for dtype, name in HALVES.items()}
STORED = {**DTYPES, "f32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}
FLOATS = {"e2m1": Scheme(4, grid="e2m1"), "e4m3": Scheme(8, grid="e4m3"), "e5m2": Scheme(8, grid="e5m2")}
WARPS = 2


FEW = set(covering())
CASES = [pytest.param(*case, id=f"{case[0]}-n{case[1]}", marks=() if case in FEW else pytest.mark.slow) for case in every()]


@dataclass
class Case:
    """A packed matrix, or a stack of them, and what it means."""

    kind: Kind
    rows: int
    columns: int
    shift: int
    tiles: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    table: torch.Tensor | None
    tensor_scale: torch.Tensor | None
    values: torch.Tensor
    """What codes mean, [experts?, rows, columns], fp32."""
    steps: torch.Tensor
    """What scales mean, in that shape."""

    @property
    def chunks(self) -> int:
        return self.tiles.shape[-3]

    @property
    def groups(self) -> int:
        return self.scale.shape[-2]

    def meant(self, looked_up: torch.dtype = torch.float32) -> torch.Tensor:
        """fp64 weights; values that are looked up are rounded to a dtype first."""
        return self.values.to(looked_up if self.table is not None else torch.float32).double() * self.steps.double()


def case(kind: Kind, rows: int, columns: int, whole: bool = False, experts: int | None = None) -> Case:
    """Random codes with scales of every size; one group for a row where it is `whole`, and may be."""
    torch.manual_seed(rows * columns + kind.bits)
    lead, wide = () if experts is None else (experts,), kind.planes * tiles.WORDS == tiles.chunk(kind.bits)
    group = (columns if whole else 2 * tiles.chunk(kind.bits)) if wide else kind.planes * tiles.WORDS or 16
    count = -(-columns // group)
    codes = torch.randint(0, 1 << kind.bits, (*lead, rows, columns), dtype=torch.uint8)
    if kind.grid in ("e4m3", "e5m2"):
        codes[(codes & 0x7F) >= (0x7F if kind.grid == "e4m3" else 0x7C)] = 0x45
    dtype = STORED[kind.scale]
    scale = torch.randint(110, 130, (*lead, rows, count)) if kind.scale == "e8m0" else torch.exp2(torch.randn(*lead, rows, count))
    scale = scale.to(dtype) if kind.grid in ("int", "e2m1", "table") else scale / 4096
    tensor_scale = torch.rand(lead) + 5 if kind.scale == "e4m3" else None
    zero = torch.randint(0, 1 << kind.bits, scale.shape, dtype=torch.uint8) if kind.zero else None
    spread = torch.arange(columns) // group
    if kind.grid == "int":
        values = codes.float() - (1 << kind.bits - 1 if zero is None else zero.float()[..., spread])
    else:
        values = table("nf")[codes.long()] if kind.grid == "table" else decode(codes, FLOATS[kind.grid])
    held = -(-columns // tiles.chunk(kind.bits)) * tiles.chunk(kind.bits)
    groups = 1 if whole and wide else -(-held // group)
    return Case(
        kind, rows, columns, WHOLE if whole and wide else group.bit_length() - 1,
        tiles.pack(codes, kind.bits), tiles.pack_grid(scale, groups), None if zero is None else tiles.pack_grid(zero, groups),
        table("nf") if kind.grid == "table" else None, tensor_scale, values, steps(scale, tensor_scale)[..., spread],
    )  # fmt: skip


def activations(rows: int, columns: int, x: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Random x, and the same in rows that are further apart: readable, as zeros, up to eight columns, the last row to its end."""
    wide, apart = -(-columns // 8) * 8, -(-columns // 8) * 8 + 8
    given = torch.randn(rows, columns).to(DTYPES[x])
    held = torch.full((rows, apart), float("nan"), dtype=given.dtype)
    held[:, :columns], held[:, columns:wide] = given, 0
    return given, held.flatten()[: (rows - 1) * apart + wide], apart


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Memory:
    memory = Memory(shape, dtype)
    memory.tensor.fill_(float("nan"))
    return memory


def optional(value: torch.Tensor | None) -> Memory | None:
    return None if value is None else Memory.of(value)


def near(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """fp32 sums to fp32's accuracy, halves to half their last bit and as much."""
    assert not got.isnan().any()
    error, allowed = (got.double() - exact).abs(), 4e-7 * magnitude
    if got.dtype != torch.float32:
        info = torch.finfo(got.dtype)
        allowed = allowed + torch.exp2(exact.abs().clamp(min=info.tiny).log2().floor()) * info.eps / 2 * 1.01
    assert (error <= allowed).all(), f"{(error / allowed).max()} of what is allowed"


def product(
    emulator: Emulator, c: Case, tokens: int, rows: int, splits: int, bias: torch.Tensor | None = None,
    backwards: bool = False, warps: int = WARPS,
) -> None:  # fmt: skip
    """Multiplies, in one part or several, and compares."""
    x, held, apart = activations(rows, c.columns, c.kind.x)
    dtype = DTYPES[c.kind.x]
    given = [
        Memory.of(held),
        Memory.of(c.tiles),
        Memory.of(c.scale),
        *map(optional, (c.zero, c.table, bias, c.tensor_scale)),
        None,
    ]
    defines = (*c.kind.defines, f"-DNT={tokens}", f"-DWARPS={warps}")
    integers = [rows, c.rows, c.columns, apart, c.chunks, c.groups, c.shift, 0]
    out = poisoned((rows, c.rows), dtype)
    sums = out if splits == 1 else poisoned((splits, rows, c.rows), torch.float32)
    grid = (c.tiles.shape[-4], splits, -(-rows // (8 * tokens)))
    emulator.run("skinny", defines, grid, 32 * warps, [*given, sums, *integers], backwards)
    w = c.meant(dtype)
    exact, magnitude = x.double() @ w.T, x.double().abs() @ w.abs().T
    if splits > 1:
        scale = 1 if c.tensor_scale is None else c.tensor_scale.double()
        near(sums.tensor.sum(0, dtype=torch.float64).float(), exact * scale, magnitude * scale)
        arguments = [sums, optional(bias), optional(c.tensor_scale), None, out, rows, c.rows, splits, 0]
        emulator.run(
            "finish", (f"-DBF16={int(c.kind.x == 'bf16')}",), (-(-c.rows // 256), max(1, rows - 1), 1), 256, arguments, backwards
        )
    near(out.tensor, exact if bias is None else exact + bias.double(), magnitude)


@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_every_kind_is_what_its_codes_mean(emulator: Emulator, kind: Kind, tokens: int) -> None:
    """Rows, columns and tokens that fill no tile; in one part and in two; and as dense rows."""
    c = case(kind, 17, 2 * tiles.chunk(kind.bits) + 40, whole=tokens == 2)
    bias = torch.randn(17).to(DTYPES[kind.x])
    product(emulator, c, tokens, 8 * tokens + 1 if tokens < 4 else 27, 1, bias)
    product(emulator, c, tokens, 8 * tokens - 3, 2, bias)
    if tokens == 1:
        expanded(emulator, c)


def expanded(emulator: Emulator, c: Case) -> None:
    dtype = DTYPES[c.kind.x]
    out = poisoned((c.rows, c.columns), dtype)
    parts = [Memory.of(c.tiles), Memory.of(c.scale), *map(optional, (c.zero, c.table, c.tensor_scale)), out]
    grid = (c.tiles.shape[-4], -(-c.chunks // 4), 1)
    emulator.run("expand", c.kind.defines, grid, 128, [*parts, c.rows, c.columns, c.chunks, c.groups, c.shift])
    assert torch.equal(out.tensor, (c.values * c.steps).to(dtype))


FOUR = Kind("int", 4, False, 4, "bf16", "bf16")


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 16, 128), (3, 31, 41), (8, 33, 1033), (9, 5, 264)], ids=str)
@pytest.mark.parametrize("kind", [FOUR, Kind("int", 3, True, 2, "f16", "f16")], ids=str)
def test_matrices_of_any_size(emulator: Emulator, kind: Kind, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    c = case(kind, outputs, columns)
    product(emulator, c, 1, rows, 1)
    product(emulator, c, 1, rows, 3)
    expanded(emulator, c)


@pytest.mark.parametrize("kind", [FOUR, Kind("table", 4, False, 2, "f16", "f16")], ids=str)
def test_the_order_of_lanes_changes_nothing(emulator: Emulator, kind: Kind) -> None:
    """With as many warps as a GPU is given; lanes that needed a barrier that is not there would find what is not there yet."""
    product(emulator, case(kind, 17, 1200), 1, 3, 1, warps=8)
    product(emulator, case(kind, 17, 1200), 1, 3, 2, warps=8, backwards=True)


def test_products_in_halves_of_eight_are_the_same(emulator: Emulator) -> None:
    """As GPUs of compute capability 7.5 have them."""
    kind = replace(FOUR, scale="f16", x="f16")
    c = case(kind, 17, 296)
    x, held, apart = activations(5, 296, "f16")
    out = poisoned((5, 17), torch.float16)
    integers = [5, 17, 296, apart, 3, c.groups, c.shift, 0]
    arguments = [Memory.of(held), Memory.of(c.tiles), Memory.of(c.scale), *[None] * 5, out, *integers]
    emulator.run("skinny", (*kind.defines, "-DNT=1", f"-DWARPS={WARPS}", "-DTURING"), (2, 1, 1), 32 * WARPS, arguments)
    near(out.tensor, x.double() @ c.meant().T, x.double().abs() @ c.meant().abs().T)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    "kind", [FOUR, Kind("int", 2, True, 8, "f16", "f16"), Kind("e2m1", 4, False, 0, "e4m3", "bf16")], ids=str
)
def test_blocks_of_experts(emulator: Emulator, kind: Kind, splits: int) -> None:
    """Experts in any order, one of them with two blocks, one with none, and a block without rows."""
    rows, outputs, columns, experts = 13, 19, tiles.chunk(kind.bits) + 24, 4
    c = case(kind, outputs, columns, experts=experts)
    x, held, apart = activations(rows, columns, kind.x)
    dtype, bias = DTYPES[kind.x], torch.randn(experts, outputs).to(DTYPES[kind.x])
    blocks = torch.tensor([[0, 2, 2, 3, 0], [0, 2, 10, 11, 0], [2, 8, 1, 2, 0]], dtype=torch.int32)
    mapped, count = Memory.of(blocks), blocks.shape[1]
    given = [
        Memory.of(held),
        Memory.of(c.tiles),
        Memory.of(c.scale),
        *map(optional, (c.zero, c.table, bias, c.tensor_scale)),
        mapped,
    ]
    out = poisoned((rows, outputs), dtype)
    sums = out if splits == 1 else poisoned((splits, rows, outputs), torch.float32)
    integers = [rows, outputs, columns, apart, c.chunks, c.groups, c.shift, count]
    emulator.run(
        "skinny", (*kind.defines, "-DNT=1", f"-DWARPS={WARPS}"), (2, splits, count), 32 * WARPS, [*given, sums, *integers]
    )
    if splits > 1:
        arguments = [sums, Memory.of(bias), optional(c.tensor_scale), mapped, out, rows, outputs, splits, count]
        emulator.run("finish", (f"-DBF16={int(kind.x == 'bf16')}",), (1, count, 1), 256, arguments)
    owner = torch.tensor([0, 0, *[2] * 9, 3, 3])
    w = c.meant()[owner]
    exact = torch.einsum("rk,rnk->rn", x.double(), w) + bias.double()[owner]
    near(out.tensor, exact, torch.einsum("rk,rnk->rn", x.double().abs(), w.abs()))


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
def test_expand_knows_every_scale(emulator: Emulator, scale: str) -> None:
    """The least and the largest of bytes, and NaN."""
    kind = Kind("e2m1", 4, False, int(scale == "e8m0"), scale, "bf16")
    c = case(kind, 16, 512)
    count = c.scale.shape[-2]
    bytes_ = torch.arange(16 * count, dtype=torch.int64).view(16, count) * 255 // (16 * count - 1)
    bytes_ = (bytes_ if scale == "e8m0" else bytes_ // 2).to(torch.uint8)
    found = bytes_ if scale == "e8m0" else bytes_.view(torch.float8_e4m3fn)
    c = replace(c, scale=tiles.pack_grid(found, count), steps=steps(found, c.tensor_scale).repeat_interleave(512 // count, -1))
    out = poisoned((16, 512), torch.bfloat16)
    parts = [Memory.of(c.tiles), Memory.of(c.scale), None, None, optional(c.tensor_scale), out]
    emulator.run("expand", kind.defines, (1, 1, 1), 128, [*parts, 16, 512, c.chunks, c.groups, c.shift])
    assert torch.equal(out.tensor.nan_to_num(nan=-1), (c.values * c.steps).bfloat16().nan_to_num(nan=-1))
    assert out.tensor.isnan().any()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("x", ["f16", "bf16"])
def test_outliers_are_added(emulator: Emulator, x: str, wide: bool) -> None:
    """Rows without any, with one, and with more than a warp has lanes."""
    torch.manual_seed(0)
    rows, outputs, columns = 11, 9, 200
    given, held, apart = activations(rows, columns, x)
    d = torch.randn(outputs, columns) * (torch.rand(outputs, columns) < torch.linspace(0, 0.9, outputs)[:, None])
    counts = torch.count_nonzero(d, dim=1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    before = torch.randn(rows, outputs).to(DTYPES[x])
    out = Memory.of(before)
    places = d.nonzero()[:, 1].to(torch.int32 if wide else torch.uint16)
    parts = [Memory.of(held), Memory.of(d[d != 0]), Memory.of(places), Memory.of(offsets), out]
    defines = (f"-DBF16={int(x == 'bf16')}", f"-DWIDE={int(wide)}")
    for high in (1, 2):
        out.tensor.copy_(before)
        emulator.run("outliers", defines, (-(-outputs // 8), high, 1), 256, [*parts, rows, outputs, apart])
        exact = given.double() @ d.double().T + before.double()
        near(out.tensor, exact, given.double().abs() @ d.double().abs().T + before.double().abs())
    assert torch.equal(out.tensor[:, 0], before[:, 0])


def test_memory_beside_a_tensor_is_guarded(emulator: Emulator) -> None:
    """What all of the above rest upon: a column too many is noticed, whether it is read or written."""
    c = case(FOUR, 16, 128)
    parts = [Memory.of(c.tiles), Memory.of(c.scale), None, None, None]
    with pytest.raises(AssertionError, match="SIGSEGV"):
        emulator.run(
            "expand", FOUR.defines, (1, 1, 1), 128, [*parts, poisoned((15, 128), torch.bfloat16), 16, 128, 1, 1, c.shift]
        )
    with pytest.raises(AssertionError, match="SIGSEGV"):
        emulator.run(
            "expand", FOUR.defines, (2, 1, 1), 128, [*parts, poisoned((32, 128), torch.bfloat16), 32, 128, 1, 1, c.shift]
        )
    # The page begins 2 bytes after such a tensor's end.
    with pytest.raises(AssertionError, match="beside a tensor"):
        emulator.run("expand", FOUR.defines, (1, 1, 1), 128, [*parts, poisoned((1, 127), torch.bfloat16), 1, 128, 1, 1, c.shift])


def halves(words: np.ndarray, bf16: bool) -> np.ndarray:
    """u16 as the numbers that they are."""
    return (
        (words.astype(np.uint32) << 16).view(np.float32).astype(float)
        if bf16
        else words.astype(np.uint16).view(np.float16).astype(float)
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_trick_of_integers_holds_for_every_code_and_zero_point(bits: int, bf16: bool) -> None:
    """(2^m + 2^s code) 2^-s - (2^(m-s) + zero), each step a half; said anew in numpy, for every s that leaves a code in the mantissa."""
    mantissa, one, large = (7, 0x3F80, 0x4300) if bf16 else (10, 0x3C00, 0x6400)
    code, zero = np.meshgrid(np.arange(1 << bits), np.arange((1 << bits) + (bits < 8)), indexing="ij")
    if bits == 8 and bf16:
        centred = halves(large | code & 127, bf16) + halves((code & 128) ^ 0xC380, bf16)
        assert (centred == code - 128).all()
        assert (np.float32(8388736) - (zero + 0x4B000000).astype(np.uint32).view(np.float32) == 128 - zero).all()
        assert not ((128.0 - zero).astype(np.float32).view(np.uint32) & 0xFFFF).any()
        assert (centred + (128 - zero) == code - zero).all()
        return
    for s in range(mantissa - bits + 1) if bits < 8 else [0]:
        if (zero.max() << s) > 1 << mantissa:
            continue
        offset = (0x8000 | large) - (s << mantissa) + (zero << s)
        found = halves(large | code << s, bf16) * halves(np.array(one - (s << mantissa)), bf16) + halves(offset, bf16)
        assert (found == code - zero).all(), s


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("grid", "bits", "fraction", "bias"), [("e2m1", 4, 1, 1), ("e4m3", 8, 3, 7), ("e5m2", 8, 2, 15)])
def test_the_trick_of_floats_holds_for_every_code(grid: str, bits: int, fraction: int, bias: int, bf16: bool) -> None:
    mantissa, there = (7, 127) if bf16 else (10, 15)
    code = np.arange(1 << bits)
    moved = (code >> bits - 1 << 15) | ((code & (1 << bits - 1) - 1) << mantissa - fraction)
    meant = decode(torch.from_numpy(code).to(torch.uint8), FLOATS[grid]).double().numpy()
    finite = np.isfinite(meant)
    assert (halves(moved[finite], bf16) * 2.0 ** (there - bias) == meant[finite]).all()


def test_codes_of_e2m1_times_scales_of_e4m3_are_halves() -> None:
    """All of them, shifted as the kernels have them."""
    values = decode(torch.arange(16, dtype=torch.uint8), FLOATS["e2m1"]).double()
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    products = values[:, None] * scales
    assert torch.equal(products.bfloat16().double(), products)
    assert torch.equal((products * 2.0**-14).half().double(), products * 2.0**-14)
