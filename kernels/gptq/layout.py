"""gptq: AutoGPTQ's version 1 layout, which GPTQModel and vLLM read too.

A linear `NAME.weight` [out, in] with codes of b bits and groups of g inputs becomes
    NAME.qweight  int32 [in * b / 32, out]        codes, one bit stream per output, running down the inputs
    NAME.qzeros   int32 [in / g, out * b / 32]    zero points less one, one stream per group, running over the outputs
    NAME.scales   fp16  [in / g, out]
    NAME.g_idx    int32 [in]                      the group of each input, i // g
and W[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]). A bias stays a plain tensor.

Codes and zero points are copied unchanged. Scales are rounded to fp16: exactly for fp16 weights and, from 2^-17 up to the
largest fp16, for bf16 weights; scales of fp32 weights lose at most 2^-11 of their size. A scale that would lose more (fp16
ends at 65504 and loses precision below 2^-14) is refused while packing. Readers multiply in fp16, we in fp32.

"Less one" cannot store a zero point of 0, and readers differ on what they read then, so it is refused while packing. Also
refused: sizes that are not multiples of 32 (AutoGPTQ allocates in // 32 * b words), a ragged last group (its forward reshapes
into whole groups), embeddings and heads, Conv1D, fused experts, tensors that transformers splits or permutes, and weights
outside of the decoder's blocks, where readers replace nothing. Written from the sources of AutoGPTQ 0.7.1 (which was run),
GPTQModel, optimum and vLLM (which were read).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.architecture.unused import unused_paths
from compress.contract.format import Format, Verdict
from compress.contract.fused_groups import FUSED
from compress.errors import FormatError, Refusal
from compress.kernels.compressed_tensors.layout import patterns
from compress.spec.scheme import Scheme
from compress.spec.weight_state import Note, State, TensorSpec, Weight

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.numerics.qtensor import QTensor

_MULTIPLE = 32
_BITS = (2, 3, 4, 8)
_ELSEWHERE = "leave it out of targets, or pack as compressed-tensors"


class Gptq(Format):
    """Integer codes of 2, 3, 4 or 8 bits, symmetric or not."""

    name = "gptq"
    least_zero = 1

    def refuse(self, weight: Weight, state: State) -> None:
        if (scheme := state.scheme) is None:
            return
        if scheme.integer and scheme.bits not in _BITS:
            raise Refusal(f"its readers take 2, 3, 4 and 8 bits, not {scheme.bits}", "quantize to one of these")
        refuse_place(weight)
        refuse_size(weight, scheme)

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        scheme = state.scheme
        if scheme is None:
            return [TensorSpec(weight.name, weight.dtype, weight.shape)]
        path, groups = disk_path(weight), scheme.groups(weight.columns)
        return [
            TensorSpec(f"{path}.qweight", "I32", (weight.columns * scheme.bits // 32, weight.rows)),
            TensorSpec(f"{path}.qzeros", "I32", (groups, weight.rows * scheme.bits // 32)),
            TensorSpec(f"{path}.scales", "F16", (groups, weight.rows)),
            TensorSpec(f"{path}.g_idx", "I32", (weight.columns,)),
        ]

    def constants(self, weight: Weight, state: State) -> dict[str, torch.Tensor]:
        import torch

        scheme = state.scheme
        assert scheme is not None
        g_idx = torch.arange(weight.columns, dtype=torch.int32) // (scheme.group or weight.columns)
        constant = {f"{disk_path(weight)}.g_idx": g_idx}
        if scheme.symmetric:
            middle = torch.full((weight.rows, scheme.groups(weight.columns)), scheme.middle, dtype=torch.uint8)
            constant[f"{disk_path(weight)}.qzeros"] = _zero_words(middle, scheme)
        return constant

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        """The packed tensors. Raises FormatError for zero points and scales that this layout cannot store."""
        import torch

        from compress.numerics import bitstream

        path, scheme = disk_path(weight), value.scheme
        tensors = {
            f"{path}.qweight": flip(bitstream.pack(value.codes, scheme.bits).view(torch.int32)),
            f"{path}.scales": flip(in_half(weight, value.scale)),
            **self.constants(weight, State(scheme)),
        }
        if value.zero is not None:
            if none := int((value.zero == 0).sum()):
                do = "pack as compressed-tensors with dequantize=true"
                raise FormatError(
                    f"'{weight.name}'", "zero points from 1 on (version 1 of this layout stores them less one)",
                    f"{none} of {value.zero.numel()} are 0", f"pack as awq, or {do[8:]}" if scheme.bits == 4 else do,
                )  # fmt: skip
            tensors[f"{path}.qzeros"] = _zero_words(value.zero, scheme)
        return {spec.name: tensors[spec.name] for spec in self.specs(weight, State(scheme))}

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
        import torch

        from compress.checkpoint.reader import torch_dtype
        from compress.numerics import bitstream
        from compress.numerics.qtensor import QTensor

        assert state.scheme is not None
        path, bits = disk_path(weight), state.scheme.bits
        codes = bitstream.unpack(flip(tensors[f"{path}.qweight"]).view(torch.uint8), bits, weight.columns)
        scale = flip(tensors[f"{path}.scales"]).to(torch_dtype(weight.dtype))
        zero = None
        if not state.scheme.symmetric:
            zero = flip(bitstream.unpack(tensors[f"{path}.qzeros"].view(torch.uint8), bits, weight.rows)) + 1
        return QTensor(state.scheme, codes, scale, zero)

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        meant = dense_views(model.weights, states)
        quantized = [path for path, scheme in meant.items() if scheme is not None]
        dense = [path for path, scheme in meant.items() if scheme is None]
        counted = Counter(state.scheme for state in states.values() if state.scheme)
        base = min(counted, key=lambda scheme: (-counted[scheme], str(scheme)))
        found: dict[str, Any] = {
            "quant_method": "gptq", **_options(base), "desc_act": False, "format": "gptq", "checkpoint_format": "gptq",
            "lm_head": False, "pack_dtype": "int32", "meta": {"quantizer": [f"compress:{__version__}"]},
        }  # fmt: skip
        if any(weight.module in model.linears and states[weight.name].scheme is None for weight in _inside(model.weights)):
            found["modules_in_block_to_quantize"] = [suffixes(quantized, dense)]
        rules = _rules(meant, base) | {rf"-:{re.escape(path)}(\..*)?$": {} for path in unused_paths(model)}
        return {**found, "dynamic": rules} if rules else found

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        return rounded_scales(weights)

    def files(self, model: Model, states: dict[str, State]) -> dict[str, str]:
        return {"quantize_config.json": json.dumps(self.config(model, states), indent=2, ensure_ascii=False) + "\n"}

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        schemes = {state.scheme for state in states.values() if state.scheme}
        mixed = len(schemes) > 1
        partial = any(w.kind in ("linear", "expert") and states[w.name].scheme is None for w in _inside(weights))
        experts = any(w.kind == "expert" and states[w.name].scheme for w in weights)
        odd = sorted(str(s) for s in schemes if s.group not in (None, 16, 32, 64, 128, 256, 512, 1024))
        return [
            _auto_gptq(mixed, partial, tied=not any(w.kind == "head" for w in weights)),
            _gptqmodel(schemes, experts, odd, unsure(weights, states)),
            _transformers(mixed, experts, odd, unsure(weights, states)),
            _server("vllm", weights, states, schemes),
            _server("sglang", weights, states, schemes),
            _exllamav2(mixed, schemes),
        ]


def rounded_scales(weights: Sequence[Weight]) -> list[Note]:
    """The counted line of scales that fp16 cannot hold exactly."""
    names = tuple(weight.name for weight in weights if weight.dtype == "F32")
    return [Note("scales", "fp32 scales rounded to fp16, by at most 2^-11 of their size", names)] if names else []


def disk_path(weight: Weight) -> str:
    """The name on disk without `.weight`."""
    return weight.name.removesuffix(".weight")


def flip(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose with contiguous strides: a single row counts as contiguous whatever its strides, which may prevent a view."""
    import torch

    return matrix.T.clone(memory_format=torch.contiguous_format)


