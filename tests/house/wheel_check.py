"""The wheel: built, looked into, installed where nothing else is, and used. `make wheel` comes first."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel() -> Path:
    built = sorted((ROOT / "dist").glob("*.whl"))
    assert len(built) == 1, "run `make wheel`"
    return built[0]


def test_it_holds_every_module_and_data_file_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = {"compress": "compress", "passes": "compress/passes", "kernels": "compress/kernels", "recipes": "compress/recipes"}
    for folder, place in rooms.items():
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".yaml", ".safetensors", ".json", ".jsonl", ".md", ".jinja", ".cu", ".cuh", ".zip")
                or path.name == "py.typed"
            ):
                wanted = f"{place}/{path.relative_to(ROOT / folder)}"
                assert wanted in names, f"{wanted} is not in the wheel"
    assert not [name for name in names if name.split("/")[0] in ("tests", "passes", "kernels", "recipes")]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "Name: compress-llm" in text
    assert "Requires-Python: >=3.11" in text


def test_it_runs_when_installed_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked beside a folder named `kernels`, with this environment's dependencies but not its editable install."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', str(f)).lower()];"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.argv = ['compress', *sys.argv[1:]];"
        "import compress; assert 'site' in compress.__file__, compress.__file__;"
        "from compress.__main__ import main; main()"
    )

    def compress(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "rtn" in compress("quantize", "--help")
    assert "rtn_w4" in compress("recipes", "ls")
    model = tmp_path / "site" / "compress" / "demo" / "model"
    assert "where:" in compress("run", str(model), str(tmp_path / "out"), "rtn_w4", "--set", "quantize.rtn.scheme=w4a16g32")
    assert (tmp_path / "out" / "model.safetensors").is_file()
