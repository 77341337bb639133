"""Facts as if they had been measured, and facts with a hostile text wherever a text can come from a file."""

from __future__ import annotations

from dataclasses import replace

from compress.checkpoint.manifest import NoteRecord, Source
from compress.evaluate.records import Number, QualityRecord, ReaderRecord, TaskRecord
from compress.report.facts import Facts

HOSTILE = "a](http:x)|<script>alert(1)</script>`` # b &amp; $x$ www.x.example\n---\nevil: 1"


def measured(facts: Facts, data: str = "held out.jsonl") -> Facts:
    """The facts as if they had been measured."""
    quality = QualityRecord(
        step=facts.stages[-1].id, against="a model", data=data, data_sha256="d" * 64, tokens=512, length=256, scored=510,
        protocol="first 512 tokens", perplexity=Number(value=12.345, error=0.21), kl=Number(value=0.1234, error=0.0011),
        top1=Number(value=0.815, error=0.01),
    )  # fmt: skip
    task = TaskRecord(
        task="hellaswag", metric="acc_norm", value=0.41, dataset="Rowan/hellaswag", shots=0, samples=10_042, harness="lm-eval 0.4"
    )
    stages = (*facts.stages[:-1], replace(facts.stages[-1], quality=(quality,)))
    return replace(facts, stages=stages, tasks=(task,))


def hostile(facts: Facts) -> Facts:
    """The facts with a hostile text wherever a text can come from a file."""
    manifest = facts.manifest
    record = next(iter(manifest.weights.values()))
    lineage = tuple(step.model_copy(update={"text": HOSTILE, "inputs": {HOSTILE: HOSTILE}}) for step in manifest.lineage)
    manifest = manifest.model_copy(update={
        "source": Source(name=HOSTILE, commit=HOSTILE, licence=HOSTILE, datasets=(HOSTILE,), fingerprint=HOSTILE), "isa": HOSTILE,
        "weights": {HOSTILE: record}, "notes": (NoteRecord(what=HOSTILE, reason=HOSTILE, count=1, names=(HOSTILE,)),),
        "device": HOSTILE, "compress_version": HOSTILE, "format": HOSTILE, "lineage": lineage, "fingerprint": HOSTILE,
    })  # fmt: skip
    reader = ReaderRecord(passed=True, version=HOSTILE, dtype=HOSTILE, versions={HOSTILE: HOSTILE})
    failed = ReaderRecord(passed=False, reason=HOSTILE)
    found = measured(replace(
        facts, manifest=manifest, name=HOSTILE, config={"architectures": ["__import__('os')"]},
        stages=tuple(replace(stage, name=HOSTILE, text=HOSTILE, inputs={HOSTILE: HOSTILE}) for stage in facts.stages),
        layers=tuple(replace(layer, name=HOSTILE, row=f"x.*.{HOSTILE}") for layer in facts.layers),
        readers=(replace(facts.readers[0], record=reader), replace(facts.readers[1], name=HOSTILE, reason=HOSTILE, record=failed)),
    ), HOSTILE)  # fmt: skip
    task = found.tasks[0].model_copy(update=dict.fromkeys(("task", "metric", "dataset", "config", "split", "harness"), HOSTILE))
    return replace(found, tasks=(task,))
