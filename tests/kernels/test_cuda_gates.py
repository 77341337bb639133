"""Machine code of the CUDA kernels: registers, spills, and instructions for each weight; `python tests/kernels/test_cuda_gates.py`.

The code is that of NVRTC, which needs no GPU, taken apart by the disassembler that triton's wheel brings along.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from compress.errors import MachineError
from compress.kernels.cuda.nvrtc import Nvrtc, nvrtc
from compress.kernels.cuda.variant import Variant, headers
from compress.kernels.native import table, tiles
from compress.kernels.native.cuda import expand, skinny
from compress.kernels.native.kind import Kind

# For whoever runs it as a script.
sys.path.insert(0, str(Path(__file__).parents[1]))
from variants import kinds

TARGETS = ("sm_75", "sm_80", "sm_89", "sm_90a")
H100 = {2: 2.35, 3: 3.46, 4: 4.56, 8: 8.99}
"""Instructions of a lane for each weight that an H100 has time for while its memory delivers the codes, by bits."""
BUDGETS = [
    # kind, eights of tokens, instructions for each weight
    (Kind("int", 4, False, 4, "f16", "f16"), 1, 1.9),
    (Kind("int", 4, False, 4, "bf16", "bf16"), 1, 2.1),
    (Kind("int", 4, True, 4, "f16", "f16"), 1, 2.0),
    (Kind("int", 4, False, 1, "f16", "f16"), 1, 2.3),
    (Kind("int", 4, True, 1, "bf16", "bf16"), 1, 2.8),
    (Kind("int", 4, False, 0, "f16", "f16"), 1, 3.5),
    (Kind("int", 4, False, 4, "f16", "f16"), 2, 2.2),
    (Kind("int", 4, False, 4, "bf16", "bf16"), 4, 3.0),
    (Kind("int", 3, False, 4, "f16", "f16"), 1, 2.4),
    (Kind("int", 3, True, 2, "bf16", "bf16"), 1, 3.0),
    (Kind("int", 2, False, 4, "f16", "f16"), 1, 1.6),
    (Kind("int", 2, False, 8, "bf16", "bf16"), 1, 1.7),
    (Kind("int", 2, True, 1, "f16", "f16"), 1, 2.3),
    (Kind("int", 8, False, 2, "f16", "f16"), 1, 2.5),
    (Kind("int", 8, False, 2, "bf16", "bf16"), 1, 3.0),
    (Kind("int", 8, True, 2, "bf16", "bf16"), 1, 3.9),
    (Kind("e2m1", 4, False, 4, "f16", "f16"), 1, 2.6),
    (Kind("e2m1", 4, False, 1, "e8m0", "bf16"), 1, 3.6),
    (Kind("e2m1", 4, False, 0, "e4m3", "bf16"), 1, 3.9),
    (Kind("e2m1", 4, False, 4, "bf16", "bf16"), 2, 3.4),
    (Kind("table", 4, False, 2, "f16", "f16"), 1, 3.8),
    (Kind("table", 4, False, 4, "bf16", "bf16"), 2, 4.2),
    (Kind("e4m3", 8, False, 2, "f32", "f16"), 1, 2.9),
    (Kind("e4m3", 8, False, 2, "f32", "bf16"), 1, 3.4),
    (Kind("e5m2", 8, False, 2, "f32", "bf16"), 1, 3.4),
]


@dataclass(frozen=True)
class Code:
    """What a disassembler tells of a kernel."""

    registers: int
    instructions: Counter[str]
    loop: Counter[str]
    """Of the largest loop with products."""

    @property
    def spills(self) -> int:
        return self.instructions["LDL"] + self.instructions["STL"]


def disassembler() -> Path:
    triton = pytest.importorskip("triton", reason="its wheel has the disassembler")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiler() -> Nvrtc:
    try:
        return nvrtc()
    except MachineError as error:
        pytest.skip(str(error))


def code(variant: Variant, target: str, folder: Path) -> Code:
    path, tool = folder / f"{variant}-{target}.cubin", disassembler()
    path.write_bytes(compiler().compile(f"{variant.source}.cu", variant.text, headers(), target, variant.options))
    told = subprocess.run([tool, "-sass", "-res-usage", path], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", told.stdout + told.stderr)
    assert registers, told.stderr
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", told.stdout)]
    loops = []
    for at, text in lines:
        jump = re.search(r"\bBRA(?:\.\S+)?\s+.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            loops.append(names(inner for place, inner in lines if int(jump[1], 16) <= place <= at))
    with_products = [loop for loop in loops if loop["HMMA"]] or [Counter()]
    return Code(int(registers[1]), names(text for _, text in lines), max(with_products, key=Counter.total))


def names(lines: Iterable[str]) -> Counter[str]:
    """How often each instruction is there, predicates and modifiers aside."""
    return Counter(re.sub(r"^@!?U?P\w+ ", "", line).split()[0].partition(".")[0] for line in lines)


def for_each_weight(found: Code, kind: Kind, tokens: int, target: str) -> float:
    """Instructions of the loop for each weight of a lane."""
    sides = 2 if not kind.planes and kind.scale != "e4m3" else 1
    planes = tiles.chunk(kind.bits) // tiles.WORDS
    products = 2 * planes * sides * tokens * (2 if target == "sm_75" else 1)
    chunks, rest = divmod(found.loop["HMMA"], products)
    assert (chunks, rest) in ((1, 0), (2, 0)), f"{found.loop['HMMA']} products are no chunks of {products}"
    return found.loop.total() / (chunks * 16 * planes)


def gate(found: Code, what: str) -> None:
    assert not found.spills, f"{what}: {found.spills} spills"
    assert not found.instructions["I2F"], f"{what}: converts integers one by one"


def runs(kind: Kind, target: str) -> bool:
    """GPUs of compute capability 7.5 have no bfloat16."""
    return target != "sm_75" or kind.x == "f16"


@pytest.mark.parametrize(
    ("target", "budgets"),
    [
        pytest.param(target, budgets, marks=marks)
        for target in TARGETS for budgets, marks in ((BUDGETS[::6], ()), (BUDGETS, pytest.mark.slow))
    ],
)  # fmt: skip
def test_budgets(target: str, budgets: list[tuple[Kind, int, float]], tmp_path: Path) -> None:
    """A loop that takes longer than the memory of an H100, or longer than it did, does not get in; nor does one that spills."""
    over = []
    for kind, tokens, most in budgets:
        if not runs(kind, target):
            continue
        found = code(skinny(kind, tokens), target, tmp_path)
        gate(found, f"{kind}-n{tokens} for {target}")
        taken = for_each_weight(found, kind, tokens, target)
        # Products take two instructions there.
        if taken > most * (1.1 if target == "sm_75" else 1):
            over.append(f"{kind}-n{tokens}: {taken:.2f} of {most}")
        assert tokens > 1 or taken < H100[kind.bits], f"{kind}: an H100 has no time for {taken:.2f}"
    assert not over, f"{target}: {'; '.join(over)}"


@pytest.mark.parametrize("target", [*TARGETS[::3], *(pytest.param(target, marks=pytest.mark.slow) for target in TARGETS[1:3])])
def test_the_other_kernels_spill_nothing(target: str, tmp_path: Path) -> None:
    for kind in [kind for kind, tokens, _ in BUDGETS if tokens == 1][::6]:
        if runs(kind, target):
            gate(code(expand(kind), target, tmp_path), f"expand {kind}")
    for source, defines in (("finish", ()), ("outliers", ("-DWIDE=0",)), ("outliers", ("-DWIDE=1",))):
        gate(code(Variant(source, "f16", ("-DBF16=0", *defines)), target, tmp_path), source)


def test_bfloat16_is_refused_where_there_is_none() -> None:
    variant = skinny(Kind("int", 4, False, 4, "bf16", "bf16"), 1)
    with pytest.raises(MachineError, match=r"bfloat16 needs compute capability 8\.0"):
        compiler().compile("skinny.cu", variant.text, headers(), "sm_75", variant.options)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_variant_spills_in_its_loop(target: str, tmp_path: Path) -> None:
    """A register that is put aside before the loop and taken up after it costs nothing, but one is enough."""
    spilling = []
    for kind in filter(lambda kind: runs(kind, target), kinds()):
        gate(code(expand(kind), target, tmp_path), f"expand {kind}")
        for tokens in table.counts(kind):
            found = code(skinny(kind, tokens), target, tmp_path)
            for_each_weight(found, kind, tokens, target)
            if found.loop["LDL"] + found.loop["STL"] or found.spills > 4 or found.instructions["I2F"]:
                spilling.append(f"{kind}-n{tokens}: {found.spills}")
    assert not spilling, spilling


def main() -> None:
    """Prints the table."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(f"NVRTC {compiler().version}: instructions for each weight, registers / spills; of what an H100 has time for")
        print(f"{'kind':28}" + "".join(f"{target:>18}" for target in TARGETS) + f"{'H100':>8}")
        for kind, tokens, _ in BUDGETS:
            cells, taken = [], 0.0
            for target in TARGETS:
                if not runs(kind, target):
                    cells.append(f"{'-':>18}")
                    continue
                found = code(skinny(kind, tokens), target, Path(folder))
                taken = for_each_weight(found, kind, tokens, target)
                cells.append(f"{taken:9.2f} {found.registers:4} / {found.spills}")
            print(f"{f'{kind}-n{tokens}':28}{''.join(cells)}{taken / H100[kind.bits]:8.0%}", flush=True)


if __name__ == "__main__":
    main()
