"""Readers table: what each reader computes from every format and scheme.

    python tests/benchmarks/readers_table.py [--cells "vllm awq*"] [--page-only]

A cell packs a tiny model, with random weights, and has the reader read it, as `verify --reader` does. What was seen is kept in
build/readers.json at once and not repeated, so that it can be stopped and run again; cells that were never run say so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real.page import table
from warm_readers import warm

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import CompressError, MachineError
from compress.evaluate import readers
from compress.evaluate.verify import read_with, token_ids
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner
from families import SERVED, build_served

ROOT = Path(__file__).parents[2]
KEPT, PAGE = ROOT / "build" / "readers.json", ROOT / "docs" / "readers.md"
BEGIN, END = "<!-- what was run: made by `make readers-table` -->", "<!-- end -->"
NAMES = {"llama": "Llama", "qwen3": "Qwen3", "mixtral": "Mixtral", "gemma3": "Gemma 3"}
_INTEGERS = ("w4a16g32", "w4a16g64", "w4a16g128", "w4a16", "w8a16g64", "w8a16")
_FLOATS = ("fp8", "fp8-afp8", "fp8-block-afp8", "mxfp4", "nvfp4")
SCHEMES: dict[str, tuple[str, ...]] = {
    "dense": ("",),
    "compressed-tensors": (*_INTEGERS, "w3a16g64", "w4a16g64-asym", "w8a8", *_FLOATS),
    "gptq": (*(f"w{bits}a16g64{kind}" for bits in (2, 3, 4, 8) for kind in ("", "-asym")), "w4a16g32", "w4a16g128"),
    "awq": ("w4a16g64", "w4a16g64-asym", "w4a16g128-asym"),
    "gguf": ("", "w4a16g32", "w4a16g64", "w8a16g32", "mxfp4"),
    "mlx": (*(f"w{bits}a16g64-min" for bits in (2, 3, 4, 5, 6, 8)), "w4a16g64", "w4a16g32-min", "w4a16g128-min"),
}
"""Schemes by format; the empty one is a model that nothing has quantized."""
READERS = {
    "dense": ("transformers", "vllm"), "compressed-tensors": ("transformers", "vllm"), "gptq": ("auto-gptq", "gptqmodel", "vllm"),
    "awq": ("gptqmodel", "vllm"), "gguf": ("llama.cpp",), "mlx": ("mlx",),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A model in a scheme and a format, and who reads it."""

    reader: str
    form: str
    scheme: str
    family: str

    @property
    def name(self) -> str:
        return f"{self.reader} {self.form} {self.scheme or 'dense'} {self.family}"

    @property
    def recipe(self) -> str:
        """What makes the artifact; empty for the model as it is."""
        least = ", least_zero=1" if self.form == "gptq" and self.scheme.endswith("-asym") else ""
        experts = ", targets=[linear, experts]" if self.family == "mixtral" else ""
        quantize = f"quantize.rtn(scheme={self.scheme}{least}{experts}) | " if self.scheme else ""
        return "" if self.form == "dense" else f"{quantize}pack(format={self.form})"


def cells() -> list[Cell]:
    return [
        Cell(reader, form, scheme, family)
        for form, names in READERS.items() for reader in names for scheme in SCHEMES[form] for family in NAMES
    ]  # fmt: skip


