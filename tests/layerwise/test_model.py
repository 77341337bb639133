"""A runnable model of any state: the logits of what the codes mean, to the bit, with codes kept as codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.architecture.qlinear import QLinear
from compress.checkpoint.reader import open_checkpoint
from compress.errors import FormatError, InputError
from compress.layerwise.model import build
from families import FAMILIES
from families import build as build_family
from support import dense_meaning, load, logits, run, shared, step_of, tiny_llama

RAGGED = "quantize.rtn(scheme=w4a16g64, ragged=divide, targets=[linear, embeddings])"
"""Embeddings too, and with them every head that is tied to them."""
CODED = {
    **{name: family.linears - family.left for name, family in FAMILIES.items()},
    # Experts that lie one by one are fused on load, and what is fused or split is dense.
    "mixtral": 2 * 4, "qwen2_moe": 2 * (4 + 3), "qwen3_moe": 2 * 4, "olmoe": 2 * 4, "deepseek_v3": 5 + 3 + 2 * (5 + 3),
    "gpt_oss": 2 * 4, "llama4": 2 * (4 + 3), "granitemoe": 2 * 4, "gte": 2 * 2,
}  # fmt: skip
"""Linears of each family that a model holds as codes."""
Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build_family(name, folder)


def coded(model: nn.Module) -> dict[str, QLinear]:
    return {path: part for path, part in model.named_modules() if isinstance(part, QLinear)}


def nbytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_canonical_codes_mean_what_they_say(name: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", "quantize.rtn(scheme=w4a16g32)")
    ours = build(open_checkpoint(tmp_path / "out"))
    meant = load(dense_meaning(tmp_path / "out", tmp_path / "dense_view"), dtype=torch.float32)
    assert torch.equal(logits(ours), logits(meant))
    assert not [key for key, value in ours.state_dict().items() if value.is_meta]
    found = coded(ours)
    assert len(found) == CODED[name]
    state = ours.state_dict()
    saved = 0
    for path, part in found.items():
        assert f"{path}.weight" not in state
        assert state[f"{path}.codes"].dtype == torch.uint8
        assert part.codes.shape == part.weight.shape
        saved += 3 * part.codes.numel() - part.scale.nbytes
    assert nbytes(meant) - nbytes(ours) == saved, "no dense copy beside the codes"
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("name", shared([*FAMILIES]))
def test_embeddings_and_tied_heads_in_codes(name: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", RAGGED)
    ours = build(open_checkpoint(tmp_path / "out"))
    meant = load(dense_meaning(tmp_path / "out", tmp_path / "dense_view"), dtype=torch.float32)
    assert torch.equal(logits(ours), logits(meant))
    embedding, head = ours.get_input_embeddings(), ours.get_output_embeddings()
    if name == "whisper":
        embedding = ours.model.decoder.embed_tokens
    assert isinstance(embedding, QLinear)
    assert isinstance(embedding, nn.Embedding)
    if head.weight.shape == embedding.weight.shape and torch.equal(head.weight, embedding.weight):
        assert head.codes is embedding.codes
        assert head.scale is embedding.scale
    assert ours.dtype == torch.float32


PACKED = {
    "quantize.rtn(scheme=w4a16g32) | pack(dequantize=true)": ["gpt2", "falcon", "mamba2", "t5"],
    "quantize.rtn(scheme=w4a16g32, skip=[experts]) | pack": ["gpt_oss", "granitemoe"],
    "quantize.rtn(scheme=w4a16g32, skip=['re:.*(qkv_proj|up_gate_proj)']) | pack": ["gte"],
}
REFUSED = ("llama4", "olmo_hybrid")
"""Families that no format holds."""


@pytest.mark.parametrize("name", shared([*FAMILIES]))
def test_packed_codes_mean_the_same(name: str, source: Source, tmp_path: Path) -> None:
    recipe = next((recipe for recipe, names in PACKED.items() if name in names), "quantize.rtn(scheme=w4a16g32) | pack")
    if name in REFUSED:
        with pytest.raises(FormatError):
            run(source(name), tmp_path / "out", recipe)
        return
    run(source(name), tmp_path / "out", recipe)
    canonical = step_of(tmp_path / "out", "quantize.rtn")
    ours, other = build(open_checkpoint(tmp_path / "out")), build(open_checkpoint(canonical))
    assert torch.equal(logits(ours), logits(load(dense_meaning(canonical, tmp_path / "dense_view"), dtype=torch.float32)))
    assert list(coded(ours)) == list(coded(other))
    assert nbytes(ours) == nbytes(other)


@pytest.mark.parametrize(
    "recipe", ["quantize.rtn(scheme=w3a16g32-asym)", "prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w8a16)"]
)
def test_other_schemes_and_dtypes(recipe: str, tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", recipe)
    for dtype in ("float32", "bfloat16"):
        meant = load(dense_meaning(tmp_path / "out", tmp_path / dtype), dtype=getattr(torch, dtype))
        ours = build(open_checkpoint(tmp_path / "out"), dtype)
        assert torch.equal(logits(ours), logits(meant))
        assert ours.dtype == meant.dtype


@pytest.mark.parametrize("recipe", ["", "prune.magnitude(sparsity=0.5)"])
def test_dense_and_masked_models(recipe: str, tiny: Path, tmp_path: Path) -> None:
    if recipe:
        run(tiny, tmp_path / "out", recipe)
    ours, theirs = build(open_checkpoint(tmp_path / "out" if recipe else tiny)), load(tmp_path / "out" if recipe else tiny)
    assert torch.equal(logits(ours), logits(theirs.float()))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", ["llama", "tied", "gemma2", "mamba2", "olmo_hybrid", "mixtral", "gpt_oss", "t5", "llava"])
def test_it_generates_as_transformers_does_with_a_cache(name: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", "quantize.rtn(scheme=w4a16g32)")
    ours = build(open_checkpoint(tmp_path / "out"))
    meant = load(dense_meaning(tmp_path / "out", tmp_path / "dense_view"), dtype=torch.float32)
    ids = torch.arange(3, 13)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    got, wanted = ours.generate(ids, **options), meant.generate(ids, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))
    assert got.past_key_values is not None
    for config in (ours.config, ours.config.get_text_config()):
        assert getattr(config, "use_cache", True) == getattr(meant.config, "use_cache", True)


def test_generation_config_comes_along(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_length": 33}))
    assert build(open_checkpoint(source)).generation_config.eos_token_id == [2, 7]


def test_what_another_tool_quantized_is_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="gptq"):
        build(open_checkpoint(source))
