"""Prune results: pruning and recovery on trained models, each row a fresh process; what was measured is kept and not repeated.

    python tests/benchmarks/prune_results.py [--rows "tiny-* smol-*"] [--page-only]

Rows are measured in order; one that is killed is begun anew the next time, the others are read from the cache. Every row has its
commands and the hashes of its inputs in build/prune.json; the table is recipes/pruning.md. Models: tiny-llama-8m of the data that lie
beside a checkout, and the model of `make real`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import ours
from benchmarks.real.model import real_model
from benchmarks.real.page import REMARKS, remarks_of, table
from benchmarks.real.table import commit, digest, machine, tell

from compress.checkpoint.cache import folder_of
from compress.errors import CompressError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
DOMAINS = ("wiki", "code", "speech", "plays")
COMPRESS = str(Path(sys.executable).with_name("compress"))
END = "<!-- end -->"
SEEDS = (0, 1, 2)
HEAD = ("recipe", "seed", "MB", "perplexity", "KL to source", "by domain", "s", "CPU", "peak", "of plan")


@dataclass(frozen=True)
class Row:
    """A recipe over a model; `{train}` are the training texts of its domains, `{calibrate}` its calibration."""

    name: str
    model: str
    passes: str
    seeds: tuple[int, ...] = (0,)
    group: str = field(default="", compare=False)
    start: str = ""
    """The row that this one goes on from: its finished steps are taken, its seconds are added."""


def tiny_rows() -> list[Row]:
    """To about half of tiny-llama-8m: one-shot and learned, and what training then gives back per method."""
    mixed = "data={train}, length=256, batch=16, micro_batch=8"
    learn = f"samples=4000, lr=1e-3, {mixed}"
    starts = {
        "depth": "{calibrate} | prune.depth(layers=3)",
        "width": "{calibrate} | prune.width(parameters=4.32M, multiple=16, refit=true)",
        "sheared": f"prune.sheared(parameters=4.32M, multiple=16, samples=2048, lr=3e-4, {mixed})",
        "sheared-dynamic": f"prune.sheared(parameters=4.32M, multiple=16, samples=2048, lr=3e-4, loading=dynamic, {mixed})",
    }
    heals = {"lm": f"train.lm({learn})", "logits": f"distill.logits({learn})"}
    found = []
    for name, start in starts.items():
        headline = {"sheared": "logits", "depth": "lm"}.get(name, "")
        found.append(Row(f"tiny-{name}", "tiny", start, SEEDS if headline else (0,), "to half of the parameters"))
        for heal, passes in heals.items():
            seeds = SEEDS if heal == headline else (0,)
            found.append(
                Row(f"tiny-{name}-{heal}", "tiny", f"{start} | {passes}", seeds, "to half of the parameters", f"tiny-{name}")
            )
    return found


def smol_rows() -> list[Row]:
    """What the same training tokens give back to a masked and to a smaller model."""
    tokens = "data=['{wiki}'], samples=64, length=512, batch=4"
    start = "{calibrate} | prune.sparsegpt(sparsity=2:4, refit=true)"
    heals = {
        "": "", "ce": f" | train.lm({tokens}, lr=5e-5)", "kl": f" | distill.logits({tokens})",
        "squarehead": f" | distill.squarehead({tokens})", "blocks": " | distill.blocks",
    }  # fmt: skip
    found = [
        Row(
            f"smol-2:4{'-' if n else ''}{n}", "smol", f"{start}{p}", group="2:4, then the same tokens", start="smol-2:4" if n else ""
        )
        for n, p in heals.items()
    ]  # fmt: skip
    starts = {
        # Masks need steps more than they need tokens in each.
        "sheared": f"prune.sheared(parameters=100M, {tokens.replace('batch=4', 'batch=1')})",
        "width": "{calibrate} | prune.width(ffn=864)",
        "depth": "{calibrate} | prune.depth(layers=20)",
    }
    for name, begin in starts.items():
        for heal, more in (("", ""), ("-lm", f" | train.lm({tokens}, lr=5e-5)"), ("-logits", f" | distill.logits({tokens})")):
            start = f"smol-{name}" if heal else ""
            found.append(Row(f"smol-{name}{heal}", "smol", f"{begin}{more}", group="to 100 M parameters", start=start))
    return found


def mask_rows() -> list[Row]:
    """Masks of tiny-llama-8m; those of the larger model are rows of `make real`."""
    methods = {
        "magnitude": "prune.magnitude({})", "wanda": "{{calibrate}} | prune.wanda({})",
        "sparsegpt": "{{calibrate}} | prune.sparsegpt({}, refit=false)",
        "wanda-refit": "{{calibrate}} | prune.wanda({}, refit=true)", "sparsegpt-refit": "{{calibrate}} | prune.sparsegpt({})",
        "wanda-owl": "{{calibrate}} | prune.wanda({}, owl=true)", "sparsegpt-owl": "{{calibrate}} | prune.sparsegpt({}, owl=true)",
    }  # fmt: skip
    return [
        Row(f"tiny-{name}-{sparsity}", "tiny", passes.format(f"sparsity={value}"), group="masks")
        for sparsity, value in {"50": "0.5", "70": "0.7", "2:4": "2:4"}.items()
        for name, passes in methods.items()
        if not (name.endswith("owl") and sparsity == "2:4")
    ]


def mission_rows() -> list[Row]:
    """The whole way in one recipe, beside plain 2-bit GPTQ of the unpruned model; and to a tenth of 16 bits."""
    learn = "data={train}, length=256, batch=16, micro_batch=8, lr=1e-3"
    small = f"{{calibrate}} | prune.sheared(layers=7, ffn=640, samples=2048, {learn}) | distill.logits(samples=4000, {learn})"
    mix = "quantize.llm_mq(schemes=[w2a16g32, w3a16g32, w4a16g32], bits=2.5, mode=abs, ragged=divide)"
    ends = "quantize.rtn(scheme=w4a16g32, targets=[embeddings, head], clip=mse)"
    # 1.6 MB: rows of 256 columns, which 2-bit codes fill in our layout.
    starts = {
        "sheared": f"prune.sheared(layers=7, ffn=288, samples=2048, {learn.replace('1e-3', '3e-4')})",
        "width": "{calibrate} | prune.depth(layers=7) | prune.width(ffn=288)",
    }
    two = ends.replace("w4", "w2")
    tenth = (
        f"distill.logits(samples=4000, {learn}) | {{calibrate}} | quantize.gptq(scheme=w2a16g32) | {two} | pack(format=native)"
    )
    return [
        Row("mission-native", "tiny", f"{small} | {mix} | {ends} | pack(format=native)", group="the whole way in one recipe"),
        Row(
            "mission-compressed-tensors", "tiny", f"{small} | {mix} | pack", group="the whole way in one recipe", start="mission-native"
        ),
        *(
            Row(f"mission-tenth-{name}", "tiny", f"{start} | {tenth}", group="the whole way in one recipe")
            for name, start in starts.items()
        ),
        Row("gptq-2-native", "tiny", f"{{calibrate}} | quantize.gptq(scheme=w2a16g32) | {ends} | pack(format=native)", group="the whole way in one recipe"),
        Row("gptq-2", "tiny", "{calibrate} | quantize.gptq(scheme=w2a16g32) | pack", group="the whole way in one recipe"),
    ]  # fmt: skip


ROWS = [*tiny_rows(), *mask_rows(), *smol_rows(), *mission_rows()]


class Results:
    """The rows, each a JSON file in the cache by its inputs."""

    def __init__(self) -> None:
        self.models = {"tiny": SHARED / "models" / "tiny-llama-8m", "smol": real_model(tell)}
        self.texts = {domain: SHARED / "data" / f"{domain}.valid.jsonl" for domain in DOMAINS}
        self.train = {domain: SHARED / "data" / f"{domain}.train.jsonl" for domain in DOMAINS}

    def recipe(self, row: Row) -> str:
        """The one-liner with its files."""
        train = "[" + ", ".join(f"'{path}'" for path in self.train.values()) + "]"
        length, samples = (256, 128) if row.model == "tiny" else (512, 64)
        data = train if row.model == "tiny" else f"['{self.train['wiki']}']"
        calibrate = f"calibrate(data={data}, samples={samples}, length={length})"
        return row.passes.replace("{train}", train).replace("{calibrate}", calibrate).replace("{wiki}", str(self.train["wiki"]))

    def domains(self, row: Row) -> tuple[str, ...]:
        """What a row is measured on."""
        return DOMAINS if row.model == "tiny" else ("wiki",)

    def inputs(self, row: Row, seed: int) -> dict[str, Any]:
        """What a row's numbers depend on, besides the code."""
        model = self.models[row.model]
        files = sorted([*model.glob("*.safetensors"), *model.glob("config.json"), *model.glob("tokenizer*")])
        texts = [*self.train.values(), *(self.texts[domain] for domain in self.domains(row))]
        return {
            "recipe": self.recipe(row).replace(f"{SHARED / 'data'}/", ""), "seed": seed, "model": digest(*files),
            "texts": digest(*texts),
        }  # fmt: skip

    def file(self, row: Row, seed: int) -> Path:
        """Where a measured row is kept."""
        key = hashlib.sha256(json.dumps(self.inputs(row, seed), sort_keys=True).encode()).hexdigest()[:16]
        return folder_of("prune") / f"{row.name.replace(':', '-')}-{seed}-{key}.json"

    def steps(self, row: Row, seed: int) -> Path:
        """Where the OUT of a row is kept that others go on from."""
        return self.file(row, seed).with_suffix("") / "out"

    def known(self, row: Row, seed: int) -> dict[str, Any] | None:
        """A row that was measured without an error."""
        file = self.file(row, seed)
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found if found and "error" not in found else None

    def keep(self, out: Path, kept: Path) -> None:
        """Moves an OUT and its steps to where other rows find them."""
        shutil.rmtree(kept.parent, ignore_errors=True)
        kept.parent.mkdir(parents=True)
        for folder in (out, out.with_name("out.steps")):
            if folder.is_dir():
                shutil.move(folder, kept.parent / folder.name)

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """Runs a row, measures what it made, and keeps the numbers."""
        facts: dict[str, Any] = {"name": row.name, "group": row.group, **self.inputs(row, seed), "commit": commit()}
        model = self.models[row.model]
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="prune-") as folder:
            scratch, out = Path(folder), Path(folder) / "out"
            try:
                recipe = self.recipe(row)
                planned, _ = ours.said([COMPRESS, "plan", str(model), "-p", recipe, "--json"], scratch / "plan.log")
                command = [COMPRESS, "run", str(model), str(out), "-p", recipe, "--seed", str(seed), "--json"]
                start = next((r for r in ROWS if r.name == row.start and self.known(r, seed)), None)
                if start is not None:
                    facts["start"] = self.known(start, seed)
                    command += ["--steps", str(self.steps(start, seed))]
                done, usage = ours.said(command, scratch / "run.log")
                facts |= {
                    "command": command, "run": usage.facts(), "planned_bytes": planned["peak_resident_bytes"],
                    "tensor_bytes": ours.tensor_bytes(out), "steps": done["steps"],
                }  # fmt: skip
                facts["quality"] = {}
                for domain in self.domains(row):
                    ask = [
                        "--tokens",
                        "8192",
                        "--length",
                        "256" if row.model == "tiny" else "512",
                        "--against",
                        str(model),
                        "--json",
                    ]
                    evaluate = [COMPRESS, "eval", str(out), "--data", str(self.texts[domain]), *ask]
                    facts["quality"][domain], _ = ours.said(evaluate, scratch / "eval.log")
                if any(r.start == row.name for r in ROWS):
                    self.keep(out, self.steps(row, seed))
            except CompressError as error:
                facts["error"] = " ".join(str(error).split())
        facts["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file = self.file(row, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        return facts


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A measured row of the table."""
    quality, start = row["quality"], row.get("start", {"run": {}})
    run = {key: row["run"][key] + start["run"].get(key, 0) for key in ("seconds", "cpu_seconds")}
    peak = max(row["run"]["peak_bytes"], start["run"].get("peak_bytes", 0))
    names = list(quality)
    mean = {key: sum(quality[n][key]["value"] for n in names) / len(names) for key in ("perplexity", "kl")}
    each = ", ".join(f"{n} {quality[n]['perplexity']['value']:.2f}" for n in names) if len(names) > 1 else ""
    return (
        f"`{row['name']}`", str(row["seed"]), f"{row['tensor_bytes'] / 1e6:.2f}", f"{mean['perplexity']:.2f}", f"{mean['kl']:.4f}", each,
        f"{run['seconds']:,.0f}", f"{run['cpu_seconds'] / run['seconds']:.0%}", f"{peak / 1e9:.2f} GB",
        f"{peak / row['planned_bytes']:.2f}x",
    )  # fmt: skip


def page(rows: list[dict[str, Any]], remarks: str) -> str:
    """recipes/pruning.md."""
    lines = [
        "# Pruning and recovery on trained models", "",
        "What `make prune-results` measured: the installed command in fresh processes. Perplexity and KL(source || result), in nats",
        "per token, are means over the domains, 8,192 held-out tokens of each. Commands and hashes: build/prune.json.", "",
        "```sh", 'make prune-results [ROWS="tiny-* smol-2:4*"]', "```", "",
        REMARKS, remarks.strip("\n"), END, "",
    ]  # fmt: skip
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [
            f"## {group[0].upper()}{group[1:]}",
            "",
            *table(HEAD, [cells(row) for row in rows if row["group"] == group]),
            "",
        ]
    lines += ["## Recipes", "", *(f"* `{row['name']}`: `{row['recipe']}`" for row in rows if row["seed"] == 0), ""]
    there = machine()
    lines += [f"Machine: {there['cpu']}, {there['cores']} cores; compress {', '.join(sorted({row['commit'] for row in rows}))}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="prune_results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="*", help="names or patterns, between blanks")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS), help="of the rows that have several")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "prune.json")
    parser.add_argument("--page", type=Path, default=ROOT / "recipes" / "pruning.md")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is known; measure nothing")
    args = parser.parse_args()
    if not SHARED.is_dir():
        print("the trained models and texts of ../shared are not there", file=sys.stderr)
        return 6
    commit()
    results, failed = Results(), 0
    named = [row for row in ROWS if any(fnmatch(row.name, word) for word in args.rows.split())]
    wanted = [(row, seed) for row in named for seed in row.seeds if seed in args.seeds]
    for number, (row, seed) in enumerate(wanted, start=1):
        if args.page_only or results.known(row, seed):
            continue
        tell(f"[{number}/{len(wanted)}] {row.name}, seed {seed}")
        found = results.measure(row, seed)
        failed += "error" in found
        tell(f"    {found.get('error') or cells(found)}")
    rows = [
        {**found, "group": row.group} for row in ROWS for seed in row.seeds if (found := results.known(row, seed)) is not None
    ]
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    if rows:
        args.page.write_text(page(rows, remarks_of(args.page)))
        print(f"written: {args.json}, {args.page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