def refuse_place(weight: Weight) -> None:
    """Raises Refusal for weights that no reader of GPTQ and AWQ checkpoints looks for, whatever the scheme."""
    if weight.experts is not None:
        raise Refusal("its readers know no fused experts, only one tensor per expert", "leave them dense: skip=[experts]")
    if weight.kind in ("embedding", "head"):
        raise Refusal(f"its readers hold no quantized {weight.kind} that they agree on", "leave it out of targets")
    if weight.converted and weight.kind != "expert":
        raise Refusal("transformers splits or permutes this tensor while loading, codes cannot follow", "skip it")
    if weight.transposed:
        raise Refusal("its readers do not agree on how a Conv1D is grouped", "pack as compressed-tensors with dequantize=true")
    if weight.block is None or weight.stack.partition(":")[0] not in ("decoder", "text"):
        raise Refusal("its readers replace linears in the blocks of the decoder only", _ELSEWHERE)
    if not weight.name.endswith(".weight"):
        raise Refusal("its readers look for names that stand for .weight", "skip it")


def refuse_size(weight: Weight, scheme: Scheme) -> None:
    """Raises Refusal for codes that its readers do not know, and for sizes that they do not allocate."""
    if not scheme.integer or scheme.inputs:
        raise Refusal(f"its readers know integer weights and 16-bit activations only, not {scheme}", "pack as compressed-tensors")
    if scheme.minimum:
        do = "use a scheme with zero points, -asym for -min"
        raise Refusal(f"the layout has integer zero points, and {scheme} has minima, which they hold only rounded", do)
    if weight.rows % _MULTIPLE or weight.columns % _MULTIPLE:
        size = f"{weight.rows} outputs and {weight.columns} inputs"
        raise Refusal(f"its readers take multiples of {_MULTIPLE} only, here {size}", _ELSEWHERE)
    if weight.columns % (scheme.group or weight.columns):
        raise Refusal(f"groups of {scheme.group} do not divide {weight.columns} columns", "quantize with ragged=divide")


