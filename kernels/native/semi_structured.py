"""semi_structured backend: 2:4 weights in half precision on GPU sparse units.

Legend: N rows, K columns, M tokens. torch has two libraries for the product W @ x.T. CUTLASS, only for capability 8.x, takes
kept values [N, K / 2] and their positions as words int16 [N, K / 16], which its threads read in a special order:
column pairs first, and rows 32a + 16b + 8c + d, columns 2e + f as [e, a, d, b, f, c]. cuSPARSELt, for 8.0 and later, has an
undocumented format, which it makes from the dense matrix, so that matrix exists meanwhile.

It runs for any number of tokens: expanding the weight first, 9 bits to 16 that are read again, would move four times the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from compress.errors import Refusal
from compress.kernels.cuda import device
from compress.kernels.dispatch import Backend, Work
from compress.kernels.native import sparse, tiles
from compress.kernels.native.packed import Packed

_CUTLASS, _LEAST = 8, (8, 0)
"""The only major capability that CUTLASS supports here, and the first with sparse units."""
_ROWS, _COLUMNS, _TOKENS = 32, 64, 8
"""Rows and columns must be multiples of these."""


class SemiStructured(Backend):
    """Half-precision weights that are not in codes."""

    name = "semi_structured"
    multiple = _ROWS

    def refuse(self, work: Work) -> None:
        if work.state.scheme is not None:
            raise Refusal("it is in codes", "use another backend")
        capability = device.usable(work.device)
        if capability < _LEAST:
            raise Refusal(f"a GPU of compute capability {capability} has no sparse units", "use another backend")
        if capability[0] != _CUTLASS and not torch.backends.cusparselt.is_available():
            raise Refusal("this torch has no cuSPARSELt, which alone runs on this GPU", "use another backend")
        if work.turned or work.looked_up:
            raise Refusal("its rows are looked up or added up", "leave the backend to be chosen")
        if work.dtype not in (torch.float16, torch.bfloat16) or work.scales != work.dtype:
            kinds = f"the weight is in {str(work.scales)[6:]} and activations in {str(work.dtype)[6:]}"
            raise Refusal(f"{kinds}, not both in one half precision", "load the model in the dtype that it is stored in")
        if work.rows % _ROWS or work.columns % _COLUMNS:
            raise Refusal(f"{_ROWS} and {_COLUMNS} do not divide {work.rows} x {work.columns}", "use another backend")

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        if device.capability(device.number(packed.parts["tiles"]))[0] != _CUTLASS:
            return {"compressed": torch._cslt_compress(packed.values())}
        every = slice(0, packed.rows)
        kept, indices = (tiles.by_rows(packed.parts[name], every) for name in ("tiles", "indices"))
        return {"kept": kept.flatten(1), "places": reordered(indices.flatten(1))}

    def chunks(self, packed: Packed, weights: int = 1 << 20) -> Iterator[slice]:
        return super().chunks(packed, weights) if "places" in packed.parts else iter([slice(0, packed.rows)])

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        parts = packed.parts
        if "places" not in parts:
            # A product with the identity is exact, and the only way to read cuSPARSELt's format.
            compressed = parts["compressed"]
            one = torch.eye(packed.columns, dtype=compressed.dtype, device=compressed.device)
            return torch._cslt_sparse_mm(compressed, one).to(dtype)
        return sparse.spread(parts["kept"][rows], ordered(parts["places"], rows), 0).to(dtype)

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        tokens, parts = len(x), packed.parts
        inputs = pad(x, (0, 0, 0, -tokens % _TOKENS)).contiguous().T
        if "places" not in parts:
            out = torch._cslt_sparse_mm(parts["compressed"], inputs, bias=bias)
        elif bias is None:
            out = torch._sparse_semi_structured_mm(parts["kept"], parts["places"], inputs)
        else:
            out = torch._sparse_semi_structured_addmm(bias, parts["kept"], parts["places"], inputs)
        return out[:, :tokens].T.contiguous()


def reordered(words: torch.Tensor) -> torch.Tensor:
    """Words int16 [N, K / 16] in the order of CUTLASS."""
    rows, columns = words.shape
    found: torch.Tensor = words.view(rows // 32, 2, 2, 8, columns // 2, 2).permute(4, 0, 3, 1, 5, 2).reshape(rows, columns)
    return found


def ordered(words: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of the inverse of `reordered`; the slice begins and ends at multiples of 32."""
    count, columns = words.shape
    found = words.view(columns // 2, count // 32, 8, 2, 2, 2)[:, rows.start // 32 : rows.stop // 32]
    return found.permute(1, 3, 5, 2, 0, 4).reshape(-1, columns)
