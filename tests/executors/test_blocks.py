"""The block trainer: it heals, keeps masks and codes, goes on after a crash, and its gradients are those of autograd."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.checkpoint.manifest import Manifest
from compress.cli.app import build as command_line
from compress.errors import CompressError, CoverageError, InputError
from compress.executors.block_trainer import BlockTrainer, Micros, divided, steps_of
from compress.executors.blocks import BlockTraining
from compress.layerwise import hidden_state_offload
from compress.numerics.inputs import InputRounding
from compress.pipeline import output_paths
from forked import compress
from support import do, load, ready_inputs, rows, step_of, stop_at_record, tensors, tiny_llama, tree

CALIBRATE = f"calibrate(data='{ready_inputs(12)}', samples=12)"
HEAL = "distill.blocks(epochs=2, batch=2, micro_batch=1, lr=1e-3, scale_lr=1e-2"
PRUNE, ROUND = "prune.magnitude(sparsity=0.5)", "quantize.rtn(scheme=w3a16g32, ragged=divide)"


def notes(manifest: Manifest, what: str) -> dict[str, list[str]]:
    """The names of a counted line by its reason."""
    found: dict[str, list[str]] = {}
    for note in manifest.notes:
        if note.what == what:
            found.setdefault(note.reason, []).extend(note.names)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral", "gpt2", "t5", "gpt_oss"])
def test_every_block_has_less_loss_and_its_zeros(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Also where experts are fused on load, and where a decoder reads what an encoder has made."""
    result = do(source(name), tmp_path / "out", f"{CALIBRATE} | {PRUNE} | {HEAL})")
    losses, before, after = (
        rows(tmp_path / "out"),
        tensors(step_of(tmp_path / "out", "prune.magnitude")),
        tensors(tmp_path / "out"),
    )
    assert [row["step"] for row in losses] == list(range(1, len(losses) + 1))
    assert len(losses) == (4 if name == "t5" else 2)
    assert all(row["loss"] < row["start"] for row in losses), losses
    (trained,) = ({*names} for reason, names in notes(result.manifest, "trained").items() if "zeros" in reason)
    moved = 0
    for key, old in before.items():
        if key in trained:
            assert torch.equal(after[key][old == 0], torch.zeros_like(old[old == 0])), key
            moved += not torch.equal(after[key], old)
            assert result.manifest.weights[key].error is None
    assert moved == len(trained), "weights that no gradient has moved"


def test_what_lies_outside_of_blocks_is_left_and_counted(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{CALIBRATE} | {PRUNE} | {HEAL})")
    before, after = tensors(tiny), tensors(tmp_path / "out")
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {name for names in notes(result.manifest, "untouched").values() for name in names} == outside
    assert all(torch.equal(before[name], after[name]) for name in outside)


@pytest.mark.parametrize("before", [ROUND, "quantize.rtn(scheme=w3a16g32-asym, ragged=divide)", "quantize.rtn(scheme=fp8-afp8)"])
def test_codes_do_not_change_and_scales_do(before: str, tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{CALIBRATE} | {before} | {HEAL}, keep=last)")
    old, new = tensors(step_of(tmp_path / "out", "quantize.rtn")), tensors(tmp_path / "out")
    codes = [name for name in old if name.endswith((".codes", ".zero"))]
    assert codes
    assert all(torch.equal(old[name], new[name]) for name in codes)
    scales = [name for name in old if name.endswith(".scale")]
    assert all(not torch.equal(old[name].float(), new[name].float()) for name in scales)


def test_low_rank_factors_are_trained_beside_scales(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{CALIBRATE} | {ROUND} | quantize.lorc(rank=4, factors=bf16) | {HEAL}, keep=last)")
    old, new = tensors(step_of(tmp_path / "out", "quantize.lorc")), tensors(tmp_path / "out")
    factors = [name for name in old if name.endswith((".left", ".right"))]
    assert factors
    assert all(not torch.equal(old[name], new[name]) for name in factors)


def test_scales_bound_to_powers_of_two_are_counted_and_left(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{CALIBRATE} | quantize.rtn(scheme=mxfp4) | {HEAL})")
    (left,) = notes(result.manifest, "untrained").values()
    assert len(left) == 14
    old, new = tensors(step_of(tmp_path / "out", "quantize.rtn")), tensors(tmp_path / "out")
    moved = {name for name in old if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))}
    assert moved == {name for name in old if "layernorm" in name}
    with pytest.raises(CoverageError, match="binds scales to powers of two"):
        do(tiny, tmp_path / "no", f"{CALIBRATE} | quantize.rtn(scheme=mxfp4) | {HEAL}, targets=[attention])")


