"""Trains a pruned model towards its teacher's hidden states, layer by layer.

SquareHead (Kurtic et al., 2310.06927): the sum over layers l of mean((S_l - T_l)^2) / (mean(T_l^2) + eps), S student, T
teacher, means over tokens and channels, beside KL and cross entropy of predictions. It is for students of the teacher's own
width, of which many weights are zero; zeros stay zero. Of a student whose layers or hidden channels were cut, those that its
manifest says were kept are compared with the teacher's.

mean(T_l^2) is measured once, over the tokens of the first step, and held. Taken anew from each micro-batch, as in the
released code, it would make a token's loss depend on the tokens beside it: this way, how a step is divided changes only
rounding. The paper's setup is ce=1, kl=0, eps=paper; the defaults are for recovery: KL without cross entropy, and an eps that
mutes no layer. `squarehead_layers` in training.jsonl has the term of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from compress.contract.feature_maps import compared
from compress.contract.feature_pass import FeatureObjective, FeaturePass, rows_of
from compress.contract.objective import Loss, Models, Objective
from compress.errors import InputError

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.contract.tasks import TrainingBatch

_NAMED_EPS = ("parity", "paper")
_DOWN = ("down_proj", "dense_4h_to_h", "mlp.c_proj", "fc2")
"""Ends of the paths of modules that read what a feed-forward layer has activated."""


class SquareHead(FeaturePass):
    """Lowers the distance of hidden states to the teacher's, each layer relative to its size."""

    example: ClassVar[str] = "calibrate | prune.magnitude(sparsity=2:4) | distill.squarehead(batch=4, micro_batch=2)"

    squarehead: float = Field(1.0, gt=0, description="weight of the sum over layers")
    eps: str = Field(
        "parity",
        description="added to a layer's mean square: parity (1e-8: all layers count alike), paper (0.0078125), or a number",
    )
    density: float = Field(
        0.0, ge=0, description="weight of the density of the down projections' inputs, which makes activations sparser (DEFT)"
    )

    @field_validator("eps")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            known = value in _NAMED_EPS or 0 < float(value) < float("inf")
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"parity, paper or a number above 0, not '{value}'")
        return value

    def eps_value(self) -> float:
        """The number that eps stands for."""
        from compress.numerics.features import PAPER_EPS, PARITY_EPS

        return {"parity": PARITY_EPS, "paper": PAPER_EPS}.get(self.eps) or float(self.eps)

    def check_teacher(self, student: Checkpoint, teacher: Checkpoint) -> None:
        self.chosen_layers(student)
        compared(student, teacher)
        if self.density:
            _refuse_hidden(student)

    def objective(self, models: Models) -> Objective:
        return SquareHeadObjective(self, models)


class SquareHeadObjective(FeatureObjective):
    """SquareHead with the means of squares that the first step had."""

    name = "squarehead"

    def __init__(self, pass_: SquareHead, models: Models) -> None:
        import torch

        assert models.teacher_source is not None
        maps, _, theirs = compared(models.source, models.teacher_source)
        super().__init__(pass_, [(layer, maps.layers[layer]) for layer in pass_.chosen_layers(models.source)], pass_.squarehead)
        device, everything = models.student.device, maps.channels == tuple(range(theirs.channels))
        self.channels = None if everything else torch.tensor(maps.channels, device=device)
        self.eps, self.density, self.teacher = pass_.eps_value(), pass_.density, models.teacher
        self.mean_square = torch.zeros(len(self.pairs), device=device)
        self.hooks: list[Any] = []
        self.inputs: list[torch.Tensor] = []
        if self.density:
            for path, module in models.student.named_modules():
                if path.endswith(_DOWN) and not any(True for _ in module.children()):
                    self.hooks.append(module.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0])))

    def buffers(self) -> dict[str, torch.Tensor]:
        return {"mean_square": self.mean_square}

    def prepare(self, batches: Iterable[TrainingBatch], add_up: Callable[[torch.Tensor], None]) -> None:
        import torch

        from compress.numerics.features import square_sum

        sums = torch.zeros(len(self.pairs) + 1, dtype=torch.float64, device=self.mean_square.device)
        for batch in batches:
            _, states = self.taught(batch, self.teacher)
            rows = [self._kept(rows_of(state, batch)) for state in states]
            sums += torch.stack([*(square_sum(each).double() for each in rows), sums.new_tensor(len(batch.positions))])
        add_up(sums)
        self.mean_square.copy_(sums[:-1] / sums[-1].clamp(min=1))

    def _kept(self, teacher: torch.Tensor) -> torch.Tensor:
        return teacher if self.channels is None else teacher.index_select(-1, self.channels)

    def term(self, number: int, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        from compress.numerics.features import squarehead_sum

        return squarehead_sum(student, self._kept(teacher), self.mean_square[number], self.eps)

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> Loss:
        self.inputs.clear()
        try:
            return super().loss(batch, student, teacher)
        finally:
            # What a recomputed block adds in the backward pass is dropped by the next batch.
            self.inputs.clear()

    def further(
        self, batch: TrainingBatch, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
    ) -> dict[str, tuple[float, torch.Tensor]]:
        if not self.density:
            return {}
        from compress.numerics.features import again, density_sum

        def dense(inputs: torch.Tensor) -> torch.Tensor:
            return density_sum(rows_of(inputs.view(*batch.inputs["input_ids"].shape, -1), batch))

        each = [again(dense, inputs) for inputs in self.inputs]
        return {"density": (self.density, sum(each[1:], start=each[0]) / len(each))}

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.inputs.clear()


def _refuse_hidden(student: Checkpoint) -> None:
    """Raises InputError for a model with experts, which only some tokens go through, or without a known down projection."""
    names = {name.removesuffix(".weight") for name in student.logical}
    if not any(name.endswith(_DOWN) for name in names) or any("experts" in name for name in names):
        expected = f"feed-forward layers that every token goes through and that end in {' or '.join(_DOWN)}"
        kind = student.config.get("model_type")
        raise InputError("distill.squarehead.density", expected, f"a model of type '{kind}' without", "leave density out")
