"""Batches: calibration tensors as arguments of a model, and which tokens count.

Texts are `input_ids` [samples, length] with an `attention_mask`; an encoder-decoder encodes the first half of a sample
and decodes the second. Ready inputs (such as audio features) are passed under their own names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compress.device import CPU, moved
from compress.errors import InputError
from compress.layerwise.memory_estimate import BATCH_TOKENS
from compress.layerwise.stepwise import Call


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of a model, and masks of the tokens that count: the encoder's and, if there is one, the decoder's."""

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None
    decoder_mask: torch.Tensor | None

    @property
    def ids(self) -> torch.Tensor:
        """The tokens that a language model predicts, int64 [samples, length]."""
        return self.inputs["decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"]

    @property
    def scored(self) -> torch.Tensor:
        """Which of these tokens have a next one to predict, bool [samples, length]."""
        mask = self.decoder_mask if "decoder_input_ids" in self.inputs else self.mask
        mask = torch.ones_like(self.ids) if mask is None else mask
        return followed(mask.bool(), self.inputs.get("position_ids"))

    def first(self) -> Batch:
        """The first sample as a batch."""
        masks = [None if mask is None else mask[:1] for mask in (self.mask, self.decoder_mask)]
        return Batch({name: value[:1] for name, value in self.inputs.items()}, *masks)

    def valid(self, x: torch.Tensor | None, call: Call) -> torch.Tensor | None:
        """Which rows of `x` [batch, length, width] count, bool [batch * length]; x is None for routed experts."""
        mask = self.decoder_mask if call.block.stack.startswith("decoder") and "decoder_input_ids" in self.inputs else self.mask
        if x is not None and "decoder_input_ids" in self.inputs:
            # Cross attention reads the encoder's output, which the decoder's blocks get as an argument.
            given = [value for value in (*call.args[1:], *call.kwargs.values()) if isinstance(value, torch.Tensor)]
            if any(value.data_ptr() == x.data_ptr() for value in given):
                mask = self.mask
        if mask is None or (x is not None and x.numel() // x.shape[-1] != mask.numel()):
            return None
        return mask.reshape(-1).bool()

    def held_bytes(self, x: torch.Tensor) -> int:
        """Memory of a batch that is paused inside a block: the reader's input, its output, the block's arguments."""
        return 3 * x.nbytes


def followed(mask: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Which tokens have a next one in the same text. `mask` [samples, length]: tokens that count; `places`: positions."""
    found = torch.zeros_like(mask)
    found[:, :-1] = mask[:, 1:] & mask[:, :-1]
    if places is not None:
        found[:, :-1] &= places[:, 1:] > 0
    return found


def cut(
    tensors: dict[str, torch.Tensor], model: Any, rank: int, world_size: int, dtype: torch.dtype, device: torch.device = CPU,
    most: int = BATCH_TOKENS,
) -> list[Batch]:  # fmt: skip
    """This rank's batches, of at most `most` tokens, on a device; how samples are cut does not depend on the number of ranks."""
    samples = len(next(iter(tensors.values())))
    if samples < world_size:
        raise InputError("calibration", f"at least a sample for each of {world_size} processes", f"{samples}")
    tokens = tensors["input_ids"].shape[1] if "input_ids" in tensors else next(iter(tensors.values()))[0].numel()
    step = max(1, min(most // tokens, samples // world_size))
    starts = range(0, samples, step)
    own = starts[len(starts) * rank // world_size : len(starts) * (rank + 1) // world_size]
    return [_batch({name: tensor[at : at + step] for name, tensor in tensors.items()}, model, dtype, device) for at in own]


def _batch(tensors: dict[str, torch.Tensor], model: Any, dtype: torch.dtype, device: torch.device) -> Batch:
    inputs = {n: t.to(dtype) if t.is_floating_point() else t.long() for n, t in tensors.items()}
    if model.config.is_encoder_decoder and inputs.keys() <= {"input_ids", "attention_mask"}:
        half = inputs["input_ids"].shape[1] // 2
        inputs = {
            **{name: value[:, :half] for name, value in inputs.items()},
            **{f"decoder_{name}": value[:, half:] for name, value in inputs.items()},
        }
    masks = {name: inputs.pop(name) for name in list(inputs) if name in ("attention_mask", "decoder_attention_mask")}
    # Without padding no mask is given: attention then has faster causal kernels.
    partial = {name: mask.to(device) for name, mask in masks.items() if not bool(mask.all())}
    return Batch({**moved(inputs, device), **partial}, partial.get("attention_mask"), partial.get("decoder_attention_mask"))
