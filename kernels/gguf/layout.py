"""gguf: one file for llama.cpp, with the model's sizes and its tokenizer in it.

Codes keep their values. A weight [out, in] becomes rows of blocks of 32 inputs (numerics/gguf_blocks.py has the bytes):
    Q4_0   w4a16, symmetric     d * (code - 8), d in fp16
    Q8_0   w8a16, symmetric     d * (code - 128)
    MXFP4  mxfp4                2^(byte - 127) * E2M1
Groups of 64, of 128 or of a whole row are stored as groups of 32 with the same scale, exactly, for some bytes more. Scales are
rounded to fp16 as in `gptq`, and refused where that loses more than 2^-11 of one. What is not in codes stays in its dtype; norms,
biases and routers become F32, exactly, and Gemma's norms have 1 added, as llama.cpp has them.

Rows of queries and keys change places for Llama and its kin (importers/gguf_names.py), and codes with them. The experts of a
block are one tensor, written matrix by matrix. It is one file, whatever its size: llama.cpp also reads split ones, which are not
written. It rounds activations to 8 bits for its products, by blocks of 32: by that it differs from what the weights mean.

Refused: zero points (Q4_1 and the K-quants hold a floating minimum), 2, 3, 5 and 6 bits, nf4 (whose values IQ4_NL does not have),
nvfp4 (whose scale of a matrix llama.cpp stores as the reciprocal), and architectures that were not run by llama.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.gguf_header import Entry, Info, write_gguf
from compress.checkpoint.reader import GGUF_FILE
from compress.checkpoint.safetensors_header import Shard
from compress.contract.format import Format, Verdict
from compress.errors import Refusal
from compress.importers.gguf_names import ARCHITECTURES, Architecture, Piece, is_norm, paired_heads, pieces, to_pairs
from compress.kernels.gguf.hyperparameters import entries, full_config, notes, rope_factors
from compress.kernels.gguf.tokenizer import tokenizer_entries
from compress.kernels.gptq.layout import in_half, rounded_scales
from compress.spec.gguf_types import BLOCK, TYPES
from compress.spec.weight_state import FLOATS, Note, State, TensorSpec, Weight, counted

if TYPE_CHECKING:
    import torch

    from compress.architecture.weight_map import Model
    from compress.checkpoint.reader import Checkpoint
    from compress.numerics.qtensor import QTensor

_SCALE_BYTES = 2
VERSION = "2026.10"
"""The version of xllamacpp whose llama.cpp was run on every architecture."""
_ELSEWHERE = "pack as compressed-tensors"
_FACTORS = "rope_freqs.weight"
_UNREAD = "a tensor that llama.cpp does not take, left out"


@dataclass(frozen=True)
class _Target:
    """What a file is made for: an architecture, the sizes of the model, and where its tokenizer lies."""

    architecture: Architecture
    config: dict[str, Any]
    folder: Path
    unused: frozenset[str]

    @cached_property
    def tokenizer(self) -> tuple[list[Entry], list[Note]]:
        return tokenizer_entries(self.folder, self.config)

    @cached_property
    def factors(self) -> torch.Tensor | None:
        return rope_factors(self.config)


class Gguf(Format):
    """Codes in blocks of 32, and all that llama.cpp needs besides."""

    name = "gguf"
    renames = True
    target: _Target | None = None
    """Empty for a weight alone, which then keeps its name and the order of its rows."""

    def written_for(self, model: Model, source: Checkpoint, config: dict[str, Any]) -> Gguf:
        found = Gguf(self.dequantize)
        if (architecture := ARCHITECTURES.get(model.family)) is not None:
            found.target = _Target(architecture, full_config(config), source.path, frozenset(model.unused))
        return found

    def plain(self, weight: Weight, state: State) -> str:
        # Tensors that are not in codes have other names there, too.
        return ""

    def refuse(self, weight: Weight, state: State) -> None:
        scheme = state.scheme
        if scheme is None:
            if weight.dtype not in FLOATS:
                raise Refusal(f"llama.cpp takes no tensor of {weight.dtype}", _ELSEWHERE)
            return
        if scheme.inputs:
            raise Refusal(f"llama.cpp rounds activations in its own way, not as {scheme} does", "use a scheme with a16")
        from compress.numerics.gguf_blocks import type_of

        if not scheme.symmetric:
            raise Refusal("the types for zero points hold a floating minimum, which is not written yet", "use a symmetric scheme")
        if not type_of(scheme):
            raise Refusal(f"no type of it holds {scheme}", "quantize to w4a16, w8a16 or mxfp4")
        if weight.transposed and weight.experts is None:
            raise Refusal("its groups run along what llama.cpp has as outputs", "skip it, or " + _ELSEWHERE)
        if weight.columns % BLOCK or (scheme.group or BLOCK) % BLOCK:
            size = f"{weight.columns} columns in groups of {scheme.group or weight.columns}"
            raise Refusal(f"it has blocks of {BLOCK}, which {size} do not fill", "use groups of 32, 64 or 128, or skip it")
        if weight.columns % (scheme.group or weight.columns):
            raise Refusal(f"groups of {scheme.group} do not divide {weight.columns} columns", "quantize with ragged=divide")

    def refuse_together(self, model: Model, states: dict[str, State]) -> list[tuple[str, str, str]]:
        if self.target is None:
            known = ", ".join(ARCHITECTURES)
            return [("*", f"{model.family} is not among the architectures written for llama.cpp: {known}", _ELSEWHERE)]
        try:
            entries(self.target.architecture, self.target.config)
            self.target.tokenizer  # noqa: B018 (raises for one that llama.cpp does not have)
        except Refusal as refusal:
            return [("*", refusal.reason, refusal.do)]
        unknown = [w.name for w in model.weights if not self._pieces(w) and w.name not in self.target.unused]
        name = self.target.architecture.name
        return [(n, f"llama.cpp's {name} has no tensor for it", _ELSEWHERE) for n in unknown]

    def _pieces(self, weight: Weight) -> list[Piece]:
        """What it is stored as; nothing for a tensor that is left out."""
        return [Piece(weight.name)] if self.target is None else pieces(self.target.architecture, weight.name)

    def _kind(self, weight: Weight, state: State) -> str:
        """Its type in the file."""
        from compress.numerics.gguf_blocks import type_of

        if state.scheme is not None:
            return type_of(state.scheme)
        return weight.dtype if len(weight.shape) > 1 and weight.kind in ("linear", "expert", "embedding", "head") else "F32"

    def specs(self, weight: Weight, state: State) -> list[TensorSpec]:
        kind, found = TYPES[self._kind(weight, state)], []
        for piece in self._pieces(weight):
            if weight.experts is None:
                shape = (*weight.shape[:-1], weight.shape[-1] // piece.step)
                if state.scheme is not None:
                    shape = (weight.rows, weight.columns // kind.weights * kind.nbytes)
                found.append(TensorSpec(piece.name, kind.dtype, shape))
                continue
            shape = (weight.rows // piece.step, weight.columns // kind.weights * (kind.nbytes if kind.dtype == "U8" else 1))
            found += [TensorSpec(f"{piece.name}[{expert}]", kind.dtype, shape) for expert in range(weight.experts)]
        if weight.kind == "embedding" and self.target is not None and (factors := self.target.factors) is not None:
            found.append(TensorSpec(_FACTORS, "F32", tuple(factors.shape)))
        return found

    def encode_as(self, weight: Weight, state: State, value: Any) -> dict[str, torch.Tensor]:
        stored, made = self._stored(weight, state, value), {}
        for piece in self._pieces(weight):
            if weight.experts is None:
                made[piece.name] = stored[..., piece.first :: piece.step] if piece.step > 1 else stored
            else:
                own = stored[:, piece.first :: piece.step]
                made |= {f"{piece.name}[{expert}]": own[expert] for expert in range(weight.experts)}
        if weight.kind == "embedding" and self.target is not None and self.target.factors is not None:
            made[_FACTORS] = self.target.factors
        return {name: tensor.contiguous() for name, tensor in made.items()}

    def _stored(self, weight: Weight, state: State, value: Any) -> torch.Tensor:
        """Blocks [experts?, rows, bytes of a row], or values, with rows where llama.cpp has them."""
        from compress.checkpoint.reader import torch_dtype
        from compress.numerics.gguf_blocks import encode

        kind, name = self._kind(weight, state), next((piece.name for piece in self._pieces(weight)), "")
        heads = paired_heads(self.target.architecture, name, self.target.config) if self.target else 0
        if state.scheme is None:
            rows: torch.Tensor = value.to(torch_dtype(kind))
            if self.target is not None and self.target.architecture.one_added and is_norm(name):
                rows = rows + 1
        else:
            rows = encode(kind, value.codes, value.scale if kind == "MXFP4" else in_half(weight, value.scale))
        return to_pairs(rows, heads) if heads else rows

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        return self.encode_as(weight, State(value.scheme), value)

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
        """The inverse of `encode`, for a weight alone; a whole file is read by importers/gguf.py."""
        from compress.importers.gguf import codes_of

        assert state.scheme is not None
        return codes_of(state.scheme, weight.dtype, tensors[weight.name])

    def shards(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Shard]:
        """The file: its header, and where each tensor lies."""
        assert self.target is not None
        found: dict[str, list[tuple[int, TensorSpec, Info]]] = {}
        for weight in weights:
            for spec in self.specs(weight, states[weight.name]):
                whole, _, index = spec.name.partition("[")
                kind = TYPES["F32"] if spec.name == _FACTORS else TYPES[self._kind(weight, states[weight.name])]
                shape = spec.shape if kind.dtype != "U8" else (spec.shape[0], weight.columns)
                found.setdefault(whole, []).append((int(index.rstrip("]") or 0), spec, Info(whole, kind, shape)))
        infos, specs = [], []
        for name, parts in found.items():
            parts.sort(key=lambda part: part[0])
            first = parts[0][2]
            infos.append(Info(name, first.type, (len(parts), *first.shape) if "[" in parts[0][1].name else first.shape))
            specs.append([spec for _, spec, _ in parts])
        header, starts, size = write_gguf(self._entries(), infos)
        places = [(spec, starts[info.name] + i * spec.nbytes) for info, each in zip(infos, specs) for i, spec in enumerate(each)]
        return [Shard(GGUF_FILE, header, tuple(spec for spec, _ in places), tuple(at for _, at in places), size)]

    def _entries(self) -> list[Entry]:
        assert self.target is not None
        return [*entries(self.target.architecture, self.target.config), *self.target.tokenizer[0]]

    def config(self, model: Model, states: dict[str, State]) -> dict[str, Any]:
        # config.json stays that of the dense model: it belongs to the tokenizer beside it, and llama.cpp reads none.
        return {}

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        stored, left, more = {}, {}, Counter[str]()
        for weight in weights:
            kind, scheme = self._kind(weight, states[weight.name]), states[weight.name].scheme
            if not self._pieces(weight):
                left[weight.name] = _UNREAD
            elif scheme is not None:
                stored[weight.name] = reason = f"{scheme} as {kind}"
                extra = weight.columns // BLOCK - scheme.groups(weight.columns)
                more[reason] += weight.rows * (weight.experts or 1) * extra * _SCALE_BYTES
            else:
                stored[weight.name] = f"{weight.kind} in {kind}"
        own = [] if self.target is None else [*notes(self.target.architecture, self.target.config), *self.target.tokenizer[1]]
        coded = [weight for weight in weights if states[weight.name].scheme is not None]
        repeated = {reason: f"{reason}, scales repeated: {nbytes:,} bytes more" for reason, nbytes in more.items() if nbytes}
        stored = {name: repeated.get(reason, reason) for name, reason in stored.items()}
        return [*counted("stored", stored), *counted("left out", left), *rounded_scales(coded), *own]

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        return [Verdict("llama.cpp", "yes", f"xllamacpp {VERSION}, run on every architecture that is written")]
