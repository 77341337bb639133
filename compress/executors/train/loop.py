"""Loop: runs a training pass over a checkpoint, in one process or many.

A step's loss is the sum over its scored tokens divided by their number, over all processes and micro-batches, so the way
a step is divided affects only rounding. accelerate wraps the student (DDP, or FSDP2 if it is launched so) and reduces
gradients; the teacher is a plain model in every process. Weights are held in fp32; the compute dtype is the context's. What the
pass's objective learns besides weights is in every process too, and its gradients are summed here.

After every `save_every` steps the state is kept, and a run that was killed goes on from there, to the same bytes on a CPU
with the same threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.checkpoint.reader import Checkpoint
from compress.contract.objective import Loss, Metric, Models
from compress.contract.tasks import TrainingBatch
from compress.contract.train_pass import TrainPass
from compress.device import CPU, device_of
from compress.errors import InputError, UsageError
from compress.executors.anomalies import watch
from compress.executors.step_run import StepRun
from compress.executors.stream import check_mask, stream
from compress.executors.train import state
from compress.executors.train.code_student import LatentStudent
from compress.executors.train.domain_order import order_for
from compress.executors.train.domains import domains_for
from compress.executors.train.record import Record
from compress.executors.train.student import Student
from compress.freed_memory import large_blocks_kept, trim_memory
from compress.layerwise.logits import is_masked
from compress.layerwise.memory_estimate import computing
from compress.layerwise.model import build
from compress.numerics import qtensor
from compress.spec.weight_state import Weight

STATE, BAD = ".training-state.safetensors", "bad-batch.safetensors"
_APART = 1e-3
"""Largest relative difference of a text's logits with and without other texts in its row: rounding only."""


def train(run: StepRun) -> dict[str, float]:
    """Trains, and writes every weight. Returns the seconds of each kind of work."""
    stream(run.untouched())
    training = Training(run)
    training.all_steps()
    started = time.perf_counter()
    training.write() if run.step.cut is None else training.write_smaller(run)
    if training.domains is not None:
        training.domains.tell(run)
    training.seconds["write"] = time.perf_counter() - started
    trim_memory()
    return {name: round(seconds, 3) for name, seconds in training.seconds.items()}


