"""A new pass is one file, and nothing else: listed, planned, run, resumed, and held to the contract."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from forked import Server

ROOT = Path(__file__).parents[2]
PASS = '''"""Random pruning: zeros anywhere, the baseline that every score has to beat."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.contract.base_passes import PruningPass
from compress.contract.shapes import TensorPass
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Random(PruningPass, TensorPass):
    """Keeps entries that are drawn by lot."""

    example: ClassVar[str] = "prune.random(sparsity=2:4)"

    draw: int = Field(0, ge=0, description="seed of the lots")

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        import torch

        from compress.numerics.masks import keep_best

        if weight.name.endswith("layers.1.mlp.up_proj.weight") and "DIE_HERE" in os.environ:
            os._exit(9)
        assert after.sparsity is not None
        lots = torch.rand(value.shape, generator=torch.Generator().manual_seed(self.draw))
        return value.masked_fill(~keep_best(lots, after.sparsity, per_row=self.scope == "row"), 0), None
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed, with one file more."""
    folder = tmp_path_factory.mktemp("tree")
    for name, target in {"compress": "compress", "passes": "compress/passes", "recipes": "compress/recipes"}.items():
        shutil.copytree(ROOT / name, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "compress" / "kernels").symlink_to(ROOT / "kernels")
    (folder / "compress" / "passes" / "prune" / "random.py").write_text(PASS)
    return folder


@pytest.fixture(scope="module")
def there(tree: Path) -> Server:
    """Runs commands with the tree in the place of what is installed."""
    return Server({**os.environ, "PYTHONPATH": str(tree)})


def test_it_is_listed_planned_run_and_goes_on_where_it_died(there: Server, tiny: Path, tmp_path: Path) -> None:
    assert "prune.random" in there.compress("list").stdout
    assert "seed of the lots" in there.compress("prune", "random", "--help").stdout
    recipe = ["-p", "prune.random(sparsity=2:4, draw=3)"]
    planned = there.compress("plan", tiny, *recipe, "--json")
    assert "prune.random" in json.loads(planned.stdout)["steps"][0]["pass"], planned.stderr
    died = there.compress("run", tiny, tmp_path / "out", *recipe, "--threads", 1, DIE_HERE="yes")
    assert died.returncode == 9
    assert not (tmp_path / "out").exists()
    again = there.compress("run", tiny, tmp_path / "out", *recipe, "--threads", 1, "--json")
    assert again.returncode == 0, again.stderr
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert any(event.get("kept") for event in events if event["event"] == "progress"), "the journal of the run that died was read"
    whole = there.compress("run", tiny, tmp_path / "whole", *recipe, "--threads", 1)
    assert whole.returncode == 0, whole.stderr
    digests = [json.loads((tmp_path / name / "manifest.json").read_text())["digests"] for name in ("out", "whole")]
    assert digests[0] == digests[1]


def test_it_is_held_to_the_contract(there: Server) -> None:
    contract = ROOT / "tests" / "passes" / "test_contract.py"
    pytest_ = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = there.python(pytest_, "-q", "-p", "no:cacheprovider", contract, "-k", "prune.random")
    assert "5 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_method_that_is_missing_is_told_when_the_pass_is_loaded(tree: Path, there: Server) -> None:
    (tree / "compress" / "passes" / "prune" / "nothing.py").write_text(PASS.replace("def tensor(", "def tensors("))
    try:
        done = there.compress("plan", "nowhere", "-p", "prune.nothing(sparsity=0.5)")
        assert "prune.nothing lacks tensor" in done.stderr
    finally:
        (tree / "compress" / "passes" / "prune" / "nothing.py").unlink()
