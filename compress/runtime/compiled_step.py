"""Compiled step: the forward of one token as one graph, by torch.compile.

What is compiled is a copy of the model's modules, which shares its weights. In it a linear with a packed weight, and a norm or a
gated product that decode_step.py has quickened, is one operator that knows the module by a number, and runs it as it is. An
operator that takes a weight apart into its arguments, as those of kernels/native/op.py do, takes longer to call than a small
product to compute. Attention is our kernel (attention.py), and torch's inductor makes what lies between, which rounds where the
model's code rounds, so that tokens stay the same. The cache has a fixed size: with one that grows, torch would compile anew.
"""

from __future__ import annotations

import copy
import time
from functools import wraps
from itertools import count
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from compress.errors import InputError, MachineError
from compress.kernels.native.modules import PackedEmbedding, PackedLinear, PackedWeight
from compress.layerwise.growing_cache import argument
from compress.runtime.decode_step import QuickGated, QuickNorm

BACKEND = "inductor"
CHECKED = 3
"""Tokens that are also computed by the model itself, before compiled code is relied on."""
_OPTIONS = {"emulate_precision_casts": True}
_LIBRARY = torch.library.Library("compress", "FRAGMENT")
_NUMBERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_MODULES: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_NEXT = count()


class Numbered(nn.Module):
    """Stands in what is compiled for a module that makes [..., outputs] of x, in its dtype."""

    def __init__(self, module: nn.Module, outputs: int) -> None:
        super().__init__()
        # Not among its modules, whose tensors the graph would take as arguments.
        self.holds = [module]
        self.number, self.outputs = _number(module), outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.compress.numbered(x, self.number, self.outputs)
        return found


def _number(module: nn.Module) -> int:
    """The same for the same module, so that torch finds what it has compiled earlier."""
    if module not in _NUMBERS:
        _NUMBERS[module] = number = next(_NEXT)
        _MODULES[number] = module
    return _NUMBERS[module]


def _run(x: torch.Tensor, number: int, outputs: int) -> torch.Tensor:
    found: torch.Tensor = _MODULES[number].forward(x)
    return found.contiguous()


def _like(x: torch.Tensor, number: int, outputs: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


_LIBRARY.define("numbered(Tensor x, int number, int outputs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("numbered", _run, "CompositeExplicitAutograd")
torch.library.register_fake("compress::numbered", _like, lib=_LIBRARY)


def copy_to_compile(model: Any) -> Any:
    """A copy of the modules that shares all weights, some of them by number."""
    modules = list(model.modules())
    kept = [*model.parameters(), *model.buffers(), *(one for one in modules if isinstance(one, PackedWeight))]
    kept += [held] if (held := getattr(model, "hf_quantizer", None)) else []
    # What deepcopy is told to have copied already.
    known: dict[int, Any] = {id(one): one for one in kept}
    for one in modules:
        if (outputs := _outputs(one, model.dtype)) is not None:
            known[id(one)] = Numbered(one, outputs)
    return copy.deepcopy(model, known)


def _outputs(module: Any, dtype: torch.dtype) -> int | None:
    """How many numbers a module makes of each token, if it is one that is run as it is."""
    if isinstance(module, QuickGated):
        module = module._modules["down_proj"]
    if isinstance(module, PackedLinear) and not isinstance(module, PackedEmbedding):
        weight: Any = module.packed_weight
        return int(weight.size[1 if weight.turned else 0])
    return module.weight.numel() if isinstance(module, QuickNorm) and module.weight.dtype == dtype else None


def _apart(model: Any) -> Any:
    """A model's forward with code of its own: torch keeps what it has compiled by code, which models of a class share."""

    def step(**named: Any) -> Any:
        return model.forward(**named)

    code = step.__code__.replace(co_name=f"step_{next(_NEXT)}")
    return FunctionType(code, step.__globals__, closure=step.__closure__)


class CompiledStep:
    """Forwards of one token by compiled code. The first are compared with the model's own, on a copy of the cache."""

    seconds = 0.0
    """What compiling took, once the first forward is done."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache_name = model, argument(model)
        self._own = model.forward
        options: Any = dict(_OPTIONS) if BACKEND == "inductor" else {}
        # The copy is nobody else's and stays as it is, so nothing need look at each call whether its modules are the same.
        if (trusted := getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)) is not None:
            options["guard_filter_fn"] = trusted
        self._compiled: Any = torch.compile(_apart(copy_to_compile(model)), fullgraph=True, backend=BACKEND, options=options)
        self._checked = 0

    def __call__(self, **named: Any) -> Any:
        """What the model's forward returns for these arguments. Raises MachineError if it cannot be compiled, or differs."""
        if self._checked >= CHECKED:
            return self._compiled(**named)
        meant = self._own(**{**named, self.cache_name: copy.deepcopy(named[self.cache_name])}).logits
        started = time.perf_counter()
        try:
            found = self._compiled(**named)
        except Exception as error:  # torch's compilers raise anything
            do = "install a C++ compiler if there is none, or leave out --compile"
            raise MachineError("torch.compile", "code for a step of one token", _reason(error), do) from error
        finally:
            self.seconds += time.perf_counter() - started
        if not torch.equal(found.logits[:, -1].argmax(-1), meant[:, -1].argmax(-1)):
            raise MachineError("torch.compile", "the tokens of the model itself", "other tokens", "leave out --compile")
        self._checked += 1
        return found


def _reason(error: Exception) -> str:
    """The first line of what a compiler says, by the error that it wraps where it does."""
    inner: Exception = getattr(error, "inner_exception", error)
    words = f"{type(inner).__name__}: {inner}"
    return words.splitlines()[0]


def compile_steps(model: Any) -> CompiledStep:
    """Makes forwards of one token over a static cache that is not empty compiled ones. Raises InputError for other models."""
    from transformers import StaticCache

    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        raise InputError(
            type(model).__name__, "a decoder with a cache of keys and values", "another model", "leave out --compile"
        )
    own, step = model.forward, CompiledStep(model)
    name = step.cache_name

    @wraps(own)
    def forward(*given: Any, **named: Any) -> Any:
        ids, cache = named.get("input_ids"), named.get(name)
        if given or ids is None or ids.shape[1] != 1 or not isinstance(cache, StaticCache) or not cache.get_seq_length():
            return own(*given, **named)
        return step(**named)

    model.forward = forward
    return step
