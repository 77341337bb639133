"""Table: runs the rows one after another, keeps each as JSON, and writes the page from all that is known.

    python tests/benchmarks/real [--rows "gptq-* source"] [--peers] [--model DIR] [--text FILE] [--calibrate FILE] ...

Rows that are asked for are measured anew; the others are taken from the cache, or from the JSON file that is there, if they were
measured on the same inputs. The page has the commits and the machines. The exit status is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.cache import folder_of
from compress.errors import CompressError, InputError

from . import ours, peers
from .model import real_model
from .page import page, remarks_of
from .peers import PEER_ROWS
from .rows import ROWS, Protocol, Row, chosen

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"
SHIPPED = ROOT / "compress" / "demo" / "text"
SAMPLES, SHIPPED_SAMPLES = 64, 24
"""Calibration samples: of a longer text, and of the one that is shipped."""


def tell(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; empty values are as if left out, for make gives them all."""
    parser = argparse.ArgumentParser(prog="real", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="", help="names or patterns, between blanks; all of ours without")
    parser.add_argument("--peers", action="store_true", help="other tools' rows too, hours of them")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's iterations")
    parser.add_argument("--model", default="", help="a checkpoint directory instead of the package's")
    parser.add_argument("--text", default="", help="what is measured on: .jsonl or .txt")
    parser.add_argument("--also", default="", help="a second text that is measured on")
    parser.add_argument("--calibrate", default="", help="what is calibrated on")
    parser.add_argument("--samples", type=int, help="calibration samples")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sample, and of a window")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens that are measured")
    parser.add_argument("--json", type=Path, default=ROOT / "recipes" / "real.json", help="where the numbers go")
    parser.add_argument("--page", type=Path, default=ROOT / "recipes" / "real.md", help="where the page goes")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is known; measure nothing")
    return parser.parse_args(arguments)


def protocol_of(args: argparse.Namespace) -> Protocol:
    """What is measured, on which texts. Raises CompressError."""
    text = Path(args.text or (DATA / "wiki.valid.jsonl" if DATA.is_dir() else SHIPPED / "evaluation.jsonl"))
    calibrate = Path(args.calibrate or (DATA / "wiki.train.jsonl" if DATA.is_dir() else SHIPPED / "calibration.jsonl"))
    second = DATA / "speech.valid.jsonl"
    also = Path(args.also) if args.also else second if second.is_file() and not args.text else None
    for option, file in (("TEXT", text), ("ALSO", also or text), ("CALIBRATE", calibrate)):
        if not file.is_file():
            raise InputError(option, "a .jsonl file with a field 'text', or a .txt", f"no file {file}")
    if args.model and not (Path(args.model) / "config.json").is_file():
        raise InputError("MODEL", "a checkpoint directory with config.json", args.model)
    samples = args.samples or (SHIPPED_SAMPLES if calibrate.parent == SHIPPED else SAMPLES)
    model = Path(args.model) if args.model else real_model(tell)
    paths = (path.resolve() for path in (model, text, calibrate))
    counts = {"samples": samples, "length": args.length, "tokens": args.tokens, "window": args.length}
    return Protocol(*paths, **counts, also=None if also is None else also.resolve())


def inputs_of(protocol: Protocol) -> dict[str, Any]:
    """Names and hashes of everything that goes in."""
    files = sorted(
        [*protocol.model.glob("*.safetensors"), *protocol.model.glob("config.json"), *protocol.model.glob("tokenizer*")]
    )
    model = {"name": protocol.model.name, "sha256": digest(*files), "bytes": ours.tensor_bytes(protocol.model)}
    texts = {
        name: {"name": file.name, "sha256": digest(file)}
        for name, file in (("text", protocol.text), ("calibrate", protocol.calibrate))
    }
    counts = {name: getattr(protocol, name) for name in ("samples", "length", "tokens", "window")}
    return {"model": model, **texts, **counts}


def digest(*files: Path) -> str:
    """sha256 of one file; of several, over their names and hashes."""
    found = []
    for file in files:
        with open(file, "rb") as stream:
            found.append((file.name, hashlib.file_digest(stream, "sha256").hexdigest()))
    return found[0][1] if len(found) == 1 else hashlib.sha256(json.dumps(found).encode()).hexdigest()


@cache
def commit() -> str:
    """The version with the commit that is measured, and whether files differed from it before the page was written."""
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"{__version__} ({done.stdout.strip()})" if done.returncode == 0 else __version__


def machine() -> dict[str, Any]:
    """What it ran on."""
    from compress.evaluate import backend_report

    there = backend_report.machine()
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "compressed-tensors")}
    kept = {name: there[name] for name in ("cpu", "isa", "memory_bytes")}
    return {**kept, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform(), **packages}


