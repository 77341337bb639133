"""Code student: trains codes and scales, of one block or of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from compress.architecture.qlearned import QLearned, codes_of, with_offsets
from compress.checkpoint.reader import Checkpoint
from compress.contract.block_training import BlockOptions
from compress.executors.train.block_student import BlockStudent
from compress.executors.train.student import Student, key_of
from compress.layerwise.model import Loader
from compress.numerics import qtensor
from compress.numerics.learned_rounding import positions
from compress.spec.weight_state import State, Weight

Dense = Callable[[Weight], torch.Tensor | None]
"""The dense weight [experts?, rows, columns] that codes were made from; None if it is not known."""


class CodeStudent(Student):
    """Of a weight in codes, offsets of the codes and gains of the scales are trained. `_dense` and `_states` are given first."""

    learned_parts: ClassVar[tuple[str, ...]] = ("offset", "gain")
    _dense: Dense
    _states: Mapping[str, State]

    def open_codes(self, weight: Weight, module: Any) -> dict[str, nn.Parameter]:
        q, dense = module.quantized(), self._dense(weight)
        return with_offsets(module, positions(q, None if dense is None else dense.to(q.codes.device)))

    def share(self, module: Any, found: dict[str, nn.Parameter]) -> None:
        if not isinstance(module, QLearned):
            twin = next(m for m in self.module.modules() if isinstance(m, QLearned) and m.offset is found["offset"])
            with_offsets(module, twin.position)
        super().share(module, found)

    def kind(self, name: str) -> Literal["matrix", "other", "scale", "code"]:
        # Gains and dense weights have the names of weights.
        return super().kind(name) if name in self.leaves else "code"

    def masks(self, states: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = super().masks(states)
        for name, leaf in self.leaves.items():
            if leaf.codes and (key := key_of(name, "offset")) in self._learning and self._states[name].sparsity is not None:
                # A pruned weight stays at the code of zero; without the dense weight, so does one that was rounded to zero.
                dense = self._dense(self.dense_view.weights[name][0])
                module: Any = self.module.get_submodule(leaf.path)
                found[key] = module.quantized().nonzero() if dense is None else dense != 0
        return found

    def parts(self, weight: Weight, learned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.leaves[weight.name].codes:
            return super().parts(weight, learned)
        module: Any = self.module.get_submodule(self.leaves[weight.name].path)
        codes = codes_of(module, learned[key_of(weight.name, "offset")])
        return qtensor.encode(weight, replace(self.scaled(weight, learned), codes=codes))


class BlockCodeStudent(CodeStudent, BlockStudent):
    """A TrainedBlock whose codes are chosen anew."""

    def __init__(self, loader: Loader, path: str, weights: Sequence[Weight], states: Mapping[str, State], dense: Dense) -> None:
        self._dense, self._states = dense, states
        super().__init__(loader, path, weights, states)

    def rate(self, name: str, options: BlockOptions) -> float | None:
        return options.scale_lr if self.is_gain(name) else options.code_lr

    @torch.no_grad()
    def settle(self, options: BlockOptions) -> None:
        for name, parameter in self._learning.items():
            if not self.is_gain(name):
                parameter.clamp_(-options.reach, options.reach)


class LatentStudent(CodeStudent):
    """A Student whose codes are those of latent weights, rounded whenever they are used."""

    def __init__(self, checkpoint: Checkpoint, states: Mapping[str, State], dense: Dense) -> None:
        self._dense, self._states = dense, states
        super().__init__(checkpoint)
