"""Products of a few tokens by matrices that are not packed, against fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.kernels.cpu.library import Library, library
from compress.runtime.decode_step import QuickLinear, quicken
from decoding import packed
from simd_oracle import ROUNDING, USABLE, plain


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_products(dtype: torch.dtype, isa: str) -> None:
    assert list(plain(Library(library().path, isa), dtype)) == []


@pytest.mark.parametrize("tokens", [1, 3])
def test_any_number_of_threads_has_the_same_bits(tokens: int) -> None:
    weight, before = torch.randn(5000, 64), torch.get_num_threads()
    x, found = torch.randn(tokens, 64), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(library().dense(weight, x, None))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_no_number_stays_so() -> None:
    weight, x = torch.randn(40, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    weight[3, 7] = torch.nan
    found = library().dense(weight, x, None)
    assert found.isnan().nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return compress.load(packed("llama", tmp_path), "bfloat16")


@pytest.mark.parametrize(("rows", "columns", "taken"), [(8192, 64, True), (8192, 48, False), (64, 64, False)])
def test_large_matrices_take_them(rows: int, columns: int, taken: bool, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = model.lm_head = nn.Linear(columns, rows, dtype=torch.bfloat16)
    own, x = nn.functional.linear, torch.randn(3, 1, columns).bfloat16()
    quicken(model)
    assert isinstance(head, QuickLinear) is taken
    calls: list[int] = []
    monkeypatch.setattr(Library, "dense", lambda self, *given, run=Library.dense: (calls.append(1), run(self, *given))[1])
    with torch.no_grad():
        torch.testing.assert_close(head(x), own(x, head.weight, head.bias), rtol=1e-2, atol=1e-2)
        head(x.transpose(0, 1))
    head(x).sum().backward()
    assert len(calls) == taken
    assert head.weight.grad is not None
