"""Trains a checkpoint in any state to predict what its teacher predicts.

Logit distillation (Hinton et al., 1503.02531): for every scored token the divergence of the student's distribution from the
teacher's, over the whole vocabulary in fp32. Forward KL alone is the usual choice for recovering the quality that pruning or
quantizing a base model has cost (Muralidharan et al., Minitron, 2407.14679). Zeros do not change.

Codes do not change either, and scales are trained, unless latent=true: then each weight in codes has a latent weight, which is
rounded to its code in every forward, and gradients go straight through the rounding (Bengio et al., 1308.3432), with learned
scales (LSQ, 1902.08153). This is quantization-aware distillation (QAD, LLM-QAT 2305.17888); its result is codes as before.
It is for thousands of steps: AdamW moves every latent weight alike, and over tens of steps most of that is noise. Over 16 steps
after `quantize.gptq(scheme=w2a16g32, correct=residual)` a model of 8 M parameters went from a KL of 0.0056 to 0.0050 by scales
alone, to 0.0054 with code_lr=0.001, and to 0.018 with 0.02.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.contract.base_passes import TrainingPass, codes_of, refuse_columns
from compress.contract.tasks import TrainingBatch
from compress.contract.train_pass import LossPass
from compress.contract.training_options import TrainingOptions
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.divergence import Divergence


class Logits(TrainingPass, LossPass):
    """Lowers the divergence between a model's and its teacher's next-token distributions."""

    example: ClassVar[str] = "calibrate | prune.magnitude(sparsity=2:4) | distill.logits(batch=4, micro_batch=2)"

    teacher: str = Field("", description="a directory or a Hub id; without it, the dense model that this one was made from")
    divergence: Literal["forward", "reverse", "skew", "skew-reverse", "jsd"] = Field(
        "forward", description="KL(teacher || student), KL(student || teacher), their skews, or Jensen-Shannon"
    )
    temperature: float = Field(1.0, gt=0, description="logits are divided by it; the divergence is multiplied by its square")
    mix: float | None = Field(None, ge=0, le=1, description="mixing weight of a skew or of Jensen-Shannon; by default 0.1 or 0.5")
    top_k: int = Field(0, ge=0, description="the teacher's likeliest tokens, compared one by one, all others as one; 0 for all")
    kl: float = Field(1.0, ge=0, description="weight of the divergence")
    latent: bool = Field(
        False, description="choose the codes anew, too: those of latent weights that are rounded in every forward and trained"
    )
    code_lr: float = Field(1e-3, ge=0, le=1e30, description="latent: peak learning rate of latent weights, in steps of codes")
    ce: float = Field(0.0, ge=0, description="weight of the cross entropy with the text's own tokens")

    @model_validator(mode="after")
    def _sensible(self) -> Logits:
        if not self.kl and not self.ce:
            raise ValueError("kl and ce are both 0: there is nothing to learn")
        if self.top_k and self.divergence != "forward":
            raise ValueError("top_k goes with divergence=forward only")
        if self.mix is not None and self.divergence in ("forward", "reverse"):
            raise ValueError(f"divergence={self.divergence} reads no mix")
        if self.mix == 1 and self.divergence.startswith("skew"):
            raise ValueError("a skew with mix=1 is 0 whatever the student does")
        if "code_lr" in self.model_fields_set and not self.latent:
            raise ValueError("code_lr: only with latent=true")
        return self

    def learns_codes(self) -> bool:
        return self.latent

    def becomes(self, weight: Weight, state: State) -> State:
        if self.latent:
            refuse_columns(state)
        return super().becomes(weight, state)

    def learns(self, state: State) -> list[str]:
        return codes_of(state.scheme) if self.latent and state.scheme is not None else super().learns(state)

    def training_options(self) -> TrainingOptions:
        return replace(super().training_options(), code_lr=self.code_lr)

    def teacher_model(self) -> str | None:
        return self.teacher if self.kl else None

    def _how(self) -> Divergence:
        from compress.numerics.divergence import Divergence

        return Divergence(self.divergence, self.temperature, self.mix, self.top_k)

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> torch.Tensor:
        import torch

        from compress.numerics.divergence import loss_sum

        def rows(model: Any) -> torch.Tensor:
            logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits
            return logits.flatten(0, 1).index_select(0, batch.positions)

        taught = None
        if self.kl:
            with torch.no_grad():
                taught = rows(teacher)
        return loss_sum(taught, rows(student), batch.labels, self._how() if self.kl else None, self.kl, self.ce)
