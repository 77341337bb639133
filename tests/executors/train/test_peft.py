"""PEFT on a quantized student: adapters learn beside codes, and travel by PEFT's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.architecture.qlinear import QLinear
from compress.checkpoint.reader import open_checkpoint
from compress.layerwise.model import build
from families import build as build_family
from support import logits, run

peft = pytest.importorskip("peft")
RECIPES = {"canonical": "quantize.rtn(scheme=w4a16g32)", "packed": "quantize.rtn(scheme=w4a16g32) | pack"}
Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build_family(name, folder)


def adapted(artifact: Path, targets: list[str]) -> Any:
    """A model with LoRA whose start is fixed."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(build(open_checkpoint(artifact)), config)


def train(model: Any, steps: int = 8) -> list[float]:
    """Next-token losses on one batch."""
    ids = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    ("name", "form", "targets"),
    [
        ("llama", "canonical", ["q_proj", "v_proj"]),
        ("llama", "packed", ["q_proj", "v_proj"]),
        ("tied", "packed", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", "canonical", ["c_attn"]),
        ("mixtral", "packed", ["q_proj", "v_proj"]),
    ],
)
def test_adapters_learn_beside_codes_and_travel(name: str, form: str, targets: list[str], source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", RECIPES[form])
    plain = build(open_checkpoint(tmp_path / "out"))
    model = adapted(tmp_path / "out", targets)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 2 * len(targets)
    assert all(isinstance(layer.get_base_layer(), QLinear) for layer in layers)
    learning = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert all("lora_" in path for path in learning)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)  # an adapter begins as nothing

    before = {path: value.clone() for path, value in model.state_dict().items()}
    found = train(model)
    assert found[-1] < 0.9 * found[0]
    moved = {path for path, value in model.state_dict().items() if not torch.equal(value, before[path])}
    assert moved == learning

    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(learning)
    again = peft.PeftModel.from_pretrained(build(open_checkpoint(tmp_path / "out")), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.equal(logits(again), logits(plain))


def test_an_adapter_can_be_turned_off(source: Source, tmp_path: Path) -> None:
    """What is below it are the codes, as they were."""
    run(source("llama"), tmp_path / "out", RECIPES["canonical"])
    model = adapted(tmp_path / "out", ["q_proj", "v_proj"])
    train(model, 2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(open_checkpoint(tmp_path / "out"))))
