"""mlx: MLX's affine codes, which mlx-lm loads and runs on Apple's GPUs.

A matrix `NAME.weight` [out, in] with groups of g columns, linear, head or embedding, becomes
    NAME.weight   uint32 [out, in * b / 32]   codes, one bit stream per row
    NAME.scales   [out, in / g]               in the dtype of the model
    NAME.biases   as scales                   what code 0 means
and W[n, k] = scales[n, k // g] * code[n, k] + biases[n, k // g]. A bias stays a plain tensor, `NAME.bias`.

That is what a scheme with minima means, and its parts are copied. Symmetric codes are written exactly, too: their minimum is the
scale times a power of two. A zero point's minimum would have to be rounded, so zero points are refused. So are groups other than
32, 64 and 128, codes of floats, rounded activations, Conv1D and fused experts, which mlx-lm turns round or takes apart while it
loads, and routed experts of families whose loader stacks plain weights alone.

config.json says the most common bits and group in `quantization`, others by module, and repeats it in `quantization_config`
as mlx-lm does. It names all that transformers leaves to defaults or has moved (`rope_parameters`), because mlx-lm has other
defaults. mlx-lm builds a model of the name in `model_type`; families.py lists its names, and those that have been run.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.architecture.unused import further_tokens
from compress.contract.format import Format, Verdict
from compress.errors import FormatError, Refusal
from compress.kernels.mlx.families import KNOWN, LEAVING_OUT, RUN, STACKING, VERSION
from compress.spec.scheme import BITS, Scheme
from compress.spec.weight_state import State, TensorSpec, Weight

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.checkpoint.reader import Checkpoint
    from compress.numerics.qtensor import QTensor

GROUPS = (32, 64, 128)
_EXPERT = re.compile(r"\.experts\.\d+\.(\w+)$")
_STACKED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Names of an expert's matrices on disk -> in mlx-lm, where they differ."""
_SYMMETRIC = "use a symmetric scheme, or -min for -asym"


