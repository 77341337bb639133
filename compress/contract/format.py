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
    from compress.checkpoint.safetensors_header import Shard
    from compress.numerics.qtensor import QTensor


@dataclass(frozen=True)
class Verdict:
    """Whether one reader loads an artifact: yes, no or unknown, and why."""

    reader: str
    loads: str
    reason: str


class Format:
    """How a reader's format stores weights. One subclass per folder of `kernels/`, in its `layout.py`."""

    name: ClassVar[str] = ""
    least_zero: ClassVar[int] = 0
    """The smallest zero point that it can store."""
    expands: ClassVar[bool] = False
    """Whether it stores the values of codes instead of the codes; such an artifact is read like another tool's."""
    renames: ClassVar[bool] = False
    """Whether every tensor has another name in it, dense ones too; such an artifact is read like another tool's."""
    holds: ClassVar[frozenset[str]] = frozenset()
    """What its reader knows besides codes: outliers, columns, lowrank, rotation; and cache, scales of keys and values."""

    def __init__(self, dequantize: bool = False) -> None:
        self.dequantize = dequantize

    def reading(self, checkpoint: Checkpoint) -> Self:
        """This format, adjusted to a checkpoint whose tensors tell more than its states."""
        return self

    def written_for(self, model: Model, source: Checkpoint, config: dict[str, Any]) -> Self:
        """This format, adjusted to the model that is packed, with its config.json."""
        return self

    def plain(self, weight: Weight, state: State) -> str:
        """Why a weight stays a plain tensor; empty where it is packed."""
        return "" if state.scheme is not None else "it is not in codes"

    def refuse(self, weight: Weight, state: State) -> None:
        """Raises Refusal if the format cannot hold this weight in this state."""

    def refuse_together(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        """(weight, reason, what to do) for each refusal that depends on the whole model."""
        return []

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        """The tensors that hold `weight`, in order."""
        raise TypeError(f"{self.name} writes nothing")

    def shards(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Shard]:
        """The files of the weights, where they are not safetensors; empty where they are."""
        return []

    def file_of(self, name: str) -> str:
        """The extra file that a tensor is stored in; empty for the shards of the model."""
        return ""

    def copies(self, weight: Weight, state: State) -> dict[str, str]:
        """Tensors of this format with the same bytes as canonical ones: name here -> canonical name."""
        return {}

    def constants(self, weight: Weight, state: State) -> dict[str, torch.Tensor]:
        """Tensors of this format that do not depend on the values, such as shapes."""
        return {}

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        """The tensors, by name, that hold codes; for formats that need nothing else of the state."""
        raise TypeError(f"{self.name} does not encode")

    def encode_as(self, weight: Weight, state: State, value: Any) -> dict[str, torch.Tensor]:
        """The tensors, by name, that `specs` lists, for a QTensor or for values [experts?, rows, columns] not in codes."""
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

    def configured(self, content: dict[str, Any], model: Model, states: dict[str, State]) -> dict[str, Any]:
        """config.json for the reader, from that of the model without a quantization."""
        return content | ({"quantization_config": found} if (found := self.config(model, states)) else {})

    def described(self, checkpoint: Checkpoint) -> dict[str, tuple[Weight, State]]:
        """An artifact's weights in codes, from config.json alone; empty if it does not say enough. Raises InputError."""
        return {}

    def files(self, model: Model, states: dict[str, State]) -> dict[str, str]:
        """Texts of further files that the reader needs, by name."""
        return {}

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        """The reader matrix of an artifact in this format."""
        return []
