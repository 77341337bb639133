"""The student: transformers' logits and gradients in every family and state, and the very bytes where nothing was learned."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.architecture.qlinear import QEmbedding, QLinear, with_codes
from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.contract.discover import load_pass
from compress.executors.train.student import Student
from compress.numerics import qtensor
from compress.numerics.grid import round_to_nearest
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import Scheme
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import State, Weight
from families import FAMILIES
from support import dense_meaning, load, logits, run

ENCODER_DECODERS = ("t5", "whisper")
"""Not trained: they have no logits for every token of one text. tests/executors/train/test_train.py sees them refused."""
LANGUAGE = [name for name in FAMILIES if name not in ENCODER_DECODERS]
FUSED = ("olmo_hybrid", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gte")
"""Families with parameters that transformers fuses or splits while it loads."""
CODES = "quantize.rtn(scheme=w4a16g32, targets=[linear, embeddings], ragged=divide)"
RECIPES = {
    "dense": "",
    "masked": "prune.magnitude(sparsity=0.5)",
    "codes": CODES,
    "asymmetric": "quantize.rtn(scheme=w3a16g64-asym, ragged=divide)",
}
Source = Callable[[str], Path]


def trained(checkpoint: Checkpoint) -> list[Weight]:
    """What a training pass trains by default."""
    return load_pass("distill.logits")().chosen(resolve(checkpoint).weights)


def states(checkpoint: Checkpoint) -> dict[str, State]:
    return {name: entry.state for name, entry in checkpoint.logical.items()}


def loss(model: Any) -> torch.Tensor:
    """Cross entropy with fixed random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (2, 12), generator=generator)
    labels = torch.randint(3, 128, (24,), generator=generator)
    return nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), labels)


