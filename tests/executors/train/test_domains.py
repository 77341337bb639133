"""Domains through the pipeline: losses are those of the model as it is, weights follow them, and all is told."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.checkpoint.scan import file_digest
from compress.context import Context
from compress.contract.domain_options import DomainOptions
from compress.contract.training_options import TrainingOptions
from compress.corpus import Corpus, DomainSpec, build_domains
from compress.errors import CompressError, InputError, RecipeError
from compress.executors.train.domain_order import DomainOrder
from compress.executors.train.domains import Domains
from compress.numerics.domain_weights import updated
from compress.numerics.scaling_law import through
from support import do as do_on_two_threads
from support import load, losses, rows, step_of, tiny_llama

PRUNE = "prune.magnitude(sparsity=0.5)"
HOW = "loading=dynamic, held_out=72, samples=28, batch=4, micro_batch=2, reweight_every=3, lr=1e-2"
"""Seven steps; updates after the third, the sixth and the last."""
do = partial(do_on_two_threads, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two domains of token ids, one of few different tokens; as an option."""
    folder = tmp_path_factory.mktemp("domains")
    chance = torch.Generator().manual_seed(0)
    for name, top in (("wide", 128), ("narrow", 30)):
        save_file({"input_ids": torch.randint(3, top, (9, 24), generator=chance)}, folder / f"{name}.safetensors")
    return f"data=['{folder / 'wide.safetensors'}', '{folder / 'narrow.safetensors'}']"


NAMES = ["wide.safetensors", "narrow.safetensors"]


def told(out: Path) -> list[dict[str, dict[str, Any]]]:
    return [row["domains"] for row in rows(out) if "domains" in row]  # type: ignore[misc]


def weights_of(update: dict[str, dict[str, Any]]) -> list[float]:
    return [update[name]["weight"] for name in NAMES]


def option(data: str) -> list[Path]:
    return [Path(path) for path in re.findall(r"'([^']+)'", data)]


