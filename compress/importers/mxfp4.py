"""MXFP4 checkpoints of GPT-OSS: the codes of fused experts.

    NAME_blocks   uint8 [experts, out, in / 32, 16]   pairs of E2M1, the even input in the low nibble
    NAME_scales   uint8 [experts, out, in / 32]       E8M0: 2^(u - 127)
NAME (`experts.gate_up_proj`) is then [experts, in, out]: convert_moe_packed_tensors of transformers ends with that
transpose. A value times its power of two is exact except at the ends of the range, and is rounded to the model's dtype.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from compress.importers.packed import Foreign, Packed, Reader, Stored
from compress.numerics.bitstream import unpack
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import Scheme

_BLOCK = 32
_SCHEME = Scheme.parse("mxfp4")


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every tensor of blocks with its scales. Raises InputError."""
    names = [name.removesuffix("_blocks") for name in stored.refs if name.endswith("_blocks")]
    for name, ref in stored.refs.items():
        if ref.dtype == "U8" and name.endswith("_scales") and name.removesuffix("_scales") not in names:
            raise stored.bad(name, "blocks beside it", "none", "fetch the checkpoint again")
    return stored.foreign(stored.gather(names, partial(_weight, stored)))


def _weight(stored: Stored, name: str) -> Packed:
    blocks = stored.ref(f"{name}_blocks", {"U8"})
    if len(blocks.shape) != 4 or blocks.shape[-1] != _BLOCK // 2:
        raise stored.bad(blocks.name, f"shape [experts, out, in / {_BLOCK}, {_BLOCK // 2}]", str(list(blocks.shape)))
    scales = stored.ref(f"{name}_scales", {"U8"}, blocks.shape[:-1])
    experts, out, groups, _ = blocks.shape
    shape, parts = (experts, groups * _BLOCK, out), (blocks.name, scales.name)
    return Packed(name, stored.dense_dtype(), shape, _SCHEME, parts, partial(_read, name=name), transposed=True)


def _read(reader: Reader, *, name: str) -> QTensor:
    blocks, scales = reader(f"{name}_blocks"), reader(f"{name}_scales")
    return QTensor(_SCHEME, unpack(blocks.flatten(2), 4, blocks.shape[2] * _BLOCK), scales)
