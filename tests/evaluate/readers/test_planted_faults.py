"""Faults that a wrong packer would make, planted into sound artifacts: each engine's reader catches every one.

Our own reading is that of the sound artifact, the engine's that of a copy with one matrix changed: nibbles swapped, scales a row
off, zero points (or minima) a step off, one expert's matrix in the place of another's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from warm_readers import warm

from compress.checkpoint.reader import GGUF_FILE, open_checkpoint
from compress.errors import FormatError
from compress.evaluate import readers
from compress.evaluate.verify import read_with, token_ids
from families import build_served
from support import run, tiny_llama

pytestmark = pytest.mark.slow
Tensors = dict[str, torch.Tensor]
Fault = Callable[[Tensors], Tensors]
DOWN = "model.layers.1.mlp.down_proj"


def nibbles(t: torch.Tensor) -> torch.Tensor:
    b = t.contiguous().view(torch.uint8)
    return (b << 4 | b >> 4).view(t.dtype)


def a_step_more(t: torch.Tensor) -> torch.Tensor:
    """Every nibble one more."""
    b = t.contiguous().view(torch.uint8)
    return ((b >> 4) + 1 << 4 | (b + 1) & 15).view(t.dtype)


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    return lambda tensors: {name: how(tensors[name])}


def swapped(blocks: torch.Tensor) -> None:
    blocks[..., 2:] = nibbles(blocks[..., 2:])


def shifted(blocks: torch.Tensor) -> None:
    blocks[..., :2] = blocks[..., :2].roll(1, 0)


def block(name: str, how: Callable[[torch.Tensor], None]) -> Fault:
    """In one matrix of Q4_0: blocks of a scale, two bytes, and sixteen bytes of codes."""

    def fault(tensors: Tensors) -> Tensors:
        found = tensors[name].clone()
        how(found.unflatten(-1, (-1, 18)))
        return {name: found}

    return fault


def super_blocks(tensors: Tensors) -> Tensors:
    """Swapped nibbles of Q4_K: super-blocks of 16 bytes of scales, and 128 of codes."""
    found = tensors["blk.1.ffn_down.weight"].clone()
    blocks = found.flatten(-2).unflatten(-1, (-1, 144)) if found.dim() > 2 else found.unflatten(-1, (-1, 144))
    blocks[..., 16:] = nibbles(blocks[..., 16:])
    return {"blk.1.ffn_down.weight": blocks.reshape(found.shape)}


def exchanged(one: str, other: str) -> Fault:
    """Two experts' matrices in each other's place, in both blocks; names with {} for the number of the block."""

    def fault(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for a, b in ((one.format(i), other.format(i)) for i in (0, 1)):
            for name in [name for name in tensors if name.startswith(a)]:
                twin = b + name.removeprefix(a)
                found |= {name: tensors[twin], twin: tensors[name]}
        return found

    return fault


EXPERTS = exchanged("model.layers.{}.block_sparse_moe.experts.0.w2.", "model.layers.{}.block_sparse_moe.experts.1.w2.")
Case = tuple[str, str, str]
# engine, model, recipe -> what is changed in its artifact; `trained` is the embedded model, `wide` has wide matrices
CASES: dict[Case, dict[str, Fault]] = {
    ("vllm", "llama", "quantize.rtn(scheme=w4a16g32) | pack"): {
        "swapped nibbles": change(f"{DOWN}.weight_packed", nibbles),
        "a scale row off by one": change(f"{DOWN}.weight_scale", lambda t: t.roll(1, 0)),
    },
    ("vllm", "llama", "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)"): {
        "swapped nibbles": change(f"{DOWN}.qweight", nibbles),
        "a scale row off by one": change(f"{DOWN}.scales", lambda t: t.roll(1, 1)),
    },
    ("vllm", "llama", "quantize.rtn(scheme=w4a16g32-asym) | pack(format=awq)"): {
        "swapped nibbles": change(f"{DOWN}.qweight", nibbles),
        "a wrong zero point": change(f"{DOWN}.qzeros", a_step_more),
        "a scale row off by one": change(f"{DOWN}.scales", lambda t: t.roll(1, 1)),
    },
    ("vllm", "mixtral", "quantize.rtn(scheme=w4a16g64) | pack"): {"an expert exchanged": EXPERTS},
    ("llama.cpp", "trained", "quantize.rtn(scheme=w4a16g32) | pack(format=gguf)"): {
        "swapped nibbles": block("blk.1.attn_q.weight", swapped),
        "swapped nibbles of an MLP": block("blk.2.ffn_down.weight", swapped),
        "a scale row off by one": block("blk.1.attn_q.weight", shifted),
        "a scale row off by one of an MLP": block("blk.2.ffn_down.weight", shifted),
    },
    ("llama.cpp", "mixtral", "quantize.rtn(scheme=w4a16g32) | pack(format=gguf)"): {
        "an expert exchanged": exchanged("blk.{}.ffn_down_exps.weight[0]", "blk.{}.ffn_down_exps.weight[1]"),
    },
    ("llama.cpp", "wide", "quantize.rtn(scheme=q4_k) | pack(format=gguf)"): {"swapped nibbles": super_blocks},
    ("mlx", "llama", "quantize.rtn(scheme=w4a16g32-min) | pack(format=mlx)"): {
        "swapped nibbles": change(f"{DOWN}.weight", nibbles),
        "a wrong minimum": lambda t: {f"{DOWN}.biases": t[f"{DOWN}.biases"] + t[f"{DOWN}.scales"]},
        "a scale row off by one": change(f"{DOWN}.scales", lambda t: t.roll(1, 0)),
    },
    ("mlx", "mixtral", "quantize.rtn(scheme=w4a16g32-min, targets=[linear, experts]) | pack(format=mlx)"): {
        "an expert exchanged": EXPERTS
    },
}  # fmt: skip


def planted(artifact: Path, out: Path, fault: Fault) -> Path:
    """A copy with a fault; nothing else changes, and no manifest tells of it."""
    shutil.copytree(artifact, out)
    checkpoint = open_checkpoint(artifact)
    if not (out / GGUF_FILE).is_file():
        tensors = load_file(artifact / "model.safetensors")
        changed = fault(tensors)
        save_file({name: value.contiguous() for name, value in {**tensors, **changed}.items()}, out / "model.safetensors")
        (out / "manifest.json").unlink()
    else:
        tensors = {name: checkpoint.read(name) for name in checkpoint.refs}
        changed = fault(tensors)
        with (out / GGUF_FILE).open("r+b") as stream:
            for name, value in changed.items():
                stream.seek(checkpoint.refs[name].offset)
                stream.write(value.numpy().tobytes())
    assert changed
    assert not any(torch.equal(value, tensors[name]) for name, value in changed.items() if "shape" not in name)
    return out


def made_of(family: str, folder: Path) -> Path:
    """A model of random weights; `wide` is a Llama whose columns hold super-blocks."""
    if family == "wide":
        return tiny_llama(folder / "wide", hidden_size=256, intermediate_size=512)
    return build_served(family, folder)


@pytest.fixture(scope="module", autouse=True)
def forks() -> Iterator[None]:
    with warm():
        yield


@pytest.fixture(scope="module")
def sound(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The artifact of a case, which its engine reads as it is meant; made and read once."""
    made: dict[Case, Path] = {}

    def of(case: Case) -> Path:
        if case not in made:
            engine, family, recipe = case
            folder = tmp_path_factory.mktemp("sound")
            run(demo_model if family == "trained" else made_of(family, folder), folder / "out", recipe)
            found = read_with(engine, folder / "out", token_ids(open_checkpoint(folder / "out")), print)
            print(f"sound: {engine}, {recipe}: {found.typical:.2%}, {found.difference:.3g} of {found.largest:.3g}")
            made[case] = folder / "out"
        return made[case]

    return of


@pytest.mark.parametrize(
    ("case", "fault"),
    [pytest.param(case, fault, id=f"{case[0]}: {case[2]}: {fault}") for case, faults in CASES.items() for fault in faults],
)
def test_a_planted_fault_is_caught(
    case: Case, fault: str, sound: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, logits = sound(case), readers.logits
    wrong = planted(artifact, tmp_path / "wrong", CASES[case][fault])

    def half(reader: str, place: Path, *arguments: Any, **options: Any) -> readers.Reading:
        return logits(reader, artifact if reader == "ours" else place, *arguments, **options)

    monkeypatch.setattr(readers, "logits", half)
    with pytest.raises(FormatError, match="logits that differ by at most") as caught:
        read_with(case[0], wrong, token_ids(open_checkpoint(artifact)), print)
    print(f"{fault}: {caught.value.problems[0].got}, {caught.value.problems[0].expected}")
