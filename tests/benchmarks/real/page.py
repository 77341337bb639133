"""Page: recipes/real.md from what was measured. What a person wrote between its markers is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.spec.byte_size import parse_size

REMARKS = "<!-- remarks -->"
END = "<!-- end -->"
QUALITY_HEAD = ("bits/weight", "MB", "KL to source", "on the second text", "perplexity", "same top-1")
"""Of what `quality_cells` gives."""
HEAD = ("method", *QUALITY_HEAD, "s", "CPU", "peak", "of plan")
PEER_HEAD = ("tool", *QUALITY_HEAD, "s", "its own work", "peak")
OPTION_HEAD = ("gptq-w3g64 with", "KL to source", "perplexity", "s", "s solving")


def page(found: dict[str, Any], remarks: str = "") -> str:
    """The whole page; `found` is what `make real` has written as JSON."""
    inputs = found["inputs"]
    rows = [row for row in found["rows"] if "quality" in row or "error" in row]
    absent = [f"`{row['name']}`" for row in found["rows"] if row not in rows]
    ours = [row for row in rows if row["kind"] == "ours" and not row.get("option")]
    options = [row for row in rows if row.get("option")]
    peers = [row for row in rows if row["kind"] == "peer"]
    lines = [
        "# Methods on a real model", "",
        f"What `make real` measured on {inputs['model']['name']}: {inputs['model']['bytes']:,} bytes of tensors, bf16. Every row is",
        "the installed command in fresh processes (`compress plan`, `run`, `eval`), one after another. The weights of the default model",
        "lie on a grid of 4 bits: rows marked \\* flatter there. KL(source || result) in nats per token; all errors are standard errors",
        "over windows.", "",
        "```sh", 'make real [PEERS=1] [ROWS="gptq-* source"] [MODEL=DIR] [TEXT=FILE] [ALSO=FILE] [CALIBRATE=FILE] [ITERS=200]', "```", "",
        REMARKS, remarks.strip("\n"), END, "",
        *table(HEAD, [ours_cells(row) for row in ours]), "",
    ]  # fmt: skip
    if options:
        base = [{**row, "option": "defaults"} for row in ours if row["name"] == "gptq-w3g64"]
        lines += [
            "What each option of GPTQ costs and earns: `gptq-w3g64` with one of them changed. Seconds are of the solver alone, summed over",
            "all matrices.", "",
            *table(OPTION_HEAD, [option_cells(row) for row in (*base, *options)]), "",
        ]  # fmt: skip
    if peers:
        lines += [
            "Other tools, each in an environment of its own, on the same token ids in the same order, symmetric as each of them",
            "makes by default; what they saved is measured by `compress eval` as ours is. `its own work` leaves out imports, loading",
            "and saving: for llm-compressor it is `oneshot`.", "",
            *table(PEER_HEAD, [peer_cells(row) for row in peers]), "",
        ]  # fmt: skip
    lines += notes(rows)
    lines += [f"Not measured here: {', '.join(absent)}.", ""] if absent else []
    return "\n".join([*lines, *protocol(found)]) + "\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table; its first column is text, the rest numbers."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---", *["---:"] * (len(head) - 1)), *rows)]


def ours_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of ours."""
    label = f"`{row['name']}`" + (" \\*" if row.get("note", "").startswith("flattered") else "")
    if "quality" not in row:
        return label, *blank(row, len(HEAD) - 1)
    run = row.get("run")
    took = (
        (seconds(run["seconds"], run), f"{run['cpu_share']:.0%}", gigabytes(run["peak_bytes"]), f"{row['of_plan']:.2f}x")
        if run
        else ("",) * 4
    )
    return label, *quality_cells(row), *took


