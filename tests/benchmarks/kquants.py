"""K-quants: our GGUF files beside llama-quantize's with an importance matrix, at equal bytes and measured by the same code.

    python tests/benchmarks/kquants.py [--rows "wide-* smol-llama.cpp-*"] [--anew] [--page-only]

The peer's importance matrix is what llama-imatrix computes, the mean square of each input of a matrix, here over the very tokens that
ours are calibrated on (llama-imatrix takes text alone, and cuts it otherwise). The peer's file says which type each matrix has; ours
give each the same type, so both have the same bytes. Both are GGUF files that are opened and compared with the source as `compress
eval` does. What was made is kept in the cache by its inputs, and what was measured in recipes/kquants.json, beside the page; a row that
failed has its reason there. The larger model is also measured on a text of another kind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.llama_tools import TOOL, llama_quantize
from benchmarks.real.model import real_model
from benchmarks.real.page import END, REMARKS, estimate, remarks_of
from benchmarks.real.page import table as markdown
from benchmarks.real.rows import Protocol
from benchmarks.real.table import DATA, ROOT, commit, inputs_of, machine, tell
from benchmarks.wide_llama import wide_llama

from compress.checkpoint.cache import folder_of
from compress.checkpoint.gguf_header import read_gguf
from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.checkpoint.safetensors_header import TensorRef
from compress.checkpoint.source import open_source
from compress.cli.eval import facts
from compress.context import Context
from compress.errors import CompressError, InputError, MachineError
from compress.evaluate.perplexity_kl import compare
from compress.importers.gguf_names import ARCHITECTURES, source_name, stored_name
from compress.layerwise.eval_windows import token_windows
from compress.numerics.gguf_blocks import scheme_text
from compress.pipeline.run import run_recipe
from compress.spec.gguf_types import TYPES
from compress.spec.recipe import parse_one_liner
from compress.spec.recipe_file import parse_yaml

PEER, METHODS = "llama.cpp", {"rtn": "clip=mse", "gptq": ""}
KINDS = ("Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "Q8_0")
"""What the peer is asked for, as its command line has it."""
HEAD = ("row", "bits/weight", "bytes", "KL to source", "perplexity", "same top-1")
ALSO = ("on the second text", "perplexity")
"""Further columns of a model that is measured on two texts."""


@dataclass(frozen=True)
class Case:
    """A model, the texts it is calibrated and measured on, and what is asked for."""

    name: str
    protocol: Protocol
    kinds: tuple[str, ...]
    store: Path = ROOT / "recipes" / "kquants.json"
    """What was measured of every case; rows of other inputs are as if they were not there."""

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return inputs_of(self.protocol)

    @cached_property
    def source(self) -> Checkpoint:
        return open_checkpoint(self.protocol.model)

    def quality(self, artifact: Checkpoint, against: bool = True) -> dict[str, Any]:
        """What is measured of an artifact, on each text."""
        p = self.protocol
        texts = {"quality": p.text, **({"also": p.also} if p.also else {})}
        return {
            key: facts(compare(self.source if against else None, artifact, token_windows(p.model, text, p.window, p.tokens)))
            for key, text in texts.items()
        }

    @cached_property
    def folder(self) -> Path:
        """Where what is made of it is kept."""
        key = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:12]
        return folder_of("kquants") / f"{self.name}-{key}"

    @property
    def weights(self) -> int:
        """How many weights the model has."""
        return self.source.nbytes // 2

    def names(self) -> list[str]:
        """Its rows, in the order of the table."""
        return [f"{self.name}-source"] + [f"{self.name}-{tool}-{kind}" for kind in self.kinds for tool in (PEER, *METHODS)]

    def rows(self) -> dict[str, dict[str, Any]]:
        """What was measured, by the names of rows."""
        found = stored(self.store).get(self.name, {})
        rows: dict[str, dict[str, Any]] = found["rows"] if found.get("inputs") == self.inputs else {}
        return rows

    def known(self, name: str) -> dict[str, Any]:
        """A row as it was measured; its name alone if it was not."""
        return self.rows().get(name, {"name": name})

    def keep(self, row: dict[str, Any]) -> None:
        """Puts a row into the JSON file."""
        kept = {"inputs": self.inputs, "rows": {**self.rows(), row["name"]: row}}
        text = json.dumps({**stored(self.store), self.name: kept}, indent=1, ensure_ascii=False)
        made = self.store.with_name(f".{self.store.name}")
        made.write_text(f"{text}\n")
        os.replace(made, self.store)

    def measure(self, name: str) -> dict[str, Any]:
        """Makes and measures a row, and keeps it; one that fails has its message for numbers."""
        row: dict[str, Any] = {"name": name, "commit": commit()}
        tool, _, kind = name.removeprefix(f"{self.name}-").partition("-")
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="kquants-") as scratch:
            try:
                row |= self.row(tool, kind, Path(scratch))
            except CompressError as error:
                row["error"] = " ".join(str(error).split())
        there = machine()
        row["machine"] = f"{there['cpu']}, {there['isa']}, {there['cores']} cores"
        row["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.keep(row)
        return row

    def row(self, tool: str, kind: str, scratch: Path) -> dict[str, Any]:
        """The numbers of a row. Raises CompressError."""
        if tool == "source":
            return {"tensor_bytes": self.source.nbytes, **self.quality(self.source, against=False)}
        peer, found = self.peer(kind), {}
        if tool == PEER:
            file = peer
            found = {"asked": kind, "built": json.loads((llama_quantize(tell).parent / "built.json").read_text())["package"]}
        else:
            passes = list(self.passes(tool, peer))
            result = run_recipe(parse_yaml(json.dumps({"version": 1, "passes": passes})), self.source, scratch / "out", Context())
            file = result.out / "model.gguf"
            found = {"passes": passes, "seconds": result.seconds}
        artifact = open_source(str(file if tool == PEER else file.parent))
        return {**found, **sizes(file), **self.quality(artifact)}

    def passes(self, method: str, peer: Path) -> Iterator[dict[str, Any]]:
        """A recipe that gives each matrix the type that it has in the peer's file; the coarsest last, for it sees what was lost.

        Raises InputError for types that no scheme has.
        """
        if method == "gptq":
            p = self.protocol
            yield {"calibrate": {"data": [str(p.calibrate)], "samples": p.samples, "length": p.length}}
        names: dict[str, list[str]] = {}
        for name, kind in types_of(peer, self.source.config["model_type"]).items():
            if TYPES[kind].dtype == "U8":
                names.setdefault(kind, []).append(name)
        if missing := [kind for kind in names if not scheme_text(kind)]:
            raise InputError(peer.name, "types that a scheme has", ", ".join(missing))
        for kind in sorted(names, key=lambda kind: -TYPES[kind].nbytes / TYPES[kind].weights):
            outside = [name for name in names[kind] if not name.startswith("model.layers.")]
            inside = [name for name in names[kind] if name.startswith("model.layers.")]
            for by, targets in (("rtn", outside), (method, inside)):
                options = dict(word.split("=") for word in METHODS[by].split())
                if targets:
                    yield {f"quantize.{by}": {"scheme": scheme_text(kind), "targets": targets, **options}}
        yield {"pack": {"format": "gguf"}}

    def peer(self, kind: str) -> Path:
        """llama-quantize's file. Raises CompressError."""
        file, log = self.folder / f"{kind}.gguf", self.folder / f"{kind}.log"
        if not file.is_file():
            made = file.with_name(f".{file.name}")
            command = [llama_quantize(tell), "--imatrix", self.importance, self.dense, made, kind, str(os.cpu_count())]
            with open(log, "wb") as record:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=record, stderr=subprocess.STDOUT)
            if done.returncode:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                raise MachineError(TOOL, "status 0", f"status {done.returncode}: {lines[-1] if lines else ''}", f"see {log}")
            os.replace(made, file)
        return file

    @cached_property
    def dense(self) -> Path:
        """The model as GGUF, without codes: what the peer takes."""
        return self.made("pack(format=gguf)", "model.gguf")

    @cached_property
    def importance(self) -> Path:
        """The importance matrix in the peer's own format. Raises CompressError."""
        file = self.folder / "imatrix.gguf"
        if not file.is_file():
            from safetensors.torch import load_file

            ids = load_file(self.made(self.protocol.calibration, "calibration.safetensors"))["input_ids"]
            made = file.with_name(f".{file.name}")
            write_importance(self.protocol.model, ids, self.protocol.calibrate.name, made)
            os.replace(made, file)
        return file

    def made(self, passes: str, name: str) -> Path:
        """A file of what passes make of the model."""
        file = self.folder / name
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                out = run_recipe(parse_one_liner(passes), self.source, Path(scratch) / "out", Context()).out
                os.replace(out / name, file)
        return file