class Training:
    """A student, its teacher, and an optimizer over the steps of their training."""

    def __init__(self, run: StepRun) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        step, source, writer, ctx = run.step, run.source, run.writer, run.ctx
        assert isinstance(step.pass_, TrainPass)
        started = time.perf_counter()
        self.step, self.pass_, self.weights, self.writer, self.ctx = step, step.pass_, run.trained, writer, ctx
        self.training_options = step.pass_.training_options()
        self.dtype = computing(ctx.dtype, source.config)
        # An expert in a module of its own gets no gradient in a step whose tokens are not routed to it.
        left_out = any(w.kind == "expert" and not w.converted and w.experts is None for w in self.weights)
        unused = DistributedDataParallelKwargs(find_unused_parameters=left_out, broadcast_buffers=False)
        self.accelerator = Accelerator(cpu=device_of(ctx) == CPU, kwargs_handlers=[unused])
        assert self.accelerator.num_processes == ctx.world_size, (self.accelerator.num_processes, ctx.world_size)
        _check_launch(self.accelerator)
        self.student = self._student(run)
        self.student.learn(self.weights)
        masks = self.student.masks(step.before)
        self.order = order_for(run, step.pass_, causal=_causal(self.student.module, source))
        self.domains = domains_for(run, self.order, self.accelerator.device, self.dtype)
        self._recompute()
        teacher = None if step.pass_.teacher_model() is None else run.teacher
        self.teacher = None if teacher is None else self._placed(build(teacher, str(self.dtype).removeprefix("torch.")))
        self._keeps_texts_apart()
        paths = {name: self.student.path_of(name) for name in self.student.trainable}
        self.model, self.optimizer = self._prepared()
        inner = self.accelerator.unwrap_model(self.model)
        self.parameters: dict[str, nn.Parameter] = {name: inner.get_parameter(path) for name, path in paths.items()}
        self.masks = {name: state.like(mask, self.parameters[name]) for name, mask in masks.items()}
        models = Models(inner, self.teacher, source, teacher, self.training_options, ctx.seed)
        self.objective = step.pass_.objective(models)
        self.own = self._own()
        self.trained = [state.Trained(self.parameters, self.optimizer), *self.own]
        self.record = Record(writer.path, step.pass_.pass_name())
        self.seconds = {"load": time.perf_counter() - started, "steps": 0.0, "save": 0.0}

    def _student(self, run: StepRun) -> Student:
        if not self.pass_.learns_codes():
            return Student(run.source)
        assert run.dense_parent is not None
        return LatentStudent(run.source, run.step.after, run.dense_parent.find)

    def _prepared(self) -> tuple[Any, torch.optim.Optimizer]:
        """The student and its optimizer as accelerate wraps them."""
        kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "other": [], "scale": [], "code": []}
        for name, parameter in {id(p): (n, p) for n, p in self.student.trainable.items()}.values():
            kinds[self.student.kind(name)].append(parameter)
        s = self.training_options
        rates = {"scale": s.scale_lr, "code": s.code_lr}
        groups = [
            {"params": parameters, "peak": rates.get(kind, s.lr), "lr": 0.0,
             "weight_decay": s.weight_decay if kind == "matrix" else 0.0}
            for kind, parameters in kinds.items() if parameters
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=s.betas)
        return self.accelerator.prepare(self.student.module, optimizer)  # type: ignore[no-any-return]

    def _own(self) -> list[state.Trained]:
        """What the objective learns besides weights, if anything, with an optimizer that accelerate does not know of."""
        groups = self.objective.own()
        if not groups:
            return []
        own = {f"objective/{name}": parameter for group in groups for name, parameter in group.parameters.items()}
        assert len(own) == sum(len(group.parameters) for group in groups), "two parameters of an objective have the same name"
        made = [
            {"params": list(group.parameters.values()), "peak": group.lr, "rate": group.rate, "lr": 0.0,
             "maximize": group.maximize, "weight_decay": group.weight_decay}
            for group in groups
        ]  # fmt: skip
        return [state.Trained(own, torch.optim.AdamW(made, betas=self.training_options.betas))]

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.accelerator.device)

    def _recompute(self) -> None:
        """Turns on activation checkpointing, but not the training mode that transformers requires for it: that means dropout."""
        if not self.training_options.recompute:
            return
        model = self.student.module
        if not model.supports_gradient_checkpointing:
            raise UsageError("recompute", "a family that can compute its blocks again", type(model).__name__, "leave it off")
        # The method was renamed between versions of transformers.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        for part in model.modules():
            if getattr(part, "gradient_checkpointing", False):
                part.training = True

    def _keeps_texts_apart(self) -> None:
        """Raises InputError for a family whose attention crosses from one text of a row to another."""
        if (row := self.order.joined()) is None:
            return
        model, inputs = self.student.module, row.inputs
        starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        second = slice(starts[1], starts[2] if len(starts) > 2 else None)
        with torch.no_grad():
            together = model(**inputs, use_cache=False).logits[0, second]
            alone = model(input_ids=inputs["input_ids"][:, second], use_cache=False).logits[0]
        if float((together - alone).abs().max()) > _APART * max(1.0, float(alone.abs().max())):
            got = f"{type(model).__name__}, whose attention joins them"
            raise InputError("packing", "a model that keeps the texts of a row apart", got, "set packing to pad")

    def all_steps(self) -> None:
        """Runs the steps from the last saved state to the end."""
        try:
            with large_blocks_kept():
                self._steps()
        finally:
            self.objective.close()

    def _steps(self) -> None:
        order, path, buffers = self.order, self.writer.path / STATE, self.objective.buffers()
        done = state.load(path, self.trained, buffers)
        tokens = self.record.back_to(done) if self.ctx.is_main else 0
        if not done:
            share = order.share(0, self.ctx.rank, self.ctx.world_size)
            self.objective.prepare((self._placed_batch(batch) for batch, _ in share), self.ctx.add_up)
        if self.domains is not None:
            self.domains.begin(self.record, self.teacher)
        began, began_tokens = time.perf_counter(), tokens
        for number in range(done, order.steps):
            started = time.perf_counter()
            samples = order.of_step(number)
            count = order.tokens(samples)
            loss, norm, rate, metrics = self._one_step(number, count)
            tokens += count
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._stop(number, samples, loss, norm)
            told = {} if self.domains is None else self.domains.after(number + 1, self.model)
            if self.ctx.is_main:
                self.record.add(step=number + 1, loss=loss, lr=rate, norm=norm, tokens=tokens, **metrics, **told)
            self.seconds["steps"] += time.perf_counter() - started
            pace = (tokens - began_tokens) / (time.perf_counter() - began)
            self.ctx.tell(
                "train", step=self.step.name, phase="train", number=number + 1, steps=order.steps, loss=loss,
                tokens_per_second=pace, metrics=metrics,
            )  # fmt: skip
            if (number + 1) % self.training_options.save_every == 0 or number + 1 == order.steps:
                started = time.perf_counter()
                if self.ctx.is_main:
                    self.record.keep()
                state.save(path, number + 1, self.trained, buffers, self.ctx)
                self.seconds["save"] += time.perf_counter() - started

    def _one_step(self, number: int, count: int) -> tuple[float, float, float, dict[str, Metric]]:
        """(loss per token, norm of the weights' gradient, learning rate, the objective's numbers) of an optimizer step.

        The step has `count` scored tokens. The norm is not finite if a gradient of the objective's own is not.
        """
        ctx, s = self.ctx, self.training_options
        for each in self.trained:
            each.optimizer.zero_grad()
        self.objective.begin_step(number, self.order.steps)
        sums: dict[str, torch.Tensor] = {}
        for batch, last in self.order.share(number, ctx.rank, ctx.world_size):
            # Gradients are averaged over processes, and only after the last micro-batch.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                found = self._loss(batch)
                self.accelerator.backward(found.value * (ctx.world_size / max(1, count)))
            for name, part in {"loss": found.value, **found.parts}.items():
                sums[name] = sums.get(name, 0) + part.detach().double().cpu()
        for part in sums.values():
            ctx.add_up(part)
        value = float(sums.pop("loss")) / max(1, count)
        metrics: dict[str, Metric] = {name: (part / max(1, count)).tolist() for name, part in sums.items()}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                # AdamW counts steps for each parameter; a loaded state has one count for all.
                parameter.grad = torch.zeros_like(parameter)
            elif name in self.masks:
                parameter.grad.mul_(self.masks[name])
        finite = self._own_gradients(metrics)
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), s.clip or math.inf)
        share = s.rate(number, self.order.steps)
        for each in self.trained:
            for group in each.optimizer.param_groups:
                rate = group.get("rate")
                group["lr"] = group["peak"] * (rate(number, self.order.steps) if rate else share)
        size = float(norm) if finite else math.nan
        if math.isfinite(value) and math.isfinite(size):
            for each in self.trained:
                each.optimizer.step()
        return value, size, s.lr * share, metrics | self.objective.metrics()

    def _own_gradients(self, metrics: dict[str, Metric]) -> bool:
        """Completes the gradients of what the objective learns; returns whether they are finite."""
        parameters = [parameter for each in self.own for parameter in each.parameters.values()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            # A loss is multiplied by the number of processes, because a wrapped model takes the mean over them.
            self.ctx.add_up(parameter.grad)
            parameter.grad.div_(self.ctx.world_size)
        if (penalty := self.objective.penalty()) is not None:
            penalty.backward()
            metrics["penalty"] = float(penalty.detach())
        return all(bool(parameter.grad.isfinite().all()) for parameter in parameters if parameter.grad is not None)

    def _placed_batch(self, batch: TrainingBatch) -> TrainingBatch:
        device = self.accelerator.device
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        return TrainingBatch(inputs, batch.positions.to(device), batch.labels.to(device))

    def _loss(self, batch: TrainingBatch) -> Loss:
        lower = self.dtype is not torch.float32
        with torch.autocast(self.accelerator.device.type, self.dtype, enabled=lower):
            return self.objective.loss(self._placed_batch(batch), self.model, self.teacher)

    def _stop(self, number: int, samples: list[int], loss: float, norm: float) -> None:
        """Saves the batch whose loss was not finite, and raises InputError."""
        kept = self.writer.path.parent / BAD
        if self.ctx.is_main:
            from safetensors.torch import save_file

            batch = self.order.batch(samples)
            save_file({name: value.contiguous() for name, value in batch.inputs.items()}, kept)
        self.ctx.barrier()
        raise InputError(
            f"step {number + 1}", "a finite loss and gradient", f"a loss of {loss:g}, a gradient of norm {norm:g}",
            f"look at its batch, {kept}; lower lr, or try --dtype float32",
        )  # fmt: skip

    def _before(self, weight: Weight) -> torch.Tensor:
        """A weight before training, [experts?, rows, columns]."""
        return qtensor.as_matrix(weight, self.student.dense_view.dense(weight.name))

    def write(self) -> None:
        """Writes every trained weight, and the record of the training."""
        for weight in self.weights:
            learned = {key: state.whole(self.parameters[key]) for key in self.student.learned(weight.name)}
            if not self.ctx.is_main:
                continue
            parts = self.student.parts(weight, learned)
            after = self.step.after[weight.name]
            dense = after.scheme is None
            value = qtensor.as_matrix(weight, parts[weight.name]) if dense else qtensor.decode(weight, after, parts)
            if after.sparsity is not None:
                check_mask(weight, after.sparsity, value)
            odd = watch(weight, value, None, partial(self._before, weight), "lower lr or scale_lr, or raise warmup")
            digests = {name: self.writer.put(name, part) for name, part in parts.items()}
            # The error of pruning or rounding that an earlier step measured no longer holds.
            self.writer.record(weight.name, digests, {"error": None, "output_error": None, "notes": odd})
        if self.ctx.is_main:
            self.record.draw()

    def write_smaller(self, run: StepRun) -> None:
        """Writes the smaller model that the masks have found, and the record of the training."""
        from compress.executors.train.extract import extract
        from compress.executors.train.mask_objective import MaskObjective

        assert isinstance(self.objective, MaskObjective)
        extract(run, self.objective, lambda name: state.whole(self.parameters[name]) if name in self.parameters else None)
        if self.ctx.is_main:
            self.record.draw()


def _check_launch(accelerator: Any) -> None:
    """Raises UsageError for a way to distribute a model that this executor does not support."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if asked and kind != "FSDP":
        got = f"FSDP on {accelerator.device}"
        raise UsageError("accelerate", "FSDP on accelerators, or DDP", got, "launch without --use_fsdp")
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP") or (kind == "FSDP" and not accelerator.is_fsdp2):
        got = f"{kind} version 1" if kind == "FSDP" else kind
        raise UsageError("accelerate", "DDP, or FSDP version 2", got, "launch with --fsdp_version 2, or with neither")


def _causal(model: Any, source: Checkpoint) -> bool:
    """Whether a model predicts the next token. Raises InputError for one without logits for every token."""
    kind = type(model).__name__
    if model.main_input_name != "input_ids" or model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        got = f"{kind}"
        raise InputError(source.name, "a language model with logits for every token of one text", got, "train another model")
    return not is_masked(kind)
