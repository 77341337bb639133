"""A LoRA adapter in loftq_init/ next to its base, as in LoftQ's artifacts.

    base_model.model.PATH.lora_A.weight  [r, in] and lora_B.weight [out, r]  of the module PATH
w = base + alpha / r B A, with alpha / sqrt(r) for rslora, and patterns for single modules, as
compress/evaluate/readers/adapter.py applies it. No scheme has such values, so the weight is dense; readers add in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from compress.importers.lora import refuse_other, scaling
from compress.importers.packed import Foreign, Packed, Reader, Stored

if TYPE_CHECKING:
    import torch

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_NOTE = "no codes: a dense base and an adapter"


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every weight that the adapter changes. Raises InputError."""
    refuse_other(str(stored.checkpoint.path / stored.file), config)
    adapter = [name for name in stored.refs if name.startswith(_PREFIX)]
    pairs = sorted({name.removesuffix(_A).removesuffix(_B) for name in adapter})
    return stored.foreign(stored.gather(pairs, lambda pair: _weight(stored, pair, config)))


def _weight(stored: Stored, pair: str, config: dict[str, Any]) -> Packed:
    path = pair.removeprefix(_PREFIX)
    base = stored.matrix(f"{path}.weight")
    turned = stored.conv1d(path)
    inputs, outputs = base.shape if turned else (base.shape[1], base.shape[0])
    a = stored.matrix(pair + _A)
    stored.ref(pair + _A, (a.dtype,), (a.shape[0], inputs))
    stored.ref(pair + _B, (a.dtype,), (outputs, a.shape[0]))
    parts = (base.name, pair + _A, pair + _B)
    read = partial(_read, parts, scaling(config, path, a.shape[0]), turned)
    return Packed(base.name, base.dtype, base.shape, None, parts, read, _NOTE)


def _read(parts: tuple[str, ...], scale: float, turned: bool, reader: Reader) -> torch.Tensor:
    base, a, b = (reader(part).float() for part in parts)
    product = b @ a
    return base.add_(product.T if turned else product, alpha=scale)
