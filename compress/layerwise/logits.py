"""Logits of a checkpoint in any state, with one block in memory.

A group of batches goes through the model together: each block is loaded once for all of them, then released, and only
their hidden states stay. Logits are computed one batch at a time, when they are requested.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.checkpoint.reader import Checkpoint
from compress.device import CPU
from compress.errors import InputError
from compress.freed_memory import trim_memory
from compress.layerwise.cache_scales import keep_as_told
from compress.layerwise.dense_view import DenseView
from compress.layerwise.input_rounding import round_as_told
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.stepwise import Call, ForwardHooks, StepwiseForward

_TOGETHER_BYTES = 256 << 20
"""Bytes of a block in fp32 up to which its weights are read in parallel; those of a larger one are read in turn."""


class Forward:
    """A language model on a device, in fp32 unless it is told otherwise. Raises InputError for one without logits at every token.

    Without `rounded`, dequantized weights are not rounded to the dtype that the codes were made from.
    """

    def __init__(
        self, checkpoint: Checkpoint, rounded: bool = True, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> None:
        self.label = label_of(checkpoint)
        try:
            self.meta_model = round_as_told(MetaModel(DenseView(checkpoint, rounded), dtype, device))
            self.rounds_cache = keep_as_told(self.meta_model)
        except InputError as error:
            # Two models are compared, so a message about a tensor must name its model.
            raise InputError(
                p if p.where.startswith(self.label) else replace(p, where=f"{self.label}: {p.where}") for p in error.problems
            ) from None
        self.model: Any = self.meta_model.module
        config, kind = self.model.config, type(self.model).__name__
        if self.model.main_input_name != "input_ids":
            got = f"{kind}, which reads {self.model.main_input_name}"
            raise InputError(self.label, "a model that reads token ids", got, "measure a language model")
        if self.model.get_output_embeddings() is None:
            do = "name the language model's class in config.json's architectures"
            raise InputError(self.label, "a model with logits for every token", f"{kind}, which has no such head", do)
        self.vocabulary: int = config.get_text_config().vocab_size
        self.encoder_decoder = bool(config.is_encoder_decoder)
        self.causal = self.encoder_decoder or not is_masked(kind)
        self._in_tuples = False

    def positions(self) -> int | None:
        """The longest input of the model, None if it names no limit."""
        limits = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        # If positions have a padding index, positions up to it are never used.
        limits += [
            part.num_embeddings - part.padding_idx - 1
            for path, part in self.model.named_modules()
            if isinstance(part, nn.Embedding) and path.endswith("position_embeddings") and part.padding_idx is not None
        ]
        return min((limit for limit in limits if isinstance(limit, int)), default=None)

    def inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's arguments for windows [batch, length], on its device."""
        ids = ids.to(self.meta_model.device)
        if not self.encoder_decoder:
            return {"input_ids": ids}
        half = ids.shape[1] // 2
        return {"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:]}

    def held_bytes(self, ids: torch.Tensor) -> int:
        """Memory of a batch between blocks: the arguments and the output of a block."""
        forward = StepwiseForward(self.meta_model, self.inputs(ids))
        with ForwardHooks(self.meta_model):
            call = forward.advance()
            held = 0 if call is None else 2 * _nbytes(call)
            forward.leave()
        self.meta_model.release_visitors()
        return held

    def logits(
        self, windows: list[torch.Tensor], passed: Callable[[], None] = lambda: None, team: Executor | None = None,
        without: str = "",
    ) -> Generator[torch.Tensor]:  # fmt: skip
        """Logits of each batch of `windows`, in order; `passed` is called after each block. Close it to release the head.

        A `team` of threads reads a block's weights, and runs the batches through it, in parallel. The block `without` hands on
        what it got; a forward of the whole model has to come before.
        """
        spread = map if team is None else team.map
        forwards = [StepwiseForward(self.meta_model, self.inputs(ids)) for ids in windows]
        waiting: list[tuple[Any, ...]] = [()] * len(forwards)
        try:
            with ForwardHooks(self.meta_model) as hooks:
                while (call := forwards[0].advance(*waiting[0])) is not None:
                    calls = [call, *(other for j, w in zip(forwards[1:], waiting[1:]) if (other := j.advance(*w)))]
                    assert [other.block for other in calls] == [call.block] * len(forwards)
                    self.meta_model.release_visitors()
                    if call.block.path == without:
                        waiting = [(self._handed_on(other),) for other in calls]
                        del calls
                        continue
                    nbytes = sum(4 * p.numel() for p in self.meta_model.module_at(call.block.path).parameters())
                    self.meta_model.load(call.block.path, spread if nbytes <= _TOGETHER_BYTES else map)
                    waiting = [(output,) for output in spread(partial(_finish, hooks), calls)]
                    self._in_tuples = isinstance(waiting[0][0], tuple)
                    self.meta_model.release(call.block.path)
                    # Otherwise gaps in freed memory would add up, block after block.
                    trim_memory()
                    del calls
                    passed()
                yield self._output(forwards[0])
                for number in range(1, len(forwards)):
                    end = forwards[number].advance(*waiting[number])
                    assert end is None
                    waiting[number] = ()
                    yield self._output(forwards[number])
        finally:
            for forward in forwards:
                forward.leave()
            self.meta_model.release_visitors()

    def _handed_on(self, call: Call) -> Any:
        """What a block would return if it changed nothing."""
        hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
        return (hidden,) if self._in_tuples else hidden

    def _output(self, forward: StepwiseForward) -> torch.Tensor:
        logits = getattr(forward.output, "logits", None)
        forward.output = None
        ids = forward.inputs["decoder_input_ids" if self.encoder_decoder else "input_ids"]
        if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != ids.shape:
            got = f"{list(logits.shape)}" if isinstance(logits, torch.Tensor) else "none"
            raise InputError(self.label, f"logits for every token, {list(ids.shape)}", got, "measure a language model")
        return logits


@torch.no_grad()
def _finish(hooks: ForwardHooks, call: Call) -> Any:
    """A block's output. `no_grad` is a setting of each thread, so it is set here."""
    return hooks.visit(call).finish()


def label_of(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint in messages: its Hub id, or its directory."""
    return checkpoint.name if checkpoint.origin else str(checkpoint.path)


def is_masked(kind: str) -> bool:
    """Whether a class of transformers is a masked language model, which predicts a token from both sides."""
    from transformers.models.auto import modeling_auto as auto

    return kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _nbytes(call: Call) -> int:
    """Memory of the tensors among a block's arguments, each counted once."""
    found: dict[int, int] = {}

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, tuple | list):
            for part in value:
                collect(part)
        elif isinstance(value, dict):
            collect(list(value.values()))

    collect([call.args, call.kwargs])
    return sum(found.values())
