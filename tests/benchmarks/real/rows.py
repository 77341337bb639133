"""Rows: which methods are measured, and the commands that a user types for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from compress.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Protocol:
    """What every row is calibrated and measured on."""

    model: Path
    text: Path
    calibrate: Path
    samples: int
    length: int
    """Tokens of a calibration sample."""
    tokens: int
    """Tokens that are measured."""
    window: int
    also: Path | None = None
    """A second text that is measured on."""

    @property
    def calibration(self) -> str:
        """The pass that draws the calibration tokens."""
        return f"calibrate(data=['{self.calibrate}'], samples={self.samples}, length={self.length})"


@dataclass(frozen=True)
class Row:
    """A recipe by its name; without passes it is the source itself."""

    name: str
    passes: str = ""
    data: bool = True
    """Whether it is calibrated."""
    form: str = "compressed-tensors"
    """What it is packed as; empty for what stays dense."""
    note: str = ""
    option: str = ""
    """The only option in which it differs from `gptq-w3g64`, for the table of what each costs and earns."""

    def recipe(self, protocol: Protocol) -> str:
        """The one-liner."""
        pack = ["pack" if self.form == "compressed-tensors" else f"pack(format={self.form})"] if self.form else []
        passes = self.passes.format(text=protocol.calibrate)
        return " | ".join([*([protocol.calibration] if self.data else []), passes, *pack])


FLATTERED = "flattered: the source's weights lie on a grid of 4 bits"
MIX = "[w2a16g64, w3a16g64, w4a16g64]"
TRAIN = "distill.logits(data=['{text}'], samples=256, length=512, batch=8)"
"""32 steps on 131,072 tokens; the text that the others are calibrated on."""
SCALES = "distill.logits(epochs=2, batch=8, micro_batch=4, scale_lr=0.002)"
"""Scales, norms and embeddings learn, from the calibration tokens: 32 steps of 128 samples."""
HEAL = "distill.blocks"
"""Its defaults, on the calibration tokens."""
OPTIONS = {
    "stored": "order=stored",
    "largest": "clip=none",
    "unsigned": "signed=false",
    "no-descent": "sweeps=0",
    "3-descents": "sweeps=3",
    "paper": "clip=none, signed=false, sweeps=0",
}
"""Options of GPTQ, each other than its default; `paper` is what Frantar et al. have, with activation order."""


def further() -> Iterator[Row]:
    """What comes after plain GPTQ, alone and together: outputs of the unchanged model, and codes chosen by gradients."""
    for scheme in ("w3a16g64", "w2a16g32"):
        name = scheme.replace("a16", "")
        for more, passes in {
            "qronos": f"quantize.gptq(scheme={scheme}, correct=qronos)",
            "learned": f"quantize.gptq(scheme={scheme}) | quantize.learned",
            "qronos-learned": f"quantize.gptq(scheme={scheme}, correct=qronos) | quantize.learned",
        }.items():
            yield Row(f"gptq-{name}-{more}", passes)


def beside_peers() -> Iterator[Row]:
    """What other tools are compared with at each of their schemes, step by step, as far as it does not stand elsewhere."""
    # w4a16g32 is for the small trained models, whose columns groups of 32 divide.
    for scheme in ("w3a16g64", "w3a16g32", "w2a16g64", "w2a16g32", "nvfp4", "mxfp4", "w4a8g64", "w4a4g64", "w4a16g32"):
        name = scheme.replace("a16", "")
        if name in ("w2g64", "w4a8g64", "w4a4g64", "w4g32"):
            yield Row(f"rtn-{name}", f"quantize.rtn(scheme={scheme}, clip=mse)", data=False)
            yield Row(f"gptq-{name}", f"quantize.gptq(scheme={scheme})")
        both = "correct=residual, feedback=both"
        yield Row(f"gptq-{name}-residual", f"quantize.gptq(scheme={scheme}, correct=residual)")
        yield Row(f"gptq-{name}-both", f"quantize.gptq(scheme={scheme}, {both})")
        yield Row(f"gptq-{name}-both-scales", f"quantize.gptq(scheme={scheme}, {both}) | {SCALES}")
        mixed = f"{scheme}-h{16 if scheme == 'nvfp4' else 32 if scheme.endswith(('g32', 'mxfp4')) else 64}"
        yield Row(f"gptq-{name}-rotated", f"quantize.gptq(scheme={mixed})", form="native")
        yield Row(f"gptq-{name}-rotated-both", f"quantize.gptq(scheme={mixed}, {both})", form="native")
        yield Row(f"gptq-{name}-rotated-both-scales", f"quantize.gptq(scheme={mixed}, {both}) | {SCALES}", form="native")


def masks() -> Iterator[Row]:
    """Masks of half of the weights, of 70 % and of 2:4, by each method; what stands in the table before is left out."""
    for name, sparsity in {"50": "0.5", "70": "0.7", "2-4": "2:4"}.items():
        yield Row(f"magnitude-{name}", f"prune.magnitude(sparsity={sparsity})", data=False, form="")
        for method in ("wanda", "sparsegpt"):
            if method == "sparsegpt" or name == "70":
                yield Row(f"{method}-{name}", f"prune.{method}(sparsity={sparsity}, refit=false)", form="")
            yield Row(f"{method}-{name}-refit", f"prune.{method}(sparsity={sparsity}, refit=true)", form="")
            if method == "sparsegpt":
                yield Row(f"alps-{name}", f"prune.sparsegpt(sparsity={sparsity}, solver=alps)", form="")
            if name != "2-4":
                yield Row(f"{method}-{name}-owl", f"prune.{method}(sparsity={sparsity}, owl=true)", form="")


ROWS = (
    Row("source", data=False, form=""),
    Row("rtn-w4g64", "quantize.rtn(scheme=w4a16g64, clip=mse)", data=False, note=FLATTERED),
    Row("rtn-w3g64", "quantize.rtn(scheme=w3a16g64, clip=mse)", data=False),
    Row("rtn-w3g32", "quantize.rtn(scheme=w3a16g32, clip=mse)", data=False),
    Row("rtn-w2g32", "quantize.rtn(scheme=w2a16g32, clip=mse)", data=False),
    Row("gptq-w4g64", "quantize.gptq(scheme=w4a16g64)", note=FLATTERED),
    Row("gptq-w3g64", "quantize.gptq(scheme=w3a16g64)"),
    Row("gptq-w3g32", "quantize.gptq(scheme=w3a16g32)"),
    Row("gptq-w2g32", "quantize.gptq(scheme=w2a16g32)"),
    Row("fp8", "quantize.rtn(scheme=fp8-afp8)", data=False),
    Row("nf4", "quantize.rtn(scheme=nf4g64, clip=mse)", data=False, form="native"),
    Row("mxfp4", "quantize.gptq(scheme=mxfp4)"),
    Row("nvfp4", "quantize.gptq(scheme=nvfp4)"),
    Row("llm_mq-3.0", f"quantize.llm_mq(bits=3.0, schemes={MIX}, mode=abs)"),
    Row("llm_mq-2.5", f"quantize.llm_mq(bits=2.5, schemes={MIX}, mode=abs)"),
    *(
        Row(f"llm_mq-{bits}-kl{more}", f"quantize.llm_mq(bits={bits}, schemes={MIX}, mode=kl{options})")
        for bits in (2.5, 3.0, 3.5)
        for more, options in {"": ", fused=false", "-both": ", fused=false, correct=residual, feedback=both"}.items()
    ),
    Row("lorc", "quantize.gptq(scheme=w2a16g32) | quantize.lorc(rank=16, weighted=true)", form="native"),
    Row("loftq", "quantize.loftq(scheme=w2a16g32, rank=16, clip=mse)", data=False, form="native", note="before any fine-tuning"),
    Row("smooth", "quantize.smooth(scheme=w3a16g64) | quantize.gptq(scheme=w3a16g64)"),
    Row("wanda-50", "prune.wanda(sparsity=0.5)", form=""),
    Row("wanda-2:4", "prune.wanda(sparsity=2:4)", form=""),
    *masks(),
    Row("sparsegpt-2-4-w4g64", "quantize.gptq(scheme=w4a16g64, sparsity=2:4)"),
    Row("sparsegpt-2-4-then-w4g64", "prune.sparsegpt(sparsity=2:4) | quantize.gptq(scheme=w4a16g64)"),
    Row("wanda-2:4-blocks", f"prune.wanda(sparsity=2:4) | {HEAL}", form=""),
    Row("gptq-w2g32-blocks", f"quantize.gptq(scheme=w2a16g32) | {HEAL}"),
    *further(),
    *beside_peers(),
    Row("llm_mq-3.0-fisher", f"quantize.llm_mq(bits=3.0, schemes={MIX}, mode=fisher)"),
    Row("five-stages", f"prune.wanda(sparsity=2:4) | quantize.gptq(scheme=w3a16g32) | {TRAIN}"),
    *(Row(f"w3g64-{name}", f"quantize.gptq(scheme=w3a16g64, {option})", option=option) for name, option in OPTIONS.items()),
)  # fmt: skip


def chosen(patterns: str, names: list[str], default: list[str]) -> list[str]:
    """The names that words such as `gptq-*` mean, in the order of the table; all of `default` without any.

    Raises UsageError for a word that means none.
    """
    words = patterns.split()
    for word in words:
        if not any(fnmatch(name, word) for name in names):
            raise UsageError("ROWS", f"some of {', '.join(names)}", f"'{word}'{did_you_mean(word, names)}")
    return [name for name in names if any(fnmatch(name, word) for word in words)] if words else default


def plan_command(compress: str, recipe: str, protocol: Protocol) -> list[str]:
    """What says beforehand how much memory the run will have."""
    return [compress, "plan", str(protocol.model), "-p", recipe, "--json"]


def run_command(compress: str, recipe: str, protocol: Protocol, out: Path) -> list[str]:
    """What makes the artifact."""
    return [compress, "run", str(protocol.model), str(out), "-p", recipe, "--json"]


def eval_command(compress: str, artifact: Path, protocol: Protocol, text: Path) -> list[str]:
    """What measures an artifact, ours or a peer's, against the source."""
    asked = ["--tokens", str(protocol.tokens), "--length", str(protocol.window), "--json"]
    against = [] if artifact == protocol.model else ["--against", str(protocol.model)]
    return [compress, "eval", str(artifact), "--data", str(text), *against, *asked]
