"""Tasks: what executors and passes hand to each other: statistics, matrices, batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Statistic(Protocol):
    """What is folded of the inputs that a weight reads; additive, so that processes can sum theirs."""

    tokens: int

    def add(self, x: torch.Tensor) -> None:
        """Folds in inputs [tokens, width] of any float dtype."""

    def parts(self) -> list[torch.Tensor]:
        """The sums, to be added up over processes in place."""


@dataclass(frozen=True)
class MatrixTask:
    """One matrix to solve: a weight, or one expert of a fused one. `value` [out, in] in the stored dtype."""

    weight: Weight
    after: State
    value: torch.Tensor
    codes: QTensor | None = None
    """For a CompensatingPass: what `value` has become, in the rows and columns of the quantized form."""


@dataclass(frozen=True)
class Solution:
    """The new value of a matrix, a tensor [out, in] or codes [rows, columns], with squared norms of what it cost."""

    value: torch.Tensor | QTensor
    lost: float
    """|W - W'|^2."""
    norm: float
    output_lost: float
    """|(W - W') x|^2, per calibration token."""
    output_norm: float
    note: tuple[str, str] | None = None
    """(what, reason) where the matrix was not solved as asked; counted in the manifest."""


@dataclass(frozen=True)
class TrainingBatch:
    """A few samples of training: the model's arguments, and which of its outputs count."""

    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor
    """Of the logits [samples * length, vocabulary], the rows that count: int64 [scored]."""
    labels: torch.Tensor
    """The token that each of these rows should predict: int64 [scored]."""