def measure(cell: Cell, scratch: Path) -> dict[str, Any]:
    """What is seen of a cell: `seen` is equal, differs, refused, not packed or machine."""
    source, artifact = scratch / "sources" / cell.family, scratch / "artifacts" / f"{cell.form}-{cell.scheme}-{cell.family}"
    if not source.is_dir():
        source.parent.mkdir(exist_ok=True)
        build_served(cell.family, source.parent).rename(source)
    began = time.monotonic()
    if not cell.recipe:
        artifact = source
    elif not artifact.is_dir():
        try:
            run_recipe(parse_one_liner(cell.recipe), open_checkpoint(source), artifact, Context(threads=1))
        except CompressError as error:
            return {"seen": "not packed", "said": said(error)}
    try:
        found = read_with(cell.reader, artifact, token_ids(open_checkpoint(artifact)), lambda line: None)
    except MachineError as error:
        return {"seen": "machine", "said": said(error)}
    except CompressError as error:
        differs = "logits that differ" in error.problems[0].expected
        return {"seen": "differs" if differs else "refused", "said": said(error)}
    return {
        "seen": "equal", "typical": found.typical, "allowed": found.allowed if found.rounds else None, "kl": found.kl,
        "difference": found.difference, "largest": found.largest, "top1": found.top1, "dtype": found.dtype,
        "versions": found.versions, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def said(error: CompressError) -> str:
    """A refusal in a line, without places of this machine."""
    text = " ".join(error.problems[0].got.split())
    return re.sub(r"/[\w.+/-]*/", "", text)[:400]


def shown(record: dict[str, Any] | None, notes: dict[str, int]) -> str:
    """A cell of the page."""
    if record is None or record["seen"] == "machine":
        return "not run"
    if record["seen"] == "equal":
        share = 100 * record["typical"]
        return f"{share:.2f} %" if share >= 0.005 else "< 0.01 %"
    number = notes.setdefault(
        record["said"].partition(" (KL")[0] if record["seen"] == "differs" else record["said"], len(notes) + 1
    )
    return f"**{record['seen']}** [{number}]" if record["seen"] == "differs" else f"{record['seen']} [{number}]"


def page(kept: dict[str, Any]) -> str:
    """The part of the page that the cells make."""
    notes: dict[str, int] = {}
    rows, left = [], 0
    for form, names in READERS.items():
        for reader in names:
            for scheme in SCHEMES[form]:
                cut = [shown(kept.get(Cell(reader, form, scheme, family).name), notes) for family in NAMES]
                if set(cut) == {"not run"}:
                    left += 1
                    continue
                rows.append((reader, form, f"`{scheme}`" if scheme else "not quantized", *cut))
    versions: dict[str, str] = {}
    for record in kept.values():
        versions |= {name: number for name, number in record.get("versions", {}).items() if name != "numpy"}
    ran = sum(1 for cell in cells() if kept.get(cell.name, {"seen": "machine"})["seen"] != "machine")
    return "\n".join([
        f"{ran} of {len(cells())} cells were run; {left} rows of which none was are left out.",
        f"Versions, the last seen: {', '.join(f'{n} {v}' for n, v in sorted(versions.items()))}.",
        "", *table(("reader", "format", "scheme", *NAMES.values()), rows), "",
        *(f"{number}. {text.replace('<', '&lt;')}" for text, number in notes.items()), "",
    ])  # fmt: skip


def write(kept: dict[str, Any]) -> None:
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{page(kept)}{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", default="*", help='patterns of "READER FORMAT SCHEME FAMILY", divided by commas')
    parser.add_argument("--page-only", action="store_true", help="write the page from what was kept")
    args = parser.parse_args()
    assert set(NAMES) == set(SERVED)
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    patterns = [pattern.strip() for pattern in args.cells.split(",")]
    wanted = [cell for cell in cells() if any(fnmatch(cell.name, pattern) for pattern in patterns)]
    KEPT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT.parent, prefix="readers-") as scratch, warm():
        (Path(scratch) / "artifacts").mkdir()
        for number, cell in enumerate(wanted if not args.page_only else (), 1):
            # What a version of the reader said is asked again only of another one.
            pins = readers.READERS[cell.reader].environment
            key = pins().key() if pins else ""
            if (old := kept.get(cell.name)) and old["seen"] != "machine" and old["recipe"] == cell.recipe and old["pins"] == key:
                continue
            record = measure(cell, Path(scratch))
            kept[cell.name] = {**record, "recipe": cell.recipe, "pins": key}
            draft = KEPT.with_suffix(".draft")
            draft.write_text(json.dumps(kept, indent=1))
            draft.rename(KEPT)
            detail = f"{record['typical']:.2%}" if record["seen"] == "equal" else record["said"]
            print(f"{number}/{len(wanted)}  {cell.name}: {record['seen']}, {detail}", file=sys.stderr, flush=True)
    write(kept)


if __name__ == "__main__":
    main()
