"""distill.squarehead and distill.features in runs: what they compare, what they hold, what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build as command
from compress.contract import feature_maps
from compress.contract.feature_maps import Maps, maps_of
from compress.contract.objective import Models
from compress.contract.tasks import TrainingBatch
from compress.errors import CompressError, InputError
from compress.pipeline.resolve import resolve
from compress.spec.recipe import Recipe, parse_one_liner
from families import build
from support import do, load, ready_inputs, rows, step_of, tiny_llama

PRUNE = "prune.magnitude(sparsity=2:4)"
STEP = f"data='{ready_inputs()}', samples=6, batch=6, micro_batch=6"
"""One step over everything; more options and a bracket follow."""
STEPS = f"data='{ready_inputs()}', samples=6, batch=2, micro_batch=2, epochs=2"
"""Six steps."""


def states(folder: Path, layers: list[int]) -> list[torch.Tensor]:
    """Outputs of layers by transformers itself, of every scored token: all but each sample's last."""
    ids = load_file(ready_inputs())["input_ids"].long()
    with torch.no_grad():
        found = load(folder, dtype=torch.float32)(input_ids=ids, output_hidden_states=True).hidden_states
    return [found[layer + 1][:, :-1].flatten(0, 1) for layer in layers]


def ratio(student: torch.Tensor, teacher: torch.Tensor, eps: float) -> float:
    """SquareHead's term of a layer, as the paper has it."""
    return float((student - teacher).square().mean() / (teacher.square().mean() + eps))


# What is compared.


@pytest.mark.parametrize(("eps", "value"), [("parity", 1e-8), ("paper", 0.0078125), ("0.5", 0.5)])
def test_the_terms_are_those_of_the_paper(eps: str, value: float, tiny: Path, tmp_path: Path) -> None:
    """Of a step that is one batch: each layer a ratio of means over all tokens and channels, the last after the final norm."""
    do(tiny, tmp_path / "out", f"{PRUNE} | distill.squarehead({STEP}, eps={eps}, ce=0.5, squarehead=2)")
    (row,) = rows(tmp_path / "out")
    pruned = states(step_of(tmp_path / "out", "prune.magnitude"), [0, 1])
    expected = [ratio(s, t, value) for s, t in zip(pruned, states(tiny, [0, 1]), strict=True)]
    assert row["squarehead_layers"] == pytest.approx(expected, rel=1e-4)
    assert row["squarehead"] == pytest.approx(sum(expected), rel=1e-4)
    assert row["loss"] == pytest.approx(2 * row["squarehead"] + row["kl"] + 0.5 * row["ce"], rel=1e-5)


def test_chosen_layers_are_compared(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "all", f"{PRUNE} | distill.squarehead({STEP})")
    do(tiny, tmp_path / "last", f"{PRUNE} | distill.squarehead({STEP}, layers=-1)")
    do(tiny, tmp_path / "first", f"{PRUNE} | distill.squarehead({STEP}, layers=[0])")
    every, last, first = (rows(tmp_path / name)[0]["squarehead_layers"] for name in ("all", "last", "first"))
    assert [*first, *last] == every  # type: ignore[misc]


