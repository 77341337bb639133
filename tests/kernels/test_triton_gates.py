"""Triton's kernels as they are compiled: the PTX in them, emulated, and what becomes of it on GPUs of 8.0 and 9.0.

`python tests/kernels/test_triton_gates.py` prints the table of all kinds and tiles, which takes minutes; words such as
`bf16 90 int4g128` narrow it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch

from compress.kernels.native import ptx, tiles
from compress.kernels.native import triton as backend
from compress.kernels.native.kind import Kind
from compress.numerics.floats import decode
from compress.spec.scheme import Scheme

DTYPE = {"f16": torch.float16, "bf16": torch.bfloat16}
GRIDS = [("int", 2), ("int", 3), ("int", 4), ("int", 8), ("e2m1", 4), ("e3m0", 4), ("nf", 4), ("e4m3", 8), ("e5m2", 8)]
Registers = dict[str, np.ndarray]


def halves(register: np.ndarray, x: str) -> torch.Tensor:
    """uint32 [n] -> both halves as fp64 [n, 2], the lower first."""
    return torch.from_numpy(register.view(np.int16).reshape(-1, 2).copy()).view(DTYPE[x]).double()


def run(text: str, operands: dict[int, np.ndarray]) -> np.ndarray:
    """What a text leaves in $0; `operands` uint32 [n] by number."""
    count = len(next(iter(operands.values())))
    registers: Registers = {f"${number}": value for number, value in operands.items()}

    def read(name: str) -> np.ndarray:
        if name == "%lanemask_lt":
            return (1 << (np.arange(count, dtype=np.uint32) % 32)) - np.uint32(1)
        return registers[name] if name[0] == "$" or name in registers else np.full(count, int(name, 0), np.uint32)

    for line in text.strip().splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        name, rest = line.rstrip(";").split(maxsplit=1)
        target, *sources = (part.strip() for part in rest.split(","))
        registers[target] = _step(name, [read(source) for source in sources])
    return registers["$0"]


def _step(name: str, given: list[np.ndarray]) -> np.ndarray:
    """One instruction, as the PTX ISA tells it."""
    kind, _, form = name.partition(".")
    if kind == "fma":
        x = form.removeprefix("rn.").removesuffix("x2")
        a, b, c = (halves(part, x) for part in given)
        # Exact in fp64, then rounded once.
        return (a * b + c).to(DTYPE[x]).view(torch.int16).numpy().reshape(-1).view(np.uint32)
    a, b = given[0], given[1] if len(given) > 1 else given[0]
    if kind == "lop3":
        table, found = int(given[3][0]), np.zeros_like(a)
        for row in (row for row in range(8) if table >> row & 1):
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (given[2] if row & 1 else ~given[2])
        return found
    if kind == "prmt":
        both, found = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros_like(a)
        for byte in range(4):
            selector = given[2] >> np.uint32(4 * byte)
            picked = (both >> (8 * (selector & 7)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
            sign = (picked >> np.uint32(7)) * np.uint32(255)
            found |= np.where(selector & 8, sign, picked) << np.uint32(8 * byte)
        return found
    plain: dict[str, Any] = {
        "mov": lambda: a,
        "and": lambda: a & b,
        "add": lambda: a + b,
        "shl": lambda: a << b,
        "shr": lambda: a >> b,
    }
    return plain[kind]()


def pairs(words: torch.Tensor) -> np.ndarray:
    """int16 [..., 2n] -> registers uint32, two neighbouring words in each."""
    return words.contiguous().numpy().reshape(-1).view(np.uint32)


def both(values: torch.Tensor, x: str, like: np.ndarray) -> np.ndarray:
    """A register of two equal halves for each."""
    half = values.to(DTYPE[x]).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return np.broadcast_to(half << np.uint32(16) | half, like.shape).copy()


@pytest.mark.parametrize(("grid", "bits"), GRIDS)
@pytest.mark.parametrize("x", ["f16", "bf16"])
def test_texts_mean_what_codes_mean(grid: str, bits: int, x: str) -> None:
    """All codes in all planes and places, all zero points, against the codes themselves, through the layout."""
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (16, 32 * tiles.chunk(bits)), dtype=torch.uint8)
    scheme = Scheme(bits, grid=grid)
    if grid in ("e4m3", "e5m2"):
        codes[~decode(codes, scheme).isfinite()] = 0
    words = tiles.pack(codes, bits)[0].transpose(0, 1)  # [16, 32, words]
    columns = torch.arange(tiles.WORDS)
    high = words[..., 32 + 4 * (columns // 8) + 2 * (columns % 8 // 4) + columns % 2] if bits == 3 else words
    select = torch.where(columns // 2 % 2 == 1, ptx.SWAP, ptx.KEEP).to(torch.int16).expand(16, 32, -1)
    given = {1: pairs(words[..., : tiles.WORDS])} | ({2: pairs(high), 3: pairs(select)} if bits == 3 else {})
    for plane, held in enumerate(codes.view(16, 32, -1, tiles.WORDS).unbind(2)):
        assert all(len(side.unique()) == len(codes.unique()) for side in held.reshape(-1, 2).unbind(1))
        if grid != "int":
            wanted = decode(held.reshape(-1), scheme).to(DTYPE[x] if grid == "nf" else torch.float32).double().view(-1, 2)
            for normal in (False, True):
                found = halves(run(ptx.text(grid, bits, plane, x, normal=normal), given), x)
                assert torch.equal(found, wanted * ptx.unit(grid, x, normal)), (plane, normal)
            continue
        wanted = held.double().reshape(-1, 2)
        assert torch.equal(halves(run(ptx.text(grid, bits, plane, x), given), x), wanted - scheme.middle)
        text, number = ptx.text(grid, bits, plane, x, zero=True), 4 if bits == 3 else 2
        for zero in range(1 << bits):
            point = both(torch.tensor(ptx.offset(grid, bits, plane, x) - zero), x, given[1])
            assert torch.equal(halves(run(text, {**given, number: point}), x), wanted - zero), (plane, zero)


@pytest.mark.parametrize("x", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("grid", "bits", "zero"),
    [("int", 4, True), ("int", 8, False), ("int", 8, True), ("int", 3, True), ("e2m1", 4, False), ("nf", 4, False)],
)
def test_texts_scale_with_one_rounding(grid: str, bits: int, zero: bool, x: str) -> None:
    torch.manual_seed(0)
    words = torch.randint(-(1 << 15), 1 << 15, (4096,)).to(torch.int16)
    more = {2: pairs(words.flip(0)), 3: np.full(2048, 0x32103210, np.uint32)} if bits == 3 else {}
    given, number = {1: pairs(words)} | more, 4 if bits == 3 else 2
    point = {number: both(torch.tensor(ptx.offset(grid, bits, 0, x) - 5), x, given[1])} if zero else {}
    scale = torch.rand(2048) + 0.01
    plain = halves(run(ptx.text(grid, bits, 0, x, zero), {**given, **point}), x)
    found = halves(
        run(ptx.text(grid, bits, 0, x, zero, scaled=True), {**given, **point, number + zero: both(scale, x, given[1])}), x
    )
    assert torch.equal(found, (plain * scale.to(DTYPE[x]).double()[:, None]).to(DTYPE[x]).double())


@pytest.mark.parametrize("x", ["f16", "bf16"])
def test_scales_in_e4m3_leave_e2m1_exact(x: str) -> None:
    kind = Kind("e2m1", 4, False, 0, "e4m3", x)
    made = backend.constants(kind, "e2m1", False, backend.tile(kind, False, 1, (9, 0)), True, False)
    words = torch.arange(16).repeat_interleave(2).to(torch.int16)
    for code in range(0x7F):
        scale = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * made["LIFT"]
        given = {1: pairs(words)}
        found = halves(run(made["ASM"][0], {**given, 2: both(scale, x, given[1])}), x)[:, 0] / made["UNIT"]
        assert torch.equal(found, decode(torch.arange(16).to(torch.uint8), Scheme(4, grid="e2m1")).double() * scale.double())


@dataclass(frozen=True)
class Case:
    """A kind, and whether a scale is a row's."""

    grid: str
    bits: int
    group: int | None
    zero: bool = False
    scale: str = ""

    def kind(self, x: str) -> Kind:
        grid = "table" if self.grid in ("nf", "e3m0") else self.grid
        folds = min(self.group or 512, tiles.chunk(self.bits)) // tiles.WORDS
        return Kind(grid, self.bits, self.zero, folds, self.scale or x, x)

    @property
    def budget(self) -> float:
        """Lane-instructions for each weight that an H100 has time for while it reads the weight at full bandwidth."""
        grids = {"": 16, "f32": 32}.get(self.scale, 8) + 8 * self.zero
        return 4.56 / 4.125 * (self.bits + (grids / self.group if self.group else 0))

    def __str__(self) -> str:
        return f"{self.grid}{self.bits}g{self.group or 'row'}{'z' if self.zero else ''}"


