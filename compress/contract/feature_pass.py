"""Feature pass: training towards a teacher's predictions and its hidden states.

The states are those that transformers returns with `output_hidden_states`: what each block puts out, and for the last one
what the final norm makes of it. Only tokens whose prediction is scored are compared: every token of a text but the last one,
and none of the padding. So all terms are means over the same tokens, and add up however a step is divided.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from compress.contract.base_passes import TrainingPass
from compress.contract.feature_maps import selected, sizes_of
from compress.contract.objective import Loss, Objective

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.contract.tasks import TrainingBatch


class FeaturePass(TrainingPass):
    """Options of passes whose loss compares hidden states."""

    teacher: str = Field("", description="a directory or a Hub id; without it, the dense model that this one was made from")
    layers: tuple[int, ...] = Field(
        (), description="layers whose outputs are compared, the first is 0, the last is -1; all without it"
    )
    kl: float = Field(1.0, ge=0, description="weight of the divergence KL(teacher || student) of predictions")
    temperature: float = Field(1.0, gt=0, description="logits are divided by it; the divergence is multiplied by its square")
    ce: float = Field(0.0, ge=0, description="weight of the cross entropy with the text's own tokens")

    @field_validator("layers", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int) else value

    def teacher_model(self) -> str | None:
        return self.teacher

    def chosen_layers(self, student: Checkpoint) -> list[int]:
        """The student's layers that are compared. Raises InputError."""
        return selected(self.layers, sizes_of(student).layers, f"{self.pass_name()}.layers")

    def objective_bytes(self, student: Checkpoint, teacher: Checkpoint | None, tokens: int, element_bytes: int) -> int:
        if teacher is None:
            return 0
        own, theirs = sizes_of(student).channels, sizes_of(teacher).channels
        # The states of both models stay until the backward pass; a few fp32 arrays are of one layer.
        return tokens * (len(self.chosen_layers(student)) * (4 * own + element_bytes * theirs) + 4 * 4 * (own + theirs))


class FeatureObjective(Objective):
    """Cross entropy and KL of predictions, and a term for each pair of hidden states."""

    name = "features"
    """Under which the sum of the terms is recorded; `NAME_layers` has each."""

    def __init__(self, pass_: FeaturePass, pairs: Sequence[tuple[int, int]], weight: float) -> None:
        """`pairs` are (layer of the student, layer of the teacher)."""
        self.pass_, self.pairs, self.weight = pass_, pairs, weight

    @abstractmethod
    def term(self, number: int, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The term of pair `number`, summed over scored tokens; both are their states [tokens, channels]."""

    def combined(self, terms: torch.Tensor) -> torch.Tensor:
        """Of the terms of all pairs: their sum."""
        return terms.sum()

    def taught(self, batch: TrainingBatch, teacher: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The teacher's logits, and its state for each pair."""
        import torch

        with torch.no_grad():
            return _called(teacher, batch, [layer for _, layer in self.pairs])

    def further(
        self, batch: TrainingBatch, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """(weight, sum) of other parts of the loss; states are [samples, length, channels], of each pair."""
        return {}

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> Loss:
        import torch

        from compress.numerics.divergence import Divergence, loss_sum
        from compress.numerics.features import again

        how = self.pass_
        logits, theirs = self.taught(batch, teacher)
        predicted, own = _called(student, batch, [layer for layer, _ in self.pairs])
        parts: dict[str, tuple[float, torch.Tensor]] = {}
        if how.ce:
            parts["ce"] = how.ce, loss_sum(None, predicted, batch.labels, None, 0, 1)
        if how.kl:
            parts["kl"] = how.kl, loss_sum(logits, predicted, batch.labels, Divergence(temperature=how.temperature), 1, 0)

        def compared(number: int, *both: torch.Tensor) -> torch.Tensor:
            return self.term(number, *(rows_of(states, batch) for states in both))

        with torch.autocast(predicted.device.type, enabled=False):
            # Rows are cut out again in the backward pass, so that no copies of states are kept until then.
            each = torch.stack([again(compared, number, *both) for number, both in enumerate(zip(own, theirs, strict=True))])
            parts[self.name] = self.weight, self.combined(each)
            parts |= self.further(batch, own, theirs)
        value = sum((weight * part for weight, part in parts.values()), start=each.new_zeros(()))
        if not (how.ce or how.kl):
            # Every trained weight needs a gradient, if only of zero, where processes wait for each other's.
            value = value + 0 * predicted.flatten()[:1].float().sum()
        recorded = {name: part for name, (_, part) in parts.items()}
        return Loss(value, {**recorded, f"{self.name}_layers": each})


def rows_of(states: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
    """Of [samples, length, channels] the scored tokens, [tokens, channels]."""
    return states.flatten(0, 1).index_select(0, batch.positions)


def _called(model: Any, batch: TrainingBatch, layers: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A model's logits of the scored tokens, and the outputs [samples, length, channels] of some of its layers."""
    # State 0 is the embeddings. A list is taken for True by classes that return all states.
    output = model(**batch.inputs, use_cache=False, output_hidden_states=[layer + 1 for layer in layers])
    return rows_of(output.logits, batch), [output.hidden_states[layer + 1] for layer in layers]
