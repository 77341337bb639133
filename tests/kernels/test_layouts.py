"""Every format: unpack(pack(q)) == q, declared shapes are true, and the reader's own code agrees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.contract.format import Format
from compress.errors import Refusal
from compress.kernels.compressed_tensors.layout import CompressedTensors, patterns
from compress.kernels.compressed_tensors.parts import group_of, kind_of
from compress.kernels.dispatch import formats, load_format
from compress.numerics import qtensor
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight

SCHEMES = [
    "w2a16g32",
    "w3a16g32",
    "w4a16g32",
    "w8a16g32",
    "w4a16",
    "w3a16g43",
    "w2a16g32-asym",
    "w3a16g32-asym",
    "w4a16g32-asym",
    "w8a16-asym",
    "w5a16g32",
    "w6a16g32-asym",
    "w4a16g32-min",
    "w6a16-min",
    "w5a16g32-min",
]
FLOATS = [
    "nf4g32", "nf3g32", "iq4_nl", "fp4g32-m2", "e3m0g32", "fp8", "fp8-e5m2", "fp8-tensor", "fp8-block", "mxfp4", "nvfp4", "w8a8", "w4a8g32",
    "w4a4", "w4a4g32-aasym", "mxfp4-amxfp4", "nvfp4-anvfp4",
]  # fmt: skip
HELD = [
    "fp8", "fp8-tensor", "fp8-block", "mxfp4", "nvfp4", "w8a8", "w4a8g32", "w4a8g32-afp8", "w4a4", "w3a4g32", "mxfp4-amxfp4",
    "nvfp4-anvfp4",
]  # fmt: skip
"""Those that compressed-tensors holds."""
SUPER = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
SHAPES = [(1, 32), (7, 64), (33, 96), (64, 172), (96, 86), (17, 544)]
WIDE = [(1, 256), (7, 512), (33, 768)]
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def example(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> tuple[Weight, QTensor]:
    weight = Weight("m.layers.0.q.weight", DTYPES[dtype], shape, "linear", "m.layers.0.q", "weight", "Linear", "decoder", 0)
    q = nearest(torch.randn(shape).to(dtype), scheme, dtype).q
    return weight, replace(q, input_scale=torch.tensor(37.5)) if scheme.input_divisor else q


def equal(a: QTensor, b: QTensor) -> bool:
    def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        return x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))

    parts = [
        same(getattr(a, name), getattr(b, name)) for name in ("codes", "scale", "zero", "minimum", "super_scale", "super_minimum")
    ]
    wholes = [[None if one is None else one.reshape(1) for one in (q.tensor_scale, q.input_scale)] for q in (a, b)]
    return a.scheme == b.scheme and all(parts) and all(map(same, *wholes))


@pytest.mark.parametrize("name", ["canonical", *formats()])
@pytest.mark.parametrize("text", [*SCHEMES, *FLOATS, *SUPER])
def test_unpack_inverts_pack_and_shapes_are_declared(name: str, text: str) -> None:
    for shape in WIDE if text in SUPER else SHAPES:
        comes_back(name, text, shape)


def comes_back(name: str, text: str, shape: tuple[int, int]) -> None:
    """One case; a failure shows all three by pytest's own account of this call."""
    scheme = Scheme.parse(text)
    weight, q = example(shape, scheme)
    state = State(scheme)
    fmt: Format | None = None if name == "canonical" else load_format(name)(dequantize=True)
    if fmt is not None:
        try:
            fmt.refuse(weight, state)
        except Refusal as refusal:
            reasons = {
                "do not divide": shape[1] % (scheme.group or 1),
                "no format of it holds": not (scheme.integer or text in HELD) or scheme.minimum or scheme.bits in (5, 6),
                "has minima": name in ("gptq", "awq") and scheme.minimum,
                "readers take 2, 3": name == "gptq" and scheme.bits in (5, 6),
                "no longer rounds": scheme.inputs,
                "would not round": scheme.inputs,
                "16-bit activations only": name in ("gptq", "awq") and (not scheme.integer or scheme.inputs),
                "multiples of 32": name in ("gptq", "awq") and (shape[0] % 32 or shape[1] % 32),
                "holds 4 bits": name == "awq" and scheme.bits != 4,
                "integers and 16-bit": name == "mlx" and (not scheme.integer or scheme.inputs),
                "up to rounding": name == "mlx" and scheme.zeros,
                "32, 64 and 128": name == "mlx" and (scheme.group or shape[1]) not in (32, 64, 128),
                "kernels read groups": name == "native" and "g43" in text,
                "scales of one level": name == "native" and text in SUPER,
                "no type of it holds": name == "gguf"
                and text != "iq4_nl"
                and (not scheme.integer or scheme.bits not in (4, 5, 8 - scheme.minimum)),
                "floating minimum": name == "gguf" and scheme.zeros,
                "blocks of 32": name == "gguf" and (shape[1] % 32 or (scheme.group or 32) % 32),
                "blocks of 64": name == "gguf" and text == "nvfp4" and shape[1] % 64,
                "in its own way": name == "gguf" and scheme.inputs,
            }
            assert any(said in str(refusal) and true for said, true in reasons.items())  # noqa: PT017
            return
    tensors = (fmt.encode if fmt else qtensor.encode)(weight, q)
    specs = fmt.specs(weight, state) if fmt else qtensor.specs(weight, state)
    assert {s.name: (s.shape, s.nbytes) for s in specs} == {
        n: (tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()
    }
    if fmt is not None and fmt.expands:
        assert torch.equal(tensors[weight.name], q.dequantize().bfloat16())
        return
    back = (fmt.decode if fmt else qtensor.decode)(weight, state, tensors)
    if name == "gguf" and q.tensor_scale is not None:
        # It stores the reciprocal.
        torch.testing.assert_close(back.tensor_scale, q.tensor_scale, rtol=2**-23, atol=0)
        back = replace(back, tensor_scale=q.tensor_scale)
    assert equal(back, q)


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("text", [t for t in (*SCHEMES, *HELD) if "g43" not in t])
def test_what_a_format_copies_from_the_canonical_form_is_what_it_encodes(name: str, text: str) -> None:
    weight, q = example((64, 96), Scheme.parse(text))
    fmt = load_format(name)(dequantize=not q.scheme.inputs)
    try:
        fmt.refuse(weight, State(q.scheme))
    except Refusal:
        pytest.skip(f"{name} does not hold it")
    encoded, canonical = fmt.encode(weight, q), qtensor.encode(weight, q)
    for there, here in fmt.copies(weight, State(q.scheme)).items():
        assert torch.equal(encoded[there].reshape(-1).view(torch.uint8), canonical[here].reshape(-1).view(torch.uint8))
    for there, tensor in fmt.constants(weight, State(q.scheme)).items():
        assert torch.equal(encoded[there], tensor)


@pytest.mark.parametrize("text", [t for t in (*SCHEMES, *HELD) if "g43" not in t and kind_of(Scheme.parse(t))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_itself_decodes_the_same_values(text: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = Scheme.parse(text)
    weight, q = example((64, 96), scheme, dtype)
    if scheme.scales in ("e8m0", "e4m3") and dtype != torch.bfloat16:
        pytest.skip("the reader expands these to bfloat16")
    fmt = CompressedTensors(dequantize=True)
    local = {name.rpartition("weight")[1] + name.rpartition("weight")[2]: t for name, t in fmt.encode(weight, q).items()}
    args = QuantizationScheme(targets=["Linear"], **group_of(scheme))
    compressor = BaseCompressor.get_value_from_registry(kind_of(scheme))
    theirs = compressor.decompress({k: v.clone() for k, v in local.items()}, args)["weight"]
    assert torch.equal(theirs.float(), q.dequantize().to(theirs.dtype).float())


def test_fused_experts_keep_their_layout() -> None:
    scheme = Scheme.parse("w4a16g32")
    stored = torch.randn(3, 64, 40).bfloat16()
    weight = Weight("e.gate_up_proj", "BF16", (3, 64, 40), "expert", transposed=True)
    matrix = qtensor.as_matrix(weight, stored)
    assert matrix.shape == (3, 40, 64)
    q = nearest(matrix, scheme, torch.bfloat16).q
    back = qtensor.decode(weight, State(scheme), qtensor.encode(weight, q))
    assert equal(back, q)
    assert (qtensor.as_matrix(weight, back.dequantize()) - stored.float()).norm() / stored.float().norm() < 0.12


@pytest.mark.parametrize(
    ("wanted", "others", "found"),
    [
        (["a.0.x", "a.1.x"], ["a.0.y"], [r"re:a\.\d+\.x$"]),
        (["a.0.x", "a.2.x"], ["a.1.x"], ["a.0.x", "a.2.x"]),
        (["lm_head"], ["a.0.x"], ["lm_head"]),
        ([], ["a"], []),
    ],
)
def test_patterns_match_all_that_is_wanted_and_nothing_else(wanted: list[str], others: list[str], found: list[str]) -> None:
    assert patterns(wanted, others) == found
