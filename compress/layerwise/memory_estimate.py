"""Memory estimate: memory of a sweep or a training run, and its compute dtype."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import size_of
from compress.contract.block_training import BlockTrainPass
from compress.contract.fused_groups import together
from compress.contract.tasks import Observer
from compress.contract.train_pass import TrainPass
from compress.errors import UsageError
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

MAX_WORKERS = 4
"""Most tensors that are worked on at the same time."""
BATCH_TOKENS = 4096
"""Tokens in one forward of a sweep: enough for efficient products, but small compared with a block's weights."""
HELD_BYTES = 1 << 30
"""Bytes of activations held inside a block; batches beyond it run the block again for every statistic."""
BETWEEN_BYTES = 2 << 30
"""Bytes of hidden states held between blocks; those beyond it are offloaded."""
DEVICE_BYTES = 256 << 20
"""Bytes of workspace of a GPU's libraries for products and factorizations, and of gaps of its allocator."""
STATISTICS_BYTES = 2 << 30
"""Bytes of statistics of routed experts held at a time; more experts take more rounds."""
LOGIT_BYTES = 256 << 20
"""Bytes of logits of one batch of a gradient sweep, in fp32."""


def batch_tokens(config: dict[str, Any]) -> int:
    """Tokens in one batch of a gradient sweep, which has logits for all of them; a sample is never cut."""
    return max(1, min(BATCH_TOKENS, LOGIT_BYTES // (4 * max(1, size_of(config, "vocab_size") or 0))))


def computing(dtype: str, config: dict[str, Any], device: torch.device | None = None) -> torch.dtype:
    """The compute dtype. `auto` is bfloat16 if the checkpoint has it and the device multiplies in it, else float32."""
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
    pass_: Observer, weights: list[Weight], touched: list[Weight], config: dict[str, Any], tokens: int, element_bytes: int
) -> int:
    """Resident bytes beyond the interpreter: a block, its statistics and solutions, activations, weights outside of blocks."""
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
    if pass_.two_streams():
        head, block, within, between, outside = (2 * part for part in (head, block, within, between, outside))
    return max(head, block + within + statistic + work) + between + outside


def slice_bytes(facts: Sequence[str], weights: list[Weight], config: dict[str, Any], tokens: int, element_bytes: int) -> int:
    """Resident bytes beyond the interpreter of a forward that observes a model block by block; 0 if nothing is observed."""
    if not facts:
        return 0
    blocks: dict[tuple[str, int | None], int] = defaultdict(int)
    outside = head = 0
    for weight in weights:
        if weight.block is not None:
            blocks[weight.stack, weight.block] += weight.numel
        elif weight.kind in ("embedding", "head"):
            head = max(head, weight.numel)
        else:
            outside += weight.numel
    hidden = size_of(config, "hidden_size", "n_embd", "d_model") or 0
    widest = max((max(w.shape) for w in weights if w.block is not None and len(w.shape) > 1), default=hidden)
    vocabulary = size_of(config, "vocab_size") or 0
    # A batch's activations inside a block in fp32, a matrix of products and its factors, logits of a batch.
    within = 8 * BATCH_TOKENS * widest * 4 + (10 * 4 * widest * widest if "inputs" in facts else 0)
    logits = 2 * 4 * min(tokens, batch_tokens(config)) * vocabulary if "loss" in facts else 0
    size = 4 if "loss" in facts else element_bytes
    state = min(BETWEEN_BYTES, 2 * tokens * hidden * size)
    block = max(blocks.values(), default=0)
    # With a fit the head is there as it was, fitted, and cut.
    head *= 3 if "inputs" in facts else 1
    return max((head + outside) * size + logits, (block + outside) * size + within) + state + (64 << 20)


def _at_once(weight: Weight, pass_: Observer) -> int:
    """How many statistics are in memory together with that of this weight, its own included."""
    if weight.kind != "expert":
        return 1
    fits = max(1, STATISTICS_BYTES // pass_.statistic_bytes(weight.in_features))
    return min(fits, weight.experts or fits)


def stride(blocks: int, state_bytes: int) -> int:
    """A gradient sweep stores the arguments of every n-th block: n = 1 if they are small, else the n of least memory."""
    return 1 if blocks * state_bytes <= BETWEEN_BYTES else max(1, math.isqrt(blocks))


def reverse_bytes(
    weights: list[Weight], touched: list[Weight], config: dict[str, Any], tokens: int, element_bytes: int
) -> tuple[int, int]:
    """(resident bytes beyond the interpreter, bytes on disk) of a gradient sweep.

    In memory: a block with its gradients and a batch's autograd graph, or the last block with the head, its gradient
    and a batch's logits. On disk: hidden states of every n-th block and of all blocks of one segment, and gradients.
    """
    batch = min(tokens, batch_tokens(config))
    blocks: dict[tuple[str, int | None], int] = defaultdict(int)
    graphs: dict[tuple[str, int | None], int] = defaultdict(int)
    wanted, outside, head = {weight.name for weight in touched}, 0, 0
    for weight in weights:
        # Where transformers fuses or splits: the index of each number, and a second copy.
        asked = 4 + element_bytes + (20 if weight.converted else 0)
        nbytes = (element_bytes + asked * (weight.name in wanted)) * weight.numel
        if weight.block is not None:
            place = weight.stack, weight.block
            blocks[place] += nbytes
            if len(weight.shape) > 1:
                # A router usually sends a token to two experts, so fused experts count twice.
                share = 2 if weight.experts else 1
                graphs[place] += 3 * batch * (weight.in_features + weight.out_features) * share * element_bytes
        elif weight.kind in ("embedding", "head"):
            head = max(head, nbytes)
        else:
            outside += nbytes
    text = config.get("text_config") or config
    hidden = int(text.get("hidden_size") or text.get("d_model") or max((w.in_features for w in touched), default=0))
    state = tokens * hidden * element_bytes
    # The gradient overwrites the logits, some rows at a time.
    logits = 2 * batch * int(text.get("vocab_size") or 0) * element_bytes + (64 << 20)
    block = max(blocks.values(), default=0)
    resident = max(block + max(graphs.values(), default=0), block + head + logits) + 2 * min(BETWEEN_BYTES, state) + outside
    every = stride(len(blocks), state)
    return resident + (128 << 20), (-(-len(blocks) // every) + every + 1) * state


def outputs_bytes(
    weights: list[Weight], touched: list[Weight], config: dict[str, Any], tokens: int, element_bytes: int
) -> tuple[int, int]:
    """The same of one that sums products of gradients by outputs: fp64 sums of a block, and fp32 means of all on disk."""
    resident, scratch = reverse_bytes(weights, [], config, tokens, element_bytes)
    sums = _gram_numbers(touched)
    return resident + 8 * max(sums.values(), default=0), scratch + 4 * sum(sums.values())


def _gram_numbers(touched: list[Weight]) -> dict[tuple[str, int | None], int]:
    """Numbers of the Gram matrices by outputs, for each block."""
    from compress.numerics.output_feedback import gram_numbers

    sums: dict[tuple[str, int | None], int] = defaultdict(int)
    for weight in touched:
        if weight.experts is None and weight.kind != "expert":
            sums[weight.stack, weight.block] += gram_numbers(weight.out_features)
    return sums


def both_bytes(
    weights: list[Weight], touched: list[Weight], config: dict[str, Any], tokens: int, element_bytes: int
) -> tuple[int, int]:
    """The same where inputs are added up as well, and each of a block's weights is solved as soon as that is through."""
    resident, scratch = reverse_bytes(weights, [], config, tokens, element_bytes)
    resident += 8 * max(_gram_numbers(touched).values(), default=0)
    sums: dict[tuple[str, int | None], dict[str, int]] = defaultdict(dict)
    for weight in touched:
        # fp64 sums; then the fp32 mean and its factor, of all that a block's weights read.
        sums[weight.stack, weight.block][together(weight.name)] = 16 * weight.in_features**2
    work = max((24 * weight.numel for weight in touched), default=0)
    return resident + work + max((sum(block.values()) for block in sums.values()), default=0), scratch


def train_bytes(
    pass_: TrainPass, weights: list[Weight], touched: list[Weight], states: dict[str, State], config: dict[str, Any],
    teacher: int, sample: int, element_bytes: int,
) -> tuple[int, int]:  # fmt: skip
    """(resident bytes beyond the interpreter, bytes of states on disk) of one process; `sample` is a sample's tokens.

    fp32 weights, gradients and two moments; codes with their expanded weights; the teacher; activations kept for the backward
    pass; the logits.
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
                # A router usually sends a token to two experts, so fused experts count twice.
                share = 2 if weight.experts else 1
                activations += 2 * tokens * (weight.in_features + weight.out_features) * share * element_bytes
            else:
                activations += 4 * tokens * weight.numel * 4
    if how.recompute:
        expanded, activations = 2 * expanded // blocks, 2 * activations // blocks
    trained = sum(learned(weight, states[weight.name]) for weight in touched)
    if pass_.learns_codes():
        chosen = sum(weight.numel for weight in touched if states[weight.name].scheme is not None)
        # Positions; the values and moved positions kept for the backward pass, unless blocks are computed again.
        trained, model = trained + chosen, model + 4 * chosen + 8 * chosen // (blocks if how.recompute else 1)
    masks = sum(weight.numel for weight in touched if states[weight.name].sparsity is not None)
    vocabulary = size_of(config, "vocab_size") or 0
    # The logits of both models, with gradients; and ten fp32 arrays of the size of a chunk of the loss.
    logits = 4 * tokens * vocabulary * element_bytes + 10 * min(64 << 20, 4 * tokens * vocabulary)
    resident = model + 16 * trained + masks + expanded + activations + teacher * element_bytes + logits
    return resident, 2 * 12 * trained


def blocks_bytes(
    pass_: BlockTrainPass, weights: list[Weight], touched: list[Weight], states: dict[str, State], config: dict[str, Any],
    tokens: int, sample: int, element_bytes: int,
) -> tuple[int, int]:  # fmt: skip
    """(resident bytes beyond the interpreter, bytes of hidden states on disk) of one process; `sample` is a sample's tokens.

    In memory: one block, in fp32 or in codes with its expanded weights, what is trained of it with its gradient, two moments
    and the best iterate, and a micro-batch's autograd graph; or the embedding. Hidden states of both models, and the targets.
    """
    micro = min(tokens, pass_.block_options().micro_batch * sample)
    trained, outside, head = {weight.name for weight in touched}, 0, 0
    blocks: dict[tuple[str, int | None], int] = defaultdict(int)
    graphs: dict[tuple[str, int | None], int] = defaultdict(int)
    for weight in weights:
        if weight.block is None:
            wide = weight.numel * element_bytes
            head, outside = (max(head, wide), outside) if weight.kind in ("embedding", "head") else (head, outside + wide)
            continue
        place, state = (weight.stack, weight.block), states[weight.name]
        # fp32; the copy that autocast makes; where transformers fuses or splits, its sources and the index of each number.
        asked = 4 + element_bytes + (16 if weight.converted else 0) + (5 if state.scheme is not None else 0)
        blocks[place] += asked * weight.numel
        if weight.name in trained:
            chosen = weight.numel if pass_.learns_codes() and state.scheme is not None else 0
            blocks[place] += (20 + element_bytes) * (learned(weight, state) + chosen) + weight.numel * (
                state.sparsity is not None
            )
            # Positions, the values and moved positions kept for the backward pass, and its temporaries.
            blocks[place] += 20 * chosen
        if len(weight.shape) > 1:
            # A router usually sends a token to two experts, so fused experts count twice.
            share = 2 if weight.experts else 1
            graphs[place] += 2 * micro * (weight.in_features + weight.out_features) * share * element_bytes
        else:
            graphs[place] += 4 * micro * weight.numel * 4
    hidden = size_of(config, "hidden_size", "d_model") or max((w.in_features for w in touched if len(w.shape) > 1), default=0)
    scores = sample * micro * (size_of(config, "num_attention_heads", "num_heads", "n_head") or 0) * 4
    # The rows of both outputs, their difference and its gradient.
    rows = 6 * micro * hidden * 4
    states_bytes = 3 * tokens * hidden * element_bytes
    block = max((blocks[place] + graphs[place] for place in blocks), default=0)
    resident = max(block + scores + rows, 2 * head) + min(BETWEEN_BYTES, states_bytes) + 2 * outside
    return resident + (96 << 20), states_bytes if states_bytes > BETWEEN_BYTES else 0


def learned(weight: Weight, state: State) -> int:
    """How many numbers of a weight are trained: its own, or its scales and low-rank factors."""
    if state.scheme is None:
        return weight.numel
    factors = 0 if state.lowrank is None else state.lowrank.rank * (weight.rows + weight.columns)
    return (math.prod(state.scheme.grid_shape(weight.rows, weight.columns)) + factors) * (weight.experts or 1)
