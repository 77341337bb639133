"""Writes codes in a reader's format, with the config that the reader needs.

Codes are rearranged, never rounded again. A model that the format's reader could not load is refused before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from compress.contract.format import Format
from compress.contract.shapes import TensorPass
from compress.errors import Refusal
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


_REMEDIES = {
    "outliers": "pack as native or peft, keep the canonical form, or quantize without outliers",
    "columns": "pack as native, keep the canonical form, or use quantize.gptq, which keeps none",
    "lowrank": "pack as native or peft, or keep the canonical form",
    "rotation": "pack as native, keep the canonical form, or use a scheme without -h",
}


class Pack(TensorPass):
    """Writes the artifact that another reader loads."""

    example: ClassVar[str] = "quantize.rtn(scheme=w4a16g32) | pack"

    format: str = Field("compressed-tensors", description="the format to write; `compress list` shows them")
    dequantize: bool = Field(
        False,
        description="make the reader expand weights while loading (needed for Conv1D, and by transformers for zero points)",
    )

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        from compress.errors import did_you_mean
        from compress.kernels.dispatch import formats

        if value not in formats():
            raise ValueError(f"one of {', '.join(formats())}{did_you_mean(value, formats())}")
        return value

    def target_format(self) -> Format:
        """The format that this pass writes."""
        from compress.kernels.dispatch import load_format

        return load_format(self.format)(dequantize=self.dequantize)

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        return list(weights)

    def becomes(self, weight: Weight, state: State) -> State:
        fmt = _asked(self.format, self.dequantize)
        for word, part in state.needs().items():
            if word not in fmt.holds:
                raise Refusal(f"no reader of {fmt.name} takes {word}({part}) beside codes", _REMEDIES[word])
        try:
            fmt.refuse(weight, state)
        except Refusal as refusal:
            words = re.findall(r"[\w-]+", refusal.do)
            others = [f"pack(format={name})" for name in _holding(_unnumbered(weight), state) if name not in (fmt.name, *words)]
            holds = f"{' or '.join(others)}, which {'holds' if len(others) == 1 else 'hold'} it" if others else ""
            raise Refusal(refusal.reason, "; or ".join(way for way in (refusal.do, holds) if way)) from None
        return state

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        return value, None


@lru_cache
def _asked(name: str, dequantize: bool) -> Format:
    """The format that is asked about each weight in turn."""
    from compress.kernels.dispatch import load_format

    return load_format(name)(dequantize=dequantize)


def _unnumbered(weight: Weight) -> Weight:
    """The same weight of the first expert and block: no format refuses one for its number."""
    name, module = (re.sub(r"\.\d+(?=\.)", ".0", text) for text in (weight.name, weight.module))
    return replace(weight, name=name, module=module, block=None if weight.block is None else 0)


@lru_cache
def _holding(weight: Weight, state: State) -> list[str]:
    """The formats that hold the codes of a weight, with their corrections."""
    from compress.kernels.dispatch import formats, load_format

    found = []
    for name in formats():
        fmt = load_format(name)()
        try:
            fmt.refuse(weight, state)
        except Refusal:
            continue
        # A format that expands codes is only suggested for low-rank factors, which PEFT adds.
        if state.needs().keys() <= fmt.holds and (not fmt.expands or state.lowrank is not None):
            found.append(name)
    return found
