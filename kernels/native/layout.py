"""native: our own layout, one for every kernel, and every scheme there is.

A weight `NAME` becomes, as tiles.py and kernels/README.md tell bit by bit,
    NAME.tiles   int16 [experts?, ceil(rows / 16), chunks, 16, 32 or 48]   codes
    NAME.scale   [experts?, ceil(rows / 16), groups, 16]                    in the dtype of the canonical form
    NAME.zero    uint8, in the shape of scale, where the scheme has zero points
FP8's scales of a matrix or of blocks, nvfp4's tensor_scale, outliers and low-rank factors are those of the canonical form.
Nothing is rounded. Embeddings, heads and fused experts lie like any other matrix; a Conv1D keeps its rows, its inputs.

config.json says of every weight in codes what a reader needs, so that it needs no manifest. Refused are groups that do not
end where a half-precision product does, and what transformers splits or permutes while it loads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.checkpoint import CANONICAL, NATIVE, Checkpoint
from compress.contract import Format, Verdict
from compress.errors import InputError, Refusal
from compress.facts import State, TensorSpec, Weight
from compress.kernels.compressed_tensors.layout import patterns

if TYPE_CHECKING:
    import torch

    from compress.names import Model
    from compress.qtensor import QTensor

VERSION = 1
"""The version of the layout and of what config.json says of it."""
_LEAST_GROUP = 16


class Native(Format):
    """Codes of 2, 3, 4 and 8 bits, integers or floats, with whatever may stand beside them."""

    name = NATIVE
    holds = frozenset({"outliers", "lowrank"})

    def refuse(self, weight: Weight, state: State) -> None:
        scheme = state.scheme
        if scheme is None:
            return
        if scheme.group is not None and (scheme.group < _LEAST_GROUP or scheme.group & (scheme.group - 1)):
            reason = f"kernels read groups of {_LEAST_GROUP}, 32, 64, 128, ... columns or whole rows, not of {scheme.group}"
            raise Refusal(reason, "quantize with such a group, or with ragged=channel where it does not divide the columns")
        if weight.converted and weight.kind != "expert":
            raise Refusal("transformers splits or permutes this tensor while loading, codes cannot follow", "skip it")
        if weight.attribute != "weight" and weight.kind != "expert":
            raise Refusal(f"it is `{weight.attribute}` of its module, where nothing packed can be put", "skip it")

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        from compress.kernels.native import packed, tiles
        from compress.qtensor import part_specs

        scheme = state.scheme
        if scheme is None:
            return [TensorSpec(weight.name, weight.dtype, weight.shape)]
        lead = () if weight.experts is None else (weight.experts,)
        words = tiles.shape(weight.rows, weight.columns, scheme.bits)
        found = {"tiles": ("I16", (*lead, *words)), **part_specs(weight, state)}
        del found["codes"]
        if packed.by_row(scheme):
            grid = (*lead, words[0], packed.groups_of(scheme, weight.columns), tiles.ROWS)
            found |= {part: (found[part][0], grid) for part in ("scale", "zero") if part in found}
        return [TensorSpec(f"{weight.name}.{part}", *spec) for part, spec in found.items()]

    def copies(self, weight: Weight, state: State) -> dict[str, str]:
        from compress.qtensor import specs

        same = {(spec.name, spec.shape) for spec in specs(weight, state)}
        return {spec.name: spec.name for spec in self.specs(weight, state) if (spec.name, spec.shape) in same}

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        from compress.kernels.native.packed import pack

        return {f"{weight.name}.{part}": tensor for part, tensor in pack(value).items()}

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
        from compress.kernels.native.packed import Packed

        parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        return Packed(state, weight.rows, weight.columns, parts).unpack()

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        alike: dict[tuple[str, str, tuple[int, ...], bool], list[str]] = defaultdict(list)
        for w in model.weights:
            if states[w.name].scheme:
                alike[str(states[w.name]), w.dtype, w.shape, w.transposed].append(w.name)
        names = [name for members in alike.values() for name in members]
        weights = [
            {"names": patterns(members, sorted({*names} - {*members})), "state": state, "dtype": dtype, "shape": list(shape)}
            | ({"transposed": True} if transposed else {})
            for (state, dtype, shape, transposed), members in alike.items()
        ]  # fmt: skip
        return {"quant_method": CANONICAL, "format": self.name, "version": VERSION, "weights": weights}

    def described(self, checkpoint: Checkpoint) -> dict[str, tuple[Weight, State]]:
        where, config = str(checkpoint.path / "config.json"), checkpoint.config["quantization_config"]
        if config.get("version") != VERSION:
            got = f"version {config.get('version')!r} of the native format"
            raise InputError(where, f"version {VERSION}, which is read here", got, "update compress")
        packed = [name.removesuffix(".tiles") for name in checkpoint.refs if name.endswith(".tiles")]
        found: dict[str, tuple[Weight, State]] = {}
        try:
            for entry in config["weights"]:
                state, shape = State.parse(entry["state"]), tuple(map(int, entry["shape"]))
                rule = re.compile("|".join(n[3:] if n.startswith("re:") else re.escape(n) for n in entry["names"]))
                for name in filter(rule.fullmatch, packed):
                    transposed, module = bool(entry.get("transposed")), name.rpartition(".")[0]
                    found[name] = (Weight(name, str(entry["dtype"]), shape, transposed=transposed, module=module), state)
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise InputError(where, "what the native format says of weights", f"{type(error).__name__}: {error}") from None
        if untold := sorted(set(packed) - set(found)):
            raise InputError(where, f"the state of '{untold[0]}'", f"nothing of {len(untold)} packed weights")
        return found

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        return [
            Verdict("native", "yes", "compress.load, or transformers after `import compress.hf`; run on the CPU"),
            Verdict("transformers", "no", "by itself it takes the weights for missing ones; `import compress.hf` first"),
            Verdict("vllm", "no", "it does not know the format"),
        ]
