"""What these tests load is compared bit by bit, so products are torch's own, which the backend simd's are not."""

from __future__ import annotations

import pytest

from compress.kernels import dispatch


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(name for name in dispatch.BACKENDS if name != "simd"))
