"""Inputs: reads and checks ready model inputs in a .safetensors file, rows first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from compress.checkpoint.reader import Checkpoint, local_header
from compress.corpus.documents import digest_of, file_at
from compress.errors import InputError

if TYPE_CHECKING:
    import torch


class Inputs:
    """A file of tensors with equal first dimensions. Opening reads the header only. Raises InputError."""

    def __init__(self, source: str) -> None:
        self.name, self.path = source, file_at(source)
        self.refs = {ref.name: ref for ref in sorted(local_header(self.path), key=lambda ref: ref.name)}
        if not self.refs:
            raise InputError(source, "model inputs, e.g. input_features", "no tensor", "leave it out, or make it anew")
        counts = {ref.name: ref.shape[0] if ref.shape else None for ref in self.refs.values()}
        if len(set(counts.values())) > 1 or None in counts.values():
            got = ", ".join(f"{name} {list(ref.shape)}" for name, ref in self.refs.items())
            raise InputError(source, "tensors with samples along the first dimension, equally many", got, "save it anew")
        if empty := [name for name, ref in self.refs.items() if not ref.nbytes]:
            raise InputError(source, "samples", f"'{empty[0]}' of shape {list(self.refs[empty[0]].shape)}", "save it anew")
        self.count = next(count for count in counts.values() if count is not None)

    @cached_property
    def sha256(self) -> str:
        with open(self.path, "rb") as stream:
            return digest_of(stream)

    def rows(self, numbers: Iterable[int] | None = None) -> dict[str, torch.Tensor]:
        """These rows of every tensor, in this order; without `numbers` all of them."""
        import torch

        wanted = None if numbers is None else list(numbers)
        file = Checkpoint(self.path.parent, self.refs, {}, ())
        try:
            if wanted is None:
                return {name: file.read(name) for name in self.refs}
            return {name: torch.cat([file.read(name, i, i + 1) for i in wanted]) for name in self.refs}
        finally:
            file.close()


def check_alike(sources: Sequence[Inputs]) -> None:
    """Raises InputError unless all files have the same names, dtypes and shapes of a sample."""
    first, *others = ({name: f"{ref.dtype} {list(ref.shape[1:])}" for name, ref in s.refs.items()} for s in sources)
    for source, other in zip(sources[1:], others, strict=True):
        if other != first:
            expected = f"the inputs of {sources[0].name}: {', '.join(map(' '.join, first.items()))} for each sample"
            raise InputError(source.name, expected, ", ".join(map(" ".join, other.items())), "save the files alike")


def check_values(
    tensors: dict[str, torch.Tensor], name: str, vocabulary: int | None = None, positions: int | None = None
) -> None:
    """Raises InputError for NaN or Inf, ids above the vocabulary, and more tokens than the model has positions."""
    import torch

    for key, tensor in tensors.items():
        # Not every torch has isfinite for float8.
        if tensor.is_floating_point() and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
            raise InputError(f"{name}: '{key}'", "finite numbers", "NaN or Inf", "make the inputs anew")
        if not key.endswith("input_ids") or tensor.is_floating_point():
            continue
        least, most = int(tensor.min()), int(tensor.max())
        if least < 0 or (vocabulary is not None and most >= vocabulary):
            expected = "ids from 0" + (f" to {vocabulary - 1}, the model's vocabulary" if vocabulary is not None else "")
            raise InputError(f"{name}: '{key}'", expected, str(least if least < 0 else most), "use the model's own tokenizer")
        if positions is not None and tensor.ndim > 1 and tensor.shape[1] > positions:
            expected = f"at most {positions} tokens, the positions of the model"
            raise InputError(f"{name}: '{key}'", expected, str(tensor.shape[1]), "cut the inputs")
