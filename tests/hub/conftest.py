"""Fixtures: a Hub with somebody logged in, an artifact that may be pushed to it, and `compress` as it is typed."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_artifact import RECIPE, TOKEN, Said, Typed, licensed, verified
from hub_server import SIGNATURE, Hub, serve
from support import run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that a token of `someone` may write to, by HTTP alone, without Xet; an empty cache; no time is waited."""
    from huggingface_hub import constants

    with serve() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        settings = {"HUGGINGFACE_CO_URL_TEMPLATE": template, "ENDPOINT": server.url, "HF_HUB_DISABLE_XET": True}
        settings |= {
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no token"),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.token = TOKEN
        yield server


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited for, which are none."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """`compress` in this process: status, stdout, stderr; no secret is ever printed."""
    from compress.__main__ import main

    monkeypatch.setenv("NO_COLOR", "1")

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, words)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capfd.readouterr()
        for secret in (TOKEN, SIGNATURE, "Authorization", "Traceback", "internal error"):
            assert secret not in out + err
        return status, out, err

    return call


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two shards, whose source is Apache; its record says that transformers has verified it."""
    folder = tmp_path_factory.mktemp("sound")
    out = run(licensed(folder / "source"), folder / "out", RECIPE, shard_bytes=40_000).out
    verified(out)
    return out


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "w4")