@torch.no_grad()
def loss_of(model: Path, ids: torch.Tensor) -> float:
    """The mean cross entropy of the next token, by transformers alone."""
    logits = load(model, dtype=torch.float32)(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def held_out(data: str, seed: int = 0) -> list[torch.Tensor]:
    """The held-out rows of each source: 72 tokens are three of 24."""
    corpus: Corpus = build_domains(DomainSpec(tuple(map(str, option(data))), samples=28, held_out=72), Path(), seed)
    marks = corpus.tensors
    return [marks["input_ids"][(marks["domain"] == number) & marks["held_out"]] for number in range(2)]


def test_losses_are_of_held_out_samples_by_the_teacher_and_by_the_model_as_it_is(tiny: Path, data: str, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {HOW})")
    before, at_end = told(tmp_path / "out")[0], told(tmp_path / "out")[-1]
    for name, ids in zip(NAMES, held_out(data), strict=True):
        assert len(ids) == 3
        assert before[name]["reference"] == at_end[name]["reference"] == pytest.approx(loss_of(tiny, ids), rel=1e-5)
        # The artifact is rounded to bf16.
        assert at_end[name]["loss"] == pytest.approx(loss_of(tmp_path / "out", ids), rel=2e-3)
        assert at_end[name]["loss"] != pytest.approx(before[name]["reference"], rel=1e-4)


def test_processes_share_the_held_out_samples(data: str) -> None:
    """However many there are, also more than micro-batches: the sums are those of one."""

    class Alone(Context):
        def add_up(self, tensor: torch.Tensor) -> None:
            sums.append(tensor.clone())

    options = TrainingOptions(batch=4, micro_batch=2)
    corpus = build_domains(DomainSpec(tuple(map(str, option(data))), samples=28, held_out=72), Path(), 0)
    order = DomainOrder(corpus, options, 0, DomainOptions("paper", 3, 28, (0.5, 0.5)), causal=True)
    table = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    whole = None
    for world_size in (1, 2, 3, 5):
        sums: list[torch.Tensor] = []
        for rank in range(world_size):
            run: Any = SimpleNamespace(ctx=Alone(rank=rank, world_size=world_size), teacher=None, weights=())
            calls: list[int] = []

            def model(input_ids: torch.Tensor, use_cache: bool, calls: list[int] = calls) -> Any:
                calls.append(len(input_ids))
                return SimpleNamespace(logits=table[input_ids])

            Domains(run, order, torch.device("cpu"), torch.float32).losses(model)
            assert len(calls) == -(-4 // world_size), "a sharded model is called by all of them as often"
        whole = sum(sums) if whole is None else whole
        torch.testing.assert_close(sum(sums), whole)


@pytest.mark.parametrize(("loading", "how"), [("dynamic", {}), ("dynamic-code", {"eta": 3.0, "smoothing": 0.01})])
def test_weights_follow_losses_by_the_rule(loading: str, how: dict[str, float], tiny: Path, data: str, tmp_path: Path) -> None:
    more = "".join(f", reweight_{name}={value}" for name, value in how.items())
    options = HOW.replace("dynamic", loading) + more
    do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {options}, weights=[3, 1], reference_losses=[4.8, 4.7])")
    found = rows(tmp_path / "out")
    assert [row["step"] for row in found if "domains" in row] == [3, 6, 7]
    weights = [0.75, 0.25]
    for update in told(tmp_path / "out"):
        measured = [update[name]["loss"] for name in NAMES]
        weights = updated(weights, measured, [4.8, 4.7], "code" if how else "paper", **how)
        assert weights_of(update) == weights
        assert sum(weights) == pytest.approx(1)
    assert weights[0] != 0.75
    samples = [[update[name]["samples"] for name in NAMES] for update in told(tmp_path / "out")]
    assert [sum(each) for each in samples] == [12, 24, 28]


def test_the_domain_that_is_further_above_its_reference_is_drawn_more(tiny: Path, data: str, tmp_path: Path) -> None:
    recipe = f"distill.logits({data}, {HOW.replace('samples=28', 'samples=120')}, kl=0, ce=1, reference_losses=[9, 0.01])"
    do(tiny, tmp_path / "out", recipe)
    updates = told(tmp_path / "out")
    grown = [weights_of(update)[1] for update in updates]
    assert grown == sorted(grown)
    assert grown[-1] > 0.99
    drawn = [update[NAMES[1]]["samples"] for update in updates]
    assert drawn[-1] - drawn[4] == 120 - 60, "from then on all are of that domain"


def test_the_manifest_tells_weights_to_start_the_next_pass_from(tiny: Path, data: str, tmp_path: Path) -> None:
    """Also after later passes, and the run prints them."""
    events: list[dict[str, Any]] = []
    recipe = f"{PRUNE} | distill.logits({data}, {HOW}) | quantize.rtn(scheme=w8a16) | pack"
    result = do(tiny, tmp_path / "out", recipe, events=events.append)
    (note,) = [note for note in result.manifest.notes if note.what == "domains"]
    assert list(note.names) == NAMES
    ends = re.search(r"weights=\[(.*)\]", note.reason)
    assert ends
    folder = step_of(tmp_path / "out", "distill.logits")
    manifest, last = Manifest.read(folder), told(folder)[-1]
    assert manifest is not None
    assert manifest.files["domains.svg"] == file_digest(folder / "domains.svg")
    assert not (tmp_path / "out/domains.svg").exists()
    assert [float(text) for text in ends[1].split(",")] == pytest.approx(weights_of(last), rel=1e-5)
    assert ends[0] in next(event["text"] for event in events if event["event"] == "notice" and "domains" in event["text"])
    do(tiny, tmp_path / "next", f"distill.logits({data}, {HOW}, {ends[0]}, kl=0, ce=1, reference_losses=[99, 99])")
    first = told(tmp_path / "next")[0]
    assert weights_of(first) != pytest.approx([0.5, 0.5])


def test_samples_that_come_again_are_counted(tiny: Path, data: str, tmp_path: Path) -> None:
    """Of nine rows three are held out."""
    result = do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {HOW})")
    last = told(tmp_path / "out")[-1]
    repeated = {note.names: note.reason for note in result.manifest.notes if note.what == "repeated"}
    assert len(repeated) == 2
    for name in NAMES:
        drawn = last[name]["samples"]
        assert repeated[name,] == f"distill.logits drew {drawn} samples of its 6: {drawn - 6} were seen before"
    pool = do(tiny, tmp_path / "pool", f"distill.logits({data}, {HOW}, pool=4, kl=0, ce=1, reference_losses=[1, 1])")
    assert [" of its 4: " in note.reason for note in pool.manifest.notes if note.what == "repeated"] == [True, True]


