"""What training refuses, and that it says why: options, texts, teachers, models, and losses that are no numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.checkpoint.scan import scan_source
from compress.context import Context
from compress.errors import CompressError, InputError, RecipeError, UsageError
from compress.pipeline.output_paths import steps_folder
from compress.pipeline.run import Result, run_recipe
from compress.spec.recipe import parse_one_liner
from support import do, losses, ready_inputs, tiny_llama

PRUNE = "prune.magnitude(sparsity=0.5)"
DISTILL = f"distill.logits(data='{ready_inputs()}', samples=6, batch=2, micro_batch=2"
Source = Callable[[str], Path]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("mix=0.3", "divergence=forward reads no mix"),
        ("mix=1, divergence=skew", "0 whatever the student does"),
        ("top_k=5, divergence=jsd", "top_k goes with divergence=forward only"),
        ("kl=0", "there is nothing to learn"),
        ("samples=5", "samples: only with data"),
        ("length=64, packing=pad", "length, packing: only with data"),
        ("betas=[0.9, 1.5]", "betas are from 0 to below 1"),
        ("betas=[0.9]", "betas"),
        ("data=texts.docx", "texts.docx"),
        ("lr=-1", "lr"),
        ("warmup=1", "warmup"),
        ("schedule=step", "schedule"),
        ("micro_batch=0", "micro_batch"),
        ("temperature=0", "temperature"),
        ("targets=['re:(']", "targets"),
    ],
)
def test_options_that_make_no_sense_are_one_clear_error(options: str, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        do(tiny, tmp_path / "out", f"distill.logits({options})")
    (problem,) = error.value.problems
    assert said in str(problem)
    assert "distill.logits" in problem.where
    assert not (tmp_path / "out.steps").exists()


def test_without_texts_and_without_tokens_it_says_what_to_do(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("-p 'calibrate | distill.logits'; calibrate(data=...) reads")):
        do(tiny, tmp_path / "out", "distill.logits")


def test_targets_that_match_nothing_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="router"):
        do(tiny, tmp_path / "out", f"{DISTILL}, targets=[router])")


def test_samples_longer_than_the_positions_of_the_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    save_file({"input_ids": torch.ones(4, 65, dtype=torch.int32)}, tmp_path / "long.safetensors")
    with pytest.raises(InputError, match="64"):
        do(tiny, tmp_path / "out", f"distill.logits(data='{tmp_path / 'long.safetensors'}', samples=4)")


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_an_encoder_decoder_is_refused(name: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a language model with logits for every token of one text"):
        do(source(name), tmp_path / "out", f"{DISTILL})")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mamba2", "bloom", "bert"])
def test_packing_is_refused_where_the_texts_of_a_row_would_be_joined(name: str, source: Source, tmp_path: Path) -> None:
    places = torch.arange(12).repeat(2).expand(6, -1).contiguous()
    save_file({**load_file(ready_inputs()), "position_ids": places}, tmp_path / "packed.safetensors")
    with pytest.raises(InputError, match="set packing to pad"):
        do(source(name), tmp_path / "out", f"distill.logits(data='{tmp_path / 'packed.safetensors'}', samples=6)")


def test_a_router_bias_that_gradients_do_not_reach_is_left_alone(source: Source, tmp_path: Path) -> None:
    """DeepSeek's correction bias is a buffer of the model, moved by another rule than gradients."""
    result = do(source("deepseek_v3"), tmp_path / "out", f"{PRUNE} | {DISTILL}, lr=1e-3)")
    trained = {name for note in result.manifest.notes if note.what == "trained" for name in note.names}
    assert not [name for name in trained if "correction_bias" in name]
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


# Losses that are no numbers.


def kept_batch(error: pytest.ExceptionInfo[InputError]) -> dict[str, torch.Tensor]:
    """The tensors of the file that a message names."""
    (problem,) = error.value.problems
    found = re.search(r"/\S+\.safetensors", problem.do)
    assert found, problem.do
    return load_file(found[0])


