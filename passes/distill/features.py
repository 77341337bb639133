"""Trains a student of any width towards its teacher's hidden states, projected.

For each compared layer a linear map from the student's channels to the teacher's is learned beside the student, and the mean
square of P n(s) - n(t) is lowered, where n divides a token's state by its root mean square (Minitron, 2407.14679). Maps are
part of the training state, and of nothing else. A map begins as the channels that were kept, where the manifest tells them or
the widths are equal, and else at random. Layers are compared as the manifest tells, or else layer i of n with layer
ceil((i + 1) N / n) - 1 of the teacher's N.

`intra_class` adds what intra-class similarity (ICS-FD) does for classifiers, where a position's class is the token that it
predicts: the last compared layer's states are drawn to the teacher's states of their nearest neighbours of the same class.
These are looked for in the same micro-batch, so this term depends on micro_batch; no other does. Models without logits for
every token, such as classifiers of whole texts, are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.contract.feature_maps import maps_of, sizes_of
from compress.contract.feature_pass import FeatureObjective, FeaturePass, rows_of
from compress.contract.objective import Models, Objective, OwnParameters

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.contract.tasks import TrainingBatch


class Features(FeaturePass):
    """Lowers the distance of projected hidden states to the teacher's."""

    example: ClassVar[str] = "calibrate | prune.magnitude(sparsity=2:4) | distill.features(batch=4, micro_batch=2)"

    features: float = Field(1.0, gt=0, description="weight of the mean over layers")
    projection_lr: float = Field(1e-3, ge=0, le=1e30, description="peak learning rate of the maps from student to teacher")
    intra_class: float = Field(0.0, ge=0, description="weight of the distance to the teacher's neighbours of the same class")
    neighbours: int = Field(3, ge=1, description="how many neighbours of the same class intra_class compares with")

    def check_teacher(self, student: Checkpoint, teacher: Checkpoint) -> None:
        self.chosen_layers(student)
        maps_of(student.manifest, teacher.manifest)
        sizes_of(teacher)

    def objective_bytes(self, student: Checkpoint, teacher: Checkpoint | None, tokens: int, element_bytes: int) -> int:
        assert teacher is not None
        map_ = sizes_of(student).channels * sizes_of(teacher).channels
        # A map is held with its gradient and two moments.
        maps = 16 * map_ * len(self.chosen_layers(student))
        return maps + super().objective_bytes(student, teacher, tokens, element_bytes)

    def objective(self, models: Models) -> Objective:
        return FeaturesObjective(self, models)


class FeaturesObjective(FeatureObjective):
    """Learns a projection for each compared layer."""

    name = "features"

    def __init__(self, pass_: Features, models: Models) -> None:
        import torch
        from torch import nn

        teacher = models.teacher_source
        assert teacher is not None
        own, theirs = sizes_of(models.source), sizes_of(teacher)
        maps = maps_of(models.source.manifest, teacher.manifest)
        n, most = own.layers, theirs.layers
        layers = _known(maps.layers, n, most) or [-(-(layer + 1) * most // n) - 1 for layer in range(n)]
        chosen = pass_.chosen_layers(models.source)
        super().__init__(pass_, [(layer, layers[layer]) for layer in chosen], pass_.features)
        kept = _known(maps.channels, own.channels, theirs.channels)
        generator = torch.Generator().manual_seed(models.seed)
        self.intra_class, self.neighbours = pass_.intra_class, pass_.neighbours
        self.lr, self.maps = pass_.projection_lr, dict[str, nn.Parameter]()
        for layer in chosen:
            if kept:
                start = torch.zeros(theirs.channels, own.channels)
                start[list(kept), range(own.channels)] = 1
            else:
                start = torch.randn(theirs.channels, own.channels, generator=generator) / own.channels**0.5
            self.maps[f"map.{layer}"] = nn.Parameter(start.to(models.student.device))

    def own(self) -> list[OwnParameters]:
        return [OwnParameters(self.maps, self.lr)]

    def term(self, number: int, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        from compress.numerics.features import projected_sum

        return projected_sum(student, teacher, list(self.maps.values())[number])

    def combined(self, terms: torch.Tensor) -> torch.Tensor:
        return terms.mean()

    def further(
        self, batch: TrainingBatch, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
    ) -> dict[str, tuple[float, torch.Tensor]]:
        if not self.intra_class:
            return {}
        from compress.numerics.features import intra_class_sum

        own, theirs = (rows_of(states[-1], batch) for states in (student, teacher))
        found = intra_class_sum(own, theirs, list(self.maps.values())[-1], batch.labels, self.neighbours)
        return {"intra_class": (self.intra_class, found)}


def _known(kept: Sequence[int], own: int, theirs: int) -> Sequence[int]:
    """The teacher's layers or channels of a student's, if the manifests or equal sizes tell them; else empty."""
    kept = kept or range(theirs)
    return kept if len(kept) == own and max(kept) < theirs else ()
