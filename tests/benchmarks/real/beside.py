"""Beside: recipes/peers.md, a table for each scheme of ours beside other tools', from rows that were measured.

    python tests/benchmarks/real/beside.py [FOLDER]

FOLDER (recipes) has peers.json, whose rows are those of `python tests/benchmarks/real --samples 128 --peers --json
recipes/peers.json`, and a peers-MODEL.json for each further model, with the same texts. `of the best` is a row's KL by the lowest of
any other tool's at that scheme, on each text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.real.page import END, REMARKS, estimate, gigabytes, protocol, remarks_of, table

SCHEMES = {
    "w3g64": "w3a16g64", "w3g32": "w3a16g32", "w2g64": "w2a16g64", "w2g32": "w2a16g32", "nvfp4": "NVFP4, weights alone",
    "mxfp4": "MXFP4, weights alone", "w4a8g64": "w4a8g64", "w4a4g64": "w4a4g64", "w4g32": "w4a16g32",
}  # fmt: skip
"""As names of rows have them -> the heading."""
OURS = (
    "rtn-{}", "gptq-{}", "{}", "gptq-{}-residual", "gptq-{}-both", "gptq-{}-both-scales", "gptq-{}-rotated",
    "gptq-{}-rotated-both", "gptq-{}-rotated-both-scales",
)  # fmt: skip
"""Rows of ours at a scheme, step by step."""
TOOLS = ("llm-compressor-{}", "gptqmodel-{}", "auto-round-{}")
HEAD = ("", "MB", "KL to source", "of the best", "on the second text", "of the best", "perplexity", "CPU s", "peak")


def of_scheme(rows: dict[str, dict[str, Any]], scheme: str) -> list[dict[str, Any]]:
    """The measured rows of a scheme, ours first."""
    names = [name.format(scheme) for name in (*OURS, *TOOLS)]
    return [rows[name] for name in names if "quality" in rows.get(name, {})]


def quality(row: dict[str, Any], text: str) -> dict[str, Any]:
    """What was measured; `text` is text or also."""
    found: dict[str, Any] = row["quality"] if text == "text" else row["also"]["quality"]
    return found


def kl(row: dict[str, Any], text: str) -> float:
    """In nats per token."""
    return float(quality(row, text)["kl"]["value"])


def kl_told(row: dict[str, Any], text: str) -> str:
    """It and its error, with two digits that count."""
    return estimate(quality(row, text)["kl"], ".4f" if kl(row, text) >= 0.01 else ".6f")


def cells(row: dict[str, Any], best: dict[str, float]) -> tuple[str, ...]:
    """A row of a table; `best` has the lowest KL of another tool on each text."""
    run = row.get("run") or row.get("made")
    of = {text: f"{kl(row, text) / best[text]:.2f}" if best else "" for text in ("text", "also")}
    passes = [words for words in row.get("recipe", "").split(" | ") if words != "pack" and not words.startswith("calibrate")]
    # A bar would end the cell.
    label = "`" + " \\| ".join(passes) + "`" if row["kind"] == "ours" else row["asked"]
    return (
        label, f"{row['tensor_bytes'] / 1e6:.1f}", kl_told(row, "text"), of["text"],
        kl_told(row, "also"), of["also"], estimate(row["quality"]["perplexity"], ".2f"),
        f"{run['cpu_seconds']:,.0f}" if run else "", gigabytes(run["peak_bytes"]) if run else "",
    )  # fmt: skip


def tables(found: dict[str, Any], model: str = "") -> Iterator[str]:
    """The lines of all tables; `model` stands in their headings."""
    rows = {row["name"]: row for row in found["rows"]}
    for scheme, heading in SCHEMES.items():
        held = of_scheme(rows, scheme)
        if not held:
            continue
        peers = [row for row in held if row["kind"] == "peer"]
        best = {text: min(kl(row, text) for row in peers) for text in ("text", "also")} if peers else {}
        yield from (f"## {heading}{model and f', {model}'}", "", *table(HEAD, [cells(row, best) for row in held]), "")
        missing = [name.format(scheme) for name in (*OURS, *TOOLS) if "error" in rows.get(name.format(scheme), {})]
        yield from (f"Failed: `{name}`: {rows[name]['error']}" for name in missing)
        yield from [""] if missing else []


def page(first: dict[str, Any], further: list[dict[str, Any]], remarks: str) -> str:
    """The whole page; `first` and `further` are what the rows of each model were written to as JSON."""
    texts = {name: value for name, value in first["inputs"].items() if name != "model"}
    for found in further:
        if differs := [name for name, value in texts.items() if found["inputs"][name] != value]:
            raise SystemExit(
                f"{found['inputs']['model']['name']}: another {differs[0]} than {first['inputs']['model']['name']} has"
            )
    measured = {**first, "rows": [row for found in (first, *further) for row in found["rows"] if "quality" in row]}
    models = [found["inputs"]["model"] for found in further]
    lines = [
        "# Beside other tools, scheme by scheme", "",
        f"{first['inputs']['model']['name']}, where no other model is named; each row a fresh process, other tools in environments of their",
        "own, on the same token ids in the same order. `of the best`: KL by that of the best other tool at the same scheme; below 1 is better.",
        "Symmetric integers throughout, as these tools make them by default. `CPU s`: seconds of a core that the whole process took, as",
        "programs beside it change least. Written by `tests/benchmarks/real/beside.py`.", "",
        "```sh",
        "python tests/benchmarks/real --samples 128 --peers --json recipes/peers.json --page build/peers.md",
        *(
            f"python tests/benchmarks/real --samples 128 --peers --model {model['name']} --rows '*w4g32*' "
            f"--json recipes/peers-{model['name']}.json --page build/peers.md"
            for model in models
        ),
        "python tests/benchmarks/real/beside.py", "```", "",
        REMARKS, remarks.strip("\n"), END, "",
        *tables(first), *(line for found in further for line in tables(found, found["inputs"]["model"]["name"])),
        *protocol(measured),
    ]  # fmt: skip
    lines += ["", *(f"{model['name']}: sha256 {model['sha256'][:16]}." for model in models)] if models else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """The exit status."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parents[3] / "recipes"
    first, *further = (json.loads(file.read_text()) for file in (folder / "peers.json", *sorted(folder.glob("peers-*.json"))))
    out = folder / "peers.md"
    out.write_text(page(first, further, remarks_of(out)))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
