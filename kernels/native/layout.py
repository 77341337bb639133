"""native: our own layout, the same for all kernels and all schemes.

A weight `NAME` becomes (tiles.py and kernels/README.md describe every bit)
    NAME.tiles   int16 [experts?, ceil(rows / 16), chunks, 16, 32 to 48]   codes
    NAME.scale   [experts?, ceil(rows / 16), groups, 16]                    in the dtype of the canonical form
    NAME.zero    uint8, in the shape of scale, where the scheme has zero points
    NAME.minimum like scale, where the scheme has minima
FP8's scales of a matrix or of blocks, nvfp4's tensor_scale and input_scale, outliers, kept columns and low-rank factors are those
of the canonical form.
A 2:4 weight, in symmetric w4 codes or not in codes, is stored without half of its entries if that takes less: NAME.tiles holds
the kept entries and NAME.indices their positions (sparse.py). If chunks do not divide the columns, NAME.rest holds the columns
of the last one (narrow.py); in memory it is a chunk like the others. Nothing is rounded. Embeddings, heads and fused experts
are stored like any other matrix; rows of a Conv1D are its inputs.

config.json describes every packed weight, so that a reader needs no manifest. Refused are groups that do not end at a
multiple of a half-precision product's width, and tensors that transformers splits or permutes while it loads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from compress.checkpoint.reader import CANONICAL, NATIVE, Checkpoint
from compress.contract.format import Format, Verdict
from compress.errors import InputError, Refusal
from compress.kernels.compressed_tensors.layout import numberless, patterns_beside
from compress.numerics import qtensor
from compress.spec.weight_state import Note, State, TensorSpec, Weight, counted, payload_bytes

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.numerics.qtensor import QTensor

VERSION = 1
"""The version of the layout and of its config in config.json."""
HALVED = 2
"""The version in which half of a 2:4 weight may be left out, which a reader of the first would take for damage."""
NARROW = 3
"""The version in which the last chunk of a weight may be a tensor of its own."""
WIDER = 4
"""The version in which codes may have 5 or 6 bits, and minima in the place of zero points."""
FEWER = 5
"""The version in which activations may be rounded to 4 bits or with zero points, and columns be kept beside codes."""
ROTATED = 6
"""The version in which inputs may be rotated before they are multiplied by codes."""
_VERSIONS = (VERSION, HALVED, NARROW, WIDER, FEWER, ROTATED)
_LEAST_GROUP = 16


class Native(Format):
    """Codes of 2, 3, 4, 5, 6 and 8 bits, integers or floats, with all corrections."""

    name = NATIVE
    holds = frozenset({"outliers", "columns", "lowrank", "rotation"})
    _there: frozenset[str] | None = None
    """When reading a checkpoint: the weights of which half is left out."""
    _cut: frozenset[str] | None = None
    """When reading a checkpoint: the weights whose last chunk is a tensor of its own."""

    def reading(self, checkpoint: Checkpoint) -> Self:
        self._there, self._cut = (
            frozenset(name.removesuffix(end) for name in checkpoint.refs if name.endswith(end)) for end in (".indices", ".rest")
        )
        return self

    def plain(self, weight: Weight, state: State) -> str:
        return "" if state.scheme is not None else self._zeros(weight, state)

    def _zeros(self, weight: Weight, state: State) -> str:
        """Why a weight is stored with all of its zeros; empty if half of it is left out."""
        from compress.kernels.native import sparse

        if self._there is not None:
            return sparse.stays(replace(weight, kind="linear"), state) if weight.name in self._there else "it has no indices"
        if reason := sparse.stays(weight, state):
            return reason
        whole = weight.nbytes if state.scheme is None else payload_bytes(_specs(weight, state))
        less = payload_bytes(_specs(weight, state, halved=True)) < whole
        return "" if less else f"rows of {weight.columns} columns take no less without zeros"

    def refuse(self, weight: Weight, state: State) -> None:
        scheme = state.scheme
        if scheme is None:
            return
        if scheme.scales == "k":
            raise Refusal(
                f"kernels read scales of one level, and {scheme} has two", "keep the canonical form, or unpack(to=dense)"
            )
        if scheme.group is not None and (scheme.group < _LEAST_GROUP or scheme.group & (scheme.group - 1)):
            reason = f"kernels read groups of {_LEAST_GROUP}, 32, 64, 128, ... columns or whole rows, not of {scheme.group}"
            raise Refusal(reason, "quantize with such a group, or with ragged=channel where it does not divide the columns")
        if weight.converted and weight.kind != "expert":
            raise Refusal("transformers splits or permutes this tensor while loading, codes cannot follow", "skip it")
        if weight.attribute != "weight" and weight.kind != "expert":
            raise Refusal(f"it is `{weight.attribute}` of its module, where nothing packed can be put", "skip it")

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        zeros = self._zeros(weight, state)
        if state.scheme is None and zeros:
            return [TensorSpec(weight.name, weight.dtype, weight.shape)]
        return _specs(weight, state, not zeros, self._rest(weight, state) if zeros else 0)

    def _rest(self, weight: Weight, state: State) -> int:
        """Columns of the last chunk if it is a tensor of its own, else 0."""
        from compress.kernels.native import narrow

        if state.scheme is None or not self._zeros(weight, state) or (self._cut is not None and weight.name not in self._cut):
            return 0
        return narrow.rest(weight.columns, state.scheme.bits)

    def memory_bytes(self, weight: Weight, state: State) -> int:
        """Bytes of a packed weight in memory; the fastest backends put zeros back among codes."""
        return payload_bytes(_specs(weight, state, state.scheme is None and not self._zeros(weight, state)))

    def copies(self, weight: Weight, state: State) -> dict[str, str]:
        from compress.numerics.qtensor import specs

        same = {(spec.name, spec.shape) for spec in specs(weight, state)}
        return {spec.name: spec.name for spec in self.specs(weight, state) if (spec.name, spec.shape) in same}

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        from compress.kernels.native import narrow
        from compress.kernels.native.packed import pack

        parts = pack(value)
        if narrow.rest(weight.columns, value.scheme.bits):
            parts = narrow.cut(parts, value)
        return {f"{weight.name}.{part}": tensor for part, tensor in parts.items()}

    def encode_as(self, weight: Weight, state: State, value: Any) -> dict[str, torch.Tensor]:
        from compress.kernels.native import packed, sparse

        if self._zeros(weight, state):
            return self.encode(weight, value)
        try:
            parts = sparse.pack(value, 0) if state.scheme is None else packed.pack(value, halved=True)
        except sparse.Crowded as crowded:
            where, expected = f"'{weight.name}', {crowded.place}", f"at most two that are not zero, as {state} says"
            raise InputError(where, expected, "more", "prune it with sparsity=2:4 again") from None
        return {f"{weight.name}.{part}": tensor for part, tensor in parts.items()}

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor | torch.Tensor:
        from compress.kernels.native import narrow, sparse
        from compress.kernels.native.packed import Packed

        parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        if "indices" in parts and not sparse.sound(parts["indices"]):
            raise InputError(f"'{weight.name}.indices'", "two places in each four columns", "others", "make the artifact anew")
        if state.scheme is None:
            return Packed(state, weight.rows, weight.columns, parts).values()
        return Packed(state, weight.rows, weight.columns, narrow.whole(parts, state.scheme, weight.columns)).unpack()

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        alike: dict[tuple[State, str, tuple[int, ...], bool], list[str]] = defaultdict(list)
        version = VERSION
        for w in model.weights:
            state = states[w.name]
            if state.scheme is None and self.plain(w, state):
                continue
            if (kind := (state, w.dtype, w.shape, w.transposed)) not in alike:
                version = max(version, self._version(w, state))
            alike[kind].append(w.name)
        shapes = {kind: numberless(members) for kind, members in alike.items()}
        others = {kind: set().union(*(shapes[other] for other in shapes if other != kind)) for kind in shapes}
        weights = [
            {"names": patterns_beside(members, others[kind]), "state": str(kind[0]), "dtype": kind[1], "shape": list(kind[2])}
            | ({"transposed": True} if kind[3] else {})
            for kind, members in alike.items()
        ]  # fmt: skip
        return {"quant_method": CANONICAL, "format": self.name, "version": version, "weights": weights}

    def _version(self, weight: Weight, state: State) -> int:
        """The first version of the layout that has what a packed weight needs."""
        scheme = state.scheme
        if scheme is not None and scheme.hadamard:
            return ROTATED
        if state.columns is not None or (scheme is not None and scheme.inputs not in ("", "int8", "fp8")):
            return FEWER
        if scheme is not None and (scheme.minimum or scheme.bits in (5, 6)):
            return WIDER
        return NARROW if self._rest(weight, state) else VERSION if self._zeros(weight, state) else HALVED

    def described(self, checkpoint: Checkpoint) -> dict[str, tuple[Weight, State]]:
        where, config = str(checkpoint.path / "config.json"), checkpoint.config["quantization_config"]
        if config.get("version") not in _VERSIONS:
            got = f"version {config.get('version')!r} of the native format"
            raise InputError(where, f"version {', '.join(map(str, _VERSIONS))}, which are read here", got, "update compress")
        packed = [name.removesuffix(".tiles") for name in checkpoint.refs if name.endswith(".tiles")]
        partial_names = [name.rpartition(".")[0] for name in checkpoint.refs if name.endswith((".indices", ".rest"))]
        found: dict[str, tuple[Weight, State]] = {}
        try:
            for entry in config["weights"]:
                state, shape = State.parse(entry["state"]), tuple(map(int, entry["shape"]))
                rule = re.compile("|".join(n[3:] if n.startswith("re:") else re.escape(n) for n in entry["names"]))
                for name in filter(rule.fullmatch, (*packed, *partial_names)):
                    transposed, module = bool(entry.get("transposed")), name.rpartition(".")[0]
                    found[name] = (Weight(name, str(entry["dtype"]), shape, transposed=transposed, module=module), state)
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise InputError(where, "what the native format says of weights", f"{type(error).__name__}: {error}") from None
        if untold := sorted(set(packed) - set(found)):
            raise InputError(where, f"the state of '{untold[0]}'", f"nothing of {len(untold)} packed weights")
        return found

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        from compress.kernels.native.sparse import PATTERN

        masked = [weight for weight in weights if states[weight.name].sparsity == PATTERN]
        reasons = {weight.name: reason for weight in masked if (reason := self._zeros(weight, states[weight.name]))}
        found = counted("zeros", {name: f"of 2:4 are stored: {reason}" for name, reason in reasons.items()})
        kinds = {w.name: (states[w.name], w.dtype, w.shape, w.transposed) for w in weights}
        said = {kinds[w.name]: self._padding(w, states[w.name]) for w in {kinds[w.name]: w for w in weights}.values()}
        return [*found, *counted("padded", {name: said[kind] for name, kind in kinds.items() if said[kind]})]

    def _padding(self, weight: Weight, state: State) -> str:
        """A text on the cost of padding columns to whole chunks; empty if there is none."""
        from compress.kernels.native import sparse, tiles

        if state.scheme is None:
            return ""
        chunk = sparse.chunk(coded=True) if not self._zeros(weight, state) else tiles.chunk(state.scheme.bits)
        columns = -(-weight.columns // chunk) * chunk
        if columns == weight.columns:
            return ""
        disk = payload_bytes(self.specs(weight, state)) * 8 / weight.numel
        memory = self.memory_bytes(weight, state) * 8 / weight.numel
        where = f"{disk:.2f} bits on disk, {memory:.2f} in memory"
        bare = payload_bytes(qtensor.specs(weight, state)) * 8 / weight.numel
        return f"{weight.columns} columns fill {columns}, in chunks of {chunk}: {where}, {bare:.2f} without padding"

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        return [
            Verdict("native", "yes", "compress.load, or transformers after `import compress.hf`; see `compress doctor`"),
            Verdict("transformers", "no", "by itself it takes the weights for missing ones; `import compress.hf` first"),
            Verdict("vllm", "no", "it does not know the format"),
        ]


def _specs(weight: Weight, state: State, halved: bool = False, rest: int = 0) -> list[TensorSpec]:
    """The tensors of a packed weight; `halved` without half of it, `rest` columns of the last chunk in a tensor of their own."""
    parts = _parts_of(weight.dtype, weight.shape, weight.transposed, state, halved, rest)
    return [TensorSpec(f"{weight.name}.{part}", *spec) for part, spec in parts]


@lru_cache(maxsize=1024)
def _parts_of(
    dtype: str, shape: tuple[int, ...], transposed: bool, state: State, halved: bool, rest: int
) -> tuple[tuple[str, tuple[str, tuple[int, ...]]], ...]:
    """safetensors dtype and shape of each part of the many weights that are alike but for their names."""
    from compress.kernels.native import packed, sparse, tiles
    from compress.numerics.bitstream import row_bytes
    from compress.numerics.qtensor import part_specs

    weight, scheme = Weight("", dtype, shape, transposed=transposed), state.scheme
    if scheme is None:
        return tuple(sparse.specs(weight, state).items())
    lead = () if weight.experts is None else (weight.experts,)
    words = tiles.shape(weight.rows, weight.columns - rest, scheme.bits)
    codes = sparse.specs(weight, state) if halved else {"tiles": ("I16", (*lead, *words))}
    if rest:
        codes["rest"] = ("U8", (*lead, weight.rows, row_bytes(rest, scheme.bits)))
    found = {**codes, **part_specs(weight, state)}
    del found["codes"]
    if packed.by_row(scheme):
        groups = scheme.groups(weight.columns) if rest else packed.groups_of(scheme, weight.columns, halved)
        grid = (*lead, words[0], groups, tiles.ROWS)
        found |= {part: (found[part][0], grid) for part in packed.GRIDS if part in found}
    return tuple(found.items())
