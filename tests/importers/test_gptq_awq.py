"""GPTQ and AWQ against packers and decoders that work bit by bit, and against compressed-tensors' AWQ converter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import InputError
from compress.importers import method_of, open_foreign

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
NAME = "model.layers.0.mlp.up_proj"


def words(values: list[int], bits: int) -> list[int]:
    """A bit stream in int32 words, by Python's own big integers."""
    total = sum(value << (bits * i) for i, value in enumerate(values))
    found = [(total >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def case(bits: int, rows: int, columns: int, group: int, symmetric: bool, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """codes [rows, columns], zeros [rows, groups] of at least one, fp16 scales [rows, groups]."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(1, 1 << bits, (rows, groups), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    return codes, zeros, (torch.rand(rows, groups, generator=generator) * 0.1 + 0.001).half()


def gptq(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int, index: list[int], offset: int
) -> dict[str, torch.Tensor]:
    stored = (zeros - offset) % (1 << bits)
    return {
        f"{NAME}.qweight": torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32).T,
        f"{NAME}.qzeros": torch.tensor([words(row, bits) for row in stored.T.tolist()], dtype=torch.int32),
        f"{NAME}.scales": scales.T,
        f"{NAME}.g_idx": torch.tensor(index, dtype=torch.int32),
    }


def dense_view(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: list[int]) -> torch.Tensor:
    """Element by element, in fp16 as AutoGPTQ does."""
    rows, columns = codes.shape
    weight = torch.empty(rows, columns, dtype=torch.float16)
    for n in range(rows):
        for k in range(columns):
            weight[n, k] = scales[n, index[k]] * (codes[n, k] - zeros[n, index[k]]).half()
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "columns"), [(16, 64), (-1, 32), (24, 64)])
def test_gptq(store: Any, dense: Any, bits: int, offset: int, symmetric: bool, group: int, columns: int) -> None:
    width = columns if group == -1 else group
    made = case(bits, 32, columns, width, symmetric)
    index = [k // width for k in range(columns)]
    config = {**GPTQ, "bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": "gptq" if offset else "gptq_v2"}
    checkpoint = store(gptq(*made, bits, index, offset), config)
    foreign = open_foreign(checkpoint)
    packed = foreign.weights[f"{NAME}.weight"]
    size = f"g{group}" if group > 0 else ""
    assert str(packed.scheme) == f"w{bits}a16{size}{'' if symmetric else '-asym'}"
    assert (packed.dtype, packed.note, foreign.notes) == ("F16", "", ())
    assert torch.equal(dense(checkpoint, packed), dense_view(*made, index))
    assert torch.equal(packed.read(checkpoint.read).codes, made[0].to(torch.uint8))
    assert foreign.parts == {f"{NAME}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert method_of(checkpoint) == foreign.method == "gptq"


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_wrong_label_is_read_by_its_zeros(store: Any, dense: Any, bits: int, offset: int) -> None:
    made = case(bits, 32, 32, 16, True)
    index = [k // 16 for k in range(32)]
    config = {**GPTQ, "bits": bits, "checkpoint_format": "gptq_v2" if offset else "gptq"}
    checkpoint = store(gptq(*made, bits, index, offset), config)
    foreign = open_foreign(checkpoint)
    packed = foreign.weights[f"{NAME}.weight"]
    assert packed.scheme is not None
    assert packed.scheme.symmetric
    assert "label" in packed.note
    assert foreign.notes[0].names == (f"{NAME}.weight",)
    assert torch.equal(dense(checkpoint, packed), dense_view(*made, index))


def test_the_words_of_a_wrong_label_are_the_known_ones(store: Any) -> None:
    tensors = gptq(*case(4, 32, 32, 16, True), 4, [k // 16 for k in range(32)], 0)
    assert set(tensors[f"{NAME}.qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}


def test_the_zeros_decide_symmetry(store: Any, dense: Any) -> None:
    index = [k // 16 for k in range(32)]
    middle, odd = case(4, 32, 32, 16, True), case(4, 32, 32, 16, False)
    packed = open_foreign(store(gptq(*middle, 4, index, 1), {**GPTQ, "sym": False})).weights[f"{NAME}.weight"]
    assert (str(packed.scheme), packed.note) == ("w4a16g16", "")
    checkpoint = store(gptq(*odd, 4, index, 1), GPTQ)
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == "w4a16g16-asym"
    assert "sym" in packed.note
    assert torch.equal(dense(checkpoint, packed), dense_view(*odd, index))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_v1_zero_of_all_ones_reads_as_zero(store: Any, dense: Any, bits: int) -> None:
    codes, zeros, scales = case(bits, 32, 32, 16, False)
    zeros[5, 1] = 0
    index = [k // 16 for k in range(32)]
    checkpoint = store(gptq(codes, zeros, scales, bits, index, 1), {**GPTQ, "bits": bits, "sym": False})
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert "all ones" in packed.note
    assert torch.equal(dense(checkpoint, packed), dense_view(codes, zeros, scales, index))


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_out_of_order(store: Any, dense: Any, symmetric: bool) -> None:
    made = case(4, 32, 64, 16, symmetric)
    shuffled = [(k * 7) % 64 // 16 for k in range(64)]
    checkpoint = store(gptq(*made, 4, shuffled, 1), {**GPTQ, "desc_act": True, "sym": symmetric})
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert packed.scheme is None
    assert "order" in packed.note
    assert torch.equal(dense(checkpoint, packed), dense_view(*made, shuffled))
    # Whole groups that changed places keep their codes.
    moved = [(2, 0, 3, 1)[k // 16] for k in range(64)]
    checkpoint = store(gptq(*made, 4, moved, 1), {**GPTQ, "desc_act": True, "sym": symmetric})
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert packed.scheme is not None
    assert packed.note == ""
    assert torch.equal(dense(checkpoint, packed), dense_view(*made, moved))


def test_a_g_idx_that_was_never_filled(store: Any, dense: Any) -> None:
    made = case(4, 32, 64, 16, True)
    checkpoint = store(gptq(*made, 4, [0] * 64, 1), GPTQ)
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert "g_idx" in packed.note
    assert torch.equal(dense(checkpoint, packed), dense_view(*made, [k // 16 for k in range(64)]))


def test_dynamic_overrides_by_the_first_regex_from_the_start(store: Any, dense: Any) -> None:
    made = case(8, 32, 64, 32, False)
    index = [k // 32 for k in range(64)]
    dynamic = {"-:.*other": {}, "+:.*up_proj": {"bits": 8, "group_size": 32, "sym": False}, "model": {"bits": 2}}
    checkpoint = store(gptq(*made, 8, index, 1), {**GPTQ, "dynamic": dynamic})
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == "w8a16g32-asym"
    assert torch.equal(dense(checkpoint, packed), dense_view(*made, index))
    with pytest.raises(InputError, match="dynamic"):
        open_foreign(store(gptq(*made, 8, index, 1), {**GPTQ, "dynamic": {"-:.*up_proj": {}}}))
    with pytest.raises(InputError, match="regexes"):
        open_foreign(store(gptq(*made, 8, index, 1), {**GPTQ, "dynamic": {"+:(": {}}}))


@pytest.mark.parametrize("layout", [GPTQ, AWQ])
def test_the_dtype_keeps_the_scales(store: Any, dense: Any, layout: dict[str, Any]) -> None:
    codes, zeros, scales = case(4, 32, 64, 16, True)
    index = [k // 16 for k in range(64)]
    for s, dtype in ((scales, "F16"), (scales.bfloat16().half(), "BF16")):
        tensors = gptq(codes, zeros, s, 4, index, 1) if layout is GPTQ else awq(codes, zeros, s)
        checkpoint = store(tensors, layout, dtype="bfloat16")
        packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
        assert packed.dtype == dtype
        assert ("cannot hold" in packed.note) == (dtype == "F16")
        exact = s.float()[:, index] * (codes - zeros[:, index])
        assert torch.equal(dense(checkpoint, packed), exact.to(torch.float16 if dtype == "F16" else torch.bfloat16))


def test_only_a_config_of_its_own(store: Any) -> None:
    made = case(4, 32, 64, 16, True)
    tensors = gptq(*made, 4, [k // 16 for k in range(64)], 1)
    said = {key: value for key, value in GPTQ.items() if key != "quant_method"}
    for file in ("quantize_config.json", "quant_config.json"):
        checkpoint = store(tensors, None, beside={file: said})
        assert method_of(checkpoint) == "gptq"
        assert open_foreign(checkpoint).weights[f"{NAME}.weight"].scheme
    checkpoint = store(awq(*made), None, beside={"quant_config.json": {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}})
    assert method_of(checkpoint) == "awq"
    assert open_foreign(checkpoint).weights[f"{NAME}.weight"].scheme
    assert method_of(store({}, None, beside={"quantize_config.json": said})) is None


def test_a_conv1d_lies_the_other_way(store: Any, dense: Any) -> None:
    made = case(4, 32, 64, 16, False)
    index = [k // 16 for k in range(64)]
    for tensors, layout in ((gptq(*made, 4, index, 1), {**GPTQ, "sym": False}), (awq(*made), AWQ)):
        moved = {name.replace("up_proj", "c_fc"): tensor for name, tensor in tensors.items()}
        checkpoint = store(moved, layout, model_type="gpt2")
        packed = open_foreign(checkpoint).weights["model.layers.0.mlp.c_fc.weight"]
        assert packed.scheme is None
        assert torch.equal(dense(checkpoint, packed), dense_view(*made, index).T)


def awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight outputs in a word, nibble j holding logical output ORDER[j], by Python's integers."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(matrix: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in matrix.T.tolist():
            line = []
            for start in range(0, len(row), 8):
                word = sum(row[start + order[j]] << (4 * j) for j in range(8))
                line.append(word - (1 << 32) if word >> 31 else word)
            rows.append(line)
        return torch.tensor(rows, dtype=torch.int32)

    return {f"{NAME}.qweight": packed(codes), f"{NAME}.qzeros": packed(zeros), f"{NAME}.scales": scales.T}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, -1])
def test_awq(store: Any, dense: Any, symmetric: bool, group: int) -> None:
    width = 64 if group == -1 else group
    made = case(4, 24, 64, width, symmetric)
    checkpoint = store(awq(*made), {**AWQ, "group_size": group})
    foreign = open_foreign(checkpoint)
    packed = foreign.weights[f"{NAME}.weight"]
    assert str(packed.scheme) == f"w4a16{'g16' if group > 0 else ''}{'' if symmetric else '-asym'}"
    assert torch.equal(dense(checkpoint, packed), dense_view(*made, [k // width for k in range(64)]))
    assert foreign.parts == {f"{NAME}.{part}" for part in ("qweight", "qzeros", "scales")}


def test_awq_as_the_converter_of_compressed_tensors_reads_it(store: Any, dense: Any) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors = awq(*case(4, 32, 64, 16, False, seed=3))
    converted = AutoAWQConverter(group_size=16).process(dict(tensors))
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16)
    local = {name.removeprefix(f"{NAME}."): tensor for name, tensor in converted.items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    weight = compressor.decompress(local, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    checkpoint = store(tensors, AWQ)
    assert torch.equal(dense(checkpoint, open_foreign(checkpoint).weights[f"{NAME}.weight"]), weight)


def test_awq_without_zeros_is_symmetric_only_if_the_config_says_so(store: Any) -> None:
    tensors = awq(*case(4, 32, 64, 16, True))
    del tensors[f"{NAME}.qzeros"]
    assert str(open_foreign(store(tensors, {**AWQ, "zero_point": False})).weights[f"{NAME}.weight"].scheme) == "w4a16g16"
    with pytest.raises(InputError, match="qzeros"):
        open_foreign(store(tensors, AWQ))


@pytest.mark.parametrize(
    ("changes", "drop", "said"),
    [
        ({"bits": 5}, None, "bits among"),
        ({"bits": True}, None, "bits among"),
        ({"bits": 8}, None, "shape"),
        ({"group_size": 0}, None, "group_size"),
        ({"group_size": 32}, None, "scales"),
        ({"checkpoint_format": "marlin"}, None, "checkpoint_format"),
        ({"checkpoint_format": ["gptq"]}, None, "checkpoint_format"),
        ({"is_marlin_format": True}, None, "marlin"),
        ({"pack_dtype": "int16"}, None, "pack_dtype"),
        ({"dynamic": ["x"]}, None, "dynamic"),
        ({}, "qzeros", "qzeros"),
        ({}, "scales", "scales"),
        ({}, "qweight", "qweight"),
        ({"desc_act": True}, "g_idx", "g_idx"),
        ({"quant_method": "awq", "version": "gemm"}, None, "shape"),
        ({"quant_method": "awq", "version": "gemv"}, None, "version gemm"),
        ({"quant_method": "quip"}, None, "quip"),
    ],
)
def test_bad_input(store: Any, changes: dict[str, Any], drop: str | None, said: str) -> None:
    tensors = gptq(*case(4, 32, 64, 16, True), 4, [k // 16 for k in range(64)], 1)
    tensors.pop(f"{NAME}.{drop}", None)
    with pytest.raises(InputError, match=said):
        open_foreign(store(tensors, {**GPTQ, **changes}))


def test_all_problems_are_told_at_once(store: Any) -> None:
    tensors = gptq(*case(4, 32, 64, 16, True), 4, [k // 16 for k in range(64)], 1)
    tensors |= {name.replace("up_proj", "down_proj"): t for name, t in tensors.items()}
    tensors[f"{NAME}.g_idx"] = torch.full((64,), 9, dtype=torch.int32)
    tensors["model.layers.0.mlp.down_proj.qzeros"] = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(InputError) as caught:
        open_foreign(store(tensors, GPTQ))
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError, match="once"):
        open_foreign(
            store(
                {**gptq(*case(4, 32, 64, 16, True), 4, [k // 16 for k in range(64)], 1), f"{NAME}.weight": torch.ones(32, 64)},
                GPTQ,
            )
        )


def test_headers_alone_are_judged_with_a_note(store: Any) -> None:
    tensors = gptq(*case(4, 32, 64, 16, True), 4, [k // 16 for k in range(64)], 1)
    checkpoint = store(tensors, GPTQ)
    (checkpoint.path / "model.safetensors").unlink()
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == "w4a16g16"
    assert "headers" in packed.note


def test_a_dense_checkpoint_needs_no_importer(store: Any) -> None:
    checkpoint = store({}, None)
    assert method_of(checkpoint) is None
    with pytest.raises(InputError, match="without a quantization config"):
        open_foreign(checkpoint)
    with pytest.raises(InputError, match="none among"):
        open_foreign(store({}, GPTQ))
