"""mlx: the words, scales and biases that MLX reads, its config, and what mlx-lm could not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import FormatError
from compress.evaluate.verify import verify_bytes
from compress.kernels.mlx.families import KNOWN, RUN, STACKING
from compress.kernels.mlx.layout import Mlx, module_of, spelled_out
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from families import build as build_family
from support import do, linear, logits, refused, run, tiny_llama


def meant(words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """MLX's dequantize, from its documentation, with Python's integers: fp32 [rows, columns]."""
    rows = []
    for row, scale, bias in zip(words.view(torch.uint8).tolist(), scales.float().tolist(), biases.float().tolist(), strict=True):
        stream = int.from_bytes(bytes(row), "little")
        codes = [(stream >> (bits * k)) & ((1 << bits) - 1) for k in range(len(row) * 8 // bits)]
        rows.append([scale[k // group] * code + bias[k // group] for k, code in enumerate(codes)])
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", ["", "-min"])
def test_words_and_scales_mean_what_codes_do(bits: int, kind: str) -> None:
    scheme, weight = Scheme.parse(f"w{bits}a16g32{kind}"), linear((24, 96))
    q = nearest(torch.randn(24, 96).bfloat16(), scheme, torch.bfloat16, "mse").q
    tensors = Mlx().encode(weight, q)
    path = weight.name.removesuffix(".weight")
    assert tensors[weight.name].dtype == torch.uint32
    found = meant(tensors[weight.name], tensors[f"{path}.scales"], tensors[f"{path}.biases"], bits, 32)
    assert torch.equal(found, q.dequantize())


def test_symmetric_scales_that_overflow_are_refused() -> None:
    codes, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.full((2, 1), 6e4, dtype=torch.float16)
    with pytest.raises(FormatError, match="128-fold F16 can hold"):
        Mlx().encode(linear((2, 32), dtype="F16"), QTensor(Scheme.parse("w8a16g32"), codes, scale))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose attention has 8 symmetric bits, its embeddings 6, and the rest 4 with minima."""
    folder = tmp_path_factory.mktemp("mlx")
    tiny_llama(folder / "model", rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=True)
    passes = (
        "quantize.rtn(scheme=w8a16g32, targets=[attention]) | quantize.rtn(scheme=w6a16g64-min, targets=[embeddings])",
        "quantize.rtn(scheme=w4a16g32-min, targets=[mlp], ragged=divide) | pack(format=mlx)",
    )
    do(folder / "model", folder / "out", " | ".join(passes))
    return folder


def test_the_config_has_what_mlx_lm_asks_for(packed: Path) -> None:
    config = json.loads((packed / "out" / "config.json").read_text())
    said = config["quantization"]
    assert said == config["quantization_config"]
    assert (said["bits"], said["group_size"], said["mode"]) == (8, 32, "affine")
    assert said["model.layers.1.mlp.up_proj"] == {"group_size": 32, "bits": 4}
    assert said["model.embed_tokens"] == {"group_size": 64, "bits": 6}
    # mlx-lm knows no rope_parameters, and ties a head unless it is told not to.
    assert (config["rope_theta"], config["tie_word_embeddings"]) == (5000.0, True)
    assert config["rms_norm_eps"] > 0
    names = load_file(packed / "out" / "model.safetensors")
    assert {"model.embed_tokens.scales", "model.embed_tokens.biases", "model.norm.weight"} <= names.keys()


