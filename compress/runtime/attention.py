"""Attention: single queries on CPUs by our kernel, all else by transformers.

Decoding has one query a head, for which torch's attention takes ten times as long as reading keys and values does. The function
is registered with transformers under NAME, and a packed model that is loaded on the CPU is set to it where it would have `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.errors import Refusal
from compress.kernels.cpu.library import DTYPES, LANES, MOST, library

NAME = "compress_sdpa"
_BESIDE = ("softcap", "s_aux", "position_bias")
"""Arguments that change what attention is."""


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [batch, heads, queries, size], key and value [batch, groups, keys, size] -> [batch, queries, heads, size].

    As transformers' `sdpa_attention_forward`, which it calls for all but a single query without dropout and gradients.
    """
    plain = not dropout and all(more.get(name) is None for name in _BESIDE)
    if plain and query.shape[2] == 1 and _computes(query, key, value):
        mask = attention_mask
        if mask is None or masks_keys(mask, query.shape[0], key.shape[2]):
            mask = mask if mask is None else mask[:, 0, 0].expand(query.shape[0], -1)
            size, runs = query.shape[-1], torch.ops.compress.attend if torch.compiler.is_compiling() else _attend
            found = runs(query[:, :, 0], key, value, size**-0.5 if scaling is None else scaling, mask)
            return found[:, None], None
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, **more}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _computes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are plain tensors that the kernel takes."""
    for tensor in (query, key, value):
        plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not tensor.requires_grad
        if not plain or tensor.dtype != query.dtype or tensor.stride(-1) != 1 or tensor.shape[-1] % LANES:
            return False
    fits = query.dtype in DTYPES and query.shape[-1] == key.shape[-1] <= MOST and key.shape[2] > 0
    return fits and query.shape[0] == key.shape[0] == value.shape[0] and not query.shape[1] % key.shape[1]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    return library().attend(query, key, value, scale, mask)


def _like(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])


def masks_keys(mask: torch.Tensor, texts: int, keys: int) -> bool:
    """Whether a mask tells which keys count, alike for all heads."""
    fits = mask.shape[1:] == (1, 1, keys) and mask.shape[0] in (1, texts)
    return fits and mask.dtype == torch.bool and mask.stride(-1) == 1


def has_kernels(model: Any) -> bool:
    """Whether a model lies on the CPU, and there are kernels for it."""
    if any(weight.device.type != "cpu" for weight in (*model.parameters(), *model.buffers())):
        return False
    try:
        library()
    except Refusal:
        return False
    return True


def attend_by_kernel(model: Any) -> None:
    """Sets a model to our attention if it is on the CPU and would use `sdpa`; leaves it where there are no kernels."""
    if has_kernels(model) and model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


# For compiled code, which calls kernels as operators.
_LIBRARY = torch.library.Library("compress", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, float scale, Tensor? mask) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("compress::attend", _like, lib=_LIBRARY)
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
