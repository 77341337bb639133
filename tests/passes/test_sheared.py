"""prune.sheared: exactly the wanted sizes, the masked model as it was in the end, and what its parts do."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.architecture.sizes import sizes_of
from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.contract.objective import Models
from compress.errors import CompressError
from compress.executors.train import loop
from compress.executors.train.mask_objective import MaskObjective, MaskOptions
from compress.layerwise.model import build as build_model
from support import load, logits, ready_inputs, rows, run, tiny_llama

CALIBRATE = f"calibrate(data='{ready_inputs()}', samples=6)"
TRAIN = "batch=2, micro_batch=1, epochs=4, lr=1e-3"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=4, dtype="float32")


def test_the_output_is_the_masked_model(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    old = loop.Training.write_smaller

    def write_smaller(self: Any, run: Any) -> None:
        kept, masks = self.objective.settled()
        ended.append((kept, masks, {name: parameter.detach().clone() for name, parameter in self.parameters.items()}))
        old(self, run)

    monkeypatch.setattr(loop.Training, "write_smaller", write_smaller)
    result = run(deep, tmp_path / "out", f"{CALIBRATE} | prune.sheared(layers=3, hidden=48, ffn=64, kv_heads=1, {TRAIN})")
    kept, masks, parameters = ended[0]
    assert result.manifest.kept == kept
    smaller = load(tmp_path / "out")
    config = smaller.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, config.intermediate_size) == (3, 48, 1, 64)
    assert config.num_attention_heads == 2
    # The larger model with the trained weights, under the masks of what is kept and zeros elsewhere.
    source = open_checkpoint(deep)
    model, sizes = build_model(source), sizes_of(source)
    found = resolve(source)
    with torch.no_grad():
        for weight in found.weights:
            model.get_parameter(f"{weight.module}.{weight.attribute}").copy_(parameters[weight.name])
    from compress.layerwise.masked_model import MaskedModel, Masks

    def zeroed(z: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
        return torch.where(torch.isin(torch.arange(len(z)), torch.tensor(numbers)), z, 0)

    groups, units = torch.zeros(4, 2), torch.zeros(4, 96)
    for layer, block in zip(kept.layers, kept.blocks, strict=True):
        groups[layer] = zeroed(masks.groups[layer], block.groups)
        units[layer] = zeroed(masks.units[layer], block.units["mlp"])
    hooked = MaskedModel(model, found.weights, found.family, sizes, frozenset(("groups",)))
    hooked.masks = Masks(zeroed(masks.layers, kept.layers), zeroed(masks.hidden, kept.hidden), groups, units)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-4)


def test_constraints_are_recorded_and_approach_their_targets(deep: Path, tmp_path: Path) -> None:
    run(deep, tmp_path / "out", f"{CALIBRATE} | prune.sheared(ffn=48, batch=2, micro_batch=2, epochs=40, lr=1e-3)")
    record = rows(tmp_path / "out")
    assert record[0]["wanted"] == 0
    assert record[-1]["wanted"] == 1
    assert abs(record[-1]["closed.units"] - 0.5) < 0.2
    assert "closed.layers" not in record[0], "all layers are kept, so none has a mask"


def objective(source: Path, **changes: int) -> MaskObjective:
    from dataclasses import replace

    from compress.contract.training_options import TrainingOptions

    checkpoint = open_checkpoint(source)
    before = sizes_of(checkpoint)
    models = Models(build_model(checkpoint), None, checkpoint, None, TrainingOptions(), 0)
    return MaskObjective(models, before, replace(before, **changes), MaskOptions(1.0, 1.0, 0.2))


def test_phi_never_falls_and_masks_stay_within_bounds(tiny: Path) -> None:
    made = objective(tiny, units=48)
    own = made.own()
    optimizers = [
        torch.optim.AdamW(list(group.parameters.values()), lr=1.0, maximize=group.maximize, weight_decay=0.0) for group in own
    ]
    phi = [0.0]
    for step in range(30):
        made.begin_step(step, 30)
        for optimizer in optimizers:
            optimizer.zero_grad()
        made.penalty().backward()
        for optimizer in optimizers:
            optimizer.step()
        phi.append(float(made.multipliers["units"][1].detach()))
    assert all(b >= a for a, b in pairwise(phi)), phi
    made.begin_step(30, 30)
    assert float(made.log_a["units"].detach().max()) <= torch.log(torch.tensor(100.0)) + 1e-6
    made.close()


def test_every_micro_batch_of_a_step_has_the_same_masks(tiny: Path) -> None:
    made = objective(tiny, hidden=48, layers=1)
    made.begin_step(3, 10)
    first = {name: u.clone() for name, u in made.u.items()}
    made.begin_step(4, 10)
    assert not torch.equal(first["hidden"], made.u["hidden"])
    made.begin_step(3, 10)
    assert all(torch.equal(u, made.u[name]) for name, u in first.items())
    made.close()


def test_experts_and_tied_embeddings(tmp_path: Path) -> None:
    from families import build

    run(build("mixtral", tmp_path), tmp_path / "moe", f"{CALIBRATE} | prune.sheared(experts=2, layers=1, {TRAIN})")
    assert load(tmp_path / "moe").config.num_local_experts == 2
    run(build("tied", tmp_path), tmp_path / "small", f"{CALIBRATE} | prune.sheared(parameters=40K, multiple=16, {TRAIN})")
    model = load(tmp_path / "small")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 40_000
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("layers=2, ffn=96", "a target as large as the model"),
        ("layers=3", "layers of 3, and the model has 2"),
        ("heads=2", "give kv_heads"),
        ("shape=sheared-1.3b", "the model has"),
        ("", "give sizes"),
        ("ffn=8, parameters=1M", "give sizes"),
        ("expert_ffn=8, ffn=8", "no mask is learned"),
    ],
)
def test_impossible_targets_are_refused_before_bytes_move(options: str, message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError) as error:
        run(tiny, tmp_path / "out", f"{CALIBRATE} | prune.sheared({options})")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
