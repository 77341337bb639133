"""Domains: measures domain losses while a run trains, and moves the weights.

The loss is the cross entropy per scored token of the domain's held-out samples, by the model as it is then. Micro-batches are
divided among the processes, and their sums are added up over them; the first process computes the weights for all.
What is measured stands in the line of its step in the record, and a run that goes on reads it there.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from compress.contract.tasks import TrainingBatch
from compress.executors.step_run import StepRun
from compress.executors.train.domain_order import DomainOrder
from compress.executors.train.record import Record
from compress.executors.train.sample_order import SampleOrder
from compress.layerwise.model import build
from compress.numerics.divergence import loss_sum
from compress.numerics.domain_weights import updated
from compress.spec.weight_state import Note


def domains_for(run: StepRun, order: SampleOrder, device: torch.device, dtype: torch.dtype) -> Domains | None:
    """The domains of a run whose weights move; None for one whose shares stay."""
    return Domains(run, order, device, dtype) if isinstance(order, DomainOrder) else None


class Domains:
    """The weights of a run's domains, and what they follow."""

    def __init__(self, run: StepRun, order: DomainOrder, device: torch.device, dtype: torch.dtype) -> None:
        self.order, self.ctx, self.device, self.dtype = order, run.ctx, device, dtype
        self.reference_model = run.teacher
        self.parameters = sum(weight.numel for weight in run.weights)
        self.names, self.how = order.names, order.domains
        self.references: list[float] = []
        self.lost = [0] * len(self.names)
        """How many updates each domain had no loss for."""

    def begin(self, record: Record, teacher: Any) -> None:
        """Goes on after the updates that the record tells of; without any it gets the reference losses. Raises InputError."""
        told: list[dict[str, Any]] = self.ctx.broadcast(record.told("domains") if self.ctx.is_main else None)
        self.order.weights = [list(self.how.weights), *([update[name]["weight"] for name in self.names] for update in told)]
        self.lost = [sum(update[name]["loss"] is None for update in told) for name in self.names]
        self.references = [told[0][name]["reference"] for name in self.names] if told else self._references(teacher)

    def _references(self, teacher: Any) -> list[float]:
        """The reference losses: known ones, or those of the teacher or of another model, which is loaded for that only."""
        known = self.how.references(self.names, self.parameters)
        if known is not None:
            return known
        if teacher is None:
            assert self.reference_model is not None
            teacher = build(self.reference_model, str(self.dtype).removeprefix("torch."), device=self.device)
        return self.losses(teacher)

    def after(self, done: int, model: Any) -> dict[str, Any]:
        """Measures and moves the weights if that is due after so many steps, or at the end; what the record tells of it."""
        if done % self.how.every and done != self.order.steps:
            return {}
        losses = self.losses(model)
        rule = self.how.rule, self.how.eta, self.how.smoothing
        weights = self.ctx.broadcast(updated(self.order.weights[-1], losses, self.references, *rule))
        self.order.weights.append(weights)
        self.lost = [lost + (not math.isfinite(loss)) for lost, loss in zip(self.lost, losses, strict=True)]
        rows = zip(self.names, losses, self.references, weights, self.order.drawn(done), strict=True)
        return {
            "domains": {
                name: {"loss": loss if math.isfinite(loss) else None, "reference": reference, "weight": weight, "samples": drawn}
                for name, loss, reference, weight, drawn in rows
            }
        }

    def losses(self, model: Any) -> list[float]:
        """The loss of each domain, in nats per token; NaN for one without a scored token."""
        ctx, size = self.ctx, self.order.training_options.micro_batch
        parts = [
            (domain, held[at : at + size]) for domain, held in enumerate(self.order.held_out) for at in range(0, len(held), size)
        ]
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        # A model that is sharded over processes is called by all of them as often.
        for number in range(-(-len(parts) // ctx.world_size)):
            at = number * ctx.world_size + ctx.rank
            domain, samples = parts[min(at, len(parts) - 1)]
            batch = self.order.batch(samples) if at < len(parts) else self.order.empty(samples[0])
            sums[domain] += self._cross_entropy(batch, model)
        ctx.add_up(sums)
        counts = [self.order.tokens(held) for held in self.order.held_out]
        return [total / count if count else math.nan for total, count in zip(sums.tolist(), counts, strict=True)]

    @torch.no_grad()
    def _cross_entropy(self, batch: TrainingBatch, model: Any) -> float:
        """Summed over the scored tokens of a batch."""
        inputs = {name: value.to(self.device) for name, value in batch.inputs.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, batch.positions.to(self.device))
            return float(loss_sum(None, logits, batch.labels.to(self.device), None, 0.0, 1.0))

    def tell(self, run: StepRun) -> None:
        """Adds counted lines to the run, and tells the weights at its end."""
        run.notes.extend(self._notes(run.step.name))
        self.ctx.tell("notice", step=run.step.name, text=f"domains: {run.notes[0].reason}")

    def _notes(self, title: str) -> list[Note]:
        """Counted lines: the weights at the end, and which domains gave samples again or had no loss."""
        ends = ", ".join(f"{weight:.6g}" for weight in self.order.weights[-1])
        found = [Note("domains", f"{title} ended with weights=[{ends}]", tuple(self.names))]
        drawn = self.order.drawn(self.order.steps)
        for name, pool, count, lost in zip(self.names, self.order.pools, drawn, self.lost, strict=True):
            if count > len(pool):
                reason = f"{title} drew {count} samples of its {len(pool)}: {count - len(pool)} were seen before"
                found.append(Note("repeated", reason, (name,)))
            if lost:
                reason = f"{lost} of {len(self.order.weights) - 1} updates of {title} left its share as it was: no loss of it"
                found.append(Note("no loss", reason, (name,)))
        return found
