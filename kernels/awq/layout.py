"""awq: AutoAWQ's gemm layout, four bits with true zero points.

A linear `NAME.weight` [out, in] with groups of g inputs becomes
    NAME.qweight  int32 [in, out / 8]        codes; bits 4j of a word hold output [0, 2, 4, 6, 1, 3, 5, 7][j] of its eight
    NAME.qzeros   int32 [in / g, out / 8]    zero points as they are, in the same order
    NAME.scales   fp16  [in / g, out]
and W[n, k] = scales[k // g, n] * (code[k, n] - zero[k // g, n]). A bias stays a plain tensor.

This is the layout for asymmetric codes of four bits, including zero points of 0, which `gptq` cannot store. Symmetric codes
are written exactly, too, with every zero point 8: readers need not know that they are symmetric. The layout has one bit
width and one group size for all weights; others are refused. Scales and positions of weights are refused as in `gptq`.
Written from the sources of AutoAWQ (whose dequantization was run, and agrees), transformers and vLLM (which were read).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.architecture.unused import unused_paths
from compress.contract.format import Format, Verdict
from compress.errors import Refusal
from compress.kernels.gptq.layout import (
    dense_views,
    disk_path,
    flip,
    gathered,
    in_half,
    refuse_place,
    refuse_size,
    rounded_scales,
    suffixes,
    unsure,
)
from compress.spec.weight_state import Note, State, TensorSpec, Weight

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.numerics.qtensor import QTensor

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs the bits 4j .. 4j + 3 of a word hold."""
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(Format):
    """Codes of four bits with one group size, zero points included."""

    name = "awq"

    def refuse(self, weight: Weight, state: State) -> None:
        scheme = state.scheme
        if scheme is None:
            return
        if scheme.integer and scheme.bits != BITS:
            raise Refusal(f"the layout holds {BITS} bits, not {scheme.bits}", "pack as gptq or compressed-tensors")
        refuse_place(weight)
        refuse_size(weight, scheme)

    def refuse_together(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        quantized = [weight for weight in model.weights if states[weight.name].scheme]
        schemes = {scheme for weight in quantized if (scheme := states[weight.name].scheme)}
        if len({scheme.group for scheme in schemes}) > 1:
            reason = f"the readers take one group size for all weights; here: {', '.join(sorted(map(str, schemes)))}"
            return [(weight.name, reason, "quantize all with one group, or pack as gptq") for weight in quantized]
        meant = dense_views(model.weights, states)
        codes = [path for path, scheme in meant.items() if scheme]
        hidden = {path for path, scheme in meant.items() if not scheme and any(path in other for other in codes)}
        reason = "readers find dense layers by a part of the path, and would take a quantized layer for this one"
        return [(w.name, reason, "quantize it too, or pack as gptq") for w in model.weights if {disk_path(w), w.module} & hidden]

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        scheme = state.scheme
        if scheme is None:
            return [TensorSpec(weight.name, weight.dtype, weight.shape)]
        path, groups = disk_path(weight), scheme.groups(weight.columns)
        return [
            TensorSpec(f"{path}.qweight", "I32", (weight.columns, weight.rows // 8)),
            TensorSpec(f"{path}.qzeros", "I32", (groups, weight.rows // 8)),
            TensorSpec(f"{path}.scales", "F16", (groups, weight.rows)),
        ]

    def constants(self, weight: Weight, state: State) -> dict[str, torch.Tensor]:
        import torch

        scheme = state.scheme
        assert scheme is not None
        if not scheme.symmetric:
            return {}
        middle = torch.full((weight.rows, scheme.groups(weight.columns)), scheme.middle, dtype=torch.uint8)
        return {f"{disk_path(weight)}.qzeros": _words(middle)}

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        """The packed tensors. Raises FormatError for scales that fp16 cannot hold."""
        path, state = disk_path(weight), State(value.scheme)
        tensors = {
            f"{path}.qweight": _words(value.codes),
            f"{path}.scales": flip(in_half(weight, value.scale)),
            **self.constants(weight, state),
        }
        if value.zero is not None:
            tensors[f"{path}.qzeros"] = _words(value.zero)
        return {spec.name: tensors[spec.name] for spec in self.specs(weight, state)}

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
        from compress.checkpoint.reader import torch_dtype
        from compress.numerics.qtensor import QTensor

        assert state.scheme is not None
        path = disk_path(weight)
        scale = flip(tensors[f"{path}.scales"]).to(torch_dtype(weight.dtype))
        zero = None if state.scheme.symmetric else _values(tensors[f"{path}.qzeros"])
        return QTensor(state.scheme, _values(tensors[f"{path}.qweight"]), scale, zero)

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        meant = dense_views(model.weights, states)
        dense = suffixes([path for path, s in gathered(meant).items() if not s], [path for path, s in meant.items() if s])
        heads = sorted({weight.module for weight in model.weights if weight.kind == "head"})
        group = next(state.scheme.group for state in states.values() if state.scheme)
        return {
            "quant_method": "awq", "bits": BITS, "group_size": group or -1, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": [*dense, *heads, *unused_paths(model)] or None,
        }  # fmt: skip

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        return rounded_scales(weights)

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        experts = any(w.kind == "expert" and states[w.name].scheme for w in weights)
        groups = {state.scheme.group for state in states.values() if state.scheme}
        open_ = unsure(weights, states)
        transformers = Verdict("transformers", "yes", "by its source, not run; needs gptqmodel and accelerate")
        vllm = Verdict("vllm", "yes", "0.32 was run on a CPU; by its source, compute capability 7.5 and up")
        model = Verdict("gptqmodel", "yes", "7.5.0, for the families that it lists; run on Llama")
        if experts:
            model = Verdict("gptqmodel", "no", "it does not find the experts by their names on disk, and computes NaN")
            transformers = Verdict("transformers", "no", "it fuses experts while loading and finds no dense ones")
        elif open_:
            model = Verdict("gptqmodel", "unknown", open_)
            transformers = Verdict("transformers", "unknown", open_)
        if open_ or not groups <= {None, 32, 64, 128}:
            vllm = Verdict("vllm", "unknown", open_ or "groups other than 32, 64, 128")
        return [
            Verdict("auto-awq", "unknown", "for the families that it lists; not run"),
            model,
            transformers,
            vllm,
            Verdict("sglang", "unknown", "by the documentation of GPTQModel; not run"),
        ]


def _words(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n] in 0 .. 15 -> int32 [n, out / 8]."""
    import torch

    from compress.numerics import bitstream

    eights = flip(values).unflatten(-1, (-1, 8))[..., list(ORDER)]
    return bitstream.pack(eights.flatten(-2), BITS).view(torch.int32)


def _values(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_words`."""
    import torch

    from compress.numerics import bitstream

    in_order = bitstream.unpack(words.view(torch.uint8), BITS, words.shape[-1] * 8)
    return flip(in_order.unflatten(-1, (-1, 8))[..., list(INVERSE)].flatten(-2))
