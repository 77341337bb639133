"""Memory estimate: what a sweep or a training run needs, and its dtype."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import size_of
from compress.contract.shapes import ObservingPass, TrainPass
from compress.errors import UsageError
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

MAX_WORKERS = 4
"""Tensors that are worked on at the same time, at most."""
BATCH_TOKENS = 4096
"""Tokens in one forward of a sweep: enough for the matrix products, little beside a block."""
HELD_BYTES = 1 << 30
"""Activations held inside a block; batches beyond it run the block again for every statistic."""
BETWEEN_BYTES = 2 << 30
"""Hidden states held between blocks; those beyond it wait in a file."""
DEVICE_BYTES = 256 << 20
"""What products and factorizations of a GPU's libraries work in, and what its allocator leaves between blocks."""
STATISTICS_BYTES = 2 << 30
"""Statistics of routed experts held at a time; more experts take more rounds."""
LOGIT_BYTES = 256 << 20
"""Logits of one batch of a reverse sweep, in fp32."""


def batch_tokens(config: dict[str, Any]) -> int:
    """Tokens in one batch of a reverse sweep, which has logits for all of them; a sample is never cut."""
    return max(1, min(BATCH_TOKENS, LOGIT_BYTES // (4 * max(1, size_of(config, "vocab_size") or 0))))


def computing(dtype: str, config: dict[str, Any], device: torch.device | None = None) -> torch.dtype:
    """What a forward computes in. `auto` is bfloat16 for such a checkpoint where the device multiplies in it, else float32."""
    import torch

    from compress.device import CPU, has_bf16

    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype in choices:
        return choices[dtype]
    if dtype != "auto":
        raise UsageError("dtype", "auto, float32 or bfloat16", f"'{dtype}'")
    stored = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if stored == "bfloat16" and has_bf16(device or CPU) else torch.float32


def sweep_bytes(
    pass_: ObservingPass, weights: list[Weight], touched: list[Weight], config: dict[str, Any], tokens: int, element_bytes: int
) -> int:
    """Resident bytes beyond the interpreter: a block, its statistics and solutions, the tokens' activations, the rest."""
    blocks: dict[tuple[str, int | None], int] = defaultdict(int)
    outside = head = 0
    for weight in weights:
        if weight.block is not None:
            blocks[weight.stack, weight.block] += weight.numel * element_bytes
        elif weight.kind in ("embedding", "head"):
            head = max(head, weight.numel * element_bytes)
        else:
            outside += weight.numel * element_bytes
    block = max(blocks.values(), default=0)
    hidden = size_of(config, "hidden_size", "d_model") or max((w.in_features for w in touched), default=0)
    widest = max((w.in_features for w in touched), default=hidden)
    between = min(BETWEEN_BYTES, tokens * hidden * element_bytes)
    within = min(HELD_BYTES, 3 * tokens * widest * element_bytes) + 8 * 4096 * widest * 4
    statistic = max((pass_.statistic_bytes(w.in_features) * _at_once(w, pass_) for w in touched), default=0)
    work = max((pass_.workspace_bytes(w) for w in touched), default=0)
    return max(head, block + within + statistic + work) + between + outside


def _at_once(weight: Weight, pass_: ObservingPass) -> int:
    """Statistics that are in memory together with the one of this weight."""
    if weight.kind != "expert":
        return 1
    fits = max(1, STATISTICS_BYTES // pass_.statistic_bytes(weight.in_features))
    return min(fits, weight.experts or fits)


def stride(blocks: int, state_bytes: int) -> int:
    """Every how many blocks a reverse sweep keeps what they are called with: each if that is little, else the least in all."""
    return 1 if blocks * state_bytes <= BETWEEN_BYTES else max(1, math.isqrt(blocks))


def reverse_bytes(
    weights: list[Weight], touched: list[Weight], config: dict[str, Any], tokens: int, element_bytes: int
) -> tuple[int, int]:
    """(resident bytes beyond the interpreter, bytes on disk) of a reverse sweep.

    A block with its gradients and what a batch leaves for its backward pass, or the last block with the head, its gradient
    and a batch's logits; on disk hidden states of every few blocks, and those of one more segment, and gradients.
    """
    batch = min(tokens, batch_tokens(config))
    blocks: dict[tuple[str, int | None], int] = defaultdict(int)
    graphs: dict[tuple[str, int | None], int] = defaultdict(int)
    wanted, outside, head = {weight.name for weight in touched}, 0, 0
    for weight in weights:
        # Where transformers fuses or splits, places of numbers and a second copy.
        asked = 4 + element_bytes + (20 if weight.converted else 0)
        nbytes = (element_bytes + asked * (weight.name in wanted)) * weight.numel
        if weight.block is not None:
            place = weight.stack, weight.block
            blocks[place] += nbytes
            if len(weight.shape) > 1:
                # A router sends a token to a few experts; two is usual, of which each is counted that is fused.
                share = 2 if weight.experts else 1
                graphs[place] += 3 * batch * (weight.in_features + weight.out_features) * share * element_bytes
        elif weight.kind in ("embedding", "head"):
            head = max(head, nbytes)
        else:
            outside += nbytes
    text = config.get("text_config") or config
    hidden = int(text.get("hidden_size") or text.get("d_model") or max((w.in_features for w in touched), default=0))
    state = tokens * hidden * element_bytes
    # Their gradient takes their place, some rows at a time.
    logits = 2 * batch * int(text.get("vocab_size") or 0) * element_bytes + (64 << 20)
    block = max(blocks.values(), default=0)
    resident = max(block + max(graphs.values(), default=0), block + head + logits) + 2 * min(BETWEEN_BYTES, state) + outside
    every = stride(len(blocks), state)
    return resident + (128 << 20), (-(-len(blocks) // every) + every + 1) * state


def train_bytes(
    pass_: TrainPass, weights: list[Weight], touched: list[Weight], states: dict[str, State], config: dict[str, Any],
    teacher: int, sample: int, element_bytes: int,
) -> tuple[int, int]:  # fmt: skip
    """(resident bytes beyond the interpreter, bytes of states on disk) of one process; `sample` is a sample's tokens.

    fp32 weights, gradients and two moments; codes with what they expand to; the teacher; what the backward pass needs of
    the forward; the logits.
    """
    how = pass_.training_options()
    tokens = how.micro_batch * sample
    model = expanded = activations = 0
    blocks = len({(w.stack, w.block) for w in weights if w.block is not None}) or 1
    for weight in weights:
        codes = states[weight.name].scheme is not None
        model += weight.numel * (1 if codes else 4)
        if weight.block is not None:
            expanded += weight.numel * (4 + element_bytes) if codes else weight.numel * element_bytes
            if len(weight.shape) > 1:
                # A router sends a token to a few experts; two is usual.
                share = 2 if weight.experts else 1
                activations += 2 * tokens * (weight.in_features + weight.out_features) * share * element_bytes
            else:
                activations += 4 * tokens * weight.numel * 4
    if how.recompute:
        expanded, activations = 2 * expanded // blocks, 2 * activations // blocks
    trained = sum(learned(weight, states[weight.name]) for weight in touched)
    masks = sum(weight.numel for weight in touched if states[weight.name].sparsity is not None)
    vocabulary = size_of(config, "vocab_size") or 0
    # All of both models', with gradients; and ten arrays of what the loss takes at a time, in fp32.
    logits = 4 * tokens * vocabulary * element_bytes + 10 * min(64 << 20, 4 * tokens * vocabulary)
    resident = model + 16 * trained + masks + expanded + activations + teacher * element_bytes + logits
    return resident, 2 * 12 * trained


def learned(weight: Weight, state: State) -> int:
    """Numbers that are trained of a weight: itself, or its scales and low-rank factors."""
    if state.scheme is None:
        return weight.numel
    factors = 0 if state.lowrank is None else state.lowrank.rank * (weight.rows + weight.columns)
    return (math.prod(state.scheme.grid_shape(weight.rows, weight.columns)) + factors) * (weight.experts or 1)