CASES = [
    Case("int", 4, 128), Case("int", 4, 128, True), Case("int", 4, 64), Case("int", 4, 32, True), Case("int", 4, 16), Case("int", 4, None),
    Case("int", 2, 128), Case("int", 2, 64, True), Case("int", 2, 16), Case("int", 3, 256), Case("int", 3, 128), Case("int", 3, 64, True),
    Case("int", 3, 16, True), Case("int", 8, 128), Case("int", 8, 32, True), Case("int", 8, None), Case("int", 8, None, True),
    Case("nf", 4, 64), Case("nf", 4, 128), Case("e3m0", 4, 32), Case("e2m1", 4, 128), Case("e2m1", 4, 32, scale="e8m0"),
    Case("e2m1", 4, 16, scale="e4m3"), Case("e4m3", 8, None, scale="f32"), Case("e4m3", 8, 128, scale="f32"), Case("e5m2", 8, None, scale="f32"),
]  # fmt: skip
OVER = {"int3g64z": 1.1, "int3g16z": 1.4, "int2g64z": 1.1, "int2g16": 1.15, "e2m14g16": 1.1}
"""Kinds whose tile of 16 tokens takes more than the budget, and how many times as much."""


@dataclass(frozen=True)
class Code:
    """What a kernel became."""

    each: float
    """Lane-instructions of the main loop for each weight."""
    registers: int
    shared: int
    loop: Counter[str]
    all: Counter[str]


