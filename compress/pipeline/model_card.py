"""Model card: writes the README.md of an artifact; the source's is renamed."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import KEPT
from compress.spec.weight_state import State

if TYPE_CHECKING:
    from compress.checkpoint.manifest import Manifest, WeightRecord
    from compress.contract.format import Verdict

_MARK = "<!-- Written by compress from manifest.json. -->"
_HEAD_BYTES = 1 << 16
_LICENCE = re.compile(r"""^license:[ \t]*["']?([A-Za-z0-9][\w.+-]{0,63})["']?[ \t]*$""", re.ASCII | re.MULTILINE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LOADING = {
    "native": 'import compress\n\nmodel = compress.load("{here}")',
    "transformers": 'from transformers import {model}\n\nmodel = {model}.from_pretrained("{here}")',
    "vllm": 'from vllm import LLM\n\nmodel = LLM("{here}")',
    "gptqmodel": 'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{here}")',
    "auto-gptq": 'from auto_gptq import AutoGPTQForCausalLM\n\nmodel = AutoGPTQForCausalLM.from_quantized("{here}")',
    "peft": (
        "from peft import PeftModel\nfrom transformers import {model}\n\n"
        'model = PeftModel.from_pretrained({model}.from_pretrained("{here}"), "{here}/loftq_init")'
    ),
}
"""Example code by which each reader loads an artifact."""


def carried(side: dict[str, Path]) -> dict[str, Path]:
    """Side files of a source by their names in the output; without a README that compress has written."""
    found = {name: path for name, path in side.items() if name not in KEPT}
    for name, kept in KEPT.items():
        if name in side and kept not in side and not _ours(side[name]):
            found[kept] = side[name]
    return found


def _ours(path: Path) -> bool:
    return _MARK in _head(path)


def _head(path: Path) -> str:
    with open(path, "rb") as stream:
        return stream.read(_HEAD_BYTES).decode("utf-8", "replace")


def licence_of(readme: Path | None) -> str:
    """The licence in the head of a README; empty if it names none."""
    parts = re.split(r"^---[ \t]*\r?$", _head(readme), maxsplit=2, flags=re.MULTILINE) if readme is not None else []
    found = _LICENCE.search(parts[1].replace("\r", "")) if len(parts) == 3 and not parts[0].strip() else None
    return found[1] if found else ""


def card(manifest: Manifest, nbytes: int, config: dict[str, Any], verdicts: Sequence[Verdict], licence: str) -> str:
    """The text of README.md, which depends on nothing but the arguments; `licence` is the one in the source's README."""
    source = manifest.source
    licence = found[0] if (found := re.search(r"^[\w.+-]{1,64}$", source.licence or "", re.ASCII)) else licence
    head = [f'base_model: "{source.name}"'] if source.commit and _HUB_ID.fullmatch(source.name) else []
    head += [f'license: "{licence}"'] if licence else []
    rows = [
        ("base model", _code(source.name) + (f", commit {_code(source.commit)}" if source.commit else "")),
        ("format", f"{_code(manifest.format)}, {nbytes:,} bytes of tensors"),
        ("made by", f"compress {manifest.compress_version}, seed {manifest.seed}"),
    ]
    kept = [name for name in KEPT.values() if name in manifest.files]
    origin = f"\nOf the base model: {', '.join(kept)}. No number there is one of this artifact.\n" if kept else ""
    return "\n".join([
        *(["---", *head, "---", ""] if head else []),
        f"{_MARK}\n# {_plain(source.name)}, by compress\n",
        *(_row(*row) for row in [("", ""), ("---", "---"), *rows]),
        "\nRecipe:\n",
        f"    {_printable(' | '.join(step.text for step in manifest.lineage))}",
        origin,
        *_weights(manifest),
        "## Loading it\n",
        *_loading(manifest, _class(config), verdicts),
        "`compress show` prints all that `manifest.json` says, `compress verify` checks every byte against it.\n",
    ])  # fmt: skip


def _weights(manifest: Manifest) -> list[str]:
    """A table of weights by state, and the counted lines."""
    groups: dict[str, list[WeightRecord]] = defaultdict(list)
    for record in manifest.weights.values():
        groups[record.state].append(record)
    lines = ["## Weights\n"]
    if groups:
        lines += [_row("weights", "what they are", "bits per weight", "error", "error of outputs"), _row(*["---"] * 5)]
        lines += [
            _row(
                str(len(records)), _code(state), f"{_bits(records):.3f}", _range([r.error for r in records]),
                _range([r.output_error for r in records]),
            )
            for state, records in groups.items()
        ]  # fmt: skip
        lines += [
            "\nError: `|W - W'| / |W|` of a weight; of outputs: `|(W - W') x| / |W x|` on the calibration tokens; smallest to"
            " largest. Weights that are neither here nor counted below are those of the base model. What all this does to the"
            " model as a whole is not measured here; `compress eval` does that.\n"
        ]
    else:
        lines += ["No weight is in codes or has zeros that a pass made.\n"]
    notes = [note for note in manifest.notes if note.what != "untouched"]
    lines += [f"- {_code(note.what)}: {note.count} ({_code(note.reason)})" for note in notes]
    return [*lines, ""] if notes else lines


def _loading(manifest: Manifest, architecture: str, verdicts: Sequence[Verdict]) -> list[str]:
    """Example code for each reader that loads the artifact, and what is known of the others."""
    if manifest.format == "canonical":
        if any(State.parse(record.state).scheme is not None for record in manifest.weights.values()):
            return ["Its codes are not packed yet. `compress pack` packs them for a reader; commands of compress read them.\n"]
        return [*_example("transformers", architecture), ""]
    lines = [_row("reader", "loads it", ""), _row(*["---"] * 3)]
    lines += [_row(v.reader, v.loads, _cell(v.reason)) for v in verdicts]
    for verdict in verdicts:
        if verdict.loads == "yes" and verdict.reader in _LOADING:
            lines += ["", *_example(verdict.reader, architecture)]
    return [*lines, ""]


def _example(reader: str, architecture: str) -> list[str]:
    return ["```python", *_LOADING[reader].format(here="PATH", model=architecture).splitlines(), "```"]


def _class(config: dict[str, Any]) -> str:
    """The class of transformers that config.json names."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    return name if isinstance(name, str) and name.isidentifier() and name.isascii() else "AutoModel"


def _bits(records: list[WeightRecord]) -> float:
    sizes = [math.prod(record.shape) for record in records]
    return sum(record.bits * size for record, size in zip(records, sizes, strict=True)) / max(sum(sizes), 1)


def _range(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{min(known):.4f} to {max(known):.4f}" if known else "-"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _printable(text: str) -> str:
    """A text without line breaks: names come from untrusted files."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _code(text: str) -> str:
    """A text as inline code in a table's cell, where nothing counts as Markdown or HTML."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{_printable(text)}{pad}{fence}".replace("|", "\\|")


def _cell(text: str) -> str:
    return _printable(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """A text for a heading, with all of Markdown and HTML escaped."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", _printable(text))
