"""Small files that are replaced whole: what a killed process has left goes, what another one writes stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compress.checkpoint.atomic import write_bytes, write_text


def test_drafts_of_killed_processes_go_and_no_others(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    kept = [f".card.md.{os.getppid()}.draft", f".other.md.{dead.pid}.draft", ".card.md.notes.draft", "card.md.1.draft"]
    for name in (*kept, f".card.md.{dead.pid}.draft"):
        (tmp_path / name).write_text("half")
    assert write_text(tmp_path / "card.md", "whole").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "card.md"])
    write_bytes(tmp_path / "card.md", b"\0")
    assert (tmp_path / "card.md").read_bytes() == b"\0"