@dataclass(frozen=True)
class Table:
    """Rows on the same inputs, each a JSON file in the cache."""

    protocol: Protocol
    inputs: dict[str, Any]
    iters: int
    compress: str = str(Path(sys.executable).with_name("compress"))
    published: Path | None = None
    """The JSON file that has what was measured elsewhere."""

    @property
    def folder(self) -> Path:
        return folder_of("real") / "rows" / hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest()[:12]

    def facts(self, name: str) -> dict[str, Any]:
        """What is known of a row without measuring it."""
        for row in ROWS:
            if row.name == name:
                recipe = recipe_shown(row, self.protocol)
                option = {"option": row.option} if row.option else {}
                return {"name": name, "kind": "ours", "recipe": recipe, "note": row.note, **option}
        row = next(row for row in PEER_ROWS if row.name == name)
        return {"name": name, "kind": "peer", "asked": row.told(self.iters)}

    def known(self, name: str) -> dict[str, Any]:
        """A row as it was measured, here or elsewhere, if it was, and if it means the same today."""
        facts, file = self.facts(name), self.folder / f"{name}.json"
        kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else self.elsewhere().get(name, {})
        same = all(kept.get(key) == value for key, value in facts.items())
        return kept if same else facts

    def elsewhere(self) -> dict[str, Any]:
        """Rows of the JSON file, if its inputs are these."""
        file = self.published
        found = json.loads(file.read_text()) if file is not None and file.is_file() else {}
        return {row["name"]: row for row in found["rows"]} if found.get("inputs") == self.inputs else {}

    def measure(self, name: str) -> dict[str, Any]:
        """Measures a row and keeps it; one that fails has its message for numbers."""
        facts = {**self.facts(name), "commit": commit(), "machine": machine_told(machine()), "finished": ""}
        # In the current disk's build folder: artifacts are large, and /tmp may be memory.
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="real-") as scratch:
            try:
                row = next((row for row in ROWS if row.name == name), None)
                found = (
                    self.peer(name, Path(scratch))
                    if row is None
                    else ours.measured(row, self.protocol, self.compress, Path(scratch))
                )
                found.pop("recipe", None)
                facts |= found
            except CompressError as error:
                facts["error"] = " ".join(str(error).split())
            except OSError as error:
                facts["error"] = str(error)
        facts["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        return facts

    def peer(self, name: str, scratch: Path) -> dict[str, Any]:
        """Another tool's row. Raises CompressError."""
        row = next(row for row in PEER_ROWS if row.name == name)
        ids, sha256 = self.tokens(scratch), ""
        sha256 = digest(ids)
        artifact, made = peers.quantized(
            row, self.iters, self.protocol.model, self.inputs["model"]["sha256"], ids, sha256, tell
        )  # fmt: skip
        found = ours.evaluated(artifact, self.protocol, self.compress, scratch)
        made = {key: value for key, value in made.items() if key not in ("command", "request")}
        return {"made": made, "ids_sha256": sha256, "tensor_bytes": made["tensor_bytes"], **found}

    def tokens(self, scratch: Path) -> Path:
        """The token ids that our rows are calibrated on, drawn by the same command."""
        place = self.folder / "calibration.safetensors"
        if not place.is_file():
            out = scratch / "tokens"
            ours.said(
                [self.compress, "run", str(self.protocol.model), str(out), "-p", self.protocol.calibration, "--json"],
                scratch / "tokens.log",
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(out / place.name, place)
        return place


def recipe_shown(row: Row, protocol: Protocol) -> str:
    """The recipe with the names of files alone, as a page has it."""
    if not row.passes:
        return ""
    return row.recipe(protocol).replace(f"{protocol.calibrate.parent}/", "")


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(arguments)
    mine, theirs = [row.name for row in ROWS], [row.name for row in PEER_ROWS]
    try:
        names = chosen(args.rows, [*mine, *theirs], [*mine, *(theirs if args.peers else [])])
        protocol = protocol_of(args)
        inputs = inputs_of(protocol)
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    for name in ("text", "calibrate"):
        print(f"{name}: {inputs[name]['name']}, sha256 {inputs[name]['sha256']}", flush=True)
    table = Table(protocol, inputs, args.iters, published=args.json)
    failed = write_down(table, [] if args.page_only else names, args.json, args.page)
    for row in failed:
        print(f"failed: {row['name']}: {row['error']}", file=sys.stderr)
    print(f"written: {args.json}, {args.page}")
    return 1 if failed else 0


def write_down(
    table: Table, names: list[str], json_: Path, page_: Path, say: Callable[[str], None] = tell
) -> list[dict[str, Any]]:
    """Measures rows, and writes both files after each; the rows that failed."""
    commit()  # before a page changes
    failed, there = [], machine()
    for number, name in enumerate([*names, None]):
        rows = [table.known(row.name) for row in (*ROWS, *PEER_ROWS)]
        found = {"inputs": table.inputs, "machine": there, "compress": commit(), "rows": rows}
        for file, text in (
            (json_, json.dumps(found, indent=1, ensure_ascii=False) + "\n"),
            (page_, page(found, remarks_of(page_))),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if name is None:
            break
        say(f"[{number + 1}/{len(names)}] {name}")
        row = table.measure(name)
        if "error" in row:
            failed.append(row)
        say(f"    {row.get('error') or told(row)}")
    return failed


def machine_told(there: dict[str, Any]) -> str:
    """What seconds depend on."""
    return f"{there['cpu']}, {there['isa']}, {there['cores']} cores, torch {there['torch']}"


def told(row: dict[str, Any]) -> str:
    """A row in a line."""
    quality, run = row["quality"], row.get("run") or row.get("made") or {}
    kl = quality["kl"]["value"]
    took = f", {run['seconds']:.0f} s, {run['peak_bytes'] / 1e9:.2f} GB" if run else ""
    return (
        f"KL {kl:.4f}, " if kl is not None else ""
    ) + f"perplexity {quality['perplexity']['value']:.2f}{took}, eval {row['eval']['seconds']:.0f} s"
