"""Masked model: transformers' model with masks on its parts.

They are on layers, hidden channels, key-value heads, neurons and experts. With masks of 0 and 1 it computes what the smaller
model computes, and with others what the smaller model computes after `folded`. Sheared LLaMA (Xia et al., 2310.06694), with what
its code gets wrong put right:

    embeddings     a channel is on or off, never in between: tied embeddings are on both sides, and one matrix cannot hold z twice
    norms          the mean runs over the channels that are on, and the output is multiplied by z
    outputs        of attention and feed-forward, or of the norm after them where there is one, times z of layer and channel
    attention      each key-value head with all its query heads, where the output projection reads them
    experts        a closed one gets no token; the weight of an open one is multiplied by z
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compress.architecture.axes import POST_NORMS, Slice, slices
from compress.architecture.families import place_of
from compress.errors import Refusal
from compress.spec.kept import Sizes
from compress.spec.weight_state import Weight


@dataclass(frozen=True)
class Masks:
    """z of each part, fp32; None for parts that are all kept."""

    layers: torch.Tensor | None = None
    """[layers]"""
    hidden: torch.Tensor | None = None
    """[hidden]"""
    groups: torch.Tensor | None = None
    """[layers, groups]"""
    units: torch.Tensor | None = None
    """[layers, units], of a dense feed-forward"""
    experts: torch.Tensor | None = None
    """[layers, experts]"""

    def gate(self, layer: int | None) -> torch.Tensor | float:
        """What a layer's output is multiplied by."""
        z: torch.Tensor | float = 1.0 if self.hidden is None else self.hidden
        return z if self.layers is None or layer is None else z * self.layers[layer]