@pytest.mark.parametrize("name", ["squarehead", "features"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str, tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"distill.{name}({STEP})")
    (row,) = rows(tmp_path / "out")
    assert row[name] == 0
    assert abs(row["loss"]) < 1e-7


def test_a_student_of_zeros_costs_one_for_each_layer(tiny: Path, tmp_path: Path) -> None:
    student = shutil.copytree(tiny, tmp_path / "student")
    tensors = load_file(student / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    do(student, tmp_path / "out", f"distill.squarehead({STEP}, layers=-1, teacher='{tiny}')")
    assert rows(tmp_path / "out")[0]["squarehead"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("name", "pass_"), [("gpt2", "squarehead"), ("mixtral", "squarehead"), ("mamba2", "features")])
def test_families_learn(name: str, pass_: str, tmp_path: Path) -> None:
    """Whatever transformers fuses or splits while it loads, and whatever its blocks put out."""
    recipe = f"prune.magnitude(sparsity=0.5) | distill.{pass_}({STEP}, epochs=6, lr=3e-3, schedule=constant)"
    do(build(name, tmp_path), tmp_path / "out", recipe)
    found = [row[pass_] for row in rows(tmp_path / "out")]
    assert found[-1] < 0.9 * found[0]


# What must not move it.


def batches(folder: Path) -> dict[str, str]:
    """The same texts twice: packed into rows with positions, and one in a row with padding."""
    lengths = [[5, 9, 10], [24], [12, 12], [1, 20, 3]]
    ids = torch.randint(3, 128, (len(lengths), 24), generator=torch.Generator().manual_seed(0))
    texts = [text for row, parts in zip(ids, lengths, strict=True) for text in row.split(parts)]
    padded, mask = torch.full((len(texts), 30), 7), torch.zeros(len(texts), 30, dtype=torch.uint8)
    for row, text in enumerate(texts):
        padded[row, : len(text)], mask[row, : len(text)] = text, 1
    places = torch.stack([torch.cat([torch.arange(length) for length in parts]) for parts in lengths])
    save_file({"input_ids": ids, "position_ids": places}, folder / "packed.safetensors")
    save_file({"input_ids": padded, "attention_mask": mask}, folder / "padded.safetensors")
    return {
        "packed": f"data='{folder}/packed.safetensors', samples={len(lengths)}",
        "padded": f"data='{folder}/padded.safetensors', samples={len(texts)}",
    }


@pytest.mark.parametrize("recipe", ["distill.squarehead({}, density=0.1, ce=0.3", "distill.features({}"])
def test_neither_padding_nor_packing_nor_micro_batches_move_it(recipe: str, tiny: Path, tmp_path: Path) -> None:
    """A token's loss does not depend on what is beside it, so a step's is the same however its tokens are laid out."""
    found = {}
    for name, data in batches(tmp_path).items():
        for size in (1, 3):
            do(tiny, tmp_path / f"{name}{size}", f"{PRUNE} | {recipe.format(data)}, batch=16, micro_batch={size})")
            (found[name, size],) = rows(tmp_path / f"{name}{size}")
    first = found.pop(("packed", 1))
    for name, other in found.items():
        assert first.keys() == other.keys()
        for key in first:
            assert first[key] == pytest.approx(other[key], rel=1e-4 if key == "norm" else 1e-5), (name, key)


def test_recomputed_blocks_change_nothing(tiny: Path, tmp_path: Path) -> None:
    for recompute in ("false", "true"):
        recipe = f"{PRUNE} | distill.squarehead({STEPS}, density=0.1, recompute={recompute}, lr=1e-3)"
        do(tiny, tmp_path / recompute, recipe)
    one, two = (rows(tmp_path / recompute) for recompute in ("false", "true"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)


def test_zeros_stay_and_weights_move(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{PRUNE} | distill.squarehead({STEPS}, lr=1e-2, weight_decay=0.1)")
    assert {record.state for record in result.manifest.weights.values()} == {"masked(2:4)"}
    before = load_file(step_of(tmp_path / "out", "prune.magnitude") / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys(), "maps and multipliers are no weights"
    for name in result.manifest.weights:
        assert bool((after[name][before[name] == 0] == 0).all())
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("name", ["squarehead", "features"])
def test_the_teacher_gets_no_gradient(name: str, tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    student, teacher = load(tiny, dtype=torch.float32), load(tiny, dtype=torch.float32)
    pass_: Any = resolve(parse_one_liner(f"distill.{name}({STEP}, ce=1{', density=1' if name == 'squarehead' else ''})"))[0]
    objective = pass_.objective(Models(student, teacher, checkpoint, checkpoint, pass_.training_options(), 0))
    ids = load_file(ready_inputs())["input_ids"].long()
    batch = TrainingBatch({"input_ids": ids}, torch.arange(ids.numel() - 1), ids.flatten()[1:])
    objective.prepare([batch], lambda tensor: None)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    loss = objective.loss(batch, student, teacher)
    loss.value.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert float(loss.value.detach()) > 0
    objective.close()
    assert not [module for module in student.modules() if module._forward_pre_hooks]


def test_sparser_activations_are_learned(tiny: Path, tmp_path: Path) -> None:
    """Only inputs near zero have a gradient, so small steps of nearly nothing else."""
    do(tiny, tmp_path / "out", f"distill.squarehead({STEP}, epochs=6, density=1e5, lr=1e-5, schedule=constant)")
    found = [row["density"] for row in rows(tmp_path / "out")]
    assert all(0 < value < 1 for value in found)
    assert found[-1] < found[0] - 0.005


def test_squarehead_alone_trains_what_it_reaches(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{PRUNE} | distill.squarehead({STEPS}, kl=0, lr=1e-2)")
    assert rows(tmp_path / "out")[0].keys() == {"step", "loss", "lr", "norm", "tokens", "squarehead", "squarehead_layers"}
    before = load_file(step_of(tmp_path / "out", "prune.magnitude") / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert {name for name in before if torch.equal(before[name], after[name])} == {"lm_head.weight"}


# Students that were cut.


def manifest(layers: tuple[int, ...] = (), hidden: tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(lineage=(), kept=SimpleNamespace(layers=layers, hidden=hidden))


def test_maps_follow_what_both_lineages_have_kept() -> None:
    assert maps_of(None, None) == maps_of(manifest(), None) == Maps()
    assert maps_of(manifest((0, 2), (1, 5, 9)), None) == Maps((0, 2), (1, 5, 9))
    assert maps_of(manifest((0, 2)), manifest((0, 1, 2))) == Maps((0, 2), ())
    assert maps_of(manifest((2, 5), (8, 9)), manifest((1, 2, 5), (7, 8, 9))) == Maps((1, 2), (1, 2))
    assert maps_of(manifest((2, 5)), manifest((2, 5))) == Maps()
    with pytest.raises(InputError, match="without 3"):
        maps_of(manifest((1, 3)), manifest((1, 2)))
    with pytest.raises(InputError, match="an ancestor of the student"):
        maps_of(None, manifest((1, 2)))


def cut(teacher: Path, out: Path, layers: list[int], channels: list[int]) -> Path:
    """A Llama with some layers and hidden channels of another."""
    config = json.loads((teacher / "config.json").read_text())
    sizes = {"num_hidden_layers": len(layers), "hidden_size": len(channels), "head_dim": 16, "intermediate_size": 96}
    tiny_llama(out, **{**sizes, "vocab_size": config["vocab_size"]})
    wide, made = load_file(teacher / "model.safetensors"), load_file(out / "model.safetensors")
    for name, tensor in made.items():
        source = name
        for number, layer in enumerate(layers):
            if f".layers.{number}." in name:
                source = name.replace(f".layers.{number}.", f".layers.{layer}.")
        value = wide[source]
        for axis, size in enumerate(tensor.shape):
            if size != value.shape[axis]:
                value = value.index_select(axis, torch.tensor(channels))
        made[name] = value.contiguous()
    save_file(made, out / "model.safetensors", {"format": "pt"})
    return out


def test_kept_layers_and_channels_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_llama(tmp_path / "teacher", num_hidden_layers=3)
    layers, channels = [0, 2], [*range(0, 64, 2)]
    student = cut(teacher, tmp_path / "student", layers, channels)
    monkeypatch.setattr(feature_maps, "maps_of", lambda *_: Maps(tuple(layers), tuple(channels)))
    do(student, tmp_path / "out", f"distill.squarehead({STEP}, teacher='{teacher}')")
    (row,) = rows(tmp_path / "out")
    theirs = [state[:, channels] for state in states(teacher, layers)]
    expected = [ratio(s, t, 1e-8) for s, t in zip(states(student, [0, 1]), theirs, strict=True)]
    assert row["squarehead_layers"] == pytest.approx(expected, rel=1e-4)
    assert expected[0] > 0


def test_projections_teach_a_student_of_any_size(tiny: Path, tmp_path: Path) -> None:
    teacher = tiny_llama(tmp_path / "teacher", num_hidden_layers=5, hidden_size=96, head_dim=16)
    do(tiny, tmp_path / "out", f"distill.features({STEP}, epochs=12, teacher='{teacher}', projection_lr=1e-2, intra_class=0.1)")
    found = rows(tmp_path / "out")
    assert found[-1]["features"] < 0.9 * found[0]["features"]
    assert len(found[0]["features_layers"]) == 2  # type: ignore[arg-type]
    assert found[0]["loss"] == pytest.approx(found[0]["kl"] + found[0]["features"] + 0.1 * found[0]["intra_class"], rel=1e-5)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()


# What is refused, before a byte is read.


def test_a_teacher_of_another_size_is_refused_before_anything_is_read(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tiny_llama(tmp_path / "wide", hidden_size=128)
    for words in (["plan", str(tiny), "-p"], ["run", str(tiny), str(tmp_path / "out"), "-p"]):
        arguments = [*words, f"{PRUNE} | distill.squarehead({STEP}, teacher='{wide}')"]
        with pytest.raises(SystemExit) as ended:
            command(arguments)(arguments, standalone_mode=False)
        assert ended.value.code == 3
        said = capsys.readouterr().err
        assert "error: teacher wide\n" in said
        assert "64 hidden channels as the student has, or a student whose manifest tells which it has kept" in said
        assert "128 hidden channels\n" in said
        assert "use distill.features, which learns a map between them" in said
    assert not list(tmp_path.glob("out*"))
    deep = tiny_llama(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(InputError, match="2 layers as the student has"):
        do(tiny, tmp_path / "out", f"{PRUNE} | distill.squarehead({STEP}, teacher='{deep}')")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("layers=2", "layers from 0 to 1, or from -2 to -1"),
        ("layers=[0, -3]", "layers from 0 to 1, or from -2 to -1"),
        ("eps=small", "parity, paper or a number above 0, not 'small'"),
        ("eps=0", "parity, paper or a number above 0, not '0'"),
        ("squarehead=0", "greater than 0"),
        ("temperature=0", "greater than 0"),
        ("density=-1", "greater than or equal to 0"),
    ],
)
def test_options_without_a_meaning_are_refused(options: str, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError) as error:
        do(tiny, tmp_path / "out", f"{PRUNE} | distill.squarehead({STEP}, {options})")
    assert said in str(error.value)
    assert "distill.squarehead" in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_density_needs_a_feed_forward_layer_that_every_token_goes_through(tmp_path: Path) -> None:
    for name in ("mixtral", "mamba2"):
        with pytest.raises(InputError, match=r"distill\.squarehead\.density"):
            do(build(name, tmp_path), tmp_path / "out", f"distill.squarehead({STEP}, density=1)")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("options", ["eps=0.01, layers=[0, -1]", "eps=paper, layers=-1", "density=1, ce=1, kl=0"])
def test_its_text_round_trips(options: str) -> None:
    (pass_,) = resolve(parse_one_liner(f"distill.squarehead({options})"))
    recipe = Recipe((pass_.line(),))
    assert resolve(parse_one_liner(recipe.one_liner())) == [pass_]


def test_the_command_line_takes_layers_from_the_end(tiny: Path, tmp_path: Path) -> None:
    arguments = ["distill", "squarehead", str(tiny), str(tmp_path / "out"), "--layers", "-1", "--layers", "0", "--quiet"]
    arguments += ["--data", str(ready_inputs()), "--samples", "6", "--batch", "6", "--dtype", "float32"]
    command(arguments)(arguments, standalone_mode=False)
    assert len(rows(tmp_path / "out")[0]["squarehead_layers"]) == 2  # type: ignore[arg-type]
