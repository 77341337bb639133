"""Allocate: decides the state of each weight before shards are laid out.

The decision is written to a table beside the step's directory at once, so that a crash while weights are written does not
cost another sweep. In the end the table and its picture lie in the directory that the step makes.

    allocation.jsonl   a line for each weight: its state, bytes, share of zeros, and the cost of each offered state
    allocation.svg     bits over the blocks, or shares of zeros
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.atomic import write_text
from compress.checkpoint.reader import ALLOCATION, Checkpoint
from compress.context import Context
from compress.contract.allocator import Allocator, InputAllocator, Offer, offers_of, read_table, rows_of
from compress.numerics import qtensor
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.contract.step_plan import StepPlan

LINES, PICTURE = ALLOCATION


def allocate(
    step: StepPlan, weights: Sequence[Weight], source: Checkpoint, tokens: Path | None, table: Path, ctx: Context
) -> dict[str, State]:
    """The state of every weight after a step: by the table of an interrupted run, by a given table, or by a new decision."""
    allocator = step.pass_.allocator()
    assert allocator is not None
    offers, rest = offers_of(step, weights)
    if not ctx.broadcast(table.is_file()):
        found = allocator.known([offer.weight for offer in offers])
        if found is None:
            if isinstance(allocator, InputAllocator):
                offers = by_inputs(step, allocator, offers, source, tokens, table.with_suffix(".states"), ctx)
            elif allocator.gradients:
                offers = by_gradients(step, allocator, offers, source, tokens, table.with_suffix(".states"), ctx)
            else:
                offers = [by_values(allocator, offer, source) for offer in offers]
            found = allocator.decide(offers, rest)
        if ctx.is_main:
            write_text(table, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(offers, found)))
        ctx.barrier()
    return ctx.broadcast(read_table(table) if ctx.is_main else None)  # type: ignore[no-any-return]


def by_gradients(
    step: StepPlan, allocator: Allocator, offers: Sequence[Offer], source: Checkpoint, tokens: Path | None, folder: Path,
    ctx: Context,
) -> list[Offer]:  # fmt: skip
    """The offers with their costs from gradients; `folder` holds hidden states during the sweep."""
    from compress.executors.gradients import GradientSweep, begun
    from compress.layerwise.memory_estimate import batch_tokens

    if allocator.weighs_outputs([offer.weight for offer in offers]):
        return by_both(step, allocator, offers, source, tokens, folder, ctx)
    # Squares are those of samples.
    most = 1 if allocator.squares else batch_tokens(source.config)
    do = "use a pass that needs no gradients, or give a table that was made elsewhere"
    meta_model, batches, named = begun(source, tokens, step.name, most, do, ctx)
    wanted = {offer.weight.name: offer for offer in offers}
    costs: dict[str, tuple[float, ...]] = {}

    def take(weight: Weight, gradient: torch.Tensor) -> None:
        value = qtensor.as_matrix(weight, meta_model.stored(weight.name))
        costs[weight.name] = allocator.costs(wanted[weight.name], value, qtensor.as_matrix(weight, gradient))

    sweep = GradientSweep(meta_model, [offer.weight for offer in offers], folder, named, allocator.squares)
    loss = sweep.run(batches, take)
    ctx.tell("sensed", step=step.name, loss=loss, weights=len(offers))
    return [replace(offer, costs=costs[offer.weight.name]) for offer in offers]


def by_both(
    step: StepPlan, allocator: Allocator, offers: Sequence[Offer], source: Checkpoint, tokens: Path | None, folder: Path,
    ctx: Context,
) -> list[Offer]:  # fmt: skip
    """The offers with their costs from inputs and from gradients by outputs; `folder` holds hidden states during the sweep."""
    from compress.executors.both_grams import BothSweep
    from compress.executors.gradients import begun
    from compress.layerwise.memory_estimate import batch_tokens

    do = "use another mode, or give a table that was made elsewhere"
    meta_model, batches, named = begun(source, tokens, step.name, batch_tokens(source.config), do, ctx)
    wanted = {offer.weight.name: offer for offer in offers}
    costs: dict[str, tuple[float, ...]] = {}

    def take(weight: Weight, inputs: Any, outputs: list[torch.Tensor]) -> None:
        value = qtensor.as_matrix(weight, meta_model.stored(weight.name))
        costs[weight.name] = allocator.costs_by_both(wanted[weight.name], value, inputs, outputs)

    sweep = BothSweep(meta_model, [offer.weight for offer in offers], folder, named)
    loss = sweep.run_both(batches, allocator.prepare_inputs, take)
    ctx.tell("sensed", step=step.name, loss=loss, weights=len(offers))
    return [replace(offer, costs=costs[offer.weight.name]) for offer in offers]


def by_inputs(
    step: StepPlan, allocator: InputAllocator, offers: Sequence[Offer], source: Checkpoint, tokens: Path | None, folder: Path,
    ctx: Context,
) -> list[Offer]:  # fmt: skip
    """The offers with their block's number from the inputs of its weights; `folder` holds hidden states during the sweep."""
    assert tokens is not None
    from compress.corpus import Corpus
    from compress.device import device_of
    from compress.executors.observe import observed
    from compress.layerwise.batches import cut
    from compress.layerwise.dense_view import DenseView
    from compress.layerwise.memory_estimate import computing
    from compress.layerwise.meta_model import MetaModel

    meta_model = MetaModel(DenseView(source), computing(ctx.dtype, source.config), device_of(ctx))
    batches = cut(Corpus.load(tokens).tensors, meta_model.module, ctx.rank, ctx.world_size, meta_model.dtype, meta_model.device)
    costs = observed(step, allocator, [offer.weight for offer in offers], meta_model, batches, folder, ctx)
    ctx.barrier()
    if ctx.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return [replace(offer, costs=(costs[offer.weight.name],)) for offer in offers]


def by_values(allocator: Allocator, offer: Offer, source: Checkpoint) -> Offer:
    """An offer with its costs from the weight's values."""
    value = qtensor.as_matrix(offer.weight, source.read(offer.weight.name))
    return replace(offer, costs=allocator.costs(offer, value, None))


def _rows(offers: Sequence[Offer], found: Mapping[str, State]) -> list[dict[str, Any]]:
    rows = []
    for offer in offers:
        weight, state = offer.weight, found[offer.weight.name]
        costs = {str(offered): float(f"{cost:.6g}") for offered, cost in zip(offer.states, offer.costs, strict=False)}
        nbytes = qtensor.stored_bytes(weight, state)
        share = None if state.sparsity is None else state.sparsity.fraction
        rows.append({
            "weight": weight.name, "state": str(state), "bytes": nbytes, "numel": weight.numel, "stack": weight.stack,
            "block": weight.block, **({"zeros": share} if share is not None else {}), **({"costs": costs} if costs else {}),
        })  # fmt: skip
    return rows


def record(table: Path, folder: Path, title: str) -> None:
    """Puts a table and its picture into the directory that a step makes."""
    from compress.plots import allocation

    shutil.copyfile(table, folder / LINES)
    allocation(folder / PICTURE, rows_of(table), title)