class Mlx(Format):
    """Integers of 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 or 128, symmetric or with minima; embeddings and heads too."""

    name = "mlx"
    family = ""
    """The model_type, where it is known."""

    def written_for(self, model: Model, source: Checkpoint, config: dict[str, Any]) -> Mlx:
        found = Mlx(self.dequantize)
        found.family = model.family
        return found

    def refuse(self, weight: Weight, state: State) -> None:
        scheme = state.scheme
        if scheme is None:
            return
        if not scheme.integer or scheme.bits not in BITS or scheme.inputs:
            raise Refusal(
                f"it holds integers and 16-bit activations, not {scheme}", "use a scheme such as w4a16g64-min or w4a16g64"
            )
        if scheme.zeros:
            raise Refusal(f"it has minima, which the zero points of {scheme} are only up to rounding", _SYMMETRIC)
        group = scheme.group or weight.columns
        if group not in GROUPS:
            raise Refusal(f"it holds groups of 32, 64 and 128 columns, not of {group}", "quantize with one of these groups")
        if weight.columns % group:
            raise Refusal(f"groups of {group} do not divide {weight.columns} columns", "use a group that does, or ragged=divide")
        if weight.experts is not None:
            raise Refusal(
                "mlx-lm takes fused experts apart while it loads, and codes cannot follow", "leave them dense: skip=[experts]"
            )
        if weight.transposed:
            raise Refusal("mlx-lm turns the weight of a Conv1D round while it loads, and codes cannot follow", "skip it")
        if weight.name.endswith(".kv_b_proj.weight"):
            raise Refusal(
                "mlx-lm splits it while it loads, and rounds both parts again", "leave it dense: skip=['re:.*kv_b_proj.*']"
            )
        if not weight.name.endswith(".weight"):
            raise Refusal("mlx-lm looks for names that end in .weight", "skip it")

    def refuse_together(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        family, refused = model.family, []
        if family not in KNOWN:
            reason = f"mlx-lm {VERSION} has no model of the type {family}"
            return [("*", reason, "pack in another format; `compress formats ls` lists them")]
        known = re.compile(LEAVING_OUT.get(family, r"\Z"))
        reason = f"mlx-lm {VERSION} has no place for layers that predict further tokens in {family}, and stops at them"
        refused += [(n, reason, "take these tensors out of MODEL") for n in further_tokens(model) if not known.match(n)]
        stacks: dict[str, list[Weight]] = defaultdict(list)
        for weight in model.weights:
            if weight.kind == "expert" and weight.experts is None:
                stacks[module_of(weight.name)].append(weight)
        for members in stacks.values():
            schemes = {states[weight.name].scheme for weight in members}
            if schemes != {None} and family not in STACKING:
                reason = f"mlx-lm stacks only plain weights of {family}'s experts while it loads"
                refused += [(w.name, reason, "leave them dense: skip=[experts]") for w in members if states[w.name].scheme]
            elif len(schemes) > 1:
                kinds = ", ".join(sorted({str(states[weight.name]) for weight in members}))
                reason = f"mlx-lm stacks these experts while it loads, which takes one scheme; here: {kinds}"
                refused += [(w.name, reason, "give all experts of a block one scheme") for w in members]
        return refused

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        scheme = state.scheme
        if scheme is None:
            return [TensorSpec(weight.name, weight.dtype, weight.shape)]
        path, grid = weight.name.removesuffix(".weight"), (weight.rows, scheme.groups(weight.columns))
        return [
            TensorSpec(weight.name, "U32", (weight.rows, weight.columns * scheme.bits // 32)),
            TensorSpec(f"{path}.scales", weight.dtype, grid),
            TensorSpec(f"{path}.biases", weight.dtype, grid),
        ]

    def copies(self, weight: Weight, state: State) -> dict[str, str]:
        assert state.scheme is not None
        name, path = weight.name, weight.name.removesuffix(".weight")
        found = {name: f"{name}.codes", f"{path}.scales": f"{name}.scale"}
        return found | ({f"{path}.biases": f"{name}.minimum"} if state.scheme.minimum else {})

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        """The packed tensors. Raises FormatError for scales whose minima overflow the dtype of the model."""
        import torch

        from compress.numerics import bitstream

        path = weight.name.removesuffix(".weight")
        minimum = lowest(value.scale, value.scheme) if value.minimum is None else value.minimum
        if not bool(minimum.isfinite().all()):
            expected = f"scales whose {value.scheme.middle}-fold {weight.dtype} can hold"
            raise FormatError(f"'{weight.name}'", expected, "larger ones", "skip this weight, or convert the model to bfloat16")
        return {
            weight.name: bitstream.pack(value.codes, value.scheme.bits).view(torch.uint32),
            f"{path}.scales": value.scale.contiguous(),
            f"{path}.biases": minimum.contiguous(),
        }

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
        assert state.scheme is not None
        path = weight.name.removesuffix(".weight")
        return qtensor_of(
            tensors[weight.name], tensors[f"{path}.scales"], tensors[f"{path}.biases"], state.scheme, weight.columns
        )

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        found = {
            module_of(weight.name): {"group_size": scheme.group or weight.columns, "bits": scheme.bits}
            for weight in model.weights
            if (scheme := states[weight.name].scheme) is not None
        }
        if not found:
            return {}
        ordered = Counter(json.dumps(settings) for settings in found.values()).most_common()
        usual = json.loads(min(text for text, count in ordered if count == ordered[0][1]))
        others = {path: settings for path, settings in found.items() if settings != usual}
        return {**usual, "mode": "affine", **others}

    def configured(self, content: dict[str, Any], model: Model, states: dict[str, State]) -> dict[str, Any]:
        quantization = self.config(model, states)
        named = {"quantization": quantization, "quantization_config": quantization} if quantization else {}
        return {**spelled_out(content, any(weight.kind == "head" for weight in model.weights)), **named}

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        run = (
            f"mlx-lm {VERSION}, run on {len(RUN)} families, this one among them"
            if self.family
            else f"mlx-lm {VERSION}; run on Llama"
        )
        mlx = Verdict("mlx", "yes", run)
        if self.family and self.family not in RUN:
            mlx = Verdict("mlx", "unknown", f"mlx-lm {VERSION} has a model of the type {self.family}; not run")
        return [
            mlx,
            Verdict("transformers", "no", "it refuses a quantization_config without quant_method"),
            Verdict("vllm", "no", "it does not know the layout"),
        ]


def module_of(name: str) -> str:
    """The path of a weight's module in mlx-lm, where experts are stacked."""
    path = name.removesuffix(".weight")
    return _EXPERT.sub(lambda match: f".switch_mlp.{_STACKED.get(match[1], match[1])}", path)


def lowest(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The minimum of symmetric codes, exact in the dtype of their scales unless it overflows."""
    return scale * -scheme.middle


def qtensor_of(words: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, scheme: Scheme, columns: int) -> QTensor:
    """The codes of three stored tensors; for symmetric ones the minimum follows from the scale."""
    import torch

    from compress.numerics import bitstream
    from compress.numerics.qtensor import QTensor

    codes = bitstream.unpack(words.contiguous().view(torch.uint8), scheme.bits, columns)
    return QTensor(scheme, codes, scale, minimum=minimum if scheme.minimum else None)


def spelled_out(content: dict[str, Any], own_head: bool) -> dict[str, Any]:
    """A config.json with what transformers leaves to its defaults, and rotary settings where mlx-lm looks for them."""
    from transformers import AutoConfig

    found = dict(content)
    with contextlib.suppress(Exception):  # a type that transformers knows only by the model's own code
        full = AutoConfig.for_model(
            str(content["model_type"]), **{k: v for k, v in content.items() if k != "model_type"}
        ).to_dict()
        found |= {
            k: v for k, v in full.items() if k not in found and v is not None and isinstance(v, bool | int | float | str | list)
        }
    found["tie_word_embeddings"] = bool(content.get("tie_word_embeddings", not own_head))
    rope = content.get("rope_parameters")
    if isinstance(rope, dict):
        kinds = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
        whole = kinds.get("full_attention", {} if kinds else rope)
        if "rope_theta" in kinds.get("sliding_attention", {}):
            found.setdefault("rope_local_base_freq", kinds["sliding_attention"]["rope_theta"])
        for name, older in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
            if name in whole:
                found.setdefault(older if found.get("model_type") == "gpt_neox" else name, whole[name])
        if whole.get("rope_type", "default") != "default":
            found.setdefault("rope_scaling", {k: v for k, v in whole.items() if k != "rope_theta"})
    kinds_of_layers = content.get("layer_types")
    if found.get("model_type") == "gemma3_text" and isinstance(kinds_of_layers, list) and "full_attention" in kinds_of_layers:
        found.setdefault("sliding_window_pattern", kinds_of_layers.index("full_attention") + 1)
    return found