def test_a_domain_without_a_scored_token_held_out_keeps_its_share(tiny: Path, tmp_path: Path) -> None:
    """Five of the nine rows of a source are one token and padding; with some seed all that are held out are such rows."""
    chance, paths = torch.Generator().manual_seed(0), []
    for number in range(3):
        paths.append(tmp_path / f"{number}.safetensors")
        ids = torch.randint(3, 128, (9, 24), generator=chance)
        mask = torch.ones_like(ids)
        mask[: 5 * (number == 1), 1:] = 0
        save_file({"input_ids": ids, "attention_mask": mask}, paths[-1])
    spec = DomainSpec(tuple(map(str, paths)), samples=28, held_out=72)

    def scored(seed: int) -> bool:
        marks = build_domains(spec, Path(), seed).tensors
        return bool(marks["attention_mask"][(marks["domain"] == 1) & marks["held_out"], 1:].any())

    seed = next(seed for seed in range(100) if not scored(seed))
    data = f"data={list(map(str, paths))}"
    result = do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {HOW}, reference_losses=[4, 4, 4.5])", seed=seed)
    for update in told(tmp_path / "out"):
        assert update["1.safetensors"]["loss"] is None
        assert update["1.safetensors"]["weight"] == pytest.approx(1 / 3)
        assert update["0.safetensors"]["weight"] > update["2.safetensors"]["weight"] > 0
    (note,) = [note for note in result.manifest.notes if note.what == "no loss"]
    assert note.names == ("1.safetensors",)
    assert "3 of 3 updates" in note.reason
    assert "NaN" not in (tmp_path / "out/training.jsonl").read_text()
    assert (tmp_path / "out/domains.svg").is_file()


# Reference losses.


def references(out: Path) -> list[float]:
    return [told(out)[0][name]["reference"] for name in NAMES]


def test_without_a_teacher_the_dense_model_gives_the_references(tiny: Path, data: str, tmp_path: Path) -> None:
    """The run's source, or the one that is named: the same numbers, and another identity than a teacher's."""
    result = do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {HOW}, kl=0, ce=1)")
    wanted = [loss_of(tiny, ids) for ids in held_out(data)]
    assert references(tmp_path / "out") == pytest.approx(wanted, rel=1e-5)
    inputs = result.manifest.lineage[-1].inputs
    assert "teacher" not in inputs
    other = tiny_llama(tmp_path / "other", num_hidden_layers=1)
    named = do(tiny, tmp_path / "named", f"{PRUNE} | distill.logits({data}, {HOW}, kl=0, ce=1, reference='{other}')")
    assert named.manifest.lineage[-1].inputs["reference"] != inputs["reference"]
    assert references(tmp_path / "named") == pytest.approx([loss_of(other, ids) for ids in held_out(data)], rel=1e-5)
    assert str(tmp_path) not in (tmp_path / "named/manifest.json").read_text()
    assert losses(tmp_path / "named")[:3] == losses(tmp_path / "out")[:3], "it only moves the weights"


def test_of_a_changed_model_the_reference_must_be_named(tiny: Path, data: str, tmp_path: Path) -> None:
    do(tiny, tmp_path / "changed", PRUNE)
    with pytest.raises(CompressError) as error:
        do(tmp_path / "changed", tmp_path / "out", f"distill.logits({data}, {HOW}, kl=0, ce=1)")
    assert f"set reference to the directory of {tiny.name}" in str(error.value)
    do(tmp_path / "changed", tmp_path / "out", f"distill.logits({data}, {HOW}, kl=0, ce=1, reference='{tiny}')")


def family(folder: Path, **changes: Any) -> Path:
    content = {"sizes": [1e5, 1e6, 1e7], "losses": {NAMES[0]: [4.0, 3.0, 2.5], NAMES[1]: [3.0, 2.0, 1.2]}}
    (folder / "family.json").write_text(json.dumps({**content, **changes}))
    return folder / "family.json"


