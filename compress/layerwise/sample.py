"""Sample: generates text from a checkpoint in any state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from compress.corpus.encoder import Encoder
from compress.corpus.spec import CorpusSpec
from compress.device import CPU
from compress.errors import InputError, UsageError
from compress.layerwise.growing_cache import GrowingCache, argument
from compress.layerwise.logits import is_masked, label_of
from compress.layerwise.model import build

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.checkpoint.reader import Checkpoint


def sample(
    checkpoint: Checkpoint, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0,
    packed: Callable[[], Any] | None = None, device: torch.device = CPU, cache: Callable[[Any, int], Any] | None = None,
) -> str:  # fmt: skip
    """The prompt and up to `tokens` more; for an encoder-decoder only its answer. Raises CompressError.

    The model is the one that `packed` loads, or else the checkpoint's, in fp32 on `device`, with codes expanded when used.
    `cache` makes a cache for a model and so many tokens; by default it is one that grows.
    """
    if not math.isfinite(temperature):
        raise UsageError(
            "temperature", "a number from 0", f"{temperature}", "0 takes the likeliest token, 1 draws as the model says"
        )
    tokenizer = Encoder(CorpusSpec(("-",)), checkpoint.path, checkpoint.trusted).tokenizer
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
    if not ids.numel():
        raise UsageError("prompt", "at least one token", "none", "begin with a word")
    model: Any = packed() if packed else build(checkpoint, device=device)
    ids = ids.to(model.device)
    kind = type(model).__name__
    masked = is_masked(kind) and not model.config.is_encoder_decoder
    if not model.can_generate() or masked or model.main_input_name != "input_ids":
        do = "take a language model that goes on from a text"
        raise InputError(label_of(checkpoint), "a model that generates text from text", kind, do)
    config = model.config.get_text_config()
    if int(ids.max()) >= config.vocab_size:
        do = "use the tokenizer that belongs to the model"
        raise InputError(label_of(checkpoint), f"ids below {config.vocab_size:,}", f"the id {int(ids.max())}", do)
    positions = getattr(config, "max_position_embeddings", None)
    used = tokens if model.config.is_encoder_decoder else ids.shape[1] + tokens
    if isinstance(positions, int) and max(used, ids.shape[1]) > positions:
        do = "ask for fewer, or give a shorter prompt"
        raise UsageError("new tokens", f"at most {positions} with the prompt's {ids.shape[1]}", f"{tokens}", do)
    # Only temperature affects sampling; the checkpoint's generation_config.json is not used.
    draws: dict[str, Any] = {"do_sample": False}
    if temperature:
        draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if device == CPU and not model.config.is_encoder_decoder and model._supports_default_dynamic_cache():
        draws[argument(model)] = cache(model, used) if cache else GrowingCache(model.config)

    def check(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.isnan().any()):
            do = "its weights are damaged; compress diff shows which"
            raise InputError(label_of(checkpoint), "logits that are numbers", "NaN", do)
        return scores

    torch.manual_seed(seed)
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, logits_processor=[check], **draws)
    return str(tokenizer.decode(found[0], skip_special_tokens=True))
