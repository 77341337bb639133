"""Shell completion, as bash and zsh ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def completed(line: str, cwd: Path, shell: str = "bash") -> list[str]:
    """What a shell is told for a line that ends where the cursor is."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)} if shell == "bash" else {"_TYPER_COMPLETE_ARGS": line}
    program = "import sys; sys.argv = ['compress']; from compress.__main__ import main; main()"
    environment = {**os.environ, **asked, "_COMPRESS_COMPLETE": f"complete_{shell}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=cwd)
    return done.stdout.split()


def test_commands_options_and_recipes(tmp_path: Path) -> None:
    (tmp_path / "gp_mine.yaml").write_text("version: 1\n")
    assert completed("compress kno", tmp_path) == ["knowledge"]
    assert {"gptq_w3", "gptq_w4", "gp_mine.yaml"} <= set(completed("compress run M O gp", tmp_path))
    assert completed("compress plan M five", tmp_path) == ["five_stages"]
    assert "--fail-on" in completed("compress run --fail", tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_options_of_a_pass(tmp_path: Path, shell: str) -> None:
    found = " ".join(completed("compress quantize gptq --sch", tmp_path, shell))
    assert "--scheme" in found
