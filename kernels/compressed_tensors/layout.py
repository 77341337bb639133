"""compressed-tensors: codes for transformers and vLLM.

parts.py describes the layout of each scheme. This file refuses what the readers cannot load, from experiments with
compressed-tensors 0.20 and transformers 5.23: fused 3-D experts (no layout loads: experts stay random), Conv1D unless it is
expanded at load (`dequantize`, which no longer rounds activations), experts of nvfp4 or of unequal schemes (loaded
silently wrong), mixed schemes under `dequantize` (silently wrong), groups that do not divide the columns. In whole models:
dense experts in separate tensors (lost if other tensors are packed), Llama 4's experts, and, unless expanded at load, linears
whose weight transformers' initialisation accesses (T5, Falcon).

Readers differ on packed zero points (asymmetric). transformers raises on their shape unless it expands at load, and always for
experts; vLLM reads them since 0.8.5 if its Marlin kernel does: 4 bits in groups of 32, 64, 128 or one per row. They are
refused if no reader loads them, else counted as not read by the one that does not. vLLM ignores `dequantize`.

Scales of keys and values (quantize.kv) are tensors of their attention, `k_scale` and `v_scale`: [1], or [heads, 1, 1] with the
strategy attn_head, and kv_cache_scheme in config.json says so. vLLM then keeps FP8 by itself; by head only with FlashAttention.
transformers up to 5.23 rounds keys and values on their way into the cache. In 5.24 the argument that takes a cache has another
name, and compressed-tensors 0.20 looks for the old one: weights load, keys and values stay unrounded. Counted as not read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compress.architecture.unused import unused_paths
from compress.contract.format import Format, Verdict
from compress.errors import Refusal
from compress.kernels.compressed_tensors import parts
from compress.spec.scheme import Scheme
from compress.spec.weight_state import Note, State, TensorSpec, Weight, counted

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.numerics.qtensor import QTensor

VERSION = "0.20.0"
"""The version of the format that is written into config.json."""
_ROUNDED_INPUTS = frozenset(map(Scheme.parse, ("w8a8", "fp8-afp8", "fp8-tensor-afp8", "fp8-block-afp8", "nvfp4-anvfp4")))
"""Schemes with rounded activations that vLLM's documentation names."""
_GROUPS = (32, 64, 128)
"""Group sizes that vLLM's kernels for integers support."""
_AT_LOAD = "pack with dequantize=true: the reader then expands the weights while loading"
_NEVER = "no artifact of this model fits this format"
_RAISES = "5.23 and 5.24 with compressed-tensors 0.20 raise on packed zero points (size mismatch)"
_SERVED = "vLLM's kernels take those of 4 bits in groups of 32, 64, 128 or one per row"
_EXPANDED = "quantization_config=CompressedTensorsConfig(dequantize=True) loads it, or pack(dequantize=true)"
_NUMBER = re.compile(r"\d+")
_CACHE = "compressed-tensors 0.20 does not find where it keeps them; 5.23 reads them"
_SPLIT = "transformers splits these experts in every quantized model and finds no tensors for the parts"


