"""Code student: one block whose codes and scales are trained, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from compress.architecture.qlearned import codes_of, with_offsets
from compress.contract.block_training import BlockOptions
from compress.executors.train.block_student import BlockStudent
from compress.executors.train.student import key_of
from compress.layerwise.model import Loader
from compress.numerics import qtensor
from compress.numerics.learned_rounding import positions
from compress.spec.weight_state import State, Weight

Dense = Callable[[Weight], torch.Tensor | None]
"""The dense weight [experts?, rows, columns] that codes were made from; None if it is not known."""


class CodeStudent(BlockStudent):
    """A TrainedBlock: offsets of codes, and gains of scales."""

    learned_parts: ClassVar[tuple[str, ...]] = ("offset", "gain")

    def __init__(self, loader: Loader, path: str, weights: Sequence[Weight], states: Mapping[str, State], dense: Dense) -> None:
        self._dense, self._kept = dense, dict[str, torch.Tensor]()
        self._states = states
        super().__init__(loader, path, weights, states)

    def learn(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            module: Any = self.module.get_submodule(self.leaves[weight.name].path)
            q, dense = module.quantized(), self._dense(weight)
            if dense is not None:
                dense = dense.to(q.codes.device)
            found = with_offsets(module, positions(q, dense))
            if self._states[weight.name].sparsity is not None:
                # A pruned weight stays at the code of zero; without the dense weight, so does one that was rounded to zero.
                self._kept[key_of(weight.name, "offset")] = q.nonzero() if dense is None else dense != 0
            self._learning |= {key_of(weight.name, part): parameter for part, parameter in found.items()}

    def masks(self, states: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self._kept

    def rate(self, name: str, options: BlockOptions) -> float | None:
        return options.scale_lr if self.is_gain(name) else options.code_lr

    @torch.no_grad()
    def settle(self, options: BlockOptions) -> None:
        for name, parameter in self._learning.items():
            if not self.is_gain(name):
                parameter.clamp_(-options.reach, options.reach)

    def parts(self, weight: Weight, learned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        module: Any = self.module.get_submodule(self.leaves[weight.name].path)
        codes = codes_of(module, learned[key_of(weight.name, "offset")])
        return qtensor.encode(weight, replace(self.scaled(weight, learned), codes=codes))
