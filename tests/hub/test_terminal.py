"""Push in a process of its own, with HF_ENDPOINT as a user sets it: on a terminal of 80 columns, and where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from hub_artifact import REPO, TOKEN, same
from hub_server import Hub


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "HF_HUB_OFFLINE")}
    more = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    return {**kept, **more, "TERM": "xterm", "PYTHONSAFEPATH": "1"}


def test_bars_fit_a_terminal_of_80_columns(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-P", "-m", "compress", "push", str(artifact), REPO]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(hub, tmp_path), cwd=tmp_path)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        said += piece
    assert process.wait() == 0, said.decode()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    lines = re.split(r"[\r\n]+", text)
    assert [line for line in lines if len(line.rstrip()) > 80 and "://" not in line] == []
    assert any(re.search(r"model-00001-of-0000\d\.saf\S* *100%", line) for line in lines), text
    assert f"pushed:   {hub.url}/{REPO}" in text
    assert TOKEN not in text
    same(hub, artifact)


def test_without_a_terminal_a_line_for_each_phase(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "compress", "push", str(artifact), REPO]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(hub, tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # A phase that takes longer than a second has a line while it goes on.
    ended = [
        line for line in done.stderr.splitlines() if not re.fullmatch(r"(read|push: upload).*, \d:\d\d(, about .* left)?", line)
    ]
    assert [re.sub(r"[\d.]+ \w?B|[\d.]+ s", "-", line) for line in ended] == ["read - in -", "push: upload in -"]
    same(hub, artifact)
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, env=environment(hub, tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
