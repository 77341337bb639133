"""Format: where the bits of a packed weight lie, for one reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compress.spec.weight_state import Note, State, TensorSpec, Weight

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.checkpoint.reader import Checkpoint
    from compress.numerics.qtensor import QTensor


@dataclass(frozen=True)
class Verdict:
    """Whether one reader loads an artifact: yes, no or unknown, and why."""

    reader: str
    loads: str
    reason: str


class Format:
    """Where the bits lie, for one reader. One subclass per folder of `kernels/`, in its `layout.py`."""

    name: ClassVar[str] = ""
    least_zero: ClassVar[int] = 0
    """The smallest zero point that it can say."""
    expands: ClassVar[bool] = False
    """Whether it holds what codes mean, and not the codes: then it is read as another tool's."""
    holds: ClassVar[frozenset[str]] = frozenset()
    """What may stand beside codes: outliers, lowrank."""

    def __init__(self, dequantize: bool = False) -> None:
        self.dequantize = dequantize

    def reading(self, checkpoint: Checkpoint) -> Self:
        """The same, for a checkpoint of which the tensors tell more than states do."""
        return self

    def plain(self, weight: Weight, state: State) -> str:
        """Why a weight stays a plain tensor; empty where it is packed."""
        return "" if state.scheme is not None else "it is not in codes"

    def refuse(self, weight: Weight, state: State) -> None:
        """Raises Refusal where the reader cannot hold this weight in this state."""

    def refuse_together(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        """(weight, reason, what to do) for what only shows when the whole model is seen."""
        return []

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        """The tensors that hold `weight`, in order."""
        raise TypeError(f"{self.name} writes nothing")

    def file_of(self, name: str) -> str:
        """The file of its own that a tensor lies in; empty for the shards of the model."""
        return ""

    def copies(self, weight: Weight, state: State) -> dict[str, str]:
        """Tensors of this format whose bytes the canonical form has already: name here -> name there."""
        return {}

    def constants(self, weight: Weight, state: State) -> dict[str, torch.Tensor]:
        """Tensors of this format that say nothing of the values, such as shapes."""
        return {}

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        """Tensors by name, of codes in a state that tells no more than they do."""
        raise TypeError(f"{self.name} does not encode")

    def encode_as(self, weight: Weight, state: State, value: Any) -> dict[str, torch.Tensor]:
        """Tensors by name, as `specs` says; of a QTensor, or of values [experts?, rows, columns] that are not in codes."""
        return self.encode(weight, value)

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor | torch.Tensor:
        """The inverse of `encode`."""
        raise TypeError(f"{self.name} does not decode")

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        """Counted lines for the manifest about what this format changes."""
        return []

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        """`quantization_config` for config.json; empty where there is to be none."""
        raise TypeError(f"{self.name} has no config")

    def described(self, checkpoint: Checkpoint) -> dict[str, tuple[Weight, State]]:
        """What config.json alone says of an artifact's weights in codes; empty where it says too little. Raises InputError."""
        return {}

    def files(self, model: Model, states: dict[str, State]) -> dict[str, str]:
        """Texts of further files that a reader looks for, by name."""
        return {}

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        """The reader matrix of an artifact in this format."""
        return []
