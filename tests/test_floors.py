"""The laws of the house: who may import whom, captions, sizes, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from compress.discover import caption_of

ROOT = Path(__file__).parents[1]
ROOMS = {"compress": "compress", "passes": "compress.passes", "kernels": "compress.kernels"}
FLOORS = {
    0: "errors strict size cache textform presets scheme sparsity beside lora facts targets recipe indentation recipefile manifest gate",
    1: "device threads shards checkpoint trust writer qtensor watch source corpus algebra spaces picture foreign",
    2: "contract kinds classes names mapping meaning skeleton experts journey batches footprint parking shelf traveller route reverse deciding granular balancing sweep fold peers qlinear kernels intake stream forward model train",
    3: "passes",
    4: "api discover resolve tally decide plan plan_checks memory places step reuse pipeline windows measure stages difference sample teacher ancestor devices stacking artifact hf account card entry readers verify doctor bench demo recipes compress",
    5: "cli __main__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
UPWARD_BY_DESIGN = dict.fromkeys(
    [(driver, "plan") for driver in ("stream", "sweep", "train")], "a step's plan is the driver's argument"
)


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "compress"


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module of ours, whether it is imported when the file is) for every import that is not for types only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, id(node) in top))
            if node.module in ("compress", "compress.cli"):
                found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module: str) -> None:
    here = FLOOR[room(module)]
    for target, _ in imports(modules()[module]):
        if not target.startswith("compress.") or room(target) not in FLOOR or room(target) == room(module):
            continue
        there = FLOOR[room(target)]
        if (room(module), room(target)) in UPWARD_BY_DESIGN:
            continue
        assert there <= here, f"{module} (floor {here}) imports {target} (floor {there}): import down only"


@pytest.mark.parametrize("module", [m for m in modules() if room(m) == "passes"])
def test_passes_never_import_passes_nor_torch_at_import(module: str) -> None:
    for target, at_import in imports(modules()[module]):
        assert not target.startswith("compress.passes"), f"{module} imports {target}: passes never import passes"
        assert not (at_import and target.split(".")[0] in ("torch", "transformers")), f"{module} imports {target} too early"


@pytest.mark.parametrize("module", [m for m in modules() if room(m) in FLOORS[0].split()])
def test_words_know_no_torch(module: str) -> None:
    assert not [t for t, _ in imports(modules()[module]) if t.split(".")[0] in ("torch", "safetensors", "transformers")]


@pytest.mark.parametrize("module", modules())
def test_files_have_a_caption_and_stay_short(module: str) -> None:
    path = modules()[module]
    caption = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    assert caption, f"{path} has no caption"
    assert len(caption[0]) < 80, f"{path}: the caption is {len(caption[0])} characters"
    assert len(path.read_text().splitlines()) <= 400, f"{path} is over 400 lines"


def test_readme_maps_every_file() -> None:
    """The code map in README has one line for each file, its caption, and none for files that are gone."""
    files = sorted(path for path in modules().values() if path.name != "__init__.py")
    wanted = [f"| `{path.relative_to(ROOT)}` | {caption_of(path)} |" for path in files]
    assert block("code map") == wanted, "make it anew: python tests/test_floors.py"


def test_readme_has_the_options_of_every_pass() -> None:
    """The text of `compress list`, the same that --help and the schema show."""
    assert block("passes")[1:-1] == options_text().splitlines()


def block(name: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    lines = text.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0].strip().splitlines()
    return [line for line in lines if not line.startswith(("| file", "| ---"))]


def options_text() -> str:
    command = [sys.executable, "-P", "-m", "compress", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["quantize", "rtn", "--help"], ["recipes", "ls"]])
def test_help_starts_without_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from compress.cli.app import build
try:
    build({arguments!r})({arguments!r}, standalone_mode=False)
finally:
    heavy = [name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules]
    heavy += ["pydantic" for argument in {arguments!r}[:1] if argument == "--help" and "pydantic" in sys.modules]
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_sorted_and_there() -> None:
    import compress

    assert sorted(compress.__all__) == compress.__all__
    for name in compress.__all__:
        assert getattr(compress, name).__name__ == name


def test_import_compress_is_light() -> None:
    code = "import sys, compress; assert not {'torch', 'pydantic', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


if __name__ == "__main__":  # prints the blocks that README holds
    print("| file | what it is |\n| --- | --- |")
    for path in sorted(path for path in modules().values() if path.name != "__init__.py"):
        print(f"| `{path.relative_to(ROOT)}` | {caption_of(path)} |")
    print(f"\n```text\n{options_text()}\n```")