def stored(file: Path) -> dict[str, Any]:
    """The JSON file of what was measured, by cases."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def write_importance(model: Path, ids: torch.Tensor, data: str, file: Path) -> None:
    """Sums of squares of the inputs of every matrix but the head, over ids [samples, length], as llama-imatrix writes them."""
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    for name, module in network.named_modules():
        stored = stored_name(ARCHITECTURES[network.config.model_type], f"{name}.weight")
        if isinstance(module, torch.nn.Linear) and stored.startswith("blk."):

            def add(_: Any, inputs: tuple[torch.Tensor], stored: str = stored) -> None:
                sums[stored] = sums.get(stored, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for batch in ids.split(8):
            network.model(input_ids=batch, use_cache=False)
    writer = GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [data])
    writer.add_uint32("imatrix.chunk_count", ids.shape[0])
    writer.add_uint32("imatrix.chunk_size", ids.shape[1])
    for stored, total in sums.items():
        writer.add_tensor(f"{stored}.in_sum2", total.float()[None].numpy())
        writer.add_tensor(f"{stored}.counts", torch.tensor([[float(ids.numel())]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refs_of(file: Path) -> list[TensorRef]:
    """The tensors of a GGUF file."""
    with open(file, "rb") as stream:

        def read(offset: int, length: int) -> bytes:
            stream.seek(offset)
            return stream.read(length)

        return read_gguf(read, file.stat().st_size, file.name).refs


def types_of(file: Path, model_type: str) -> dict[str, str]:
    """The type of each matrix by its name in transformers' model. Raises InputError for a tensor without one."""
    found = {}
    for ref in refs_of(file):
        if len(ref.shape) > 1:
            name = source_name(ARCHITECTURES[model_type], ref.name)
            if not name:
                raise InputError(file.name, "tensors of the model", ref.name)
            found[name] = ref.kind
    return found