def option_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of options."""
    label = f"`{row['option']}`" if row["option"] != "defaults" else "its defaults"
    if "quality" not in row:
        return label, *blank(row, len(OPTION_HEAD) - 1)
    quality, run, solving = row["quality"], row["run"], row["steps"]["quantize.gptq"]["spent"]["solve"]
    took = (seconds(run["seconds"], run), seconds(solving, run))
    return label, estimate(quality["kl"], ".4f"), estimate(quality["perplexity"], ".2f"), *took


def peer_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of another tool."""
    if "quality" not in row:
        return row["asked"], *blank(row, len(PEER_HEAD) - 1)
    made = row["made"]
    took = (seconds(made["seconds"], made), seconds(made["stages"]["quantize"], made), gigabytes(made["peak_bytes"]))
    return row["asked"], *quality_cells(row), *took


def blank(row: dict[str, Any], count: int) -> tuple[str, ...]:
    """Cells of a row that failed; the first of them says why."""
    return f"failed: {' '.join(row['error'].split())}".replace("|", "\\|"), *[""] * (count - 1)


def quality_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Bits, megabytes, and what eval found."""
    quality, bits = row["quality"], row.get("bits_per_weight")
    return (
        f"{bits:.3f}" if bits else "", f"{row['tensor_bytes'] / 1e6:.1f}", estimate(quality["kl"], ".4f"),
        estimate(row["also"]["quality"]["kl"], ".4f") if "also" in row else "", estimate(quality["perplexity"], ".2f"), estimate(quality["top1"], ".1%"),
    )  # fmt: skip


def estimate(found: dict[str, float | None], form: str) -> str:
    """A number and its standard error."""
    if found["value"] is None:
        return ""
    return f"{found['value']:{form}}" + (f" ± {found['error']:{form}}" if found["error"] is not None else "")


def seconds(value: float, usage: dict[str, Any]) -> str:
    """Seconds; in brackets where other processes had a part of the machine."""
    return f"({value:,.0f})" if usage["busy"] else f"{value:,.0f}"


def gigabytes(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / parse_size('1GB'):.2f} GB"


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What marks mean, as far as there are any, and the recipe of every row."""
    lines = []
    if any(use["busy"] for row in rows for use in (row.get("run"), row.get("made")) if use):
        lines += [
            "Seconds in brackets were measured while other processes had more than a tenth of the machine: only their KL counts.",
            "",
        ]
    named = [row for row in rows if row.get("recipe") and not row.get("option")]
    lines += [f"* `{row['name']}`: `{row['recipe']}`" + (f" ({row['note']})" if row.get("note") else "") for row in named]
    return [*lines, ""] if named else lines


def protocol(found: dict[str, Any]) -> list[str]:
    """On what it was measured, with the hashes of everything that went in."""
    inputs, machine = found["inputs"], found["machine"]
    text, data = inputs["text"], inputs["calibrate"]
    commits = sorted({row["commit"] for row in found["rows"] if row.get("commit")})
    second = sorted({row["also"]["text"] for row in found["rows"] if "also" in row})
    there = sorted({row["machine"] for row in found["rows"] if row.get("machine")})
    return [
        f"Protocol: first {inputs['tokens']:,} tokens of {text['name']} (sha256 {text['sha256'][:16]}), windows of {inputs['window']} without",
        "overlap, fp32, no BOS, first token of a window not scored; calibrated on "
        f"{inputs['samples']} x {inputs['length']} tokens of {data['name']}",
        f"(sha256 {data['sha256'][:16]}), seed 0. Model: sha256 {inputs['model']['sha256'][:16]} over config, tokenizer and tensors."
        + (f" Second text: as many tokens of {', '.join(second)}." if second else ""), "",
        f"Machines: {'; '.join(there)}. The JSON file has each row's.",
        f"Python {machine['python']}, transformers {machine['transformers']}. compress {', '.join(commits)}. `peak` is the largest resident memory of the process; `of plan` is that",
        "by what `compress plan` said beforehand. `CPU` is CPU seconds a second: 200% is two cores all the time.",
    ]  # fmt: skip


def remarks_of(file: Path) -> str:
    """What stands between the markers of a page that is there."""
    text = file.read_text() if file.is_file() else ""
    return text.partition(REMARKS)[2].partition(END)[0].strip("\n")
