"""Packed: one weight of another tool, and the checks that all decoders share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import Checkpoint, torch_dtype
from compress.errors import InputError, Problem
from compress.spec.weight_state import FLOATS, Note, counted

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.safetensors_header import TensorRef
    from compress.numerics.qtensor import QTensor
    from compress.spec.scheme import Scheme

Reader = Callable[[str], "torch.Tensor"]
"""Reads a tensor on disk by its name."""
_MOST_PROBLEMS = 20
_CHUNK = 1 << 20
"""Elements decoded at a time, so that temporaries stay small compared with the result."""
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "half": "F16", "float": "F32"}
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
NOT_HERE = "judged by headers alone, because the tensors are not on this machine"


@dataclass(frozen=True)
class Packed:
    """One weight as another tool has stored it."""

    name: str
    """Name of the dense weight, such as `model.layers.0.self_attn.q_proj.weight`."""
    dtype: str
    """safetensors dtype of the dense weight: config.json's, else that of the scales."""
    shape: tuple[int, ...]
    """Stored shape of that dense weight."""
    scheme: Scheme | None
    """Its scheme; None if no scheme has these values, and `read` returns a dense tensor."""
    parts: tuple[str, ...]
    """The tensors on disk that hold it."""
    read: Callable[[Reader], QTensor | torch.Tensor]
    """Decodes it, given a reader of stored tensors; dense weights are in `shape` and `dtype`, or fp32 if readers add in fp32."""
    note: str = ""
    """Why codes are not kept, or what was corrected while reading."""
    transposed: bool = False
    """Whether the dense weight is [experts, in, out]; codes have outputs in rows."""


@dataclass(frozen=True)
class Foreign:
    """The quantized weights of another tool's checkpoint. Tensors that are not in `parts` are plain."""

    method: str
    weights: dict[str, Packed]
    parts: frozenset[str]
    """Every tensor on disk that belongs to a quantized weight, including dropped ones (g_idx, input_scale)."""
    notes: tuple[Note, ...] = ()
    """Counted notes of the weights and of dropped tensors."""