def sizes(file: Path) -> dict[str, Any]:
    """Bytes of a file's tensors, and how many matrices have which type."""
    refs = refs_of(file)
    counts = Counter(ref.kind for ref in refs if len(ref.shape) > 1)
    return {
        "tensor_bytes": sum(ref.nbytes for ref in refs),
        "file_bytes": file.stat().st_size,
        "types": dict(sorted(counts.items())),
    }


def cases() -> Iterator[Case]:
    """The models. Raises CompressError where one cannot be had."""
    text, calibrate = DATA / "wiki.valid.jsonl", DATA / "wiki.train.jsonl"
    yield Case("wide", Protocol(wide_llama(tell), text, calibrate, samples=64, length=256, tokens=8192, window=256), KINDS)
    smol = Protocol(real_model(tell), text, calibrate, 64, length=512, tokens=8192, window=512, also=DATA / "speech.valid.jsonl")
    yield Case("smol", smol, ("Q4_K_M",))


def cells(row: dict[str, Any], weights: int, width: int = len(HEAD)) -> tuple[str, ...]:
    """A row of a table with so many columns, of a model with so many weights."""
    label = f"`{row['name'].partition('-')[2]}`"
    if "quality" not in row:
        return label, f"failed: {row['error']}".replace("|", "\\|") if "error" in row else "not measured", *[""] * (width - 2)
    quality, also = row["quality"], row.get("also")
    further = (estimate(also["kl"], ".5f"), estimate(also["perplexity"], ".2f")) if also else ()
    return (
        label, f"{8 * row['tensor_bytes'] / weights:.3f}", f"{row['tensor_bytes']:,}", estimate(quality["kl"], ".5f"),
        estimate(quality["perplexity"], ".2f"), estimate(quality["top1"], ".1%"), *further,
    )  # fmt: skip


