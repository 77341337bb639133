"""Every kind of pass is killed at random moments of every phase, and goes on to the bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import CALIBRATE, Ran, Server, journal, same, two_domains

from compress.pipeline.output_paths import steps_folder
from support import tiny_llama

KILLS = 20
RECIPES = {
    "stream and pack": "quantize.rtn(scheme=w4a16g32) | pack",
    "sweep": f"{CALIBRATE} | prune.wanda(sparsity=2:4) | quantize.gptq(scheme=w4a16g32) | pack",
    "residual": f"{CALIBRATE} | quantize.gptq(scheme=w4a16g32, correct=residual) | pack",
    "outputs": f"{CALIBRATE} | quantize.gptq(scheme=w4a16g32, feedback=both) | pack",
    "quik": f"{CALIBRATE} | quantize.quik | pack(format=native)",
    "owl": f"{CALIBRATE} | prune.sparsegpt(sparsity=0.5, owl=true, refit=true)",
    "train": f"{CALIBRATE} | quantize.rtn(scheme=w3a16g32) | distill.logits(epochs=1, batch=2, micro_batch=2, save_every=3) | pack",
    "latent": f"{CALIBRATE} | quantize.rtn(scheme=mxfp4) | distill.logits(latent=true, epochs=1, batch=2, micro_batch=2, "
    "save_every=3) | pack",
    "rotate": "quantize.rotate | quantize.rtn(scheme=w4a16g32) | pack",
    "slice": f"{CALIBRATE} | prune.width(hidden=48, ffn=64, refit=true) | prune.depth(layers=6)",
    "sheared": f"{CALIBRATE} | prune.sheared(layers=6, ffn=64, epochs=1, batch=2, micro_batch=2, save_every=3)",
    "an objective that learns": f"{CALIBRATE} | prune.magnitude(sparsity=2:4) | distill.features(epochs=1, batch=2, micro_batch=2, "
    "save_every=3, intra_class=0.1)",
    "an objective that measures": f"{CALIBRATE} | prune.magnitude(sparsity=2:4) | distill.squarehead(epochs=1, batch=2, "
    "micro_batch=2, save_every=3)",
    "train over domains": f"quantize.rtn(scheme=w3a16g32) | distill.logits({two_domains()}, samples=24, batch=2, micro_batch=2, "
    "reweight_every=2, save_every=3) | pack",
    "learned": f"{CALIBRATE} | quantize.rtn(scheme=w3a16g32) | quantize.learned(epochs=2, batch=4, micro_batch=2) | pack",
    "blocks": f"{CALIBRATE} | prune.magnitude(sparsity=2:4) | distill.blocks(epochs=2, batch=4, micro_batch=2, lr=1e-3) | pack(format=native)",
}
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks in four shards."""
    return tiny_llama(tmp_path_factory.mktemp("kill") / "model", max_shard_size="300KB", num_hidden_layers=8)


def redone(before: Ran, journaled: dict[str, set[str]], after: Ran) -> Counter[str]:
    """What a run to the end did again although the one that was killed had finished it, by kind of work."""
    found: Counter[str] = Counter()
    kept = Counter({event["step"]: 0 for event in after.told("progress")})
    for event in after.told("progress"):
        kept[event["step"]] += event.get("kept", 0)
    for step, names in journaled.items():
        # What a step trains is journaled at its end only.
        found["tensors"] += len(names) - kept[step] if step in kept else 0
    for step in {event["step"] for event in before.told("publish")}:
        found["tensors"] += sum(event["step"] == step and not event.get("kept", 0) for event in after.told("progress"))
    steps = [event["number"] for event in before.told("train")], [event["number"] for event in after.told("train")]
    if all(steps):
        found["training steps"] += max(0, steps[0][-1] - steps[1][0] + 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_killed_in_every_phase(kind: str, model: Path, server: Server, table: list[Any], tmp_path: Path) -> None:
    # The report comes after everything else, the same way whatever ran: one recipe is killed in it.
    report = [] if kind == "stream and pack" else ["--no-report"]

    def command(out: Path) -> list[Any]:
        return ["run", model, out, "-p", RECIPES[kind], "--json", "--dtype", "float32", "--shard-size", "200kB", *report]

    first = server.run(command(tmp_path / "reference"))
    assert first.status == 0, (first.words, first.events[-1])
    phases = {phase: length for phase, (_, length) in first.phases().items() if phase != "end"}
    chance, failures = random.Random(kind), []
    for phase, length in phases.items():
        kills, runs, worst, wrong, before, out = 0, 0, Counter[str](), 0, None, tmp_path / "out"
        journaled: dict[str, set[str]] = {}
        while kills < KILLS or before is not None:
            # Some phases last a millisecond: the more often one was missed, the sooner the kill; some last microseconds.
            share, at_once = chance.random() / (1 + runs // KILLS), runs >= 3 * KILLS and kills < KILLS
            ran = server.run(command(out), phase if kills < KILLS else "", share, length, at_once=at_once)
            runs += 1
            assert runs < 30 * KILLS, (phase, kills, ran.status, ran.words)
            if before is not None and ran.status == 0:
                worst |= redone(before, journaled, ran)
            if ran.status == -9:
                kills += ran.killed_in == phase
                before, journaled = ran, journal(out)
                continue
            assert ran.status == 0, (phase, ran.status, ran.words, ran.events[-1])
            differences = same(out, tmp_path / "reference")
            wrong += len(differences)
            failures += [(phase, differences)] if differences else []
            before = None
            shutil.rmtree(out)
            shutil.rmtree(steps_folder(out), ignore_errors=True)
        assert worst["tensors"] == 0, (phase, worst)
        assert worst["training steps"] <= SAVE_EVERY, (phase, worst)
        again = "tensors in flight" + (f", {worst['training steps']} training steps" if worst["training steps"] else "")
        table.append((kind, phase, str(kills), str(runs), again, str(wrong)))
    assert not failures
