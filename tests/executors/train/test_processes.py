"""Training that is killed goes on to the same bytes, and two processes do what one does."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.contract.objective import LossObjective
from compress.executors.train.loop import Training
from compress.executors.train.record import LINES, Record
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner
from families import build
from forked import python
from support import few, ready_inputs, rows, tree

RUN = """
import json, os, signal, sys
from importlib import import_module
from pathlib import Path
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def killed_at(place, number):
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            kill()
        return real(*args, **kwargs)
    setattr(owner, name, counted)

def one(source, out, recipe, at=None, **context):
    steps = []
    def note(event):
        if event["event"] == "train":
            steps.append(event["number"])
            if at == event["number"]:
                Path(out + ".seen").write_text(json.dumps(steps))
                kill()
    if isinstance(at, list):
        killed_at(*at)
    ctx = Context(threads=1, dtype="float32", events=note, **context)
    run_recipe(parse_one_liner(recipe), open_checkpoint(Path(source)), Path(out), ctx)
    Path(out + ".seen").write_text(json.dumps(steps))
"""
"""`one(source, out, recipe, at)` runs, and kills itself at a step, or at a call of a function."""
ONE = RUN + "\none(*sys.argv[1:4], json.loads(sys.argv[4]))"
RANKS = (
    RUN
    + """
import torch.distributed as dist
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
assert world == 2
for source, out, recipe, stop in json.loads(sys.argv[1]):
    if stop:
        # Both go no further, and the run begins again.
        def tell(self, kind, _tell=Context.tell, **facts):
            _tell(self, kind, **facts)
            if kind == "train" and facts["number"] == stop:
                raise KeyboardInterrupt
        real, Context.tell = Context.tell, tell
        try:
            one(source, out, recipe, rank=rank, world_size=world)
            raise SystemExit("not stopped")
        except KeyboardInterrupt:
            Context.tell = real
        dist.barrier()
    one(source, out, recipe, rank=rank, world_size=world)
"""
)


def run_and_kill(source: Path, recipe: str, plans: dict[Path, list[Any]]) -> list[list[int]]:
    """Runs a recipe to each place, killed at the place's moments, one after another; the steps seen in runs killed at steps."""
    seen = []
    for out, moments in plans.items():
        for at in [*moments, None]:
            done = python(ONE, source, out, recipe, json.dumps(at))
            assert done.returncode == (0 if at is None else -signal.SIGKILL), (out, at, done.stderr[-3000:])
            if isinstance(at, int):
                seen.append(json.loads(Path(f"{out}.seen").read_text()))
    return seen


MOMENTS: dict[str, list[Any]] = {
    # A state is made after its step is told of, so a kill at step 3 or 6 is before it.
    "at steps": [1, 3, 4, 4, 6, 7],
    "while files are written": [
        ["compress.executors.train.state:os.replace", 1],
        ["compress.checkpoint.writer:Writer.record", 10],
        ["compress.executors.train.record:Record.draw", 1],
        ["compress.checkpoint.writer:Writer.publish", 1],
        ["compress.checkpoint.writer:os.rename", 1],
    ],
}
"""By a name: what a run is killed at, one after another, before it is let through. States are after steps 3, 6 and 7."""
OTHERS = ("distill.features", "distill.squarehead")
"""Passes whose objective learns or measures something besides weights; killed at fewer moments."""


@pytest.mark.parametrize("pass_", few(["distill.logits", *OTHERS], "distill.logits"))
def test_a_killed_run_ends_at_the_bytes_of_one_that_was_not(pass_: str, tmp_path: Path) -> None:
    """Weights, what an objective learns and has measured, the record of every step, its picture, the fingerprint of it all."""
    before = "quantize.rtn(scheme=w3a16g32-asym, targets=[attention, embeddings])"
    how = "samples=13, batch=4, micro_batch=3, epochs=2, lr=1e-3, scale_lr=1e-2, weight_decay=0.1, save_every=3"
    recipe = f"{before} | {pass_}(data='{ready_inputs(13)}', {how})"
    asked: dict[str, list[Any]] = {"at steps": [2, 5]} if pass_ in OTHERS else MOMENTS
    plans = {tmp_path / "whole": [], **{tmp_path / name: moments for name, moments in asked.items()}}
    seen = run_and_kill(build("tied", tmp_path), recipe, plans)
    # The steps after a state are made again, those before it are not.
    whole_seen = [[1], [1, 2, 3], [1, 2, 3, 4], [4], [4, 5, 6], [4, 5, 6, 7]]
    assert seen == ([[1, 2], [1, 2, 3, 4, 5]] if pass_ in OTHERS else whole_seen)
    whole, one = tree(tmp_path / "whole"), Manifest.read(tmp_path / "whole")
    assert {"canonical.safetensors", "training.jsonl", "training.svg"} <= whole.keys()
    for moment in asked:
        found, two = tree(tmp_path / moment), Manifest.read(tmp_path / moment)
        assert list(whole) == list(found)
        assert [name for name in whole if whole[name] != found[name]] == [], moment
        assert one is not None
        assert two is not None
        assert one.fingerprint == two.fingerprint
        assert len(rows(tmp_path / moment)) == 7
        assert not list((tmp_path / f"{moment}.steps").glob("*.tmp"))


def two_domains(folder: Path, samples: int = 9) -> str:
    """Two files of token ids, one of them of few different tokens; as an option."""
    chance, paths = torch.Generator().manual_seed(0), []
    for top in (128, 40):
        paths.append(str(folder / f"ids-below-{top}.safetensors"))
        save_file({"input_ids": torch.randint(3, top, (samples, 24), generator=chance)}, paths[-1])
    return f"data={paths}, loading=dynamic"