@pytest.mark.parametrize("before", [PRUNE, ROUND, "quantize.rtn(scheme=fp8)", "quantize.rtn(scheme=nvfp4)"])
def test_without_a_step_every_byte_is_what_it_was(before: str, tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{CALIBRATE} | {before} | distill.blocks(epochs=0)")
    step = step_of(tmp_path / "out", before.partition("(")[0])
    old, new = tree(step), tree(tmp_path / "out")
    assert {n: b for n, b in old.items() if n.endswith("safetensors")} == {
        n: b for n, b in new.items() if n.endswith("safetensors")
    }
    assert notes(result.manifest, "unimproved")
    earlier = Manifest.read(step)
    assert earlier is not None
    assert {n: r.error for n, r in result.manifest.weights.items()} == {n: r.error for n, r in earlier.weights.items()}


def test_a_block_that_got_worse_only_is_left_as_it_was(tiny: Path, tmp_path: Path) -> None:
    """The iterates are worse than the start at this rate; `keep=last` shows that."""
    wild = f"{CALIBRATE} | {PRUNE} | distill.blocks(epochs=2, batch=4, lr=0.3, warmup=0, schedule=constant"
    result = do(tiny, tmp_path / "best", f"{wild})")
    do(tiny, tmp_path / "last", f"{wild}, keep=last)")
    assert all(row["loss"] == row["start"] for row in rows(tmp_path / "best"))
    assert all(row["loss"] > row["start"] for row in rows(tmp_path / "last"))
    old, new = tensors(step_of(tmp_path / "best", "prune.magnitude")), tensors(tmp_path / "best")
    assert all(torch.equal(old[name], new[name]) for name in old)
    (left,) = notes(result.manifest, "unimproved").values()
    assert len(left) == 18


def test_targets_of_the_same_inputs(tiny: Path, tmp_path: Path) -> None:
    """The first block has the same inputs either way; the second is further from the dense stream than from its own twin."""
    for target in ("dense", "local"):
        do(tiny, tmp_path / target, f"{CALIBRATE} | {PRUNE} | {HEAL}, target={target})")
    dense, local = rows(tmp_path / "dense"), rows(tmp_path / "local")
    assert dense[0] == local[0]
    assert local[1]["start"] < dense[1]["start"]
    assert local[1]["loss"] < local[1]["start"]


def test_squared_errors_are_another_loss(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{CALIBRATE} | {PRUNE} | {HEAL}, error=squared, held_out=0)")
    assert all(row["loss"] < row["start"] for row in rows(tmp_path / "out"))


# Gradients.


def oracle(student: Path, dense: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients, by autograd over the whole model, of each block's own loss, by name."""
    found: dict[str, torch.Tensor] = {}
    outputs: list[list[torch.Tensor]] = []
    models = [load(folder, dtype=torch.float32) for folder in (student, dense)]
    for model in models:
        outputs.append([])
        for layer in model.model.layers:
            # Inputs are cut off, so that each loss reaches its own block only.
            layer.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
            layer.register_forward_hook(lambda _, __, out, kept=outputs[-1]: kept.append(out))
        model(input_ids=ids)
    for number, (output, target) in enumerate(zip(*outputs, strict=True)):
        loss = ((output - target.detach()).square().sum(-1) / target.detach().square().sum(-1)).mean()
        layer = models[0].model.layers[number]
        grads = torch.autograd.grad(loss, list(layer.parameters()))
        named = zip((name for name, _ in layer.named_parameters()), grads, strict=True)
        found |= {f"model.layers.{number}.{name}": grad for name, grad in named}
    return found


@pytest.mark.parametrize("micro", [1, 4])
def test_gradients_are_those_of_autograd(micro: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all tokens, however they are divided; a rate of 0 leaves each block, so that the next one's inputs are the oracle's."""
    found: dict[str, torch.Tensor] = {}
    real = BlockTrainer.one_step

    def kept(self: BlockTrainer, *args: Any) -> int:
        tokens = real(self, *args)
        found.update({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})
        return tokens

    monkeypatch.setattr(BlockTrainer, "one_step", kept)
    recipe = f"{CALIBRATE} | {PRUNE} | distill.blocks(epochs=1, batch=12, micro_batch={micro}, lr=0, clip=0, held_out=0)"
    do(tiny, tmp_path / "out", recipe)
    ids = load_file(tmp_path / "out/calibration.safetensors")["input_ids"].long()
    step = step_of(tmp_path / "out", "prune.magnitude")
    masks, expected = tensors(step), oracle(step, tiny, ids)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad.dim() > 1:
            grad = grad * (masks[name] != 0)
        torch.testing.assert_close(found[name], grad, rtol=2e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_padding_counts_in_no_loss(tiny: Path, tmp_path: Path) -> None:
    """What stands in its place changes nothing."""
    ids = load_file(ready_inputs(12))["input_ids"]
    mask = (torch.arange(24) < torch.tensor([20, 24, 9, 24, 5, 17, 24, 3, 11, 24, 24, 2])[:, None]).to(torch.uint8)
    for name, filler in (("a", 3), ("b", 77)):
        save_file({"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}, tmp_path / f"{name}.safetensors")
        calibrate = f"calibrate(data='{tmp_path / name}.safetensors', samples=12)"
        do(tiny, tmp_path / name, f"{calibrate} | {PRUNE} | distill.blocks(epochs=3, batch=12, micro_batch=1, held_out=0)")
    for one, other in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["tokens"] == other["tokens"]


# Experts.


def test_experts_without_a_token_are_counted_and_left(source: Callable[[str], Path], tmp_path: Path) -> None:
    """Texts of one token only: attention hands it on unchanged, and two of four experts get all of it."""
    save_file({"input_ids": torch.full((12, 24), 7)}, tmp_path / "same.safetensors")
    calibrate = f"calibrate(data='{tmp_path / 'same.safetensors'}', samples=12)"
    result = do(source("mixtral"), tmp_path / "out", f"{calibrate} | {PRUNE} | {HEAL})")
    (left,) = notes(result.manifest, "untrained").values()
    assert len(left) == 2 * 2 * 3, "two experts of each of two blocks, of three matrices each"
    old, new = tensors(step_of(tmp_path / "out", "prune.magnitude")), tensors(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in left)
    fused = do(source("gpt_oss"), tmp_path / "fused", f"{calibrate} | {PRUNE} | {HEAL})")
    assert all(reason.startswith("2 of 4 experts: ") for reason in notes(fused.manifest, "untrained"))


# Crashes, memory, processes.


@pytest.mark.parametrize("at", [1, 5, 14, 18])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    at: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any record of a weight; a finished block is not trained again."""
    recipe = f"{CALIBRATE} | {PRUNE} | {HEAL})"
    do(tiny, tmp_path / "whole", recipe)
    trained, train = [], BlockTraining.train

    def counted(self: BlockTraining, block: Any, weights: Any) -> Any:
        trained.append(block.index)
        return train(self, block, weights)

    stop_at_record(monkeypatch, "distill", at + 3)
    monkeypatch.setattr(BlockTraining, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        do(tiny, tmp_path / "out", recipe)
    do(tiny, tmp_path / "out", recipe)
    assert trained == ([0, 0, 1] if at <= 9 else [0, 1, 1])[: len(trained)]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_states_beyond_the_budget_go_to_files_and_come_back(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are the same; three streams have their files while the run lasts, and leave none."""
    recipe = f"{CALIBRATE} | {PRUNE} | {HEAL})"
    do(tiny, tmp_path / "roomy", recipe)
    monkeypatch.setattr("compress.executors.blocks.BETWEEN_BYTES", 0)
    monkeypatch.setattr(hidden_state_offload, "_SMALLEST", 1)
    written = set()
    real = hidden_state_offload.HiddenStateOffload._write

    def seen(self: Any, owner: object, nbytes: int, parts: Any) -> None:
        written.add(owner)
        real(self, owner, nbytes, parts)

    monkeypatch.setattr(hidden_state_offload.HiddenStateOffload, "_write", seen)
    do(tiny, tmp_path / "tight", recipe)
    assert len(written) == 3 * 12
    assert not list(output_paths.steps_folder(tmp_path / "tight").rglob(".compress-states*"))
    assert tree(tmp_path / "tight") == tree(tmp_path / "roomy")


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", dtype="float32")
    recipe = f"{CALIBRATE} | {PRUNE} | {HEAL})"
    for ranks in (1, 2):
        done = compress("run", model, tmp_path / str(ranks), "-p", recipe, "--dtype", "float32", "--threads", 1, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    before, after = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    apart = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert apart < 2e-4, "far less than the rate at which they were trained"


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
@pytest.mark.parametrize("before", ["prune.magnitude(sparsity=2:4)", "quantize.rtn(scheme=w4a16g128)"])
def test_peak_memory_is_planned(before: str, tmp_path: Path) -> None:
    """Of a process of its own, whose blocks are larger than the interpreter's libraries are."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 2000}
    model = tiny_llama(tmp_path / "model", **sizes)
    data = ready_inputs.__wrapped__(8, 64, 2000)
    recipe = f"calibrate(data='{data}', samples=8) | {before} | distill.blocks(epochs=2, batch=4, micro_batch=2)"
    command = [sys.executable, "-c", MEASURE, model, tmp_path / "out", recipe]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["planned"] <= 3 * found["peak"]


# The order of micro-batches.


def test_what_is_held_out_and_the_order_of_the_rest() -> None:
    assert divided(10, range(10), 0.2) == Micros([0, 1, 2, 3, 5, 6, 7, 8], [4, 9], range(10))
    assert divided(3, range(3), 0.1) == Micros([0, 1, 2], [0, 1, 2], range(3)), "too few to hold one out"
    assert divided(4, range(4), 0.0).compared == [0, 1, 2, 3]
    steps = steps_of(list(range(10)), 4, "key")
    assert sorted(number for step in steps for number in step) == list(range(10))
    assert [len(step) for step in steps] == [4, 4, 2]
    ranges = [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert all(sum(number in part for number in step) <= 1 for step in steps for part in ranges)
    assert steps == steps_of(list(range(10)), 4, "key") != steps_of(list(range(10)), 4, "another")


# The command line, and bad input.


def typed(*arguments: Any) -> int:
    """A command line in this process; its exit status."""
    filled = [str(argument) for argument in arguments]
    try:
        command_line(filled)(filled, standalone_mode=False)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_as_a_user_types_it(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    do(tiny, tmp_path / "pruned", f"{CALIBRATE} | {PRUNE}")
    options = ["--teacher", tiny, "--epochs", 1, "--batch", 4, "--micro-batch", 2, "--target", "local"]
    assert typed("distill", "blocks", tmp_path / "pruned", tmp_path / "healed", *options) == 0
    manifest = Manifest.read(tmp_path / "healed")
    assert manifest is not None
    assert manifest.lineage[-1].text.startswith("distill.blocks(teacher=")
    assert str(tiny.parent) not in (tmp_path / "healed/manifest.json").read_text()
    capsys.readouterr()
    assert typed("plan", tmp_path / "pruned", "-p", f"distill.blocks(teacher='{tiny}')") == 0
    assert "distill.blocks" in capsys.readouterr().out


def test_of_a_changed_model_the_twin_must_be_named(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "pruned", f"{CALIBRATE} | {PRUNE}")
    with pytest.raises(InputError, match=f"set teacher to the directory of {tiny.name}"):
        do(tmp_path / "pruned", tmp_path / "out", f"{HEAL})")


@pytest.mark.parametrize("sizes", [{"intermediate_size": 128}, {"num_hidden_layers": 1}], ids=["wider", "fewer blocks"])
def test_a_twin_of_other_shapes_is_refused_before_anything_is_written(sizes: dict[str, int], tiny: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", **sizes)
    with pytest.raises(InputError, match="the dense twin's") as error:
        do(tiny, tmp_path / "out", f"{CALIBRATE} | {PRUNE} | {HEAL}, teacher='{other}')")
    assert "distill.logits" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.steps").exists()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("distill.blocks", "calibrate | distill.blocks"),
        ("calibrate | distill.blocks(micro_batch=8, batch=4)", "micro_batch=8 is more than batch=4"),
        ("calibrate | distill.blocks(lr=nan)", "a finite number"),
        ("calibrate | distill.blocks(held_out=0.9)", "less than or equal to 0.5"),
        ("calibrate | distill.blocks(betas=[0.9, 1.0])", "from 0 to below 1"),
        ("calibrate | distill.blocks(target=teacher)", "'dense' or 'local'"),
        ("calibrate | distill.blocks(targets=[head, embeddings])", "outside of the text model's blocks"),
        ("calibrate | distill.blocks(teacher=./nowhere)", "nowhere"),
    ],
)
def test_bad_input_is_refused(recipe: str, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError) as error:
        do(tiny, tmp_path / "out", recipe.replace("calibrate |", f"{CALIBRATE} |"))
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.steps").exists()


def test_a_loss_that_is_no_number_stops_the_block(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.layers\.0, .*finite|model\.layers\.0, step") as error:
        do(tiny, tmp_path / "out", f"{CALIBRATE} | {PRUNE} | distill.blocks(lr=1e30, warmup=0, batch=4)")
    assert "lower lr" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_family_whose_blocks_share_a_cache_is_refused(tmp_path: Path) -> None:
    """Gemma 4's later blocks read keys and values of earlier ones, which no output of a block has."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "num_kv_shared_layers": 2,
        "layer_types": ["full_attention"] * 4, "max_position_embeddings": 64, "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 0, "pad_token_id": 0,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gemma4_text", **sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(CoverageError, match=r"layers\.\d.*\n.*hands on what it returns.*\n.*Dict"):
        do(tmp_path / "model", tmp_path / "out", f"{CALIBRATE} | {PRUNE} | {HEAL})")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_kept_are_not_rounded_on_the_way_to_the_next_block(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    real = InputRounding.__call__

    def rounded(self: InputRounding, x: Any) -> Any:
        seen.add(0 if self.columns is None else len(self.columns))
        return real(self, x)

    do(tiny, tmp_path / "codes", f"{CALIBRATE} | quantize.quik(outliers=16, down=w4a4)")
    monkeypatch.setattr(InputRounding, "__call__", rounded)
    do(tmp_path / "codes", tmp_path / "out", f"distill.blocks(teacher='{tiny}', epochs=1)")
    assert seen == {16}