@cache
def compiled(case: Case, x: str, tokens: int, arch: int, **options: bool) -> Code:
    """Ahead of time, with no GPU: `options` are `split`, `grouped`, `bias` and `uneven`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from compress.kernels.native.swap import swap

    kind, whole = case.kind(x), case.group is None
    tile = backend.tile(kind, whole, tokens, divmod(arch, 10))
    split = options.get("split", False)
    held = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32"}
    signature = {
        "x": held[x], "tiles": "*i16", "scale": held.get(kind.scale, "*u8"), "zero": "*u8", "bias": held[x],
        "tensor_scale": "*fp32", "blocks": "*i32", "out": "*fp32" if split else held[x],
    }  # fmt: skip
    signature |= dict.fromkeys(("M", "N", "K", "ldx", "chunks", "groups", "shift", "nblocks", "per"), "i32")
    given = {
        "zero": kind.zero, "bias": options.get("bias"), "tensor_scale": kind.scale == "e4m3", "blocks": options.get("grouped"),
    }  # fmt: skip
    constants = backend.constants(kind, case.grid, whole, tile, not options.get("uneven"), split)
    constants |= {name: None for name, there in given.items() if not there}
    signature = {name: "constexpr" if name in constants else signature[name] for name in swap.arg_names}
    aligned = [name for name in ("x", "tiles", "scale", "zero", "out", "N", "K", "ldx") if signature[name] != "constexpr"]
    attributes = {(swap.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    made = triton.compile(
        ASTSource(fn=swap, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        used, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass.stdout)]
    loop = max((_loop(lines, at, line) for at, line in lines), key=lambda found: found["HGMMA"] + found["HMMA"])
    weights = 128 * tiles.chunk(case.bits) / (32 * tile.warps)
    registers = re.search(r"REG:(\d+)", used.stdout + used.stderr)
    assert registers
    return Code(loop.total() / weights, int(registers[1]), made.metadata.shared, loop, _counted(line for _, line in lines))


def _loop(lines: list[tuple[int, str]], at: int, line: str) -> Counter[str]:
    """The instructions between a jump back and its target."""
    target = re.search(r"\bBRA(?:\.\S+)?\s+.*?0x([0-9a-f]+)", line)
    start = int(target[1], 16) if target else at
    return _counted(line for place, line in lines if start <= place <= at) if start < at else Counter()


def _counted(lines: Iterator[str]) -> Counter[str]:
    return Counter(re.sub(r"^@!?U?P\w+ ", "", line).split()[0].partition(".")[0] for line in lines)


@pytest.fixture(autouse=True, scope="module")
def cache_of_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


def sound(code: Code, arch: int) -> None:
    assert not code.all["LDL"] + code.all["STL"]
    assert not code.all["I2F"]
    assert code.loop["HGMMA" if arch == 90 else "HMMA"]
    assert code.shared <= (227 if arch == 90 else 163) * 1024
    assert code.registers <= 255


def case(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "name", ["int4g128", "int4g128z", "int2g128", "int3g64z", "int8grow", "nf4g128", "e2m14g16", "e4m38grow"]
)
def test_the_smallest_tile_keeps_up_with_memory(name: str, arch: int) -> None:
    pytest.importorskip("triton")
    code = compiled(case(name), "bf16", 16, arch)
    sound(code, arch)
    assert code.each <= case(name).budget * OVER.get(name, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "arch"),
    [
        ("int4g128", 64, 90),
        ("int4g128", 128, 90),
        ("int4g128z", 128, 80),
        ("int3g64z", 64, 90),
        ("int8grow", 128, 80),
        ("nf4g128", 64, 80),
    ],
)
def test_larger_tiles_keep_their_sums_in_registers(name: str, tokens: int, arch: int) -> None:
    pytest.importorskip("triton")
    sound(compiled(case(name), "bf16", tokens, arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"split": True}, {"grouped": True}, {"bias": True, "uneven": True}], ids=str)
def test_other_ways_to_call_it(options: dict[str, bool]) -> None:
    pytest.importorskip("triton")
    sound(compiled(case("int4g128"), "f16", 16, 90, **options), 90)


if __name__ == "__main__":
    print(
        "| kind | x | sm | tile | scaled | instructions a weight (budget) | registers | spills | I2F | shared KiB | HGMMA or HMMA |"
    )
    print("| --- " * 11 + "|")
    for each, x, arch, tokens in product(CASES, DTYPE, (80, 90), (16, 32, 64, 128)):
        if not {*sys.argv[1:]} <= {str(each), x, str(arch), str(tokens)}:
            continue
        tile, code = backend.tile(each.kind(x), each.group is None, tokens, divmod(arch, 10)), compiled(each, x, tokens, arch)
        print(
            f"| {each} | {x} | {arch} | {tile.tokens}x128 w{tile.warps} s{tile.stages} | {'before' if tile.scaled else 'after'} | "
            f"{code.each:.2f} ({each.budget:.2f}) | {code.registers} | {code.all['LDL'] + code.all['STL']} | {code.all['I2F']} | "
            f"{code.shared // 1024} | {code.loop['HGMMA'] + code.loop['HMMA']} |", flush=True
        )  # fmt: skip
