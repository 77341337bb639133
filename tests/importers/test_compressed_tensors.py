"""compressed-tensors checkpoints against the library's own compressors, format by format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import InputError
from compress.importers import open_foreign
from compress.spec.scheme import Scheme

pytest.importorskip("compressed_tensors")

NAME = "model.layers.0.mlp.up_proj"


def scales(weight: torch.Tensor, args: dict[str, Any], top: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and signed zero points of a strategy; they need not be good, only of the right shape."""
    rows, columns = weight.shape
    if args["strategy"] == "tensor":
        blocks = weight.reshape(1, -1)
    elif args["strategy"] == "channel":
        blocks = weight.reshape(rows, 1, columns)
    elif args["strategy"] == "block":
        h, w = args["block_structure"]
        padded = torch.nn.functional.pad(weight, (0, -columns % w, 0, -rows % h))
        blocks = padded.reshape(-(-rows // h), h, -(-columns // w), w).transpose(1, 2).flatten(2)
    else:
        blocks = weight.reshape(rows, columns // args["group_size"], -1)
    scale = (blocks.float().abs().amax(-1) / top).to(dtype)
    generator = torch.Generator().manual_seed(1)
    limit = 1 << (args["num_bits"] - 1)
    return scale, torch.randint(-limit, limit, scale.shape, generator=generator).to(torch.int8)


def compress(
    kind: str, args: dict[str, Any], weight: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the library stores, by names on disk, and what it reads from that."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress({"weight": weight, **tensors}, scheme)
    read = compressor.decompress(dict(stored), scheme)["weight"]
    return {f"{NAME}.{part}": tensor for part, tensor in stored.items()}, read


def config(kind: str, args: dict[str, Any], targets: Any = None, **more: Any) -> dict[str, Any]:
    group = {"targets": targets or ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}, **more}


def weight(rows: int = 48, columns: int = 96, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


STRATEGIES = [
    {"strategy": "group", "group_size": 32},
    {"strategy": "channel"},
    {"strategy": "tensor"},
]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s["strategy"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["pack-quantized", "int-quantized"])
def test_integers(store: Any, dense: Any, bits: int, strategy: dict[str, Any], symmetric: bool, kind: str) -> None:
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    w = weight(50, 96)
    scale, zero = scales(w, args, 2.0 ** (bits - 1), torch.bfloat16)
    tensors = {"weight_scale": scale, **({} if symmetric else {"weight_zero_point": zero})}
    stored, read = compress(kind, args, w, tensors)
    checkpoint = store(stored, config(kind, args), dtype="bfloat16")
    foreign = open_foreign(checkpoint)
    packed = foreign.weights[f"{NAME}.weight"]
    if bits != 7:
        size = "g32" if strategy["strategy"] == "group" else ""
        assert str(packed.scheme) == f"w{bits}a16{size}{'' if symmetric else '-asym'}"
        assert packed.note == ""
    else:
        assert packed.scheme is None
        assert f"{bits} bits" in packed.note
    assert packed.dtype == "BF16"
    assert torch.equal(dense(checkpoint, packed), read)
    assert foreign.parts == set(stored)


@pytest.mark.parametrize("columns", [32, 40, 100])
def test_rows_that_end_within_a_word(store: Any, dense: Any, columns: int) -> None:
    args = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "channel"}
    w = weight(7, columns)
    scale, zero = scales(w, args, 4.0, torch.bfloat16)
    stored, read = compress("pack-quantized", args, w, {"weight_scale": scale, "weight_zero_point": zero})
    checkpoint = store(stored, config("pack-quantized", args), dtype="bfloat16")
    assert torch.equal(dense(checkpoint, open_foreign(checkpoint).weights[f"{NAME}.weight"]), read)


def test_blocks_of_integers_become_groups(store: Any, dense: Any) -> None:
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "block", "block_structure": [16, 32]}
    w = weight(40, 80)
    scale, _ = scales(w, args, 127.0, torch.bfloat16)
    stored, read = compress("int-quantized", args, w, {"weight_scale": scale})
    checkpoint = store(stored, config("int-quantized", args), dtype="bfloat16")
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == "w8a16g32"
    assert torch.equal(dense(checkpoint, packed), read)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_that_the_model_cannot_hold(store: Any, dense: Any, dtype: torch.dtype) -> None:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    w = weight(dtype=dtype)
    stored, read = compress("pack-quantized", args, w, {"weight_scale": scales(w, args, 7.5, dtype)[0]})
    checkpoint = store(stored, config("pack-quantized", args), dtype="bfloat16")
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert "cannot hold" in packed.note
    assert torch.equal(dense(checkpoint, packed), read)


@pytest.mark.parametrize(
    "strategy",
    [*STRATEGIES, {"strategy": "block", "block_structure": [32, 64]}],
    ids=lambda s: s["strategy"],
)
@pytest.mark.parametrize("kind", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8(store: Any, dense: Any, strategy: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    args = {"num_bits": 8, "type": "float", "symmetric": True, **strategy}
    w = weight(dtype=dtype)
    stored, read = compress(kind, args, w, {"weight_scale": scales(w, args, 448.0, dtype)[0]})
    checkpoint = store(stored, config(kind, args), dtype="bfloat16")
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    kept = strategy["strategy"] != "block" and dtype != torch.float16
    text = {"tensor": "fp8-tensor", "channel": "fp8"}.get(strategy["strategy"]) if kept else None
    assert (str(packed.scheme), packed.dtype) == (str(text), "BF16")
    assert torch.equal(dense(checkpoint, packed), read.to(torch.bfloat16))


def test_nvfp4(store: Any, dense: Any) -> None:
    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    w = weight()
    total = 448 * 6 / w.float().abs().max().reshape(1)
    scale = (w.float().reshape(48, -1, 16).abs().amax(-1) / 6 * total).to(torch.float8_e4m3fn).float()
    stored, read = compress("nvfp4-pack-quantized", args, w, {"weight_scale": scale, "weight_global_scale": total})
    checkpoint = store(stored, config("nvfp4-pack-quantized", args), dtype="bfloat16")
    foreign = open_foreign(checkpoint)
    assert str(foreign.weights[f"{NAME}.weight"].scheme) == "nvfp4"
    assert torch.equal(dense(checkpoint, foreign.weights[f"{NAME}.weight"]), read)
    assert foreign.parts == set(stored)
    said = config("nvfp4-pack-quantized", args)
    said["config_groups"]["group_0"]["input_activations"] = {**args, "dynamic": "local"}
    number = {f"{NAME}.input_global_scale": torch.tensor([37.5])}
    # Without the number that divides their scales the activations cannot be rounded, and that is told.
    for more, scheme, dropped in ((number, "nvfp4-anvfp4", set()), ({}, "nvfp4", {f"{NAME}.weight"})):
        both = open_foreign(other := store({**stored, **more}, said, dtype="bfloat16"))
        packed = both.weights[f"{NAME}.weight"]
        assert str(packed.scheme) == scheme
        assert {name for note in both.notes if note.what == "dropped" for name in note.names} == dropped
        assert both.parts == {*stored, *more}
        assert packed.read(other.read).input_scale == (torch.tensor(37.5) if more else None)
    half = store(stored, config("nvfp4-pack-quantized", args), dtype="float16")
    packed = open_foreign(half).weights[f"{NAME}.weight"]
    assert packed.scheme is None
    assert "bfloat16" in packed.note
    assert torch.equal(dense(half, packed), read.half())


@pytest.mark.parametrize(("bits", "args", "found"), [
    (8, {"type": "int", "strategy": "token", "dynamic": True}, "w8a8"),
    (8, {"type": "float", "strategy": "token", "dynamic": True}, "w8a8-afp8"),
    (8, {"type": "int", "strategy": "tensor", "dynamic": False}, "w8a16"),
    (8, {"type": "int", "strategy": "token", "dynamic": True, "symmetric": False}, "w8a8-aasym"),
    (4, {"type": "int", "strategy": "token", "dynamic": True}, "w4a8"),
    (4, {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True}, "w4a4"),
    (4, {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False}, "w4a4-aasym"),
    (4, {"num_bits": 6, "type": "int", "strategy": "token", "dynamic": True}, "w4a16"),
    (4, {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}, "w4a16"),
])  # fmt: skip
def test_rounded_activations_are_kept_where_a_scheme_has_them(store: Any, bits: int, args: dict[str, Any], found: str) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    w = weight()
    stored, _ = compress("int-quantized", weights, w, {"weight_scale": scales(w, weights, 127.0, torch.bfloat16)[0]})
    stored |= {name.replace("mlp.up", "mlp.experts.3.up"): tensor for name, tensor in stored.items()}
    said = config("int-quantized", weights)
    said["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, **args}
    foreign = open_foreign(store(stored, said, dtype="bfloat16"))
    assert str(foreign.weights[f"{NAME}.weight"].scheme) == found
    assert foreign.weights[f"{NAME.replace('mlp', 'mlp.experts.3')}.weight"].scheme == Scheme(bits)
    dropped = {name for note in foreign.notes if note.what == "dropped" for name in note.names}
    assert (f"{NAME}.weight" in dropped) == found.endswith("a16")
    assert any("experts" in name for name in dropped)


@pytest.mark.parametrize(("kind", "bits"), [("mxfp4-pack-quantized", 4), ("mxfp6-pack-quantized", 6), ("mxfp8-quantized", 8)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_microscaling(store: Any, dense: Any, kind: str, bits: int, dtype: str | None) -> None:
    args = {
        "num_bits": bits,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    }
    w = weight()
    scale = 2.0 ** torch.floor(torch.log2(w.float().reshape(48, -1, 32).abs().amax(-1))) / 2 ** {4: 2, 6: 2, 8: 8}[bits]
    stored, read = compress(kind, args, w, {"weight_scale": scale.bfloat16()})
    checkpoint = store(stored, config(kind, args), dtype=dtype)
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert torch.equal(dense(checkpoint, packed), read.to(getattr(torch, dtype or "bfloat16")))


def test_every_code_and_every_scale_of_mxfp4(store: Any, dense: Any) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    }
    local = {
        "weight_packed": torch.arange(256, dtype=torch.uint8).reshape(1, 256).repeat(256, 1),
        "weight_scale": torch.arange(256, dtype=torch.uint8).reshape(256, 1).repeat(1, 16),
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    read = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").decompress(dict(local), scheme)["weight"]
    checkpoint = store({f"{NAME}.{part}": t for part, t in local.items()}, config("mxfp4-pack-quantized", args), dtype="bfloat16")
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == "mxfp4"
    ours = dense(checkpoint, packed)
    # The last scale means NaN, of which the reader makes infinities.
    assert torch.equal(ours[:255], read[:255])
    assert torch.equal(ours[:255].signbit(), read[:255].signbit())
    assert bool(ours[255].isnan().all())
    assert not bool(read[255].isfinite().any())


def test_groups_of_different_formats_and_the_order_of_targets(store: Any, dense: Any) -> None:
    four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    w = weight()
    stored, reads = {}, {}
    for module, kind, args, top in (
        ("a.up_proj", "pack-quantized", four, 7.5),
        ("a.q_proj", "int-quantized", eight, 127.0),
        ("a.o_proj", "float-quantized", fp8, 448.0),
    ):
        local, reads[module] = compress(kind, args, w, {"weight_scale": scales(w, args, top, torch.bfloat16)[0]})
        stored |= {name.replace(NAME, module): tensor for name, tensor in local.items()}
    groups = {
        "group_0": {"targets": ["Linear"], "format": "float-quantized", "weights": fp8, "input_activations": {"num_bits": 8}},
        "group_1": {"targets": ["re:.*up_proj"], "format": "pack-quantized", "weights": four},
        "group_3": {"targets": ["a.q_proj", "re:a.zzz"], "format": "int-quantized", "weights": eight},
    }
    # As compressed-tensors has it: the exact name, then a regex, then the class.
    stored["a.o_proj.input_scale"] = torch.ones(1)
    stored["a.k_scale"] = torch.ones(1)
    checkpoint = store(
        stored,
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": groups,
            "ignore": ["lm_head"],
            "kv_cache_scheme": {"num_bits": 8},
        },
        dtype="bfloat16",
    )
    foreign = open_foreign(checkpoint)
    assert [str(foreign.weights[f"{module}.weight"].scheme) for module in reads] == ["w4a16g32", "w8a16", "fp8"]
    for module, read in reads.items():
        assert torch.equal(dense(checkpoint, foreign.weights[f"{module}.weight"]), read)
    assert foreign.parts == set(stored)
    assert [(note.what, note.names) for note in foreign.notes if note.what == "dropped"] == [
        ("dropped", ("a.o_proj.input_scale",)), ("dropped", ("a.k_scale",)), ("dropped", ("a.o_proj.weight",)),
    ]  # fmt: skip


def test_the_first_regex_of_the_alphabet(store: Any) -> None:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    w = weight()
    stored, _ = compress("pack-quantized", args, w, {"weight_scale": scales(w, args, 7.5, torch.bfloat16)[0]})
    groups = {
        "z": {"targets": ["re:model.*"], "weights": {**args, "num_bits": 8}},
        "a": {"targets": ["re:.*up_proj"], "weights": args},
    }
    foreign = open_foreign(
        store(stored, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
    )
    assert str(foreign.weights[f"{NAME}.weight"].scheme) == "w4a16"


@pytest.mark.parametrize("symmetric", [True, False])
def test_old_files_with_g_idx(store: Any, dense: Any, symmetric: bool) -> None:
    args = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    w = weight()
    scale, zero = scales(w, args, 7.5, torch.bfloat16)
    stored, read = compress(
        "pack-quantized", args, w, {"weight_scale": scale, **({} if symmetric else {"weight_zero_point": zero})}
    )
    said = config("pack-quantized", {**args, "actorder": "group"})
    for index, kept in (
        (torch.arange(96) // 32, True),
        (torch.full((96,), -1), True),
        ((torch.arange(96) * 7) % 96 // 32, False),
    ):
        checkpoint = store({**stored, f"{NAME}.weight_g_idx": index.int()}, said, dtype="bfloat16")
        packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
        assert (packed.scheme is not None) == kept
        if kept:
            assert torch.equal(dense(checkpoint, packed), read)
            continue
        assert "order" in packed.note
        plain = store(stored, said, dtype="bfloat16")
        q = open_foreign(plain).weights[f"{NAME}.weight"].read(plain.read)
        middle = torch.full_like(q.scale, 8) if q.zero is None else q.zero
        for k in (0, 5, 95):
            column = q.scale[:, index[k]].float() * (q.codes[:, k].float() - middle[:, index[k]].float())
            assert torch.equal(dense(checkpoint, packed)[:, k], column.bfloat16())


ARGS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "marlin-24"}, "format among"),
        ({"format": None}, "format among"),
        ({"format": "int-quantized"}, "tensor of this name"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "preset"),
        ({"config_groups": {"a": {"targets": "Linear", "weights": ARGS}}}, "targets"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {**ARGS, "num_bits": 9}}}}, "num_bits"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {**ARGS, "num_bits": 8}}}}, "shape"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {**ARGS, "group_size": 64}}}}, "group_size"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {**ARGS, "strategy": "token"}}}}, "strategy"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {**ARGS, "type": "float"}}}}, "type int"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {**ARGS, "symmetric": False}}}}, "zero_point"),
        ({"config_groups": {"a": {"targets": ["re:("], "weights": ARGS}}}, "regexes"),
        (
            {
                "config_groups": {
                    "a": {"targets": ["re:x"], "weights": ARGS},
                    "b": {"targets": ["y.y"], "weights": {**ARGS, "num_bits": 8}},
                }
            },
            "targets",
        ),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"quantization_status": "frozen"}, "quantization_status"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ],
)
def test_bad_config(store: Any, change: dict[str, Any], said: str) -> None:
    w = weight()
    stored, _ = compress("pack-quantized", ARGS, w, {"weight_scale": scales(w, ARGS, 7.5, torch.bfloat16)[0]})
    with pytest.raises(InputError, match=said):
        open_foreign(store(stored, {**config("pack-quantized", ARGS), **change}))