def plain_gradients(dense: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Autograd's gradient of every tensor on disk, from transformers' model alone.

    Which number of a tensor became which of a parameter is read off a second checkpoint, whose numbers count from one:
    transformers' own loader moves them to where it would move the weights.
    """
    tensors = load_file(dense / "model.safetensors")
    starts, total = {}, 1
    for name, tensor in tensors.items():
        starts[name], total = total, total + tensor.numel()
    assert total < 1 << 24, "fp32 tells them apart"
    numbered = folder / "numbered"
    numbered.mkdir()
    counted = {
        name: torch.arange(starts[name], starts[name] + tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }
    save_file(counted, numbered / "model.safetensors", {"format": "pt"})
    (numbered / "config.json").write_text((dense / "config.json").read_text())
    places = load(numbered, dtype=torch.float32)
    model: Any = load(dense, dtype=torch.float32)
    loss(model).backward()
    flat = torch.zeros(total)
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            # An embedding's row of padding is zeroed by nothing: it is loaded like all others.
            flat[places.get_parameter(path).long().flatten()] = parameter.grad.flatten()
    return {name: flat[starts[name] : starts[name] + tensor.numel()].view(tensor.shape) for name, tensor in tensors.items()}


def of_scales(weight: Weight, q: QTensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of each scale's gain, from that of the stored weight: the rule of the product, group by group."""
    product = qtensor.as_matrix(weight, grad) * QTensor(q.scheme, q.codes, q.scale.float(), q.zero).dequantize()
    group = q.scheme.group or product.shape[-1]
    return torch.stack([part.sum(-1) for part in product.split(group, dim=-1)], -1)


def assert_same_gradient(got: torch.Tensor | None, wanted: torch.Tensor, name: str) -> None:
    """Equal but for the order of sums; a gradient that is not there is zero."""
    got = torch.zeros_like(wanted) if got is None else got
    assert got.shape == wanted.shape, name
    assert float((got - wanted).abs().max()) <= 2e-6 + 2e-5 * float(wanted.abs().max()), name


@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_and_gradients_are_those_of_transformers(name: str, source: Source, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source(name))
    student = Student(checkpoint)
    torch.testing.assert_close(logits(student.module), logits(load(source(name), dtype=torch.float32)), rtol=0, atol=1e-6)
    weights = trained(checkpoint)
    student.learn(weights)
    assert student.trainable.keys() == {weight.name for weight in weights}
    loss(student.module).backward()
    wanted = plain_gradients(source(name), tmp_path)
    assert any("source_" in student.path_of(weight.name) for weight in weights) == (name in FUSED)
    for weight in weights:
        parameter = student.trainable[weight.name]
        assert parameter is student.module.get_parameter(student.path_of(weight.name))
        assert_same_gradient(parameter.grad, wanted[weight.name], weight.name)
        # A router may leave out an expert, and a text sees no picture.
        assert bool(wanted[weight.name].any()) or re.search("expert|vision|multi_modal", weight.name), weight.name


@pytest.mark.parametrize("name", LANGUAGE)
def test_scales_of_codes_get_the_gradient_of_what_they_mean(name: str, source: Source, tmp_path: Path) -> None:
    """Of every family: fused experts, Conv1D, embeddings and the heads that are tied to them in codes."""
    run(source(name), tmp_path / "out", CODES)
    dense_view = dense_meaning(tmp_path / "out", tmp_path / "dense_view")
    checkpoint = open_checkpoint(tmp_path / "out")
    student = Student(checkpoint)
    torch.testing.assert_close(logits(student.module), logits(load(dense_view, dtype=torch.float32)), rtol=0, atol=1e-6)
    weights = trained(checkpoint)
    student.learn(weights)
    loss(student.module).backward()
    wanted, held, coded = plain_gradients(dense_view, tmp_path), states(checkpoint), 0
    for weight in weights:
        parameter = student.trainable[weight.name]
        if held[weight.name].scheme is None:
            assert_same_gradient(parameter.grad, wanted[weight.name], weight.name)
            continue
        parts = {spec.name: checkpoint.read(spec.name) for spec in qtensor.specs(weight, held[weight.name])}
        q = qtensor.decode(weight, held[weight.name], parts)
        assert bool((parameter == 1).all())
        assert_same_gradient(parameter.grad, of_scales(weight, q, wanted[weight.name]), weight.name)
        coded += 1
    assert coded > FAMILIES[name].linears - FAMILIES[name].left, "the linears and the embeddings"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral", "deepseek_v3", "gpt_oss", "olmo_hybrid", "gte"])
def test_an_unchanged_student_gives_back_the_very_bytes(name: str, recipe: str, source: Source, tmp_path: Path) -> None:
    folder = source(name)
    if RECIPES[recipe]:
        folder = run(folder, tmp_path / "out", RECIPES[recipe]).out
    checkpoint = open_checkpoint(folder)
    student = Student(checkpoint)
    weights = trained(checkpoint)
    student.learn(weights)
    found: set[str] = set()
    for weight in weights:
        parts = student.parts(weight, {weight.name: student.trainable[weight.name].detach()})
        assert list(parts) == [spec.name for spec in qtensor.specs(weight, checkpoint.logical[weight.name].state)]
        for part, tensor in parts.items():
            kept = checkpoint.read(part)
            assert (tensor.dtype, tensor.shape) == (kept.dtype, kept.shape), part
            assert torch.equal(tensor.contiguous().view(torch.uint8), kept.contiguous().view(torch.uint8)), part
        found |= parts.keys()
    rest = set(checkpoint.refs) - found
    assert all("correction_bias" in part for part in rest), rest


def test_tied_embeddings_and_head_share_one_gain(source: Source, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(run(source("tied"), tmp_path / "out", CODES).out)
    student = Student(checkpoint)
    student.learn(trained(checkpoint))
    embedding, head = student.module.get_input_embeddings(), student.module.get_output_embeddings()
    assert isinstance(embedding, QEmbedding)
    assert isinstance(head, QLinear)
    assert embedding.gain is head.gain is student.trainable["model.embed_tokens.weight"]
    assert embedding.scale.data_ptr() == head.scale.data_ptr()


def test_what_is_not_to_be_learned_gets_no_gradient(source: Source, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(run(source("mixtral"), tmp_path / "out", "quantize.rtn(scheme=w4a16g32)").out)
    student = Student(checkpoint)
    only = [weight for weight in trained(checkpoint) if weight.kind == "norm"]
    student.learn(only)
    loss(student.module).backward()
    with_gradient = {path for path, parameter in student.module.named_parameters() if parameter.grad is not None}
    assert with_gradient == {student.path_of(weight.name) for weight in only}


def test_masks_are_where_a_pruned_weight_is_not_zero(source: Source, tmp_path: Path) -> None:
    recipe = "prune.magnitude(sparsity=2:4, targets=[attention]) | quantize.rtn(scheme=w4a16g32, targets=['re:.*q_proj.weight'])"
    checkpoint = open_checkpoint(run(source("llama"), tmp_path / "out", recipe).out)
    student = Student(checkpoint)
    student.learn(trained(checkpoint))
    masks, held = student.masks(states(checkpoint)), states(checkpoint)
    assert masks.keys() == {n for n, state in held.items() if state.sparsity is not None and state.scheme is None}
    assert len(masks) == 2 * 3, "codes are frozen: they need no mask"
    for name, mask in masks.items():
        assert held[name] == State(None, Sparsity.parse("2:4"))
        assert torch.equal(mask, checkpoint.read(name) != 0)
        assert int(mask.unflatten(-1, (-1, 4)).sum(-1).max()) == 2


def test_a_minus_zero_is_written_as_zero(source: Source) -> None:
    checkpoint = open_checkpoint(source("llama"))
    student = Student(checkpoint)
    weights = [weight for weight in trained(checkpoint) if weight.kind == "linear"]
    student.learn(weights)
    part = student.parts(weights[0], {weights[0].name: torch.full(weights[0].shape, -0.0)})[weights[0].name]
    assert not torch.signbit(part).any()


SCHEMES = ["w4a16g16", "w3a16g16-asym", "w2a16g24", "w4a16g24-asym", "w8a16", "w8a16-asym", "w4a16g64"]
"""Of 40 columns: g16 and g24 leave a ragged last group, g64 is longer than a row, w8a16 is per channel."""


def codes_of(rows: int, scheme: str, dtype: torch.dtype = torch.float32) -> QTensor:
    w = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(w, Scheme.parse(scheme), dtype)
    return QTensor(Scheme.parse(scheme), found.codes, found.scale, found.zero)


def naive(q: QTensor, gain: torch.Tensor) -> torch.Tensor:
    """w = s g (c - z), column by column."""
    columns, group = q.codes.shape[1], q.scheme.group or q.codes.shape[1]
    found = []
    for column in range(columns):
        at = column // group
        zero = q.scheme.middle if q.zero is None else q.zero[:, at].float()
        found.append(q.scale[:, at].float() * gain[:, at] * (q.codes[:, column].float() - zero))
    return torch.stack(found, 1)


def gain_of(q: QTensor) -> torch.Tensor:
    return (1 + 0.1 * torch.randn(q.scale.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gain_of_a_linear_gets_the_gradient_of_a_naive_expansion(scheme: str) -> None:
    q, x = codes_of(6, scheme), torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    assert q.scale.shape == (6, math.ceil(40 / (q.scheme.group or 40)))
    module: Any = nn.Linear(40, 6)
    with_codes(module, q, torch.float32, torch.float32)
    gain, oracle = module.learn()["gain"], gain_of(q)
    with torch.no_grad():
        gain.copy_(oracle)
    torch.testing.assert_close(module.weight.detach(), naive(q, oracle).detach())
    (module(x) ** 2).sum().backward()
    (nn.functional.linear(x, naive(q, oracle), module.bias.detach()) ** 2).sum().backward()
    torch.testing.assert_close(gain.grad, oracle.grad, rtol=1e-5, atol=1e-4)
    assert module.scale.grad is None
    assert module.codes.grad is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gain_of_an_embedding_gets_the_gradient_of_a_naive_expansion(scheme: str) -> None:
    """Of rows that are looked up once, several times, and never; in a batch of two dimensions."""
    q, ids = codes_of(6, scheme), torch.tensor([[0, 2, 2], [5, 2, 0]])
    module: Any = nn.Embedding(6, 40)
    with_codes(module, q, torch.float32, torch.float32)
    assert isinstance(module, QEmbedding)
    gain, oracle = module.learn()["gain"], gain_of(q)
    with torch.no_grad():
        gain.copy_(oracle)
    out, wanted = module(ids), nn.functional.embedding(ids, naive(q, oracle))
    torch.testing.assert_close(out, wanted)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(gain.grad, oracle.grad, rtol=1e-5, atol=1e-5)
    assert bool((gain.grad[[1, 3, 4]] == 0).all())


def test_rounding_to_what_is_stored_passes_gradients_on(source: Source) -> None:
    """Straight through: the gradient of scale and weight as if they had not been rounded, at what they were rounded to."""
    q = codes_of(6, "w4a16g16", torch.bfloat16)
    q = QTensor(q.scheme, q.codes, q.scale.float(), q.zero)
    module: Any = nn.Linear(40, 6, bias=False)
    with_codes(module, q, torch.bfloat16, torch.float32)
    gain = module.learn()["gain"]
    with torch.no_grad():
        gain.copy_(gain_of(q))
    on_grid = (q.scale * gain.detach()).bfloat16().float()
    assert torch.equal(module.current_scale(), on_grid)
    weight = module.weight
    exact = QTensor(q.scheme, q.codes, on_grid).dequantize().bfloat16().float()
    assert torch.equal(weight, exact)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    (weight * direction).sum().backward()
    steps = direction * (q.codes.float() - q.scheme.middle)
    torch.testing.assert_close(gain.grad, torch.stack([p.sum(-1) for p in steps.split(16, -1)], -1) * q.scale)


def test_a_conversion_that_computes_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is more than moving numbers about has no way back that is known here."""
    from compress.architecture.hf_mapping import Mapping
    from compress.errors import InputError

    convert = Mapping.convert
    monkeypatch.setattr(Mapping, "convert", lambda self, group, read: {n: v + v for n, v in convert(self, group, read).items()})
    from compress.executors.train.student import Conversion

    student = SimpleNamespace(mapping=Mapping(load(source("mixtral"))))
    names = list(open_checkpoint(source("mixtral")).logical)
    group = next(group for group in student.mapping.groups(names) if group.patterns)
    shapes = [tuple(open_checkpoint(source("mixtral")).logical[name].shape) for name in group.sources]
    with pytest.raises(InputError, match="skip them"):
        Conversion(student.mapping, group, shapes)