def test_weights_that_run_away_stop_at_the_step_and_keep_its_batch(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step 2\b") as error:
        do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, lr=1e30, schedule=constant, warmup=0)")
    assert "finite" in str(error.value)
    batch, ids = kept_batch(error), load_file(ready_inputs())["input_ids"]
    assert batch["input_ids"].shape == (2, 24)
    assert all(any(torch.equal(row, other) for other in ids) for row in batch["input_ids"])
    assert not (tmp_path / "out").exists()
    assert len(losses(next(steps_folder(tmp_path / "out").glob("*.tmp")))) == 1, "what was finite is on record"


def test_weights_that_run_away_in_the_last_step_are_not_published(tmp_path: Path) -> None:
    """No loss is left to show it; fp16 ends at 65504."""
    source = tiny_llama(tmp_path / "m", dtype="float16")
    recipe = f"{PRUNE} | distill.logits(data='{ready_inputs()}', samples=6, batch=6, lr=1e9, warmup=0)"
    with pytest.raises(InputError, match="finite numbers in what the pass has made"):
        do(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_errors_of_earlier_passes_are_not_told_of_trained_weights(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, targets=[attention])")
    for name, record in result.manifest.weights.items():
        assert (record.error is None) == ("self_attn" in name), name


def test_a_loss_that_is_no_number_is_not_learned_from(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second step only; when it is gone, the same run goes on from the state before it and ends well."""
    from compress.contract.discover import load_pass

    logits, calls = load_pass("distill.logits"), [0]
    loss = logits.loss

    def spoiled(self: Any, *args: Any) -> torch.Tensor:
        calls[0] += 1
        return loss(self, *args) * (float("nan") if calls[0] == 2 else 1)

    recipe = f"{PRUNE} | {DISTILL}, save_every=1)"
    monkeypatch.setattr(logits, "loss", spoiled)
    with pytest.raises(InputError, match=r"step 2\b") as error:
        do(tiny, tmp_path / "out", recipe)
    assert "a loss of nan" in str(error.value)
    assert kept_batch(error).keys() == {"input_ids"}
    monkeypatch.setattr(logits, "loss", loss)
    do(tiny, tmp_path / "out", recipe)
    do(tiny, tmp_path / "whole", recipe)
    assert (tmp_path / "out/training.jsonl").read_bytes() == (tmp_path / "whole/training.jsonl").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not [path.name for path in (tmp_path / "out").iterdir() if "bad" in path.name]


def test_a_teacher_without_numbers_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "teacher")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, teacher='{tmp_path / 'teacher'}')")


# Teachers.


def teacher_digest(result: Result) -> str | None:
    return result.manifest.lineage[-1].inputs.get("teacher")


def identity(folder: Path) -> str:
    return scan_source(open_checkpoint(folder), Context()).fingerprint


def test_the_teacher_is_what_the_run_reads(tiny: Path, tmp_path: Path) -> None:
    """By default, and the same as if it is named; a loss above 0 tells that it is not the pruned one."""
    default = do(tiny, tmp_path / "default", f"{PRUNE} | {DISTILL})")
    named = do(tiny, tmp_path / "named", f"{PRUNE} | {DISTILL}, teacher='{tiny}')")
    assert teacher_digest(default) == teacher_digest(named) == identity(tiny)
    assert losses(tmp_path / "default") == losses(tmp_path / "named")
    assert losses(tmp_path / "default")[0] > 1e-3
    assert str(tiny.parent) not in (tmp_path / "named/manifest.json").read_text()


def test_another_teacher_is_another_result(tiny: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", num_hidden_layers=1)
    result = do(tiny, tmp_path / "out", f"{DISTILL}, teacher='{other}')")
    assert teacher_digest(result) == identity(other) != identity(tiny)
    assert losses(tmp_path / "out")[0] > 1e-3
    with pytest.raises(InputError, match="another result"):
        do(tiny, tmp_path / "out", f"{DISTILL})")


def test_another_teacher_of_the_same_name_is_another_result(tiny: Path, tmp_path: Path) -> None:
    """Its content counts."""
    teacher = shutil.copytree(tiny, tmp_path / "teacher")
    do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, teacher='{teacher}')")
    assert not do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, teacher='{teacher}')").fresh
    shutil.rmtree(teacher)
    tiny_llama(teacher, num_hidden_layers=1)
    with pytest.raises(InputError, match="another result"):
        do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, teacher='{teacher}')")


def test_without_kl_there_is_no_teacher(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, kl=0, ce=1)")
    assert teacher_digest(result) is None
    assert 3 < losses(tmp_path / "out")[0] < 7, "near the logarithm of the vocabulary"


@pytest.mark.parametrize("before", [PRUNE, "quantize.rtn(scheme=w4a16g32)", f"{PRUNE} | {DISTILL})"])
def test_of_a_changed_model_the_dense_parent_must_be_named(before: str, tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "changed", before)
    with pytest.raises(CompressError) as error:
        do(tmp_path / "changed", tmp_path / "out", f"{DISTILL})")
    assert f"set teacher to the directory of {tiny.name}" in str(error.value)
    assert not (tmp_path / "out").exists()
    at_once = do(tiny, tmp_path / "at once", f"{before} | {DISTILL})")
    result = do(tmp_path / "changed", tmp_path / "out", f"{DISTILL}, teacher='{tiny}')")
    assert teacher_digest(result) == teacher_digest(at_once) == identity(tiny)
    assert losses(tmp_path / "out") == losses(tmp_path / "at once")


def test_a_trained_model_is_a_changed_one(tiny: Path, tmp_path: Path) -> None:
    """Though every weight of it is dense."""
    other = tiny_llama(tmp_path / "other", num_hidden_layers=1)
    do(tiny, tmp_path / "trained", f"{DISTILL}, teacher='{other}')")
    with pytest.raises(CompressError, match=f"the directory of {tiny.name}"):
        do(tmp_path / "trained", tmp_path / "out", f"{DISTILL})")


def test_calibration_alone_changes_no_model(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "calibrated", f"calibrate(data='{ready_inputs()}', samples=6)")
    result = do(tmp_path / "calibrated", tmp_path / "out", f"{PRUNE} | distill.logits(batch=2)")
    manifest = Manifest.read(tmp_path / "calibrated")
    assert manifest is not None
    assert teacher_digest(result) == manifest.fingerprint
    assert losses(tmp_path / "out")[0] > 1e-3


def test_a_dense_parent_of_the_hub_is_opened_at_its_commit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def from_the_hub(name: str, trusted: bool = False) -> Any:
        opened.append(name)
        assert not trusted
        return open_checkpoint(tiny)

    hub = open_checkpoint(tiny, "someone/tiny", {"commit": "c" * 40})
    context = Context(threads=2, dtype="float32")
    run_recipe(parse_one_liner(PRUNE), hub, tmp_path / "pruned", context)
    monkeypatch.setattr("compress.executors.teacher.open_source", from_the_hub)
    monkeypatch.setattr("compress.executors.teacher.open_headers", from_the_hub)
    result = do(tmp_path / "pruned", tmp_path / "out", f"{DISTILL})")
    assert set(opened) == {f"someone/tiny@{'c' * 40}"}
    assert teacher_digest(result) == identity(tiny)


def test_a_teacher_in_codes_teaches_what_they_mean(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "codes", "quantize.rtn(scheme=w8a16) | pack")
    result = do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, teacher='{tmp_path / 'codes'}')")
    manifest = Manifest.read(tmp_path / "codes")
    assert manifest is not None
    assert teacher_digest(result) == manifest.fingerprint


def test_a_teacher_with_another_tokenizer_is_refused(demo_model: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(demo_model, tmp_path / "teacher")
    content = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer"):
        do(demo_model, tmp_path / "out", f"{PRUNE} | {DISTILL}, teacher='{teacher}')")
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_not_there_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="nowhere"):
        do(tiny, tmp_path / "out", f"{PRUNE} | {DISTILL}, teacher='{tmp_path / 'nowhere'}')")
