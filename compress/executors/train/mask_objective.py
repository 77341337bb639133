"""Mask objective: learns which parts of a model are kept, while it is trained.

The loss is that of the language model under masks that are drawn anew for each step. Constraints pull the expected share of
closed masks of each kind to the one that is wanted: their multipliers ascend where masks and weights descend. The wanted share
rises over the first steps. Sheared LLaMA (Xia et al., 2310.06694), in the form of its code, which does not depend on sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.architecture.weight_map import resolve
from compress.contract.objective import Loss, Metric, Models, Objective, OwnParameters
from compress.contract.tasks import TrainingBatch
from compress.layerwise.masked_model import MaskedModel, Masks
from compress.numerics import hard_concrete
from compress.numerics.divergence import loss_sum
from compress.numerics.importance import best
from compress.spec.kept import MLP, Kept, KeptBlock, Sizes

_START, _SPREAD = 5.0, 0.01
"""log a of a mask before training: its mean and deviation over the parts."""


@dataclass(frozen=True)
class MaskOptions:
    """How masks are learned."""

    lr: float
    multiplier_lr: float
    warmup: float
    """Share of the steps over which the wanted share of closed masks rises."""


class MaskObjective(Objective):
    """Masks on the parts of which `after` has fewer than `before`."""

    def __init__(self, models: Models, before: Sizes, after: Sizes, options: MaskOptions) -> None:
        self.before, self.after, self.options, self.seed = before, after, options, models.seed
        pairs = {
            name: (getattr(before, name), getattr(after, name)) for name in ("layers", "hidden", "groups", "units", "experts")
        }
        self.sparsity = {name: 1 - new / old for name, (old, new) in pairs.items() if new < old}
        model = resolve(models.source, allow_dtype_mismatch=True)
        weights = [weight for weight in model.weights if weight.module]
        self.masked = MaskedModel(models.student, weights, model.family, before, frozenset(self.sparsity))
        device = next(models.student.parameters()).device
        generator = torch.Generator().manual_seed(self._number("start"))
        self.log_a: dict[str, nn.Parameter] = {}
        self.multipliers: dict[str, nn.Parameter] = {}
        for name in self.sparsity:
            shape = (pairs[name][0],) if name in ("layers", "hidden") else (before.layers, pairs[name][0])
            start = _START + _SPREAD * torch.randn(shape, generator=generator)
            self.log_a[name] = nn.Parameter(start.to(device))
            self.multipliers[name] = nn.Parameter(torch.zeros(2, device=device))
        self.u: dict[str, torch.Tensor] = {}
        self.wanted = 0.0
        """The wanted share of closed masks at this step, as a share of the one in the end."""

    def _number(self, what: str) -> int:
        """A seed of this run for one purpose."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/masks/{what}".encode()).digest()[:7], "big")

    def own(self) -> Sequence[OwnParameters]:
        multipliers = {f"multipliers.{name}": parameter for name, parameter in self.multipliers.items()}
        return (
            OwnParameters({f"masks.{name}": parameter for name, parameter in self.log_a.items()}, self.options.lr),
            OwnParameters(multipliers, self.options.multiplier_lr, maximize=True),
        )

    def begin_step(self, step: int, steps: int) -> None:
        rising = max(1, round(self.options.warmup * steps))
        self.wanted = min(1.0, step / rising)
        generator = torch.Generator().manual_seed(self._number(f"step {step}"))
        with torch.no_grad():
            for name, parameter in self.log_a.items():
                parameter.clamp_(hard_concrete.LOWEST, hard_concrete.HIGHEST)
                self.u[name] = torch.rand(parameter.shape, generator=generator).to(parameter.device)

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> Loss:
        # Drawn again for each micro-batch from the same numbers, because each has a backward pass of its own.
        self.masked.masks = Masks(
            **{name: hard_concrete.sampled(parameter, self.u[name]) for name, parameter in self.log_a.items()}
        )
        logits = student(**batch.inputs, use_cache=False).logits
        rows = logits.flatten(0, 1).index_select(0, batch.positions)
        return Loss(loss_sum(None, rows, batch.labels, None, 0.0, 1.0))

    def penalty(self) -> torch.Tensor:
        each = [
            hard_concrete.constraint(parameter, self.sparsity[name] * self.wanted, self.multipliers[name])
            for name, parameter in self.log_a.items()
        ]
        return torch.stack(each).sum()

    def metrics(self) -> dict[str, Metric]:
        with torch.no_grad():
            closed = {f"closed.{name}": float(1 - hard_concrete.score(p).mean()) for name, p in self.log_a.items()}
        return {**closed, "wanted": self.wanted}

    def close(self) -> None:
        self.masked.close()

    @torch.no_grad()
    def settled(self) -> tuple[Kept, Masks]:
        """What is kept, exactly as much as wanted of each row, and the masks to fold into it: 0 for what is cut."""
        before, after = self.before, self.after
        kept, settled = Kept.first(after, before), {n: hard_concrete.settled(p.detach().cpu()) for n, p in self.log_a.items()}
        layers = best(settled["layers"], after.layers) if "layers" in settled else kept.layers
        hidden = best(settled["hidden"], after.hidden) if "hidden" in settled else kept.hidden
        blocks = []
        for layer in layers:
            rows = {name: z[layer] for name, z in settled.items() if z.dim() == 2}
            first = kept.blocks[0]
            groups = best(rows["groups"], after.groups) if "groups" in rows else first.groups
            queries = tuple(group * before.share + n for group in groups for n in range(before.share))
            experts = best(rows["experts"], after.experts) if "experts" in rows else first.experts
            units = {name: numbers for name, numbers in first.units.items() if not name.isdigit()}
            units |= {str(expert): tuple(range(before.expert_units)) for expert in experts}
            if "units" in rows:
                units[MLP] = best(rows["units"], after.units)
            blocks.append(KeptBlock(groups, queries, units, experts))
        return Kept(layers, hidden, tuple(blocks)), Masks(**settled)