class Stored:
    """A checkpoint's headers, with the checks and the choice of dtype that all decoders share."""

    def __init__(self, checkpoint: Checkpoint, method: str, file: str = "config.json") -> None:
        self.checkpoint, self.method, self.file = checkpoint, method, file
        self.refs = checkpoint.refs
        self.dtype = _dtype(checkpoint.config)
        """config.json's dtype, None if it names none."""

    def bad(self, where: str, expected: str, got: str, do: str = "") -> InputError:
        return InputError(f"{self.checkpoint.path}: {where} ({self.method})", expected, got, do)

    def bad_config(self, expected: str, got: Any, do: str = "") -> InputError:
        return InputError(str(self.checkpoint.path / self.file), expected, str(got), do)

    def ref(self, name: str, dtypes: Iterable[str] = FLOATS, *shapes: Sequence[int]) -> TensorRef:
        """The header's entry. Raises InputError unless it has one of these dtypes and, if given, one of these shapes."""
        ref = self.refs.get(name)
        if ref is None:
            raise self.bad(name, "a tensor of this name", "none", "fetch the checkpoint again, or make it anew")
        if ref.dtype not in dtypes:
            raise self.bad(name, f"dtype {' or '.join(sorted(dtypes))}", ref.dtype)
        if shapes and ref.shape not in {tuple(shape) for shape in shapes}:
            raise self.bad(name, f"shape {' or '.join(str(list(s)) for s in shapes)} by {self.file}", str(list(ref.shape)))
        return ref

    def matrix(self, name: str, dtypes: Iterable[str] = FLOATS) -> TensorRef:
        """The header's entry. Raises InputError unless it has two dimensions and is not empty."""
        ref = self.ref(name, dtypes)
        if len(ref.shape) != 2 or not math.prod(ref.shape):
            raise self.bad(name, "a tensor of two dimensions", f"shape {list(ref.shape)}")
        return ref

    def here(self, name: str) -> bool:
        """Whether a tensor's bytes are on this machine; for a plan of a Hub model they are not."""
        return (self.checkpoint.path / self.refs[name].file).is_file()

    def peek(self, name: str) -> torch.Tensor | None:
        """A small tensor that decoding depends on; None if its bytes are not on this machine."""
        return self.checkpoint.read(name) if self.here(name) else None

    def dense_dtype(self, scale: str = "BF16") -> str:
        """The dtype of a dense weight: config.json's, else that of its scales."""
        return self.dtype or (scale if scale in FLOATS else "BF16")

    def code_dtype(self, scale: str) -> tuple[str, str]:
        """The dtype of a weight that stays in codes, and a note if it is not config.json's.

        Canonical scales have the weight's dtype, so a dtype that cannot hold them would change the weight.
        """
        ref = self.refs[scale]
        wanted = self.dtype or ref.dtype
        if wanted in (ref.dtype, "F32") or self._holds(ref, wanted):
            return wanted, ""
        return ref.dtype, f"{wanted} cannot hold its {ref.dtype} scales, so the weight stands in {ref.dtype}"

    def _holds(self, ref: TensorRef, dtype: str) -> bool:
        """Whether `dtype` can hold every value of a tensor exactly."""
        if not self.here(ref.name):
            return False
        rows = ref.shape[0] if ref.shape else 1
        step = max(1, _CHUNK * rows // max(1, math.prod(ref.shape)))
        for start in (0, *range(1, rows, step)):
            stop = min(rows, start + step) if start else 1
            part = self.checkpoint.read(ref.name, start, stop)
            if not bool((part.to(torch_dtype(dtype)).to(part.dtype) == part).all()):
                return False
        return True

    def conv1d(self, module: str) -> bool:
        """Whether a module is a Conv1D of transformers, whose dense weight is [in, out]; its quantizers transpose it."""
        known = str(self.checkpoint.config.get("model_type")) in _CONV1D_MODELS
        return known and module.rpartition(".")[2] in _CONV1D_MODULES

    def gather(self, names: Iterable[str], decode: Callable[[str], Packed]) -> dict[str, Packed]:
        """Decodes every name. Raises InputError with all problems at once, or if there is nothing to decode."""
        found: dict[str, Packed] = {}
        problems: list[Problem] = []
        for name in names:
            try:
                packed = decode(name)
                if packed.name in found or (packed.name in self.refs and packed.name not in packed.parts):
                    raise self.bad(packed.name, "the weight once", f"a dense one and one in {packed.parts[0]}")
                found[packed.name] = packed
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems[:_MOST_PROBLEMS])
        if not found:
            raise self.bad_config(f"weights quantized by {self.method}, as it says", "none among the tensors")
        return found

    def foreign(self, weights: dict[str, Packed], dropped: Iterable[str] = (), notes: Iterable[Note] = ()) -> Foreign:
        """The decoded checkpoint, with the notes of its weights counted."""
        noted = counted("foreign", {packed.name: packed.note for packed in weights.values() if packed.note})
        parts = {part for packed in weights.values() for part in packed.parts} | set(dropped)
        return Foreign(self.method, weights, frozenset(parts), (*noted, *notes))


def _dtype(config: dict[str, Any]) -> str | None:
    """The safetensors dtype of weights by config.json."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(name := place.get(key), str) and name.removeprefix("torch.") in _DTYPES:
                return _DTYPES[name.removeprefix("torch.")]
    return None


def steps(rows: int, columns: int, multiple: int = 1) -> Iterable[slice]:
    """Slices of rows, a multiple of `multiple` each, that hold about a chunk of elements."""
    step = max(1, _CHUNK // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def joined(*notes: str) -> str:
    """Notes as one text, empty ones left out."""
    return "; ".join(note for note in notes if note)