def test_a_killed_run_over_domains_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    """Weights move after steps 2, 4, 6 and 7, and states are after 3, 6 and 7: between them, with them, and at the end."""
    how = "samples=27, batch=4, micro_batch=3, reweight_every=2, lr=1e-2, save_every=3"
    recipe = f"quantize.rtn(scheme=w3a16g32) | distill.logits({two_domains(tmp_path)}-code, held_out=48, {how})"
    # Killed while it measures, in the middle of a step after an update, and before the last state is in its place.
    moments: list[Any] = [["compress.executors.train.domains:loss_sum", 8], 5, ["compress.executors.train.state:os.replace", 2]]
    seen = run_and_kill(build("llama", tmp_path), recipe, {tmp_path / "whole": [], tmp_path / "killed": moments})
    assert seen == [[4, 5]]
    whole, found = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    assert {"canonical.safetensors", "training.jsonl", "domains.svg"} <= whole.keys()
    assert whole == found
    updates = [row["domains"] for row in rows(tmp_path / "whole") if "domains" in row]
    assert [row["step"] for row in rows(tmp_path / "whole") if "domains" in row] == [2, 4, 6, 7]
    assert len({json.dumps(update) for update in updates}) == 4
    one, two = (Manifest.read(tmp_path / name) for name in ("whole", "killed"))
    assert one is not None
    assert two is not None
    assert one.fingerprint == two.fingerprint


def test_a_line_that_a_crash_has_cut_is_dropped(tmp_path: Path) -> None:
    record = Record(tmp_path, "title")
    assert record.back_to(0) == 0
    for step in (1, 2, 3):
        record.add(step=step, loss=0.5, tokens=10 * step)
    whole = (tmp_path / LINES).read_text()
    (tmp_path / LINES).write_text(whole + '{"step": 4, "lo')
    assert record.back_to(3) == 30
    assert (tmp_path / LINES).read_text() == whole
    assert record.back_to(2) == 20
    record.add(step=3, loss=0.5, tokens=30)
    assert (tmp_path / LINES).read_text() == whole


def test_only_the_first_process_writes_the_record(tmp_path: Path) -> None:
    """Another that rewrites it while it goes on from a state may cut what the first is about to read."""
    record = Record(tmp_path, "title")
    record.add(step=1, loss=0.5, tokens=10)
    whole = (tmp_path / LINES).read_bytes()
    second: Any = SimpleNamespace(
        order=SimpleNamespace(steps=0, share=lambda *_: []), domains=None, writer=SimpleNamespace(path=tmp_path), trained=[],
        record=record, ctx=Context(rank=1, world_size=2), objective=LossObjective(lambda *_: torch.zeros(())),
    )  # fmt: skip
    Training._steps(second)
    assert (tmp_path / LINES).read_bytes() == whole


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """With the same global batch, of which one may have a micro-batch more, or the other no sample at all."""
    data, padded = ready_inputs(7), tmp_path / "padded.safetensors"
    mask = (torch.arange(24) < torch.tensor([2, 24, 9, 24, 5, 17, 24])[:, None]).to(torch.uint8)
    ids = torch.randint(3, 128, (7, 24), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "attention_mask": mask}, padded)
    how = "samples=7, batch=5, micro_batch=2, epochs=2, lr=1e-3, scale_lr=1e-2"
    domains = "samples=14, batch=5, micro_batch=1, lr=1e-2, reweight_every=1, held_out=72"
    recipes = {
        "llama": f"prune.magnitude(sparsity=2:4) | distill.logits(data='{data}', {how}, save_every=1)",
        "tied": f"quantize.rtn(scheme=w4a16g32, targets=[linear, embeddings]) | distill.logits(data='{padded}', {how})",
        "mixtral": f"quantize.rtn(scheme=w3a16g32) | distill.logits(data='{data}', {how}, recompute=true)",
        "qwen2": f"prune.magnitude(sparsity=0.5) | distill.squarehead(data='{padded}', {how}, density=0.1, kl=0)",
        "gemma2": f"prune.magnitude(sparsity=0.5) | distill.features(data='{padded}', {how}, projection_lr=1e-2, save_every=1)",
        "qwen3": f"prune.magnitude(sparsity=0.5) | distill.logits({two_domains(tmp_path)}, {domains})",
    }
    stopped = ("llama", "gemma2")
    tasks = []
    for name, recipe in recipes.items():
        model = build(name, tmp_path)
        run_recipe(parse_one_liner(recipe), open_checkpoint(model), tmp_path / f"{name}.1", Context(threads=1, dtype="float32"))
        tasks.append([str(model), str(tmp_path / f"{name}.2"), recipe, 2 if name in stopped else 0])
    done = python(RANKS, json.dumps(tasks), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in recipes:
        one, two = rows(tmp_path / f"{name}.1"), rows(tmp_path / f"{name}.2")
        assert len(one) == len(two) == 3
        for number, (a, b) in enumerate(zip(one, two, strict=True)):
            # Sums in another order: of one step, and of others after steps that divide by what is small, on some processors 1.3e-4.
            assert a["norm"] == pytest.approx(b["norm"], rel=1e-3 if number else 1e-5), name
            assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
            assert a.keys() == b.keys()
            for key in a.keys() - {"norm", "domains"}:
                assert a[key] == pytest.approx(b[key], rel=1e-5), (name, key)
            for domain, told in b.get("domains", {}).items():
                assert a["domains"][domain] == pytest.approx(told, rel=1e-5)
        manifest = open_checkpoint(tmp_path / f"{name}.2").manifest
        assert manifest is not None
        assert manifest.measured["ranks"] == 2
        assert one[-1]["loss"] != one[0]["loss"]