class MaskedModel:
    """Puts hooks on `module`; `masks` can be replaced between forwards. Raises Refusal for what cannot be masked."""

    def __init__(self, module: Any, weights: Sequence[Weight], family: str, sizes: Sizes, masked: frozenset[str]) -> None:
        self.module, self.family, self.sizes, self.masks = module, family, sizes, Masks()
        self._undo: list[Callable[[], None]] = []
        every = [tuple(range(sizes.experts))] * sizes.layers
        parts = slices(weights, family, range(sizes.layers), every)
        if "groups" in masked and any(part.dims == ("queries",) and part.source.kind == "norm" for part in parts):
            raise Refusal("a norm over all heads changes with every head", "keep all key-value heads")
        for part in {part.source.module: part for part in parts if part.source.kind != "bias"}.values():
            self._hook(part)

    def close(self) -> None:
        """Removes the hooks."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _hook(self, part: Slice) -> None:
        weight, layer = part.source, part.layer
        module, dims = self.module.get_submodule(weight.module), part.logical
        if weight.kind == "norm" and dims == ("hidden",):
            post = is_post_norm(part, self.family)
            if isinstance(module, nn.LayerNorm) or ("LayerNorm" in type(module).__name__ and hasattr(module, "bias")):
                self._replace(module, partial(self._layer_norm, module))
            else:
                self._before(module, partial(self._spread, post))
                self._after(module, partial(self._narrow, layer if post else None))
        elif weight.block is None and dims == ("", "hidden") and weight.kind != "head" and weight.module:
            self._after(module, self._switched)
        elif weight.kind == "expert" and layer is not None:
            self._before(module, partial(self._weighted, layer))
            self._after(module, partial(self._gated, layer))
        elif weight.kind == "router" and dims[0] == "experts" and layer is not None:
            self._replace(module, partial(self._routed, layer, module.forward))
        elif weight.kind == "linear" and layer is not None:
            if dims[1] == "queries":
                self._before(module, partial(self._heads, layer))
            elif dims[1] == "units" and "shared" not in weight.module:
                self._before(module, partial(self._neurons, layer))
            if dims[0] == "hidden":
                self._after(module, self._switched if self.family in POST_NORMS else partial(self._gated, layer))

    def _before(self, module: nn.Module, change: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_pre_hook(lambda _, args: change(*args)).remove)

    def _after(self, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._undo.append(module.register_forward_hook(lambda _, args, out: change(out)).remove)

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        old = vars(module).get("forward")
        module.forward = forward

        def undo() -> None:
            if old is None:
                vars(module).pop("forward", None)
            else:
                module.forward = old

        self._undo.append(undo)

    def _switched(self, out: torch.Tensor) -> torch.Tensor:
        """Without the channels that are off."""
        return out if self.masks.hidden is None else out * (self.masks.hidden > 0).to(out.dtype)

    def _gated(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        z = self.masks.gate(layer)
        return out if isinstance(z, float) else out * z.to(out.dtype)

    def _ratio(self) -> torch.Tensor | float:
        """Root of all channels over those that are on: a mean over all is as much too small."""
        hidden = self.masks.hidden
        return 1.0 if hidden is None else (len(hidden) / (hidden > 0).sum().clamp(min=1)).sqrt()

    def _spread(self, post: bool, x: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
        # The output of a layer still has what channels that are off would get; the residual stream has zeros there.
        x = self._switched(x) if post else x
        return (x if self.masks.hidden is None else x * self._ratio(), *rest)

    def _narrow(self, layer: int | None, out: torch.Tensor) -> torch.Tensor:
        z = self.masks.gate(layer)
        return out if isinstance(z, float) else out * (z / self._ratio()).to(out.dtype)

    def _layer_norm(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.masks.hidden
        if hidden is None:
            return nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)
        on = (hidden > 0).nonzero()[:, 0]
        bias = None if module.bias is None else module.bias[on]
        normed = nn.functional.layer_norm(x[..., on], (len(on),), module.weight[on], bias, module.eps)
        return torch.zeros_like(x, dtype=normed.dtype).index_copy(-1, on, normed * hidden[on].to(normed.dtype))

    def _heads(self, layer: int, x: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
        if self.masks.groups is None:
            return (x, *rest)
        return (x * self._by_query(self.masks.groups[layer]).to(x.dtype), *rest)

    def _by_query(self, groups: torch.Tensor) -> torch.Tensor:
        """z of heads for every input of the output projection."""
        return groups.repeat_interleave(self.sizes.share * self.sizes.head)

    def _neurons(self, layer: int, x: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
        return (x if self.masks.units is None else x * self.masks.units[layer].to(x.dtype), *rest)

    def _weighted(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *rest: Any
    ) -> tuple[Any, ...]:
        if self.masks.experts is None:
            return (hidden, index, weights, *rest)
        return (hidden, index, weights * self.masks.experts[layer].to(weights.dtype)[index], *rest)

    def _routed(self, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.masks.experts is None:
            return forward(*args, **kwargs)
        with _Closed(self.masks.experts[layer] <= 0):
            return forward(*args, **kwargs)

    def folded(self, value: torch.Tensor, part: Slice, masks: Masks) -> torch.Tensor:
        """A stored tensor of the model with the masks of what is kept multiplied into it, fp32."""
        weight, dims, layer = part.source, part.logical, part.layer
        value = value.float()
        if "norm" in weight.module_class.lower() and dims == ("hidden",):
            z = masks.gate(layer if is_post_norm(part, self.family) else None)
            # Gemma's norms stand for themselves plus one; none of its norms has a bias.
            return (1 + value) * z - 1 if self.family.startswith("gemma") else value * z
        if layer is None:
            return value
        matrix = value.transpose(-1, -2) if weight.transposed and value.dim() >= 2 else value
        writes = dims[0] == "hidden" or (dims[:2] == ("experts", "hidden") and weight.kind in ("expert", "bias"))
        if writes and self.family not in POST_NORMS:
            z = masks.gate(layer)
            if masks.experts is not None and part.expert is not None:
                z = z * masks.experts[layer][part.expert]
            elif masks.experts is not None and dims[0] == "experts":
                closed = masks.experts[layer].view(-1, *[1] * (value.dim() - 1))
                matrix = matrix * closed
            if not isinstance(z, float):
                z = z.expand(self.sizes.hidden) if z.dim() == 0 else z
                matrix = matrix * (z if dims[-1] == "hidden" else z.unsqueeze(-1))
        if len(dims) == 2 and dims[1] == "queries" and masks.groups is not None:
            matrix = matrix * self._by_query(masks.groups[layer])
        if (
            len(dims) == 2
            and dims[1] == "units"
            and part.expert is None
            and "shared" not in weight.module
            and masks.units is not None
        ):
            matrix = matrix * masks.units[layer]
        return matrix.transpose(-1, -2) if weight.transposed and value.dim() >= 2 else matrix


def is_post_norm(part: Slice, family: str) -> bool:
    """Whether it is the norm of what a layer adds to the residual stream."""
    return part.source.block is not None and place_of(part.source)[1].partition(".bias")[0] in POST_NORMS.get(family, ())


class _Closed(TorchFunctionMode):
    """Inside it the logits of closed experts are minus infinity, however a router goes on from them."""

    def __init__(self, closed: torch.Tensor) -> None:
        super().__init__()
        # A layer without any open expert is closed as a whole, and whatever it computes comes to nothing.
        self.closed = closed & ~closed.all()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.masked_fill(self.closed, -torch.inf) if func is nn.functional.linear else out