def in_half(weight: Weight, scale: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    """Scales in fp16. Raises FormatError if one loses more than 2^-11 of its size, or of that of `least`."""
    import torch

    half = scale.to(torch.float16)
    lost = (half.float() - scale.float()).abs()
    size = scale.float().abs() if least is None else torch.maximum(scale.float().abs(), least.float().abs())
    # Not "greater than", so that overflows and NaN count as well.
    bad = ~(lost <= size * 2.0**-11)
    if bool(bad.any()):
        worst = float(scale[bad].float().abs().max()), float(scale[bad].float().abs().min())
        raise FormatError(
            f"'{weight.name}'", "scales that fp16 can hold, in which this layout stores them",
            f"{int(bad.sum())} of {scale.numel()} that it cannot, between {worst[1]:.3g} and {worst[0]:.3g}",
            "pack as compressed-tensors, which keeps the dtype of the model, or skip this weight",
        )  # fmt: skip
    return half


def dense_views(weights: Iterable[Weight], states: dict[str, State]) -> dict[str, Scheme | None]:
    """Scheme (None if dense) of every linear of the blocks, under both paths that readers use: name on disk and module."""
    found: dict[str, Scheme | None] = {}
    for weight in weights:
        if weight.attribute == "weight" and weight.kind in ("linear", "router"):
            found |= dict.fromkeys((disk_path(weight), weight.module), states[weight.name].scheme)
        elif weight.kind == "expert":
            found[disk_path(weight)] = states[weight.name].scheme
    return found


def gathered(meant: dict[str, Scheme | None]) -> dict[str, Scheme | None]:
    """The same, but experts of a block with one scheme are under the single path `...experts`, which servers look up."""
    together = _together(meant)
    return {_experts_of(path) if len(together[_experts_of(path)]) == 1 else path: scheme for path, scheme in meant.items()}


def suffixes(wanted: Sequence[str], others: Sequence[str]) -> list[str]:
    """Strings that occur in all of `wanted` and in none of `others`: paths inside a block if they suffice.

    Readers compare them by `in` or `endswith`, with the whole path or with the path inside the block.
    """
    inside = {path: re.sub(r"^.*?\.\d+\.", "", path) for path in wanted}
    # One text of all paths, in which no path can occur across two of them.
    text = "\n".join(others)
    clashing = {short for short in {*inside.values()} if short in text}
    return sorted({path if short in clashing else short for path, short in inside.items()})


def unsure(weights: Iterable[Weight], states: dict[str, State]) -> str:
    """The part of a model that readers may know by other names than those on disk; empty if there is none."""
    dense = False
    for weight in weights:
        if weight.stack.startswith("tower:"):
            return f"a model with a {weight.stack}; not run"
        dense = dense or (weight.kind == "expert" and states[weight.name].scheme is None)
    return "dense experts beside quantized layers; not run" if dense else ""


def _zero_words(zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Zero points [out, groups] from 1 on, less one, as words [groups, out * b / 32]."""
    import torch

    from compress.numerics import bitstream

    return bitstream.pack(flip(zero - 1), scheme.bits).view(torch.int32)


def _inside(weights: Iterable[Weight]) -> list[Weight]:
    return [w for w in weights if (w.block is not None and w.attribute == "weight") or w.kind == "expert"]


def _options(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group or -1, "sym": scheme.symmetric}


def _experts_of(path: str) -> str:
    """`model.layers.0.mlp.experts` for a path of one of these experts, else an empty string."""
    match = re.fullmatch(r"(.*\.experts)\..+", path)
    return match[1] if match else ""


def _together(meant: dict[str, Scheme | None]) -> dict[str, set[Scheme | None]]:
    """Path of each module that servers fuse -> the schemes of its parts."""
    found: dict[str, set[Scheme | None]] = defaultdict(set)
    for path, scheme in meant.items():
        head, _, last = path.rpartition(".")
        if experts := _experts_of(path):
            found[experts].add(scheme)
        elif last in FUSED:
            found[f"{head}.{FUSED[last]}"].add(scheme)
    return found


def _rules(meant: dict[str, Scheme | None], base: Scheme) -> dict[str, dict[str, Any]]:
    """GPTQModel's `dynamic` rules: `-:REGEX` stays dense, `+:REGEX` has other settings. Regexes match from a path's start.

    The first that matches counts; here no path matches two.
    """
    names = gathered(meant) | {path: next(iter(parts)) for path, parts in _together(meant).items() if len(parts) == 1}
    rules: dict[str, dict[str, Any]] = {}
    for scheme in sorted({*names.values()} - {base}, key=str):
        others = {name for name in names if names[name] != scheme}
        others |= {_experts_of(name) for name in names if _experts_of(name)}
        for pattern in patterns([name for name in names if names[name] == scheme], others):
            regex = pattern[3:] if pattern.startswith("re:") else f"{re.escape(pattern)}$"
            regex = re.sub(r"\\.experts\$$", r"\\.experts(?:\\.|$)", regex)
            differs = {} if scheme is None else {k: v for k, v in _options(scheme).items() if v != _options(base)[k]}
            rules[f"{'-' if scheme is None else '+'}:{regex}"] = differs
    return rules


def _auto_gptq(mixed: bool, partial: bool, tied: bool) -> Verdict:
    if mixed:
        return Verdict("auto-gptq", "no", "one scheme for all layers")
    if partial:
        return Verdict("auto-gptq", "no", "it replaces all linears of a family, and loses those that are dense without a word")
    if tied:
        return Verdict("auto-gptq", "no", "it loads embeddings that are the head as well as zeros, without a word")
    return Verdict("auto-gptq", "yes", "0.7.1 with transformers 4.46, for the families that it lists; run on Llama and Mixtral")


def _gptqmodel(schemes: set[Scheme], experts: bool, odd: list[str], open_: str) -> Verdict:
    if odd:
        return Verdict("gptqmodel", "no", f"groups that it does not list: {', '.join(odd)}")
    if any(not scheme.symmetric for scheme in schemes):
        return Verdict("gptqmodel", "no", "it takes asymmetric codes of this version from its own quantizer only")
    if experts:
        return Verdict("gptqmodel", "no", "it looks for experts by other names than those on disk")
    if len(schemes) > 1 or open_:
        return Verdict("gptqmodel", "unknown", "by its `dynamic` rules; not run" if len(schemes) > 1 else open_)
    return Verdict("gptqmodel", "yes", "7.5.0, for the families that it lists; run on Llama")


def _transformers(mixed: bool, experts: bool, odd: list[str], open_: str) -> Verdict:
    if experts:
        return Verdict("transformers", "no", "it fuses experts while loading and finds no dense ones")
    if mixed:
        return Verdict("transformers", "no", "optimum takes one scheme for all layers")
    if odd:
        return Verdict("transformers", "no", f"gptqmodel, which it needs, does not list groups of {', '.join(odd)}")
    if open_:
        return Verdict("transformers", "unknown", open_)
    return Verdict("transformers", "yes", "by its source, not run; needs optimum >= 1.24 and gptqmodel >= 1.4.3")


def _server(reader: str, weights: Sequence[Weight], states: dict[str, State], schemes: set[Scheme]) -> Verdict:
    wrong = sorted(str(s) for s in schemes if s.bits not in (4, 8) or not s.symmetric)
    odd = sorted(str(s) for s in schemes if s.group not in (None, 32, 64, 128))
    split = sorted(path for path, parts in _together(dense_views(weights, states)).items() if len(parts) > 1)
    if wrong:
        loads = "no" if reader == "vllm" or any(s.bits == 3 for s in schemes) else "unknown"
        return Verdict(reader, loads, f"its kernels take symmetric 4 and 8 bits, not {', '.join(wrong)}")
    if odd:
        return Verdict(reader, "no" if reader == "vllm" else "unknown", f"groups other than 32, 64, 128: {', '.join(odd)}")
    if split:
        return Verdict(reader, "no", f"it fuses {split[0]}, whose parts differ")
    if len(schemes) > 1:
        return Verdict(reader, "unknown", "by the `dynamic` rules; not run")
    if open_ := unsure(weights, states):
        return Verdict(reader, "unknown", open_)
    if reader == "vllm":
        return Verdict(reader, "yes", "4 bits by 0.32 were run on a CPU; by its source, compute capability 6.0 and up")
    return Verdict(reader, "unknown", "by the documentation of GPTQModel; not run")


def _exllamav2(mixed: bool, schemes: set[Scheme]) -> Verdict:
    if any(scheme.bits != 4 for scheme in schemes):
        return Verdict("exllamav2", "no", "4 bits only")
    families = "4 bits, for the families that it lists; not run"
    return Verdict("exllamav2", "unknown", "mixed groups; not run" if mixed else families)
