"""Output Grams: plain autograd's products of gradients by outputs, and what GPTQ makes of them; a crash costs no second sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import CompressError
from compress.executors import output_grams
from compress.executors.backward_batch import drawn
from compress.executors.output_grams import OutputSweep
from compress.executors.sweep import Sweep
from compress.layerwise.batches import Batch, cut
from compress.layerwise.dense_view import DenseView
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.model import build
from compress.spec.weight_state import Weight
from families import inputs_for
from support import SHARED, do, load, ready_inputs, run, tiny_llama

CALIBRATE = f"calibrate(data='{ready_inputs(12)}', samples=12)"
BOTH = "quantize.gptq(scheme=w3a16g32, ragged=divide, feedback=both)"


def labels(p: torch.Tensor, seed: int) -> torch.Tensor:
    """One for each row of probabilities: how many sums of them a random number reaches."""
    sums, chances = p.cumsum(1), torch.rand(len(p), 1, generator=torch.Generator().manual_seed(seed))
    return (sums <= chances * sums[:, -1:]).sum(1)


def by_autograd(source: Path, batches: list[Batch], weights: list[Weight]) -> dict[str, torch.Tensor]:
    """The whole model at once, with the labels that the sweep draws."""
    model, total = load(source, dtype=torch.float32), sum(int(batch.scored.sum()) for batch in batches)
    found = {weight.name: torch.zeros(weight.out_features, weight.out_features, dtype=torch.float64) for weight in weights}
    tokens = dict.fromkeys(found, 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            def add(gradient: torch.Tensor) -> None:
                g = gradient.flatten(0, -2).double()
                found[name] += g.T @ g
                tokens[name] += len(g)

            output.register_hook(add)

        return hook

    for weight in weights:
        model.get_submodule(weight.module).register_forward_hook(watch(weight.name))
    for number, batch in enumerate(batches):
        logits = model(**batch.inputs).logits[batch.scored]
        drawn = labels(logits.float().softmax(-1), number)
        (torch.nn.functional.cross_entropy(logits, drawn, reduction="sum") / total).backward()
    return {name: sums / tokens[name] for name, sums in found.items()}


def test_labels_come_as_often_as_they_are_probable() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0]).expand(40_000, 6)
    found = drawn(p, torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(found.bincount(minlength=6) / 40_000, p[0], atol=0.01)
    assert drawn(p[:2], torch.tensor([[0.0], [1 - 2**-24]])).tolist() == [1, 4]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3", "mixtral", "falcon"])
def test_grams_are_those_of_plain_autograd(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = source(name)
    meta_model = MetaModel(DenseView(open_checkpoint(folder)), torch.float32)
    tensors = load_file(inputs_for(name, tmp_path))
    batches = [
        b
        for at in range(0, 4, 2)
        for b in cut({k: t[at : at + 2] for k, t in tensors.items()}, meta_model.module, 0, 1, torch.float32)
    ]
    weights = [
        w
        for w in meta_model.model.weights
        if w.kind == "linear" and w.experts is None and w.block is not None and not w.unlearned
    ]
    found: dict[str, torch.Tensor] = {}
    OutputSweep(meta_model, weights, tmp_path / "scratch", Context()).run(
        batches, lambda w, grams: found.update({w.name: grams[0].clone()})
    )
    wanted = by_autograd(folder, batches, weights)
    assert found.keys() == wanted.keys()
    for key, mean in wanted.items():
        assert float((found[key].double() - mean).norm()) <= 1e-4 * float(mean.norm()), key
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_it_gains_on_a_trained_model(tmp_path: Path) -> None:
    """Less KL on another text than the one that was calibrated on; so few tokens want more damping than 0.1."""
    model = SHARED / "models" / "tiny-llama-3m"
    if not model.is_dir():
        pytest.skip("no trained models beside this checkout")
    calibrate, kls = f"calibrate(data=['{SHARED / 'data' / 'wiki.train.jsonl'}'], samples=32, length=256)", []
    for feedback in ("inputs", "both, output_damping=0.3"):
        out = tmp_path / feedback[:4]
        run(model, out, f"{calibrate} | quantize.gptq(scheme=w3a16g32, correct=residual, feedback={feedback})")
        kls.append(kl(model, out))
    assert kls[1] < 0.9 * kls[0]


def kl(model: Path, out: Path) -> float:
    """KL of the model's predictions and those of its codes, on texts that were not calibrated on."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (SHARED / "data" / "speech.valid.jsonl").read_text().splitlines()[:40]
    ids = torch.tensor(tokenizer("\n".join(json.loads(line)["text"] for line in lines))["input_ids"][:2048]).view(8, 256)
    with torch.no_grad():
        p, q = (build(open_checkpoint(path))(input_ids=ids).logits.double().log_softmax(-1) for path in (model, out))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("at", [5, 14], ids=["within", "after the last weight"])
def test_a_crash_after_it_costs_no_second_sweep(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(tmp_path / "model")
    do(source, tmp_path / "whole", f"{CALIBRATE} | {BOTH}")
    sweeps: list[int] = []
    plain = OutputSweep.run

    def counted(self: OutputSweep, *arguments: Any) -> float:
        sweeps.append(1)
        return plain(self, *arguments)

    monkeypatch.setattr(OutputSweep, "run", counted)
    keep, kept = Sweep.keep, []

    def dies(self: Sweep, *arguments: Any) -> torch.Tensor:
        kept.append(keep(self, *arguments))
        if len(kept) == at:
            raise KeyboardInterrupt
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "keep", dies)
        with pytest.raises(KeyboardInterrupt):
            do(source, tmp_path / "out", f"{CALIBRATE} | {BOTH}")
    do(source, tmp_path / "out", f"{CALIBRATE} | {BOTH}")
    assert len(sweeps) == 1
    whole, again = tmp_path / "whole", tmp_path / "out"
    assert {file.name for file in again.iterdir()} == {file.name for file in whole.iterdir()}
    assert not list(again.rglob(output_grams.FOLDER))
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("scheme=fp8-tensor, feedback=both", "scales that rows share"),
        ("scheme=w4a16g32, feedback=both, sparsity=2:4", "not both with sparsity"),
        ("scheme=w4a16g32, feedback=both, outliers=0.01", "not both with sparsity or outliers"),
        ("scheme=w4a16g32, output_damping=0.1", "only with feedback=both"),
    ],
)
def test_what_cannot_be_rounded_in_turn_is_refused(options: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=said):
        do(tiny_llama(tmp_path / "model"), tmp_path / "out", f"{CALIBRATE} | quantize.gptq({options})")
