"""Planted faults: each of them, put into a copy of the sources, must fail tests that are named here (make faults).

The copy lies as an installed package does and comes first in PYTHONPATH, so that processes which tests start find it too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; pytest then fails with `tests`, which may choose by -k."""

    file: str
    old: str
    new: str
    tests: str
    only: str = ""


FAULTS = {
    "a wrong zero point": Fault(
        "compress/numerics/grid.py", "(low.neg() / s).round_()", "(low.neg() / s).floor_()", "tests/numerics/test_grid.py"
    ),
    "a scale of the wrong group": Fault(
        "compress/numerics/grid.py", "scale[rs, g0:g1] = s.squeeze(-1)", "scale[rs, g0:g1] = s.squeeze(-1).flip(-1)",
        "tests/numerics/test_grid.py",
    ),
    "a mask that GPTQ does not apply again": Fault(
        "compress/numerics/gptq.py", "q.mul_(keeps[k])", "pass", "tests/numerics/test_gptq.py", "masked"
    ),
    "a divergence with its arguments swapped": Fault(
        "compress/numerics/divergence.py", 'if kind == "forward":\n        found = _kl(p, q)',
        'if kind == "forward":\n        found = _kl(q, p)', "tests/numerics/test_divergence.py",
    ),
    "a measured KL with its sides swapped": Fault(
        "compress/evaluate/perplexity_kl.py", "p, q = logs", "q, p = logs", "tests/evaluate/test_perplexity_kl.py", "ruled_out"
    ),
    "a share that does not follow the losses": Fault(
        "compress/numerics/domain_weights.py", "max(excess, 0.0)", "max(-excess, 0.0)", "tests/numerics/test_domain_weights.py"
    ),
    "a held-out document that is trained on": Fault(
        "compress/corpus/domains.py", "number + bisect_right(before, number)", "number", "tests/corpus/test_domains.py", "nothing_of"
    ),
    "a skipped fsync": Fault(
        "compress/checkpoint/writer.py", 'for entry in self.path.rglob("*"):\n                fsync(entry)', "pass",
        "tests/checkpoint/test_writer.py",
    ),
    "an unsorted shard index": Fault(
        "compress/checkpoint/safetensors_header.py", "for name in sorted(files)", "for name in list(files)",
        "tests/checkpoint/test_safetensors_header.py", "indexed",
    ),
    "a journal that is not read": Fault(
        "compress/checkpoint/writer.py", "self.journal = self.read_journals()", "self.journal = {}",
        "tests/pipeline/test_run.py", "journaled",
    ),
    "a link out of a checkpoint that passes": Fault(
        "compress/checkpoint/reader.py", "if path.is_symlink() and not any(", "if not path and any(", "tests/house/test_security.py",
        "neighbour",
    ),
    "a digest of tokens that is ignored": Fault(
        "compress/corpus/build.py", "if corpus.digest != digest:", "if False:", "tests/corpus/test_build.py", "is_checked"
    ),
    "a refusal that passes": Fault(
        "kernels/awq/layout.py", "if scheme.integer and scheme.bits != BITS:", "if False:", "tests/kernels/test_awq.py", "refusals"
    ),
    "rows of queries that stay where they are": Fault(
        "compress/importers/gguf_names.py", "return heads if isinstance(heads, int) else 0", "return 0",
        "tests/kernels/test_gguf.py", "written_by_hand",
    ),
    "embeddings whose scale does not follow the width": Fault(
        "compress/architecture/axes.py", 'if part.source.kind == "embedding":', "if False:",
        "tests/architecture/test_masked_model.py", "gemma2",
    ),
    "a norm over all channels": Fault(
        "compress/layerwise/masked_model.py", "return 1.0 if hidden is None else", "return 1.0 if True else",
        "tests/architecture/test_masked_model.py", "llama",
    ),
    "a dropped expert": Fault(
        "compress/executors/sweep.py", "for expert, statistic in statistics.items():",
        "for expert, statistic in [*statistics.items()][:-1]:", "tests/executors/test_sweep.py", "see_their_own_tokens",
    ),
}  # fmt: skip


def copied(folder: Path) -> Path:
    """The sources as an installed package: passes, kernels and recipes within compress."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "compress", folder / "compress", ignore=skip)
    for part in ("passes", "kernels", "recipes"):
        shutil.copytree(ROOT / part, folder / "compress" / part, ignore=skip)
    return folder


def tried(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the copy, of which the checkout is only the directory it runs in."""
    options = ["-q", "-x", "--color=no", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_planted(name: str) -> None:
    fault = FAULTS[name]
    assert (ROOT / fault.file).read_text().count(fault.old) == 1, f"'{fault.old}' does not stand once in {fault.file}"
    assert (ROOT / fault.tests).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, tmp_path: Path) -> None:
    """By a test that passes without it."""
    fault, folder = FAULTS[name], copied(tmp_path)
    path = folder / (fault.file if fault.file.startswith("compress/") else f"compress/{fault.file}")
    sound = path.read_text()
    path.write_text(sound.replace(fault.old, fault.new))
    done = tried(folder, fault.tests, *(["-k", fault.only] if fault.only else []))
    assert done.returncode == 1, f"{name} survives:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    (caught,) = re.findall(r"^FAILED (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    path.write_text(sound)
    again = tried(folder, caught)
    assert again.returncode == 0, f"{caught} fails without the fault too:\n{again.stdout[-3000:]}"
    print(f"{name}: {caught}")