def section(case: Case) -> list[str]:
    """What the page says of one model."""
    p, weights, rows = case.protocol, case.weights, [case.known(name) for name in case.names()]
    inputs = case.inputs
    peers = [row for row in rows if "asked" in row and "types" in row]
    kinds = [f"* {row['asked']}: {', '.join(f'{count} {kind}' for kind, count in row['types'].items())}" for row in peers]
    commits, machines = (sorted({row[key] for row in rows if row.get(key)}) for key in ("commit", "machine"))
    head = (*HEAD, *(ALSO if p.also else ()))
    return [
        f"## {inputs['model']['name']}", "", *markdown(head, [cells(row, weights, len(head)) for row in rows]), "",
        *(["Types of the matrices, as the peer chooses them and ours take them:", "", *kinds, ""] if kinds else []),
        f"Protocol: first {p.tokens:,} tokens of {p.text.name} (sha256 {inputs['text']['sha256'][:16]}), windows of {p.window} without overlap,",
        f"fp32, no BOS, first token of a window not scored; {p.samples} x {p.length} tokens of {p.calibrate.name} (sha256 "
        f"{inputs['calibrate']['sha256'][:16]}),",
        f"seed 0, for GPTQ and for the importance matrix. Model: sha256 {inputs['model']['sha256'][:16]}. compress {', '.join(commits)}.",
        *([f"Second text: as many tokens of {p.also.name}."] if p.also else []), f"Machines: {'; '.join(machines)}.", "",
    ]  # fmt: skip


def page(found: list[Case], remarks: str) -> str:
    """recipes/kquants.md."""
    built = next((row["built"] for case in found for name in case.names() if "built" in (row := case.known(name))), "")
    return "\n".join([
        "# K-quants beside llama-quantize", "",
        "What `make kquants` measured: GGUF files of `llama-quantize` with an importance matrix, and ours with the same type for each",
        "matrix, so with the same bytes. The importance matrix (what `llama-imatrix` computes: mean squares of inputs, none for the head) is",
        "of the very tokens that GPTQ is calibrated on. All files are read and measured as `compress eval` does. `rtn` rounds to nearest;",
        "embeddings and heads are so rounded in all rows of ours. KL(source || result) in nats per token; errors are standard errors over",
        "windows.", "",
        "```sh", 'make kquants [ROWS="wide-* smol-source"]', "```", "",
        REMARKS, remarks.strip("\n"), END, "",
        *(line for case in found if any("commit" in case.known(name) for name in case.names()) for line in section(case)),
        f"llama.cpp: {built}, built from its source package for a CPU with AVX2. `wide-llama` is made by tests/benchmarks/wide_llama.py.",
    ]) + "\n"  # fmt: skip


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="kquants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="*", help="names or patterns, between blanks")
    parser.add_argument("--anew", action="store_true", help="measure these rows even if they are known")
    parser.add_argument("--page", type=Path, default=ROOT / "recipes" / "kquants.md", help="where the page goes")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is known; measure nothing")
    args = parser.parse_args()
    commit()
    failed, found = 0, []
    try:
        for case in cases():
            found.append(case)
            tell(f"{case.name}: {case.protocol.model}, in {case.folder}")
            for name in case.names():
                wanted = any(fnmatch(name, word) for word in args.rows.split()) and not args.page_only
                if not wanted or (not args.anew and "quality" in case.known(name)):
                    continue
                tell(name)
                row = case.measure(name)
                failed += "error" in row
                tell(f"    {row.get('error') or cells(row, case.weights)}")
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    args.page.write_text(page(found, remarks_of(args.page)))
    print(f"written: {args.page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