def test_bad_tensors(store: Any) -> None:
    w = weight()
    stored, _ = compress("pack-quantized", ARGS, w, {"weight_scale": scales(w, ARGS, 7.5, torch.bfloat16)[0]})
    said = config("pack-quantized", ARGS)
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        with pytest.raises(InputError, match="tensor of this name"):
            open_foreign(store({name: t for name, t in stored.items() if not name.endswith(part)}, said))
    with pytest.raises(InputError, match="rows"):
        open_foreign(store({**stored, f"{NAME}.weight_shape": torch.tensor([5, 96])}, said))
    with pytest.raises(InputError, match="dtype"):
        open_foreign(store({**stored, f"{NAME}.weight_packed": stored[f"{NAME}.weight_packed"].to(torch.int64)}, said))
    wide = {f"{NAME}.weight": torch.full((48, 96), 9, dtype=torch.int8), f"{NAME}.weight_scale": torch.ones(48, 3)}
    checkpoint = store(wide, config("int-quantized", ARGS))
    with pytest.raises(InputError, match="4 bits"):
        open_foreign(checkpoint).weights[f"{NAME}.weight"].read(checkpoint.read)


@pytest.mark.parametrize("kind", ["int-quantized", "float-quantized"])
def test_zero_points_of_old_symmetric_files(store: Any, dense: Any, kind: str) -> None:
    args = {"num_bits": 8, "type": kind.partition("-")[0], "symmetric": True, "strategy": "channel"}
    w = weight()
    stored, read = compress(kind, args, w, {"weight_scale": scales(w, args, 127.0, torch.bfloat16)[0]})
    zeros = torch.zeros(48, 1, dtype=stored[f"{NAME}.weight"].dtype)
    checkpoint = store({**stored, f"{NAME}.weight_zero_point": zeros}, config(kind, args), dtype="bfloat16")
    foreign = open_foreign(checkpoint)
    assert torch.equal(dense(checkpoint, foreign.weights[f"{NAME}.weight"]), read)
    assert f"{NAME}.weight_zero_point" in foreign.parts
    with pytest.raises(InputError, match="zeros"):
        open_foreign(store({**stored, f"{NAME}.weight_zero_point": torch.ones(48, 1).to(zeros.dtype)}, config(kind, args)))
