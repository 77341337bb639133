"""Decode step: what lies between the products of a token, in fewer calls.

A token of a small model spends more time between kernels than in them: a norm is six operations of torch, a rotation of queries
and keys nine. Here norms, rotations and gated products are each one call of ours, for one token of a few texts, on a CPU and
without gradients; all else goes to the module's own code. Modules are found by what they are made of, and taken only if they
compute what their own code computes, on numbers that are large enough for every term to count.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from itertools import groupby
from typing import Any

import torch
from torch import nn

from compress.kernels.cpu.library import DTYPES, library
from compress.kernels.native.modules import PackedLinear
from compress.layerwise.growing_cache import GrowingCache, argument
from compress.runtime.attention import NAME, attention, has_kernels
from compress.runtime.decode_block import ATTENTION, GATED, HEAD_NORMS, NORMS, block_of
from compress.runtime.decode_chain import QuickBlock, link
from compress.runtime.one_token import takes, takes_rotated

ALIKE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference from a module's own code, as a share of the norm: its own rounding."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_LEAST = 1 << 18
"""Numbers that a matrix has at most whose product is left to torch, because calling a kernel takes longer."""
_LOG = logging.getLogger("compress")


class QuickNorm(nn.Module):
    """Mixed into a norm by the root of the mean square."""

    weight: torch.Tensor
    quick_epsilon: float
    quick_plus_one: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if not takes(x, weight) or (weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)  # type: ignore[no-any-return]
        return library().norm(x, weight, self.quick_epsilon, self.quick_plus_one)


class QuickLinear(nn.Module):
    """Mixed into a product by a large matrix that is not packed, such as a head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        learns = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        if not takes(x, weight) or learns or not weight.is_contiguous():
            return super().forward(x)  # type: ignore[no-any-return]
        return library().dense(weight, x, bias)


class QuickGated(nn.Module):
    """Mixed into down(silu(gate(x)) up(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules: Any = self._modules
        if not takes(x, x):
            return super().forward(x)  # type: ignore[no-any-return]
        gate, up = _called(modules["gate_proj"], x), _called(modules["up_proj"], x)
        return _called(modules["down_proj"], library().gate(gate, up))


class QuickAttention(nn.Module):
    """Mixed into attention of rotated queries over a cache, of one token for each text."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    training: bool
    quick_cache: str

    def forward(self, *given: Any, **named: Any) -> Any:
        x: Any = named.get("hidden_states")
        angles: Any = named.get("position_embeddings")
        held: Any = named.get(self.quick_cache)
        quick = not given and held is not None and not self.training and self.config._attn_implementation == NAME
        if not quick or not takes_rotated(x, angles, self.head_dim):
            return super().forward(*given, **named)
        modules: Any = self._modules
        texts, size = x.shape[0], self.head_dim
        flat = x.view(texts, -1)
        query, key, value = _called(modules["q_proj"], flat), _called(modules["k_proj"], flat), _called(modules["v_proj"], flat)
        if "q_norm" in modules:
            query, key = _headed(modules["q_norm"], query, size), _headed(modules["k_norm"], key, size)
        # An adapter's, or of a norm that learns.
        if any(one.dtype != x.dtype or not one.is_contiguous() or one.requires_grad for one in (query, key)):
            return super().forward(*given, **named)
        library().rotary(query, key, angles[0], angles[1], size)
        keys, values = held.update(key.view(texts, -1, 1, size), value.view(texts, -1, 1, size), self.layer_idx)
        mask = named.get("attention_mask")
        out, _ = attention(self, query.view(texts, -1, 1, size), keys, values, mask, scaling=self.scaling)
        return _called(modules["o_proj"], out.reshape(texts, 1, -1)), None