class CompressedTensors(Format):
    """Integers, FP8, MXFP4 and NVFP4 for compressed-tensors; `dequantize` makes the reader expand them at load."""

    name = "compressed-tensors"
    holds = frozenset({"cache"})

    def refuse(self, weight: Weight, state: State) -> None:
        scheme = state.scheme
        if scheme is None:
            return
        if not parts.kind_of(scheme):
            do = "keep the canonical form, or use integers of 2, 3, 4 or 8 bits without minima, fp8, mxfp4 or nvfp4"
            raise Refusal(f"no format of it holds {scheme}", do)
        if weight.module_class in _split_experts():
            raise Refusal(_SPLIT, _NEVER)
        if weight.experts is not None:
            raise Refusal(
                "the reader loads no layout of fused experts (they would stay random)", "leave them dense: skip=[experts]"
            )
        if weight.kind == "embedding":
            raise Refusal("the reader holds no quantized embeddings", "leave them out of targets")
        if weight.converted and weight.kind != "expert":
            raise Refusal("transformers splits or permutes this tensor while loading, codes cannot follow", "skip it")
        if scheme.scales != "block" and weight.columns % (scheme.group or weight.columns):
            raise Refusal(f"groups of {scheme.group} do not divide {weight.columns} columns", "quantize with ragged=divide")
        if scheme.scales == "e4m3" and weight.kind == "expert":
            raise Refusal("transformers loses the scales of nvfp4 experts while loading, silently", "use mxfp4 or fp8 for them")
        if scheme.scales in ("e8m0", "e4m3") and weight.dtype != "BF16" and not (self.dequantize and scheme.scales == "e8m0"):
            reason = f"the reader expands {scheme} to bfloat16, and this weight is {weight.dtype}"
            raise Refusal(reason, _AT_LOAD if scheme.scales == "e8m0" else "convert the model to bfloat16 first")
        if scheme.inputs and self.dequantize:
            raise Refusal("with dequantize the reader no longer rounds activations", "pack without it, or use a scheme with a16")
        if scheme.inputs.startswith("int") and not scheme.symmetric:
            raise Refusal(f"no layout here has zero points beside int{scheme.input_bits} activations", "use a symmetric scheme")
        if self._raises(weight, scheme) and not _served(scheme):
            do = "use a symmetric scheme for them" if weight.kind == "expert" else f"{_AT_LOAD}; or use a symmetric scheme"
            raise Refusal(f"no reader loads {scheme} here: transformers {_RAISES}, {_SERVED}", do)
        if weight.transposed and not self.dequantize:
            raise Refusal("the reader re-initialises a packed Conv1D", _AT_LOAD)
        if not weight.name.endswith(".weight"):
            raise Refusal("the reader looks for names that end in .weight", "skip it")

    def _raises(self, weight: Weight, scheme: Scheme) -> bool:
        """Whether transformers raises on the zero points of a weight."""
        return not scheme.symmetric and (weight.kind == "expert" or not self.dequantize)

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        unread = {weight.name: f"by transformers: {reason}" for weight, reason in self._unread(weights, states)}
        cache = {weight.name: f"by transformers 5.24: {_CACHE}" for weight in weights if weight.kind == "cache"}
        return counted("not read", unread | cache)

    def _unread(self, weights: Sequence[Weight], states: dict[str, State]) -> list[tuple[Weight, str]]:
        """(weight, message) for each weight that transformers raises on."""
        schemes = ((weight, states[weight.name].scheme) for weight in weights)
        raising = [weight for weight, scheme in schemes if scheme is not None and self._raises(weight, scheme)]
        ways = {True: "asymmetric experts, however they are loaded", False: _EXPANDED}
        return [(weight, f"{_RAISES}; {ways[weight.kind == 'expert']}") for weight in raising]

    def refuse_together(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        weights = model.weights
        refused = self._refuse_model(model, states)
        experts = [weight for weight in weights if weight.kind == "expert" and weight.experts is None]
        if len({states[weight.name].scheme for weight in experts}) > 1:
            kinds = ", ".join(sorted({str(states[weight.name]) for weight in experts}))
            reason = f"transformers takes one scheme for all experts and would load others silently wrong; here: {kinds}"
            refused += [(w.name, reason, "give all experts one scheme") for w in experts]
        schemes = {str(scheme) for scheme in {state.scheme for state in states.values()} if scheme is not None}
        if self.dequantize and len(schemes) > 1:
            reason = f"with dequantize the reader takes one scheme for all linears, silently; here: {', '.join(sorted(schemes))}"
            refused += [(w.name, reason, "use one scheme") for w in weights if states[w.name].scheme]
        return refused

    def _refuse_model(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        """Refusals of weights that transformers' code for this model would lose or fail on, in any layout."""
        loses = "transformers fuses this tensor while loading, takes it for a packed one and loses it"
        refused, split = [], _split_experts()
        for weight in model.weights:
            quantized = states[weight.name].scheme is not None
            if weight.module_class in split and not quantized:
                refused.append((weight.name, _SPLIT, _NEVER))
            if weight.name in model.by_weight and not quantized:
                expert = weight.kind == "expert"
                refused.append((weight.name, loses, "quantize the experts as well, in 8 bits if need be" if expert else _NEVER))
            if weight.module in model.initialised and quantized and not self.dequantize:
                reason = "transformers' initialisation asks for this weight and fails without"
                refused.append((weight.name, reason, _AT_LOAD))
        return refused

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        if state.scheme is None:
            return [TensorSpec(weight.name, weight.dtype, weight.shape)]
        return parts.specs(weight, state.scheme)

    def copies(self, weight: Weight, state: State) -> dict[str, str]:
        assert state.scheme is not None
        return parts.copies(weight, state.scheme)

    def constants(self, weight: Weight, state: State) -> dict[str, torch.Tensor]:
        assert state.scheme is not None
        return parts.constants(weight, state.scheme)

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        return parts.encode(weight, value)

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
        assert state.scheme is not None
        return parts.decode(weight, state.scheme, tensors)

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        members: dict[Scheme, list[Weight]] = defaultdict(list)
        for weight in model.weights:
            scheme = states[weight.name].scheme
            if scheme is not None:
                members[scheme].append(weight)
        quantized = {_module(weight) for group in members.values() for weight in group}
        dense = [path for path in model.linears if path not in quantized]
        dense += [_module(w) for w in model.weights if w.kind in ("router", "expert") and not states[w.name].scheme]
        groups = {}
        # Experts first: for them transformers takes the first group whose regexes mention experts, even shared ones.
        for number, scheme in enumerate(sorted(members, key=lambda s: (all(w.kind != "expert" for w in members[s]), str(s)))):
            weights = members[scheme]
            own = [_module(w) for w in weights]
            classes = sorted({model.linears.get(w.module, "Linear") for w in weights})
            targets = classes if len(members) == 1 else patterns(own, {*model.linears, *quantized} - {*own})
            groups[f"group_{number:03d}"] = {"targets": targets, **parts.group_of(scheme)}
        ignore = patterns(sorted(set(dense)), quantized) if groups else []
        ignore += [rf"re:{re.escape(path)}(\..*)?$" for path in unused_paths(model)] if groups else []
        kinds = sorted({group["format"] for group in groups.values()}) or ["dense"]
        cache = next((parts.cache_scheme(weight) for weight in model.weights if weight.kind == "cache"), None)
        found = {
            "quant_method": "compressed-tensors", "format": kinds[0] if len(kinds) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "version": VERSION, "global_compression_ratio": None, "kv_cache_scheme": cache, "ignore": ignore,
            "config_groups": groups, "sparsity_config": {}, "transform_config": {},
        }  # fmt: skip
        return {**found, "dequantize": True} if self.dequantize else found

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        schemes = {state.scheme for state in states.values() if state.scheme}
        when = "while loading" if self.dequantize else "in the first forward"
        known = "5.23 with compressed-tensors 0.20, run on 30 families"
        loads, reason = "yes", f"{known}; expands the weights {when}" if schemes else known
        if unread := self._unread(weights, states):
            loads, reason = "no", unread[0][1]
        if any(weight.kind == "cache" for weight in weights):
            reason = f"{reason}; rounds keys and values up to 5.23, 5.24 leaves their scales unread"
        verdicts = [Verdict("transformers", loads, reason), _vllm_keeps(weights, _vllm(weights, states, schemes))]
        asymmetric = any(not scheme.symmetric for scheme in schemes)
        if len(schemes) > 1:
            return [*verdicts, Verdict("sglang", "no", "mishandles mixed groups")]
        if any(scheme.bits in (2, 3) for scheme in schemes):
            return [*verdicts, Verdict("sglang", "no", "not run")]
        zeros = "releases before June 2026 refuse zero points; " if asymmetric else ""
        return [*verdicts, Verdict("sglang", "unknown", f"{zeros}not run")]


def _served(scheme: Scheme) -> bool:
    """Whether vLLM has a kernel for the zero points of a scheme."""
    return scheme.bits == 4 and scheme.group in (None, *_GROUPS)


def _vllm(weights: Sequence[Weight], states: dict[str, State], schemes: set[Scheme]) -> Verdict:
    def said(which: Iterable[Scheme]) -> str:
        return ", ".join(sorted(map(str, which)))

    own = [(weight, scheme) for weight in weights if (scheme := states[weight.name].scheme) is not None]
    zeros = [(weight, scheme) for weight, scheme in own if not scheme.symmetric]
    if wide := [s for s in schemes if s.bits in (2, 3)]:
        return Verdict("vllm", "no", f"no kernel for {said(wide)}")
    if odd := [s for s in schemes if s.integer and s.group not in (None, *_GROUPS)]:
        return Verdict("vllm", "no", f"groups other than 32, 64, 128: {said(odd)}")
    if unserved := {scheme for _, scheme in zeros if not _served(scheme)}:
        return Verdict("vllm", "no", f"no kernel for zero points of 8 bits: {said(unserved)}")
    if zeros_of_inputs := [s for s in schemes if s.inputs == "int4-asym"]:
        return Verdict("vllm", "no", f"its kernels for int4 activations have no zero points: {said(zeros_of_inputs)}")
    if untold := [s for s in schemes if s.scales == "e8m0" or (s.inputs and s not in _ROUNDED_INPUTS)]:
        return Verdict("vllm", "unknown", f"its documentation does not say it: {said(untold)}")
    if any(weight.transposed for weight, _ in own):
        return Verdict("vllm", "unknown", "Conv1D")
    if any(weight.kind == "expert" for weight, _ in zeros):
        return Verdict("vllm", "unknown", "asymmetric experts: by its source since June 2026; not run")
    if narrow := [weight for weight, _ in zeros if weight.in_features % 128 or weight.out_features % 64]:
        size = f"{narrow[0].in_features} inputs and {narrow[0].out_features} outputs"
        reason = f"its Marlin kernel takes zero points at multiples of 128 inputs and 64 outputs, here {size}; not run"
        return Verdict("vllm", "unknown", reason)
    if zeros:
        return Verdict("vllm", "yes", "0.8.5 and later read packed zero points of 4 bits, by its source; 0.32 was run on a CPU")
    alone = "; below compute capability 10.0 it leaves activations in 16 bits" if any(s.input_divisor for s in schemes) else ""
    return Verdict("vllm", "yes", f"by its documentation; q/k/v and gate/up must share a scheme{alone}")


def _vllm_keeps(weights: Sequence[Weight], loads: Verdict) -> Verdict:
    """What vLLM does with scales of keys and values besides."""
    shapes = {weight.shape for weight in weights if weight.kind == "cache"}
    if not shapes:
        return loads
    told = " (0.32, run on a CPU, where it cuts digits off instead of rounding them)"
    if shapes != {(1,)}:
        told = " with FlashAttention, the one backend that has them by head, by its source (0.32)"
    return replace(loads, reason=f"{loads.reason}; keeps keys and values in FP8{told}")


@lru_cache(maxsize=1)
def _split_experts() -> frozenset[str]:
    """Classes of fused experts that transformers replaces by one module per expert before it loads this format."""
    from transformers.quantizers import base

    patched = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    return frozenset(name for name, patch in patched.items() if CompressedTensors.name in patch["quantization_methods"])


def _module(weight: Weight) -> str:
    """The path that a reader matches: the module, or the name on disk for experts, which transformers fuses."""
    return weight.name.removesuffix(".weight") if weight.kind == "expert" else weight.module


def numberless(names: Iterable[str]) -> set[str]:
    """Names without their numbers: what those of blocks and experts have in common."""
    return {_NUMBER.sub("#", name) for name in names}


def patterns(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest regexes that match all of `wanted` and none of `others`; exact names where no regex can.

    Names that differ only in their numbers share a regex. Disjoint by construction, because readers that find two
    matching targets take the alphabetically first.
    """
    return patterns_beside(wanted, numberless(others))


def patterns_beside(wanted: Iterable[str], taken: Collection[str]) -> list[str]:
    """`patterns`, with the others given without their numbers: a name matches a regex of a shape if it has that shape."""
    shapes: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        shapes[_NUMBER.sub("#", name)].append(name)
    found = []
    for shape, names in shapes.items():
        regex = re.escape(shape).replace(r"\#", r"\d+").replace("#", r"\d+")
        found += sorted(names) if len(names) == 1 or shape in taken else [f"re:{regex}$"]
    return sorted(found)
