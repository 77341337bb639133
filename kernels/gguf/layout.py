"""gguf: one file for llama.cpp, with the model's sizes and its tokenizer in it.

Codes keep their values. A weight [out, in] becomes rows of blocks of 32 inputs (numerics/gguf_blocks.py has the bytes):
    Q4_0, Q5_0, Q8_0   w4a16, w5a16, w8a16, symmetric   d * (code - middle), d in fp16
    Q4_1, Q5_1         w4a16-min, w5a16-min             d * code + m, m in fp16 too
    IQ4_NL             iq4_nl                           d * one of 16 values
    MXFP4              mxfp4                            2^(byte - 127) * E2M1
    NVFP4              nvfp4, blocks of 64              E4M3 * E2M1, times one number for the matrix
    Q2_K to Q6_K       q2_k to q6_k, blocks of 256      numerics/kquants.py says what they mean
Groups of 64, of 128 or of a whole row are stored as groups of 32 with the same scale, exactly, for some bytes more. Scales are
rounded to fp16 as in `gptq`, and refused where that loses more than 2^-11 of one; minima too, where it loses more than 2^-11 of
a scale. nvfp4's divisor of a matrix is stored as its reciprocal, within 2^-23 of it. What is not in codes stays in its dtype;
norms, biases and routers become F32, exactly, and Gemma's norms have 1 added, as llama.cpp has them.

Rows of queries and keys change places for Llama and its kin (importers/gguf_names.py), and codes with them. The experts of a
block are one tensor, written matrix by matrix. It is one file, whatever its size: llama.cpp also reads split ones, which are not
written. It rounds activations to 8 bits for its products, by blocks of 32: by that it differs from what the weights mean.

Refused: zero points (the types of two numbers a block hold a minimum), 2, 3 and 6 bits, nf4 (whose values IQ4_NL does not have),
nvfp4 where llama.cpp multiplies nothing by its number (embeddings, fused experts, matrices with a bias, architectures other than
llama, qwen3 and qwen3moe), and architectures that were not run by it.
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
from compress.importers.gguf_names import (
    ARCHITECTURES,
    Architecture,
    Piece,
    is_norm,
    paired_heads,
    pieces,
    scale_name,
    to_pairs,
)
from compress.kernels.gguf.hyperparameters import entries, full_config, notes, rope_factors
from compress.kernels.gguf.tokenizer import tokenizer_entries
from compress.kernels.gptq.layout import in_half, rounded_scales
from compress.spec.gguf_types import TYPES
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
_NUMBERLESS = "skip it, or use mxfp4 or w4a16g32 for it"
_FACTORS = "rope_freqs.weight"
_TINY = "bf16 minima below 2^-14 rounded to fp16, by at most 2^-25"
_INVERSE = "the divisor of a matrix as its reciprocal, within 2^-23 of it"
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
    """Codes in blocks, and all that llama.cpp needs besides."""

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

        if scheme.zeros:
            do = "use -min for -asym, or a symmetric scheme"
            raise Refusal("its types hold a floating minimum, which a zero point is only up to rounding", do)
        if not (kind := type_of(scheme)):
            raise Refusal(
                f"no type of it holds {scheme}", "quantize to w4a16, w5a16, w8a16, q2_k to q6_k, iq4_nl, mxfp4 or nvfp4"
            )
        if weight.transposed and weight.experts is None:
            raise Refusal("its groups run along what llama.cpp has as outputs", "skip it, or " + _ELSEWHERE)
        block = TYPES[kind].weights
        if weight.columns % block or (scheme.scales == "row" and (scheme.group or block) % block):
            size = f"{weight.columns} columns in groups of {scheme.group or weight.columns}"
            raise Refusal(f"it has blocks of {block}, which {size} do not fill", "use groups of 32, 64 or 128, or skip it")
        if kind == "NVFP4" and (weight.kind == "embedding" or weight.experts is not None):
            what = "fused experts" if weight.experts is not None else "an embedding"
            raise Refusal(f"llama.cpp does not multiply {what} by a number, as {scheme} asks", _NUMBERLESS)
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
        name, there = self.target.architecture.name, {w.name for w in model.weights}
        refused = []
        for w in model.weights:
            scheme = states[w.name].scheme
            if not self._pieces(w) and w.name not in self.target.unused:
                refused.append((w.name, f"llama.cpp's {name} has no tensor for it", _ELSEWHERE))
            elif scheme is not None and scheme.scales == "e4m3":
                biased = f"{w.module}.bias" in there
                if biased or not self.target.architecture.numbers:
                    where = f"matrices of {name}{' with a bias' if biased else ''}"
                    refused.append((w.name, f"llama.cpp does not multiply {where} by a number, as {scheme} asks", _NUMBERLESS))
        return refused

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
                if kind.name == "NVFP4":
                    # Of a stack of experts it is a row of numbers.
                    found.append(TensorSpec(scale_name(piece.name), "F32", () if "[" in piece.name else (1,)))
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
                if state.scheme is not None and value.tensor_scale is not None:
                    made[scale_name(piece.name)] = value.tensor_scale.reciprocal().reshape(() if "[" in piece.name else (1,))
            else:
                own = stored[:, piece.first :: piece.step]
                made |= {f"{piece.name}[{expert}]": own[expert] for expert in range(weight.experts)}
        if weight.kind == "embedding" and self.target is not None and self.target.factors is not None:
            made[_FACTORS] = self.target.factors
        return {name: tensor.contiguous() for name, tensor in made.items()}

    def _stored(self, weight: Weight, state: State, value: Any) -> torch.Tensor:
        """Blocks [experts?, rows, bytes of a row], or values, with rows where llama.cpp has them."""
        from compress.checkpoint.reader import torch_dtype
        from compress.numerics import gguf_superblocks
        from compress.numerics.gguf_blocks import encode

        kind, name = self._kind(weight, state), next((piece.name for piece in self._pieces(weight)), "")
        heads = paired_heads(self.target.architecture, name, self.target.config) if self.target else 0
        if state.scheme is None:
            rows: torch.Tensor = value.to(torch_dtype(kind))
            if self.target is not None and self.target.architecture.one_added and is_norm(name):
                rows = rows + 1
        elif value.super_scale is not None:
            rows = gguf_superblocks.encode(value)
        else:
            scale = value.scale if state.scheme.scales != "row" else in_half(weight, value.scale)
            lows = None if value.minimum is None else in_half(weight, value.minimum, value.scale)
            rows = encode(kind, value.codes, scale, lows)
        return to_pairs(rows, heads) if heads else rows

    def encode(self, weight: Weight, value: QTensor) -> dict[str, torch.Tensor]:
        return self.encode_as(weight, State(value.scheme), value)

    def decode(self, weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
        """The inverse of `encode`, for a weight alone; a whole file is read by importers/gguf.py."""
        from compress.importers.gguf import codes_of

        assert state.scheme is not None
        return codes_of(state.scheme, weight.dtype, tensors[weight.name], tensors.get(scale_name(weight.name)))

    def shards(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Shard]:
        """The file: its header, and where each tensor lies."""
        assert self.target is not None
        found: dict[str, list[tuple[int, TensorSpec, Info]]] = {}
        for weight in weights:
            for spec in self.specs(weight, states[weight.name]):
                whole, _, index = spec.name.partition("[")
                kind = TYPES[spec.dtype if spec.dtype != "U8" else self._kind(weight, states[weight.name])]
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
        offsets = tuple(at for _, at in places)
        return [Shard(GGUF_FILE, len(header), tuple(spec for spec, _ in places), offsets, size, header)]

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
                if scheme.scales == "row":
                    extra = weight.columns // TYPES[kind].weights - scheme.groups(weight.columns)
                    more[reason] += weight.rows * (weight.experts or 1) * extra * _SCALE_BYTES * (1 + scheme.minimum)
            else:
                stored[weight.name] = f"{weight.kind} in {kind}"
        own = [] if self.target is None else [*notes(self.target.architecture, self.target.config), *self.target.tokenizer[1]]
        coded = [weight for weight in weights if states[weight.name].scheme is not None]
        repeated = {reason: f"{reason}, scales repeated: {nbytes:,} bytes more" for reason, nbytes in more.items() if nbytes}
        stored = {name: repeated.get(reason, reason) for name, reason in stored.items()}
        return [*counted("stored", stored), *counted("left out", left), *_rounded(coded, states), *own]

    def readers(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Verdict]:
        return [Verdict("llama.cpp", "yes", f"xllamacpp {VERSION}, run on every architecture that is written")]


def _rounded(weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
    """The counted lines of numbers beside codes that are not stored exactly."""
    schemes = {weight.name: scheme for weight in weights if (scheme := states[weight.name].scheme) is not None}
    halves = [weight for weight in weights if schemes[weight.name].scales == "row"]
    tiny = {w.name: _TINY for w in halves if schemes[w.name].minimum and w.dtype == "BF16"}
    inverse = {name: _INVERSE for name, scheme in schemes.items() if scheme.scales == "e4m3"}
    return [*rounded_scales(halves), *counted("scales", {**tiny, **inverse})]
