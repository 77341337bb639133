"""MXFP4 checkpoints of GPT-OSS: dense experts as transformers loads them.

    NAME_blocks   uint8 [experts, out, in / 32, 16]   pairs of E2M1, the even input in the low nibble
    NAME_scales   uint8 [experts, out, in / 32]       E8M0: 2^(u - 127)
NAME (`experts.gate_up_proj`) is then [experts, in, out]: convert_moe_packed_tensors of transformers ends with that
transpose. It scales by ldexp, exact but at the ends of the range, and rounds to the model's dtype; so do we, expert
by expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from compress.checkpoint import torch_dtype
from compress.foreign.floats import pairs
from compress.foreign.packed import Foreign, Packed, Reader, Stored, steps

_BLOCK, _BIAS = 32, 127
_NOTE = "no scheme here has floats of 4 bits, so it is dense"


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
    dtype = stored.dense_dtype()
    read = partial(_read, name=name, dtype=torch_dtype(dtype))
    return Packed(name, dtype, (experts, groups * _BLOCK, out), None, (blocks.name, scales.name), read, _NOTE)


def _read(reader: Reader, *, name: str, dtype: torch.dtype) -> torch.Tensor:
    blocks, scales = reader(f"{name}_blocks"), reader(f"{name}_scales")
    experts, rows, groups, _ = blocks.shape
    dense = torch.empty(experts, groups * _BLOCK, rows, dtype=dtype)
    for expert in range(experts):
        for part in steps(rows, groups * _BLOCK):
            exponents = scales[expert, part].to(torch.int32) - _BIAS
            # ldexp as in the reader, which for exponents at the end of the range is not a product with a power.
            values = torch.ldexp(pairs(blocks[expert, part]), exponents.unsqueeze(-1))
            dense[expert, :, part] = values.flatten(-2).to(dtype).T
    return dense
