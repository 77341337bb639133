"""Cases: weights of every kind on the device of the tests, with what they mean."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

from compress.errors import Refusal, UsageError
from compress.kernels.bench import ALLOWED, random_weight
from compress.kernels.dispatch import BACKENDS
from compress.kernels.native.modules import PackedWeight
from compress.kernels.native.packed import Packed
from compress.numerics.inputs import rounded_inputs
from compress.spec.weight_state import State

DEVICE = os.environ.get("COMPRESS_TEST_DEVICE", "cuda")
DTYPES = ("bfloat16", "float16")
TOKENS = (1, 8, 16, 64, 128, 2048) if DEVICE == "cuda" else (1, 16, 128)
RUNNING = [name for name in BACKENDS if name != "integers" and (DEVICE == "cpu" or name not in ("int4pack", "int8pack", "cpu"))]
"""Those that may run there, of inputs that are rounded already; what they refuse is skipped, with the reason."""
KERNELS = [name for name in RUNNING if name != "reference"]
"""Those that do not expand a weight first, with tables that they take from the CPU."""
SCHEMES = (
    "w4a16g128", "w4a16g128-asym", "w8a16", "fp8", "w3a16g128", "w2a16g64", "nf4g64", "mxfp4", "nvfp4", "fp4g128", "w8a8",
    "fp8-afp8", "w4a16g32", "w4a16", "w4a16g16-asym", "w3a16g64-asym", "w2a16g32-asym", "w8a16g128-asym", "e3m0g32", "fp4g128-m2",
    "fp8-e5m2", "fp8-tensor", "fp8-block", "fp8-tensor-afp8", "nf3g32", "nf2g16",
)  # fmt: skip
"""The usual ones first: what does not fit into the time is at the end."""


def made(text: str, rows: int, columns: int, dtype: torch.dtype, experts: int | None = None) -> tuple[Packed, torch.Tensor]:
    """A random weight in a state [experts?, rows, columns], and what it means in fp32; on the device."""
    state = State.parse(text if "(" in text else f"codes({text})")
    packed = random_weight(state, rows, columns, dtype, experts)
    packed = replace(packed, parts={name: part.to(DEVICE) for name, part in packed.parts.items()})
    return packed, packed.values().float()


def weight_of(packed: Packed, dtype: torch.dtype, backend: str) -> PackedWeight:
    """The module of a weight. Raises Refusal where the backend refuses."""
    try:
        return PackedWeight(packed, dtype, backend=backend)
    except UsageError as error:
        raise Refusal(error.problems[0].got) from None


def inputs(packed: Packed, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Random activations [tokens, columns], rounded as the scheme says."""
    x = torch.randn(tokens, packed.columns, dtype=dtype, device=DEVICE)
    scheme = packed.state.scheme
    return rounded_inputs(x, scheme) if scheme is not None and scheme.inputs else x


def check(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """A product against that by what the codes mean, in fp32."""
    exact = linear(x.float(), dense, None if bias is None else bias.float())
    assert found.dtype == x.dtype
    difference = float((found.float() - exact).abs().max() / exact.abs().max().clamp(min=1e-9))
    assert difference <= ALLOWED[x.dtype], f"off by {difference:.3g} of the largest output"


def twice(run: Any, *arguments: Any) -> torch.Tensor:
    """What a function gives, the same bits both times."""
    first = run(*arguments)
    assert torch.equal(first, run(*arguments)), "two runs differ"
    return first
