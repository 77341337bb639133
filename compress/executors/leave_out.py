"""Leave out: the loss on the calibration tokens without each layer in turn.

A layer that is left out hands on what it got. Every loss is kept at once, so that a crash costs the forward of one.
"""

from __future__ import annotations

import json

import torch

from compress.device import device_of
from compress.errors import InputError
from compress.executors.step_run import StepRun
from compress.layerwise.batches import cut
from compress.layerwise.logits import Forward
from compress.layerwise.memory_estimate import batch_tokens

KNOWN = ".losses.jsonl"
_CHUNK = 1024
"""Tokens whose logits are compared at a time."""


def losses(run: StepRun) -> list[float]:
    """Cross entropy per scored token without each layer, and last that of the whole model. Raises InputError."""
    ctx, file = run.ctx, run.writer.path / KNOWN
    forward = Forward(run.source, device=device_of(ctx))
    meta_model = forward.meta_model
    most = batch_tokens(run.source.config)
    tensors = run.corpus().tensors
    if set(tensors) - {"input_ids"} and not bool(tensors.get("attention_mask", torch.ones(1)).all()):
        raise InputError("calibration", "samples without padding", "padded ones", "calibrate with packing=concatenate")
    batches = cut(
        {"input_ids": tensors["input_ids"]}, meta_model.module, ctx.rank, ctx.world_size, torch.float32, meta_model.device, most
    )
    layers = len(meta_model.blocks)
    known: dict[int, float] = ctx.broadcast(_read(run) if ctx.is_main else None)
    # The whole model comes first: from it is learnt in what form a block hands on its output.
    for layer in (layers, *range(layers)):
        if layer in known and layer != layers:
            continue
        without = meta_model.blocks[layer].path if layer < layers else ""
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                (logits,) = forward.logits([batch.ids], without=without)
                scored = batch.scored
                rows, labels = logits[scored], batch.ids.roll(-1, dims=1)[scored]
                for start in range(0, len(rows), _CHUNK):
                    part = torch.nn.functional.cross_entropy(
                        rows[start : start + _CHUNK].float(), labels[start : start + _CHUNK], reduction="sum"
                    )
                    sums[0] += part.double().cpu()
                sums[1] += len(rows)
        ctx.add_up(sums)
        known[layer] = float(sums[0] / sums[1].clamp(min=1))
        if ctx.is_main:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"layer": layer, "loss": known[layer]}) + "\n")
        ctx.tell(
            "progress", step=run.step.name, phase="leave out", weight=without, total_bytes=1, done_bytes=0,
            unit="layers", total=layers + 1, done=len(known),
        )  # fmt: skip
    return [known[layer] for layer in range(layers + 1)]


def _read(run: StepRun) -> dict[int, float]:
    """The losses that an interrupted run has kept."""
    file = run.writer.path / KNOWN
    found = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
            found[int(row["layer"])] = float(row["loss"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
