"""Train pass: the shape of passes that train the whole model.

Its executor is executors/train/.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.contract.pass_base import Executor, ExternalInputs, TargetedPass
from compress.contract.tasks import TrainingBatch

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.contract.domain_options import DomainOptions
    from compress.contract.objective import Models, Objective
    from compress.contract.training_options import TrainingOptions
    from compress.corpus import Corpus, CorpusSpec


class TrainPass(TargetedPass):
    """Gradient training of the whole model."""

    second_model: ClassVar[Literal["", "teacher", "dense"]] = "teacher"

    def executor(self) -> Executor:
        return "train"

    def texts(self) -> CorpusSpec | None:
        """The texts to train on; None for the calibration tokens that are stored with the checkpoint."""
        return None

    @abstractmethod
    def training_options(self) -> TrainingOptions:
        """How to train."""

    def teacher_model(self) -> str | None:
        """The teacher: a directory, a Hub id, or empty for the dense parent; None for no teacher."""
        return None

    def second_name(self) -> str | None:
        """The other model that it reads, named alike: its teacher, or one whose losses it is compared with."""
        return self.teacher_model()

    def domains(self) -> DomainOptions | None:
        """How the shares of its sources follow losses while it trains; None if they are fixed."""
        return None

    @abstractmethod
    def objective(self, models: Models) -> Objective:
        """What a run minimizes, and what it learns besides weights. Raises InputError for models that it cannot train."""

    def check_teacher(self, student: Checkpoint, teacher: Checkpoint) -> None:
        """Raises InputError, from headers and manifests alone, for a teacher that cannot teach this model."""

    def objective_bytes(self, student: Checkpoint, teacher: Checkpoint | None, tokens: int, element_bytes: int) -> int:
        """Memory that the objective needs besides logits, for micro-batches of so many tokens."""
        return 0

    def reads_tokens(self) -> bool:
        return self.texts() is None

    def own_tokens(self, model: Checkpoint, seed: int) -> Corpus | None:
        from compress.corpus import build_for

        texts = self.texts()
        return None if texts is None else build_for(texts, model, seed)

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        taught = {"teacher": found.second_model} if found.second_model else {}
        return {"tokens": found.tokens, "dtype": found.dtype, **taught}

    def how_to_use_less_memory(self) -> str:
        return "lower micro_batch or length, or set recompute=true"


class LossPass(TrainPass):
    """A TrainPass whose loss needs a batch and the models, and nothing else."""

    @abstractmethod
    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> torch.Tensor:
        """The loss summed over the batch's scored tokens, fp32; both models are called like models of transformers."""

    def objective(self, models: Models) -> Objective:
        from compress.contract.objective import LossObjective

        return LossObjective(self.loss)
