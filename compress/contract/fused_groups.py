"""Fused groups: weights that readers fuse, and the largest magnitude in each.

vLLM and SGLang fuse q/k/v, gate/up, and the inputs of linear attention, into one matrix with one scale. Schemes with one scale
for a whole matrix (`nvfp4`, `fp8-tensor`) therefore choose a common scale for these weights: an executor measures their largest
magnitude when it comes to the first of them, reading each once more. Fused experts already hold gate and up; they have a scale
for each expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "in_proj_qkv": "in_proj_qkvz", "in_proj_z": "in_proj_qkvz", "in_proj_b": "in_proj_ba", "in_proj_a": "in_proj_ba",
}  # fmt: skip
"""Weight -> the name that readers give the fused matrix."""
_ALSO = {"query": "qkv", "key": "qkv", "value": "qkv", "q": "qkv", "k": "qkv", "v": "qkv", "w1": "w13", "w3": "w13"}


def together(name: str) -> str:
    """The path of the fused matrix that a weight becomes part of, or its own path."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{(FUSED | _ALSO).get(last, last)}"


class Peaks:
    """Measures fused weights whose scheme after a step has one scale for a whole matrix. `read` gives a dense weight by name."""

    def __init__(self, weights: Iterable[Weight], after: Mapping[str, State], read: Callable[[str], torch.Tensor]) -> None:
        self._members: dict[tuple[str, Scheme], list[str]] = defaultdict(list)
        for weight in weights:
            scheme = after[weight.name].scheme
            if scheme is not None and scheme.scales in ("tensor", "e4m3") and weight.experts is None:
                self._members[together(weight.name), scheme].append(weight.name)
        self._places = {name: group for group, names in self._members.items() for name in names}
        self._read, self._found, self._lock = read, dict[tuple[str, Scheme], float](), Lock()

    def of(self, weight: Weight) -> Weight:
        """The weight, with the largest magnitude of its group as `peak` if its scheme needs it."""
        import torch

        from compress.numerics.input_rotation import rotated
        from compress.numerics.rounding import largest

        group = self._places.get(weight.name)
        if group is None:
            return weight
        with self._lock:
            if group not in self._found:
                size = group[1].hadamard
                found = torch.tensor([largest(rotated(self._read(name), size)) for name in self._members[group]])
                self._found[group] = float(found.max())
        return replace(weight, peak=self._found[group])
