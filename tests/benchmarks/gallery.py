"""Gallery: every recipe of recipes/ on a real model, as its first line says; the result goes into the recipe's header.

    python tests/benchmarks/gallery.py [--rows "gptq_* fp8"] [--write-only]

Recipes are measured on the model of `make real`, those that say that they are for another on a small one that lies beside a checkout.
What was measured is kept under the user's cache by the recipe's text and its inputs, and is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import ours
from benchmarks.real.model import real_model
from benchmarks.real.table import commit, digest, tell

from compress.checkpoint.cache import folder_of
from compress.errors import CompressError

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SMALL = {"moqe_w2": "tiny-mixtral-9m", "sheared_mq": "tiny-llama-8m", "sheared_mq_ct": "tiny-llama-8m"}
"""By recipe: of the models beside a checkout."""
COMPRESS = str(Path(sys.executable).with_name("compress"))
MARK, GOES_ON = "# Measured on ", "#   "
"""How a result begins, and how its other lines do."""
TOKENS, WINDOW = 8192, 512
ALONE, MIXED = ("wiki",), ("wiki", "code", "speech", "plays")
"""Texts: what a recipe is calibrated on, and what one that trains a small model for long needs."""
_PLACEHOLDER = re.compile(r"--set (\S+)=TEXTS\.jsonl")


class Recipe:
    """A file of the gallery."""

    def __init__(self, file: Path) -> None:
        self.file, self.name = file, file.stem
        self.lines = file.read_text().splitlines()
        self.body = "\n".join(line for line in self.lines if not line.startswith("#"))
        self.domains = MIXED if "prune.sheared" in self.body and self.name in SMALL else ALONE
        self.model = ROOT.parent / "shared" / "models" / SMALL[self.name] if self.name in SMALL else real_model(tell)

    def command(self, out: Path) -> list[str]:
        """The command of its first line, on the model and its texts."""
        paths = [str(path) for path in self.texts()[:-1]]
        value = paths[0] if len(paths) == 1 else json.dumps(paths)
        texts = [word for name in _PLACEHOLDER.findall(self.lines[0]) for word in ("--set", f"{name}={value}")]
        return [COMPRESS, "run", str(self.model), str(out), str(self.file), *texts, "--json"]

    def kept(self) -> Path:
        """Where its result is kept."""
        key = (
            f"{self.body} {digest(self.model / 'config.json', *sorted(self.model.glob('*.safetensors')))} {digest(*self.texts())}"
        )
        return folder_of("gallery") / f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"

    def texts(self) -> list[Path]:
        """Those that it learns from, and at last the one that it is measured on."""
        return [*(DATA / f"{domain}.train.jsonl" for domain in self.domains), DATA / "wiki.valid.jsonl"]

    def measure(self) -> dict[str, Any]:
        """Runs it in a fresh process, measures what it made, and keeps the numbers. Raises CompressError."""
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="gallery-") as folder:
            out = Path(folder) / "out"
            done, usage = ours.said(self.command(out), Path(folder) / "run.log")
            evaluate = [
                COMPRESS, "eval", str(out), "--against", str(self.model), "--data", str(DATA / "wiki.valid.jsonl"),
                "--tokens", str(TOKENS), "--length", str(WINDOW), "--json",
            ]  # fmt: skip
            quality, _ = ours.said(evaluate, Path(folder) / "eval.log")
            facts = {
                "name": self.name, "model": self.model.name, "commit": commit(), "run": usage.facts(), "quality": quality,
                "texts": list(self.domains), "tensor_bytes": ours.tensor_bytes(out), "source_bytes": ours.tensor_bytes(self.model),
                "bits": done["bits_per_targeted_weight"],
            }  # fmt: skip
        self.kept().parent.mkdir(parents=True, exist_ok=True)
        self.kept().write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        return facts

    def write(self, facts: dict[str, Any]) -> None:
        """Puts the result below the first line, in place of an older one."""
        command, *told = [line for line in self.lines if line.startswith("#") and not line.startswith((MARK, GOES_ON))]
        self.file.write_text("\n".join([command, *header(facts), *told, self.body]) + "\n")


def header(facts: dict[str, Any]) -> list[str]:
    """The lines of a result."""
    quality, run = facts["quality"], facts["run"]
    kl, perplexity, source = (quality[name] for name in ("kl", "perplexity", "source_perplexity"))
    texts = ", ".join(f"{domain}.train" for domain in facts.get("texts", ALONE))
    busy = ", others at work" if run["busy"] else ""
    return [
        f"{MARK}{facts['model']}: KL {kl['value']:.4f} +- {kl['error']:.4f}, perplexity {perplexity['value']:.2f} (source "
        f"{source['value']:.2f}),",
        f"{GOES_ON}{facts['tensor_bytes'] / 1e6:.1f} MB (source {facts['source_bytes'] / 1e6:.1f}), {facts['bits']:.2f} bits per weight, "
        f"{run['seconds']:.0f} s ({run['cpu_share']:.0%} CPU{busy}), {run['peak_bytes'] / 1e9:.2f} GB;",
        f"{GOES_ON}{TOKENS:,} tokens of wiki.valid in windows of {WINDOW}, fp32, no BOS; texts: {texts}, seed 0.",
    ]  # fmt: skip


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="gallery", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="*", help="names or patterns, between blanks")
    parser.add_argument("--write-only", action="store_true", help="write what is known into the headers; measure nothing")
    args = parser.parse_args()
    if not DATA.is_dir():
        print("the texts of ../shared are not there", file=sys.stderr)
        return 6
    commit()
    failed = 0
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = Recipe(file)
        if not any(fnmatch(recipe.name, word) for word in args.rows.split()):
            continue
        kept = recipe.kept()
        try:
            if not kept.is_file():
                if args.write_only:
                    continue
                tell(recipe.name)
            facts = json.loads(kept.read_text()) if kept.is_file() else recipe.measure()
        except CompressError as error:
            failed += 1
            tell(f"{recipe.name}: {' '.join(str(error).split())}")
            continue
        recipe.write(facts)
        tell("\n".join(header(facts)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