def _called(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """What a module returns; without hooks by its forward alone, for its call takes a fifth of a small product."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    found: torch.Tensor = linear(x) if hooked else linear.forward(x)
    return found


def _headed(norm: Any, x: torch.Tensor, size: int) -> torch.Tensor:
    """x [texts, heads size] with each head by a norm."""
    heads = x.reshape(-1, size)
    hooked, learns = norm._forward_hooks or norm._forward_pre_hooks, norm.weight.requires_grad and torch.is_grad_enabled()
    if not isinstance(norm, QuickNorm) or hooked or learns or norm.weight.dtype != x.dtype or x.requires_grad:
        return norm(heads).view(x.shape)  # type: ignore[no-any-return]
    return library().norm(heads, norm.weight, norm.quick_epsilon, norm.quick_plus_one).view_as(x)


def quicken(model: Any) -> int:
    """Gives the modules of a packed model on the CPU their quick forwards; returns how many took one."""
    if model.dtype not in ALIKE or not has_kernels(model):
        return 0
    trial = _Trial(argument(model), model.dtype)
    with torch.no_grad():
        # A block after what it has.
        modules = [module for module in list(model.modules())[::-1] if "forward" not in vars(module)]
        taken = [module for module in modules if trial.quickened(module)]
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for quick, blocks in groupby(module, lambda block: isinstance(block, QuickBlock)):
                if quick:
                    link([*blocks])
    kinds = Counter(type(module).__name__ for module in taken)
    _LOG.info("one call each for a token: %s", ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing")
    return len(taken)


class _Trial:
    """Tries modules with and without their quick forwards, `cache_name` being what forwards call a cache."""

    def __init__(self, cache_name: str, dtype: torch.dtype) -> None:
        self.cache_name, self.dtype, self.drawn = cache_name, dtype, torch.Generator().manual_seed(0)

    def quickened(self, module: Any) -> bool:
        """Whether it took a quick forward."""
        children, own = {*module._modules}, {*module._parameters}
        if children == {"self_attn", "mlp", *NORMS} and not own:
            return self._block(module)
        if type(module).__name__.endswith("RMSNorm") and not children and own == {"weight"}:
            return self._norm(module)
        if type(module) is nn.Linear:
            return self._linear(module)
        if own or not all(isinstance(module._modules.get(name), PackedLinear) for name in children - {"act_fn", *HEAD_NORMS}):
            return False
        if children == {*GATED, "act_fn"}:
            return self._becomes(module, QuickGated, module, self._texts(module, "gate_proj"))
        # sdpa leaves out a bound on scores, and what is left out cannot be tried.
        bound = any("softcap" in name and value is not None for name, value in vars(module).items())
        whole = isinstance(getattr(module, "head_dim", None), int) and hasattr(module, "scaling") and not bound
        named = children in ({*ATTENTION}, {*ATTENTION, *HEAD_NORMS})
        if named and whole and getattr(vars(module).get("config"), "_attn_implementation", "") == NAME:
            vars(module)["quick_cache"] = self.cache_name
            run = partial(self._attended, module, config=module.config, size=module.head_dim)
            return self._becomes(module, QuickAttention, run, self._texts(module, "q_proj"))
        return False

    def _linear(self, module: nn.Linear) -> bool:
        """Of columns that the kernel takes, and not so small that calling it takes longer."""
        weight, bias = module.weight, module.bias
        fits = weight.dtype in DTYPES and not weight.shape[1] % 32 and weight.numel() > _LEAST
        if not fits or (bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous())):
            return False
        return self._becomes(module, QuickLinear, module, self._numbers(weight.shape[1], (1.0,), weight.dtype))

    def _norm(self, module: Any) -> bool:
        epsilon = next((value for name in _EPSILONS if isinstance(value := vars(module).get(name), float)), None)
        if epsilon is None or module.weight.dtype not in DTYPES:
            return False
        x = self._numbers(module.weight.numel(), (1.0, 1e-3), module.weight.dtype)
        for plus_one in (False, True):
            vars(module).update(quick_epsilon=epsilon, quick_plus_one=plus_one)
            if self._becomes(module, QuickNorm, module, x):
                return True
        return False

    def _block(self, module: Any) -> bool:
        """Of one whose modules have quick forwards already."""
        parts = [module._modules[name] for name in ("self_attn", "mlp", *NORMS)]
        parts += [parts[0]._modules[name] for name in HEAD_NORMS if name in parts[0]._modules]
        quick = all(isinstance(part, kind) for part, kind in zip(parts, (QuickAttention, QuickGated, *[QuickNorm] * 4)))
        if not quick or block_of(module) is None:
            return False
        vars(module)["quick_cache"] = self.cache_name
        link([module])
        run = partial(self._attended, module, config=parts[0].config, size=parts[0].head_dim)
        return self._becomes(module, QuickBlock, run, self._texts(parts[0], "q_proj"))

    def _texts(self, module: nn.Module, projection: str) -> torch.Tensor:
        """A token of usual numbers, and one of large ones, where what bounds or bends them counts."""
        linear: Any = module._modules[projection]
        return self._numbers(linear.in_features, (1.0, 4.0), self.dtype)

    def _numbers(self, width: int, scales: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
        by = torch.tensor(scales)[:, None, None]
        return (torch.randn(len(scales), 1, width, generator=self.drawn) * by).to(dtype)

    def _attended(self, module: Any, x: torch.Tensor, config: Any, size: int) -> torch.Tensor:
        """What comes of two tokens of each text."""
        held, found = GrowingCache(config), []
        for number in (1, 2):
            angle = torch.arange(size // 2) * 0.1 * number + number
            angles = [turn(torch.cat([angle, angle]))[None, None].to(x.dtype) for turn in (torch.cos, torch.sin)]
            more = {"hidden_states": x * number, "position_embeddings": (*angles,), "attention_mask": None, self.cache_name: held}
            out = module(**more)
            found.append(out[0] if isinstance(out, tuple) else out)
        return torch.cat(found, -1)

    def _becomes(self, module: nn.Module, mixin: type[nn.Module], run: Callable[[Any], torch.Tensor], x: torch.Tensor) -> bool:
        """Mixes it in if the module computes the same with it as without it."""
        own, training = type(module), module.training
        module.train(False)
        try:
            meant = run(x).float()
            module.__class__ = _mixed(mixin, own)
            found = run(x).float()
        except Exception as error:  # other people's modules may raise anything; this one stays as it is
            _LOG.debug("%s stays as it is: %s", own.__name__, error)
            module.__class__ = own
            return False
        finally:
            module.train(training)
        if ((found - meant).norm(dim=-1) <= ALIKE[x.dtype] * meant.norm(dim=-1)).all():
            return True
        module.__class__ = own
        return False


def _mixed(mixin: Any, cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward has the signature of its own, which others look at."""
    if (mixin, cls) not in _MIXED:

        @wraps(cls.forward)
        def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
            return mixin.forward(self, *given, **named)

        _MIXED[mixin, cls] = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "forward": forward})
    return _MIXED[mixin, cls]


_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