def test_what_is_packed_comes_back_with_a_manifest_and_without(packed: Path, tmp_path: Path) -> None:
    verify_bytes(open_checkpoint(packed / "out"), Context())
    shutil.copytree(packed / "out", tmp_path / "alone", ignore=shutil.ignore_patterns("manifest.json"))
    expected = logits(build(open_checkpoint(packed / "out")))
    assert torch.equal(logits(build(open_checkpoint(tmp_path / "alone"))), expected)
    for source in (packed / "out", tmp_path / "alone"):
        do(source, tmp_path / "again", "unpack | pack(format=mlx)")
        ours, theirs = (load_file(place / "model.safetensors") for place in (packed / "out", tmp_path / "again"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)) for name, tensor in ours.items())
        shutil.rmtree(tmp_path / "again")
    do(tmp_path / "alone", tmp_path / "codes", "unpack")
    found = DenseView(open_checkpoint(tmp_path / "codes"))
    schemes = {str(state.scheme) for _, state in found.weights.values()}
    assert schemes == {"w8a16g32", "w6a16g64-min", "w4a16g32-min"}, "symmetric codes are known as such"
    assert "quantization" not in json.loads((tmp_path / "codes" / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "recipe", "said"),
    [
        ("llama", "quantize.rtn(scheme=w4a16g32-asym)", ("up to rounding", "-min for -asym")),
        ("llama", "quantize.rtn(scheme=w4a16g16)", ("groups of 32, 64 and 128 columns, not of 16", "one of these groups")),
        ("llama", "quantize.rtn(scheme=nf4g32)", ("integers and 16-bit activations, not nf4g32", "w4a16g64-min")),
        ("llama", "quantize.rtn(scheme=w4a8g32)", ("integers and 16-bit activations, not w4a8g32",)),
        ("llama", "quantize.rtn(scheme=w4a16g32, outliers=0.01)", ("no reader of mlx takes outliers", "pack as native")),
        ("gpt2", "quantize.rtn(scheme=w4a16g32)", ("turns the weight of a Conv1D round",)),
        ("gpt_oss", "quantize.rtn(scheme=w4a16g32, targets=[experts])", ("takes fused experts apart", "skip=[experts]")),
        ("qwen3_moe", "quantize.rtn(scheme=w4a16g32, targets=[experts])", ("stacks only plain weights of qwen3_moe's experts",)),
        ("bloom", "quantize.rtn(scheme=w4a16g32)", ("has no model of the type bloom",)),
        ("deepseek_v3", "quantize.rtn(scheme=w4a16g32, targets=['re:.*kv_b_proj.*'])", ("splits it", "rounds both parts again")),
        ("mixtral", "quantize.rtn(scheme=w4a16g32, targets=['re:.*experts.1.w1.*'])", ("takes one scheme; here: codes(w4a16g32), dense",)),
    ],
)  # fmt: skip
def test_what_mlx_lm_would_not_load_is_refused(family: str, recipe: str, said: tuple[str, ...], tmp_path: Path) -> None:
    source = build_family(family, tmp_path)
    refused(source, tmp_path / "out", f"{recipe} | pack(format=mlx)", said)


@pytest.mark.parametrize(("family", "loads"), [("llama", "yes"), ("mixtral", "yes"), ("starcoder2", "unknown")])
def test_readers_are_told_by_family(family: str, loads: str, tmp_path: Path) -> None:
    kinds = "linear, experts" if family == "mixtral" else "linear"
    made = run(
        build_family(family, tmp_path), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32, targets=[{kinds}]) | pack(format=mlx)"
    )
    assert {verdict.reader: verdict.loads for verdict in made.plan.verdicts}["mlx"] == loads


def test_experts_have_the_names_under_which_they_are_stacked() -> None:
    assert (
        module_of("model.layers.0.block_sparse_moe.experts.3.w1.weight") == "model.layers.0.block_sparse_moe.switch_mlp.gate_proj"
    )
    assert module_of("model.layers.0.mlp.experts.3.up_proj.weight") == "model.layers.0.mlp.switch_mlp.up_proj"
    assert module_of("model.layers.0.mlp.shared_experts.up_proj.weight") == "model.layers.0.mlp.shared_experts.up_proj"
    assert RUN <= KNOWN
    assert STACKING <= KNOWN


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": False},
        ),
        (
            {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
             "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3},
        ),
        ({"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
         {"rotary_emb_base": 1e4, "rotary_pct": 0.25}),
        ({"model_type": "no_such_type"}, {"tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_what_transformers_leaves_out_is_spelled_out(content: dict[str, Any], found: dict[str, Any]) -> None:
    assert found.items() <= spelled_out(content, own_head=True).items()
