"""Tasks: statistics, matrices and batches that executors and passes exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Statistic(Protocol):
    """A statistic of a weight's inputs; additive, so that processes can sum theirs."""

    tokens: int

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs [tokens, width] of any float dtype."""

    def parts(self) -> list[torch.Tensor]:
        """The sums, to be added up over processes in place."""


class Observer(Protocol):
    """What observes inputs: a pass, or an allocator that decides by them."""

    @property
    def route(self) -> Literal["router", "all"]:
        """The tokens that a routed expert is observed on."""

    def two_streams(self) -> bool:
        """Whether it is shown the inputs of the unchanged model, too."""

    def statistic(self, width: int) -> Statistic:
        """An empty statistic of inputs of that width."""

    def statistic_bytes(self, width: int) -> int:
        """Memory of a statistic, including what `prepare` needs."""

    def prepare(self, statistic: Any) -> Any:
        """Computes, once, from the statistic what all weights with the same inputs share."""

    def workspace_bytes(self, weight: Weight) -> int:
        """Memory that the work on one weight needs besides it."""


@dataclass(frozen=True)
class MatrixTask:
    """One matrix to solve: a weight, or one expert of a fused one. `value` [out, in] in the stored dtype."""

    weight: Weight
    after: State
    value: torch.Tensor
    codes: QTensor | None = None
    """For a CompensatingPass: the codes of `value`, in the rows and columns of the quantized form."""
    grams: Sequence[torch.Tensor] | None = None
    """Where outputs are weighed: the mean of g g^T of each segment of its rows (numerics/output_feedback.py)."""


@dataclass(frozen=True)
class Solution:
    """The new value of a matrix, a tensor [out, in] or codes [rows, columns], with its squared errors and norms."""

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
    """A few training samples: the model's arguments, and which of its logits are scored."""

    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor
    """The rows of the logits [samples * length, vocabulary] that are scored: int64 [scored]."""
    labels: torch.Tensor
    """The token that each of these rows should predict: int64 [scored]."""