def test_references_follow_from_a_family_at_the_size_of_the_model(tiny: Path, data: str, tmp_path: Path) -> None:
    file = family(tmp_path)
    do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {HOW}, kl=0, ce=1, reference_family='{file}')")
    size = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    curves = [through([1e5, 1e6, 1e7], numbers) for numbers in ([4.0, 3.0, 2.5], [3.0, 2.0, 1.2])]
    assert references(tmp_path / "out") == [curve.loss(size) for curve in curves]
    assert 3 < references(tmp_path / "out")[0] < 5
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    first = manifest.lineage[-1].inputs["reference_family"]
    shutil.rmtree(tmp_path / "out")
    family(tmp_path, sizes=[1e5, 1e6, 2e7])
    result = do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {HOW}, kl=0, ce=1, reference_family='{file}')")
    assert result.manifest.lineage[-1].inputs["reference_family"] != first, "its content counts"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": {NAMES[0]: [4, 3, 2.5]}}, f"losses of '{NAMES[1]}'"),
        ({"losses": {NAMES[0]: [4, 3, 2.5], "narow.safetensors": [3, 2, 1.2]}}, "did you mean"),
        ({"losses": {NAMES[0]: [4, 3, 2.5], NAMES[1]: [3, 2, 1.2], "more": [1, 2, 3]}}, "also of 'more'"),
        ({"losses": {name: [4, 3] for name in NAMES}}, "three sizes with a loss each, not 3 with 2"),
        ({"losses": {name: [2, 3, 4] for name in NAMES}}, "losses that fall as models grow"),
        ({"losses": {name: ["4", "3", "2"] for name in NAMES}}, "a number, not '4'"),
        ({"losses": [4, 3, 2]}, '{"sizes": [N, N, N]'),
        ({"sizes": 7}, '{"sizes": [N, N, N]'),
    ],
)
def test_a_file_without_a_curve_for_every_source_is_refused_before_anything_is_made(
    changes: dict[str, Any], said: str, tiny: Path, data: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as error:
        do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, {HOW}, reference_family='{family(tmp_path, **changes)}')")
    (problem,) = error.value.problems
    assert problem.do
    assert not list(tmp_path.glob("out.steps/*"))


# What is refused.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("reweight_every=5, pool=3", "reweight_every, pool: only with loading=dynamic or dynamic-code"),
        ("loading=dynamic, reweight_eta=2", "reweight_eta: only with loading=dynamic-code"),
        ("loading=dynamic, epochs=2", "epochs: not with loading=dynamic"),
        ("loading=dynamic, reference=DIR, reference_losses=[1, 2]", "one of reference and reference_losses"),
        ("loading=dynamic, reference=DIR", "reference: not beside a teacher"),
        ("loading=dynamic, reference_losses=[1]", "reference_losses: 1 for 2 sources"),
        ("loading=dynamic, reference_losses=[1, -2]", "reference_losses: above 0"),
        ("loading=dynamic, weights=[1, 0]", "finite numbers above 0"),
        ("loading=dynamic, weights=[1, 2, 3]", "3 for 2 sources"),
        ("loading=sometimes", "'static', 'dynamic' or 'dynamic-code'"),
        ("loading=dynamic-code, reweight_smoothing=1", "reweight_smoothing"),
    ],
)
def test_options_that_make_no_sense_are_one_clear_error(options: str, said: str, tiny: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        do(tiny, tmp_path / "out", f"distill.logits({data}, {options})")
    (problem,) = error.value.problems
    assert said in str(problem)


def test_one_source_has_no_share_to_move(tiny: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="two sources of data or more"):
        do(tiny, tmp_path / "out", f"distill.logits(data='{option(data)[0]}', loading=dynamic)")
    with pytest.raises(RecipeError, match="loading: only with data"):
        do(tiny, tmp_path / "out", "distill.logits(loading=dynamic)")


def test_a_masked_model_has_no_next_token(data: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model that predicts the next token"):
        do(source("bert"), tmp_path / "out", f"distill.logits({data}, {HOW})")


def test_static_shares_are_as_they_were(tiny: Path, data: str, tmp_path: Path) -> None:
    """No line about domains, no picture of them, no tensor of them in the tokens."""
    do(tiny, tmp_path / "out", f"{PRUNE} | distill.logits({data}, samples=6, batch=3)")
    assert not told(tmp_path / "out")
    assert not (tmp_path / "out/domains.svg").exists()
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert manifest is not None
    assert {"training.jsonl", "training.svg"} <= manifest.files.keys()
    assert "domains.svg" not in manifest.files
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))
