"""Scheme: the grammar parses, prints back, and refuses in words."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.kernels.compressed_tensors.parts import group_of
from compress.spec.presets import PRESETS, remark
from compress.spec.scheme import BITS, Scheme
from compress.spec.weight_state import State


@given(st.sampled_from(BITS), st.none() | st.integers(8, 4096), st.sampled_from(("", "-asym", "-min")))
def test_text_round_trips(bits: int, group: int | None, kind: str) -> None:
    scheme = Scheme(bits, group, not kind, minimum=kind == "-min")
    assert Scheme.parse(str(scheme)) == scheme


KNOWN = [
    "w4a16g128", "w3a16g64-asym", "w8a16", "w2a16-asym", "w8a8", "w4a8g128", "w4a8g128-asym", "w4a8g128-afp8", "w4a16g32-min", "w5a16g64", "w6a16-asym", "w5a8g32-min-afp8", "w4a4", "w4a4g128", "w3a4g64", "w4a4-aasym",
    "w8a8-aasym", "w4a8g128-aasym", "w4a4g32-asym-aasym", "fp8", "fp8-tensor",
    "fp8-block", "fp8-e5m2", "fp8-e5m2-tensor", "fp8-e5m2-block", "fp8-afp8", "fp8-block-afp8", "nf4g64", "nf3g64", "nf2g64", "nf4",
    "fp4g128", "fp4g256-m1", "fp4g256-m1-ceil", "fp4g320-m2", "e3m0g256", "e3m0g256-m2", "mxfp4", "mxfp4-floor", "mxfp4-even",
    "mxfp4-mse", "mxfp4-afp8", "nvfp4", "nvfp4-4over6", "nvfp4-4over6-afp8", "mxfp4-amxfp4", "mxfp4-mse-amxfp4", "nvfp4-anvfp4", "nvfp4-4over6-anvfp4", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
]  # fmt: skip


@pytest.mark.parametrize("text", KNOWN)
def test_known_spellings_print_back(text: str) -> None:
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w7a16", "2, 3, 4, 5, 6, 8"),
        ("w4a16g64-asym-min", "w4a16g32-min"),
        ("w4a16g64min", "did you mean 'w4a16g64-min'"),
        ("w4a2", "a16, a8 or a4"),
        ("w4a16-aasym", "a8 or a4 where activations have zero points"),
        ("w4a4-afp8", "a8 where activations are FP8"),
        ("mxfp4-anvfp4", "mxfp4"),
        ("w4a4-amxfp4", "w4a16g32-min"),
        ("w4", "w4a16g128"),
        ("w4a16g4", "at least 8"),
        ("nf4g4", "at least 8"),
        ("w4a16g128-afp8", "a8"),
        ("nf5g64", "nf4g64"),
        ("mxfp4g32", "mxfp4"),
        ("fp8g128", "fp8"),
        ("nvfp4-m1", "nvfp4"),
        ("fp4g128-asym", "fp8"),
        ("W4A16G64", "did you mean 'w4a16g64'"),
        ("w4a16g-128", "did you mean 'w4a16g128'"),
        ("w4g128", "did you mean 'w4a16g128'"),
        ("Q4_K", "did you mean 'q4_k'"),
        ("IQ4_NL", "did you mean 'iq4_nl'"),
        ("q7_k", "w4a16g32-min"),
        ("w3a16g64asym", "did you mean 'w3a16g64-asym'"),
        ("int4", r"W4A16 \(w4a16g128\), W4A16_ASYM \(w4a16g128-asym\).*NVFP4 \(nvfp4\)"),
        ("int3", r"preset such as W3A16 \(w3a16g128\)"),
        ("bf16", r"W4A16 \(w4a16g128\).*FP8_DYNAMIC"),
        ("", "w4a16"),
    ],
)
def test_wrong_text_is_refused_with_what_would_do(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Scheme.parse(text)


def test_groups_count_a_ragged_last_one() -> None:
    assert Scheme(4, 64).groups(172) == 3
    assert Scheme(4).groups(172) == 1


def test_the_default_of_mxfp4_need_not_be_said() -> None:
    assert str(Scheme.parse("mxfp4-rceil")) == "mxfp4"


@pytest.mark.parametrize("text", KNOWN)
def test_the_schema_takes_what_parses_and_states_print_it(text: str) -> None:
    assert re.match(Scheme.__get_pydantic_json_schema__(None, None)["pattern"], text)
    assert str(State.parse(f"codes({text})")) == f"codes({text})"


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("fp8", (300, 1)),
        ("fp8-tensor", (1, 1)),
        ("fp8-block", (3, 2)),
        ("nf4g64", (300, 3)),
        ("nvfp4", (300, 11)),
        ("iq4_nl", (300, 6)),
        ("q2_k", (300, 11)),
    ],
)
def test_shapes_of_scales(text: str, shape: tuple[int, int]) -> None:
    assert Scheme.parse(text).grid_shape(300, 172) == shape


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("W4A16", "w4a16g128"), ("w4a16", "w4a16"), ("W4A4", "w4a4g128"), ("w4a4", "w4a4"), ("W8A16", "w8a16g128"), ("W8A8", "w8a8"), ("int8", "w8a8"), ("FP8", "fp8-tensor-afp8"),
        ("W4A16_ASYM", "w4a16g128-asym"), ("w4a16-asym", "w4a16-asym"), ("Fp8-Dynamic", "fp8-afp8"), ("fp8_block", "fp8-block-afp8"),
        ("NVFP4", "nvfp4"), ("MXFP4", "mxfp4"), ("nvfp4a16", "nvfp4"),
    ],
)  # fmt: skip
def test_presets_of_other_tools_are_schemes(text: str, scheme: str) -> None:
    assert str(Scheme.parse(text)) == scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_mean_what_compressed_tensors_means(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    assert re.match(Scheme.__get_pydantic_json_schema__(None, None)["pattern"], name)
    theirs = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[name])
    ours = QuantizationScheme(targets=["Linear"], **group_of(Scheme.parse(name)))

    def meant(args: Any) -> Any:
        words = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")
        return args and [getattr(args, word) for word in words]

    assert meant(ours.weights) == meant(theirs.weights)
    # What is otherwise is said.
    assert (meant(ours.input_activations) == meant(theirs.input_activations)) == (": " not in remark(name)), name
