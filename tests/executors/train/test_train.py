"""Training through the pipeline: it learns, changes what it may and nothing else, and tells what it did."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.reader import TRAINING, open_checkpoint
from compress.evaluate.perplexity_kl import compare
from compress.layerwise.eval_windows import token_windows
from families import FAMILIES
from support import SHARED, dense_meaning, do, load, losses, ready_inputs, rows, shared, step_of, tiny_llama

DISTILL = f"distill.logits(data='{ready_inputs()}', samples=6, batch=4, micro_batch=2, epochs=2"
"""Three steps: of 4, 4 and 4 samples; more options and a bracket follow."""
Source = Callable[[str], Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed(before: Path, after: Path) -> set[str]:
    """The tensors whose bytes differ."""
    a, b = tensors(before), tensors(after)
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


# What it is for.


@pytest.mark.parametrize("name", ["embedded", pytest.param("tiny-llama-3m", marks=pytest.mark.slow)])
def test_it_brings_a_trained_model_back_towards_its_source(name: str, demo_model: Path, tmp_path: Path) -> None:
    """Two bits cost a model most of what it knew; the scales alone give some of it back, on text that it did not see."""
    folder = demo_model if name == "embedded" else SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{name} does not lie beside this checkout")
    text = demo_model.parent / "text"
    recipe = f"quantize.rtn(scheme=w2a16g32) | distill.logits(data='{text / 'calibration.jsonl'}', samples=48, length=64, batch=4"
    do(folder, tmp_path / "out", f"{recipe}, epochs=2, lr=2e-3, scale_lr=2e-2)")
    windows = token_windows(folder, text / "evaluation.jsonl", 128, 1024)
    kl = [
        compare(open_checkpoint(folder), open_checkpoint(student), windows).kl.value
        for student in (step_of(tmp_path / "out", "quantize.rtn"), tmp_path / "out")
    ]
    assert kl[1] < 0.8 * kl[0]
    found = losses(tmp_path / "out")
    assert len(found) == 24
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


@pytest.mark.parametrize(("name", "before"), shared(
    ["llama", "gpt2", "mixtral", "gpt_oss", "bert", "gte"],
    ["prune.magnitude(sparsity=0.5)", "quantize.rtn(scheme=w2a16g32, ragged=divide)"],
))  # fmt: skip
def test_training_lowers_the_loss(name: str, before: str, source: Source, tmp_path: Path) -> None:
    """On the texts it trains on, again and again; every family of parameters that are fused, split or transposed."""
    recipe = f"{before} | distill.logits(data='{ready_inputs()}', samples=6, batch=6, micro_batch=3, epochs=10, lr=3e-3"
    do(source(name), tmp_path / "out", f"{recipe}, scale_lr=1e-2, schedule=constant, save_every=100)")
    found = losses(tmp_path / "out")
    assert len(found) == 10
    assert found[-1] < 0.8 * found[0]
    assert (tmp_path / "out" / "model.safetensors").is_file() == ("prune" in before)


def test_a_student_that_is_its_teacher_stays_as_it_is(tiny: Path, tmp_path: Path) -> None:
    """The loss is 0, and what rounding leaves of a gradient moves no weight further than the rates allow, rounded to bf16.

    After a first step at 0 AdamW makes steps of that rounding, so the next losses are near 0 and not at it.
    """
    do(tiny, tmp_path / "out", f"{DISTILL})")
    found = losses(tmp_path / "out")
    assert abs(found[0]) < 1e-7
    assert max(map(abs, found)) < 1e-4
    before, after = tensors(tiny), tensors(tmp_path / "out")
    for name, tensor in before.items():
        moved = (after[name].float() - tensor.float()).abs()
        assert bool((moved <= 3e-4 + tensor.float().abs() * 2**-7).all()), name


def test_nothing_to_learn_at_a_rate_of_zero(tiny: Path, tmp_path: Path) -> None:
    """Every byte: of dense, masked and coded weights."""
    recipe = "prune.magnitude(sparsity=2:4, targets=[attention]) | quantize.rtn(scheme=w3a16g32-asym, targets=[mlp])"
    do(tiny, tmp_path / "before", recipe)
    do(tiny, tmp_path / "out", f"{recipe} | {DISTILL}, lr=0, scale_lr=0)")
    assert changed(tmp_path / "before", tmp_path / "out") == set()
    assert min(losses(tmp_path / "out")) > 1e-3


# The same loss, however it is divided.

TEXTS = [[5, 9, 10], [24], [12, 12], [1, 20, 3], [8, 8, 8], [2, 2, 20]]
"""Lengths of the texts in each packed sample of 24 tokens."""


def packed_and_padded(folder: Path) -> tuple[str, str]:
    """The same texts twice: packed into rows with positions, and one in a row with padding. Arguments of distill.logits."""
    ids = torch.randint(3, 128, (len(TEXTS), 24), generator=torch.Generator().manual_seed(0))
    alone, mask = torch.zeros(sum(map(len, TEXTS)), 24, dtype=ids.dtype), torch.zeros(sum(map(len, TEXTS)), 24, dtype=torch.uint8)
    at = 0
    for row, lengths in enumerate(TEXTS):
        for text in ids[row].split(lengths):
            alone[at, : len(text)], mask[at, : len(text)] = text, 1
            at += 1
    places = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in TEXTS])
    save_file({"input_ids": ids, "position_ids": places}, folder / "packed.safetensors")
    save_file({"input_ids": alone, "attention_mask": mask}, folder / "padded.safetensors")
    return f"data='{folder}/packed.safetensors', samples=6", f"data='{folder}/padded.safetensors', samples={at}"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen3", "mixtral", "llama4"])
def test_packed_texts_cost_what_padded_ones_do(name: str, source: Source, tmp_path: Path) -> None:
    """Texts of a row do not see each other, and each token of them counts once: one step over all of them."""
    found = []
    for number, data in enumerate(packed_and_padded(tmp_path)):
        out = tmp_path / f"{number}"
        do(source(name), out, f"prune.magnitude(sparsity=0.5) | distill.logits({data}, batch=64, micro_batch=2, ce=0.5)")
        found.append(rows(out)[0])
    packed, padded = found
    assert packed["tokens"] == padded["tokens"] == sum(length - 1 for lengths in TEXTS for length in lengths)
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["norm"] == pytest.approx(padded["norm"], rel=1e-4)


def test_the_packings_of_a_corpus_train(demo_model: Path, tmp_path: Path) -> None:
    data = demo_model.parent / "text" / "calibration.jsonl"
    tokens = {}
    for packing in ("documents", "concatenate", "pad"):
        recipe = f"quantize.rtn(scheme=w2a16g32) | distill.logits(data='{data}', packing={packing}, samples=4, length=48"
        do(demo_model, tmp_path / packing, f"{recipe}, batch=4)")
        (row,) = rows(tmp_path / packing)
        assert 0 < row["loss"] < 10
        tokens[packing] = row["tokens"]
    assert tokens["concatenate"] == 4 * 47
    assert max(tokens["pad"], tokens["documents"]) <= tokens["concatenate"]


@pytest.mark.parametrize(
    ("name", "other"),
    [("llama", "micro_batch=1"), ("llama", "recompute=true"), ("mixtral", "micro_batch=3"), ("mixtral", "recompute=true")],
)
def test_how_a_step_is_divided_changes_nothing_but_rounding(name: str, other: str, source: Source, tmp_path: Path) -> None:
    """Padding included: tokens count alike, whatever micro-batch they are in."""
    _, data = packed_and_padded(tmp_path)
    for folder, options in (("one", "micro_batch=4"), ("other", other)):
        prune = f"prune.magnitude(sparsity=0.5, targets=[{'mlp' if name == 'llama' else 'experts'}])"
        before = f"quantize.rtn(scheme=w3a16g32, targets=[attention]) | {prune}"
        do(source(name), tmp_path / folder, f"{before} | distill.logits({data}, batch=4, {options}, lr=1e-3)")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "other")
    assert len(one) == 4
    assert one == pytest.approx(two, rel=1e-5)


# What may change, and what may not.


def test_masks_hold(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"prune.magnitude(sparsity=2:4) | {DISTILL}, lr=1e-2, weight_decay=0.1)")
    assert {record.state for record in result.manifest.weights.values()} == {"masked(2:4)"}
    before, after = tensors(step_of(tmp_path / "out", "prune.magnitude")), tensors(tmp_path / "out")
    for name in result.manifest.weights:
        assert bool((after[name][before[name] == 0] == 0).all())
        assert not torch.signbit(after[name][after[name] == 0]).any()
        assert int((after[name] != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "tied"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16g16-asym"])
def test_codes_stay_and_scales_move(name: str, scheme: str, source: Source, tmp_path: Path) -> None:
    codes = f"quantize.rtn(scheme={scheme}, targets=[linear, embeddings])"
    result = do(source(name), tmp_path / "out", f"{codes} | {DISTILL}, lr=1e-2, scale_lr=1e-2)")
    before = tensors(step_of(tmp_path / "out", "quantize.rtn"))
    after = tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {record.state for record in result.manifest.weights.values()} == {f"codes({scheme})"}
    assert len(result.manifest.weights) > FAMILIES[name].linears
    kinds = {"codes": 0, "zero": 0, "scale": 0}
    for weight in result.manifest.weights:
        for part in kinds:
            if f"{weight}.{part}" in before:
                a, b = before[f"{weight}.{part}"], after[f"{weight}.{part}"]
                assert torch.equal(a, b) == (part != "scale"), f"{weight}.{part}"
                kinds[part] += 1
    assert kinds["codes"] == kinds["scale"] == len(result.manifest.weights)
    assert bool(kinds["zero"]) == ("asym" in scheme)


def test_codes_that_are_masked_stay_masked(tiny: Path, tmp_path: Path) -> None:
    recipe = f"prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w4a16g32) | {DISTILL}, scale_lr=1e-2)"
    result = do(tiny, tmp_path / "out", recipe)
    assert {record.state for record in result.manifest.weights.values()} == {"codes(w4a16g32)+masked(2:4)"}
    dense_view = tensors(dense_meaning(tmp_path / "out", tmp_path / "dense_view"))
    for name in result.manifest.weights:
        assert int((dense_view[name] != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("skip=[embeddings]", lambda name: "embed_tokens" not in name),
        ("targets=[norms]", lambda name: "norm" in name),
        ("targets=[attention], skip=['re:.*layers.1']", lambda name: "layers.0.self_attn" in name),
    ],
)
def test_only_what_is_targeted_changes(options: str, wanted: Callable[[str], bool], tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"prune.magnitude(sparsity=0.5) | {DISTILL}, lr=1e-2, {options})")
    before = step_of(tmp_path / "out", "prune.magnitude")
    named = {name for name in tensors(tiny) if wanted(name)}
    assert changed(before, tmp_path / "out") == named
    notes = [note for note in result.manifest.notes if note.what == "trained"]
    assert {name for note in notes for name in note.names} == named
    assert sum(note.count for note in notes) == len(named)
    assert result.manifest.coverage["transformed"] == len(named)


def test_weights_that_no_text_reaches_are_not_trained(source: Source, tmp_path: Path) -> None:
    """Of a model with a vision tower: weight decay alone would wear them away."""
    result = do(source("llava"), tmp_path / "out", f"prune.magnitude(sparsity=0.5) | {DISTILL}, lr=1e-2, weight_decay=0.5)")
    before = step_of(tmp_path / "out", "prune.magnitude")
    assert [name for name in changed(before, tmp_path / "out") if "vision" in name or "multi_modal" in name] == []
    trained = {name for note in result.manifest.notes if note.what == "trained" for name in note.names}
    assert [name for name in trained if "vision" in name or "multi_modal" in name] == []


def test_a_trained_expert_family_is_what_transformers_loads(source: Source, tmp_path: Path) -> None:
    """What is written down is the student of the last step: its loss goes on where it was."""
    recipe = f"prune.magnitude(sparsity=0.5, targets=[experts]) | {DISTILL}, lr=1e-3, schedule=constant)"
    do(source("mixtral"), tmp_path / "out", recipe)
    teacher, student = load(source("mixtral"), dtype=torch.float32), load(tmp_path / "out", dtype=torch.float32)
    ids = load_file(ready_inputs())["input_ids"]
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl < losses(tmp_path / "out")[0]
    again = f"distill.logits(data='{ready_inputs()}', samples=6, batch=6, lr=0, teacher='{source('mixtral')}')"
    do(tmp_path / "out", tmp_path / "more", again)
    assert losses(tmp_path / "more")[0] == pytest.approx(kl, rel=1e-4)


# What is told.


def test_the_record_is_published_digested_and_left_behind(tiny: Path, tmp_path: Path) -> None:
    recipe = f"quantize.rtn(scheme=w4a16g32) | {DISTILL}) | {DISTILL}, lr=2e-4) | pack"
    result = do(tiny, tmp_path / "out", recipe)
    folders = sorted((tmp_path / "out.steps").glob("*-distill.logits-*"))
    assert len(folders) == 2
    for folder in folders:
        manifest = open_checkpoint(folder).manifest
        assert manifest is not None
        for name in TRAINING[:2]:
            assert manifest.files[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        assert (folder / "training.svg").read_text().rstrip().endswith("</svg>")
        found = rows(folder)
        assert [row["step"] for row in found] == [1, 2, 3]
        assert [row["tokens"] for row in found] == [4 * 23, 8 * 23, 12 * 23]
        assert all(row.keys() == {"step", "loss", "lr", "norm", "tokens"} for row in found)
    assert losses(folders[0]) != losses(folders[1]), "each has its own"
    assert not [name for name in TRAINING if (tmp_path / "out" / name).exists() or name in result.manifest.files]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_the_record_does_not_travel_to_another_run(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "trained", f"{DISTILL})")
    result = do(tmp_path / "trained", tmp_path / "codes", "quantize.rtn(scheme=w4a16g32)")
    assert not [name for name in TRAINING if (tmp_path / "codes" / name).exists() or name in result.manifest.files]


def test_the_manifest_tells_what_was_trained_to_the_end(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"quantize.rtn(scheme=w4a16g32, targets=[mlp]) | {DISTILL}, skip=[embeddings]) | pack")
    packed, distilled = result.manifest, open_checkpoint(step_of(tmp_path / "out", "distill.logits")).manifest
    assert distilled is not None
    names = set(tensors(tiny))
    for manifest in (distilled, packed):
        notes = {note.reason.partition(",")[0]: set(note.names) for note in manifest.notes if note.what == "trained"}
        assert notes.keys() == {"scales", "weights"}
        assert notes["scales"] == {name for name in names if ".mlp." in name}
        assert notes["weights"] == {name for name in names if ".mlp." not in name and "embed_tokens" not in name}
        untouched = {name for note in manifest.notes if note.what == "untouched" for name in note.names}
        assert untouched == {"model.embed_tokens.weight"}
    assert distilled.coverage == {"targeted": len(names) - 1, "transformed": len(names) - 1, "skipped": 0}


def test_calibration_tokens_serve_where_no_data_is_named(tiny: Path, tmp_path: Path) -> None:
    """The same tokens, and so the same steps, whether they travel with the checkpoint or are named."""
    how = "batch=4, micro_batch=2, epochs=2"
    calibrate, prune = f"calibrate(data='{ready_inputs()}', samples=6)", "prune.magnitude(sparsity=0.5)"
    do(tiny, tmp_path / "a", f"{calibrate} | {prune} | distill.logits({how})")
    do(tiny, tmp_path / "b", f"{prune} | {DISTILL})")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("a", "b")]
    assert files[0] == files[1]


def test_events_tell_of_every_step(tiny: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    do(tiny, tmp_path / "out", f"prune.magnitude(sparsity=0.5) | {DISTILL})", events=events.append)
    found = [event for event in events if event["event"] == "train"]
    assert [event["number"] for event in found] == [1, 2, 3]
    assert [event["loss"] for event in found] == losses(tmp_path / "out")
    assert all(event["steps"] == 3 and event["tokens_per_second"] > 0 for event in found)


MEASURE = """
import json, sys
from pathlib import Path
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner
source, out, recipe = sys.argv[1:4]
result = run_recipe(parse_one_liner(recipe), open_checkpoint(Path(source)), Path(out), Context(threads=1, dtype="float32"))
print(json.dumps({"peak": result.manifest.measured["peak_resident_bytes"], "planned": result.plan.peak_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("pass_", ["distill.logits", "distill.squarehead", "distill.features"])
@pytest.mark.parametrize("before", ["prune.magnitude(sparsity=2:4)", "quantize.rtn(scheme=w4a16g128)"])
def test_peak_memory_is_planned(before: str, pass_: str, tmp_path: Path) -> None:
    """Of a process of its own, whose model is larger than the interpreter's libraries are."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "vocab_size": 2000}
    model = tiny_llama(tmp_path / "model", **sizes)
    data = ready_inputs.__wrapped__(4, 64, 2000)
    recipe = f"{before} | {pass_}(data='{data}', samples=4, length=64, batch=4, micro_batch=2)"
    command = [sys.executable, "-c", MEASURE, model, tmp_path / "out", recipe]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["planned"] <= 3 * found["peak"]
