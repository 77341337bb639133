"""Plan memory: resident bytes, disk and GPU memory that a step needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from compress.checkpoint.reader import CALIBRATION, Checkpoint, local_header
from compress.contract.allocator import InputAllocator
from compress.contract.block_training import BlockTrainPass
from compress.contract.cache_pass import CachePass
from compress.contract.format import Format
from compress.contract.pass_base import WeightPass
from compress.contract.rotating_pass import RotatingPass
from compress.contract.shapes import ObservingPass
from compress.contract.slicing_pass import SlicingPass
from compress.contract.train_pass import TrainPass
from compress.executors.teacher import open_twin, teacher_headers
from compress.layerwise.memory_estimate import (
    DEVICE_BYTES,
    MAX_WORKERS,
    blocks_bytes,
    both_bytes,
    computing,
    outputs_bytes,
    reverse_bytes,
    slice_bytes,
    sweep_bytes,
    train_bytes,
)
from compress.spec.weight_state import State, TensorSpec, Weight, payload_bytes


@dataclass(frozen=True)
class Surroundings:
    """The facts besides the pass that a step's memory depends on."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    """config.json of the model that the step reads."""
    weights: list[Weight]
    threads: int
    dtype: str
    tokens: int
    length: int
    """Tokens of a calibration sample."""


def tokens_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """(calibration tokens stored with a checkpoint, tokens in a sample)."""
    if CALIBRATION not in checkpoint.side_files:
        return 0, 0
    return max((math.prod(ref.shape), math.prod(ref.shape[1:])) for ref in local_header(checkpoint.path / CALIBRATION))


class Needs(NamedTuple):
    """Bytes that a step needs; `device_bytes` is 0 for a step that always runs on the CPU."""

    resident_bytes: int
    scratch_bytes: int
    device_bytes: int


def needs_of(
    pass_: WeightPass, touched: list[Weight], after: dict[str, State], stored: Mapping[str, list[TensorSpec]], fmt: Format | None,
    around: Surroundings,
) -> Needs:  # fmt: skip
    """The bytes that a step needs, given the states `after` it, what is `stored` then, and the weights that it changes."""
    worker, config = pass_.worker(), around.config
    size = computing(around.dtype, config).itemsize
    if isinstance(worker, TrainPass):
        texts = worker.texts()
        sample, teacher = texts.length if texts else around.length, teacher_headers(worker, around.checkpoint)
        taught = sum(math.prod(entry.shape) for entry in teacher.logical.values()) if teacher is not None else 0
        resident, scratch = train_bytes(worker, around.weights, touched, after, config, taught, sample, size)
        tokens = worker.training_options().micro_batch * sample
        resident += worker.objective_bytes(around.checkpoint, teacher, tokens, size)
        return Needs(resident, scratch, resident + DEVICE_BYTES)
    if isinstance(worker, BlockTrainPass):
        open_twin(worker, around.checkpoint, touched)
        resident, scratch = blocks_bytes(worker, around.weights, touched, after, config, around.tokens, around.length, size)
        return Needs(resident, scratch, resident + DEVICE_BYTES)
    assert isinstance(worker, WeightPass)
    if isinstance(worker, SlicingPass):
        there = slice_bytes(worker.facts(), around.weights, config, around.tokens, size)
        most = 4 * max((weight.nbytes for weight in touched), default=0) + (32 << 20)
        return Needs(max(there, min(around.threads, MAX_WORKERS) * most), 0, there and there + DEVICE_BYTES)
    if isinstance(worker, CachePass):
        there = slice_bytes(("cache",), around.weights, config, around.tokens, size)
        return Needs(max(there, min(around.threads, MAX_WORKERS) << 25), 0, there + DEVICE_BYTES)
    # Of the many weights that are alike, one tells what each needs.
    alike = list({(w.kind, w.dtype, w.shape, w.transposed, w.converted, after[w.name]): w for w in touched}.values())
    work = max((_workspace(worker, weight, stored[weight.name], fmt) for weight in alike), default=0)
    resident = min(around.threads, MAX_WORKERS) * max(work, 32 << 20)
    if isinstance(worker, RotatingPass):
        resident += worker.rotation_bytes(config)
    scratch = there = 0
    if isinstance(worker, ObservingPass) and worker.observes():
        there = sweep_bytes(worker, around.weights, alike, config, around.tokens, size)
        if worker.weighs_outputs():
            needed, scratch = outputs_bytes(around.weights, touched, config, around.tokens, size)
            there = max(there, needed)
    allocator = pass_.allocator()
    if isinstance(allocator, InputAllocator):
        there = max(there, sweep_bytes(allocator, around.weights, alike, config, around.tokens, size))
    if allocator is not None and allocator.reads_gradients:
        bytes_of = both_bytes if allocator.weighs_outputs(touched) else reverse_bytes
        needed, taken = bytes_of(around.weights, touched, config, around.tokens, size)
        scratch = max(scratch, taken)
        there = max(there, needed)
    return Needs(max(resident, there), scratch, there and there + DEVICE_BYTES)


def _workspace(pass_: WeightPass, weight: Weight, stored: list[TensorSpec], fmt: Format | None) -> int:
    """Most bytes that one worker holds: the dense tensor, the pass's workspace, packed streams and their parts."""
    stream = payload_bytes(stored)
    dense = 0 if fmt is not None else weight.nbytes
    return dense + pass_.workspace_bytes(weight) + 2 * stream + (16 << 20)
