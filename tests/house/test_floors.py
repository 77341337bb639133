"""The laws of the house: who may import whom, captions, sizes, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"compress": "compress", "passes": "compress.passes", "kernels": "compress.kernels"}
FOLDERS = (
    "errors", "spec", "threads", "freed_memory", "context", "device", "plots", "numerics", "checkpoint", "importers", "corpus", "architecture",
    "contract", "kernels", "layerwise", "executors", "passes", "pipeline", "runtime", "hf", "evaluate", "report", "hub", "api", "demo", "cli",
    "__main__",
)  # fmt: skip
"""Every folder and every module that stands alone, lowest first: each may import what stands before it."""
EXEMPT = {("compress.runtime.artifact", "compress.hf"): "loading an artifact registers its reader with transformers"}
SLOW_TO_IMPORT = {"torch", "transformers", "datasets", "numpy"}
"""What takes seconds to import, so that help and plans of recipes do without."""


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def folder_of(module: str) -> str:
    """The entry of FOLDERS that a module belongs to; `compress` is the package itself."""
    return module.split(".")[1] if "." in module else module


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, whether it is imported when the file is, whether for types only) for every import of a file."""
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    for_types = {id(node) for block in blocks for node in ast.walk(block)}
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else node.module, id(node) in top, id(node) in for_types) for name in names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top, id(node) in for_types) for alias in node.names]
    return found


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def arrows() -> set[tuple[str, str]]:
    """(module, module of ours that it imports, lazily or for types), between folders."""
    found = {(module, target) for module, each in IMPORTS.items() for target, _, _ in each if target in MODULES}
    return {(a, b) for a, b in found if folder_of(a) != folder_of(b) and "compress" not in (a, b)}


def test_every_module_has_its_place_in_the_order_of_folders() -> None:
    assert {folder_of(module) for module in MODULES} - {"compress"} == set(FOLDERS)


def test_imports_go_down_only() -> None:
    up = [
        f"{module} imports {target}: {folder_of(target)} stands above {folder_of(module)}"
        for module, target in sorted(arrows())
        if FOLDERS.index(folder_of(target)) > FOLDERS.index(folder_of(module)) and (module, target) not in EXEMPT
    ]
    assert not up, "import down only:\n" + "\n".join(up)
    assert arrows() >= EXEMPT.keys(), "an exemption that nothing needs"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for types are left out: they are none when the program runs."""
    real = {module: {t for t, _, typed in each if t in MODULES and not typed} for module, each in IMPORTS.items()}
    for module, target in EXEMPT:
        real[module].discard(target)
    real.pop("compress")
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "a circle: " + " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for target in sorted(real.get(module, ())):
                if not module.startswith(f"{target}."):
                    visit(target, (*way, module))
            done.add(module)

    for module in real:
        visit(module, ())


def test_every_folder_says_what_it_is_and_what_it_imports() -> None:
    """Its docstring ends with the sentence that this test makes of the imports."""
    for folder in FOLDERS:
        path = MODULES[f"compress.{folder}"]
        if path.name != "__init__.py":
            continue
        used = {folder_of(target) for module, target in arrows() if folder_of(module) == folder}
        said = ", ".join(name for name in FOLDERS if name in used)
        wanted = f"Imports {said}." if used else "Imports nothing of ours."
        text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        assert text.endswith(wanted), f"{path.relative_to(ROOT)} should end with: {wanted}"


def test_passes_never_import_passes_nor_torch_at_import() -> None:
    for module in (name for name in MODULES if folder_of(name) == "passes"):
        for target, at_import, _ in IMPORTS[module]:
            assert not target.startswith("compress.passes"), f"{module} imports {target}: passes never import passes"
            assert not (at_import and target.split(".")[0] in SLOW_TO_IMPORT), f"{module} imports {target} too early"


def test_spec_and_errors_know_no_torch() -> None:
    for module in (name for name in MODULES if folder_of(name) in ("spec", "errors")):
        heavy = {target for target, _, _ in IMPORTS[module] if target.split(".")[0] in {*SLOW_TO_IMPORT, "safetensors"}}
        assert not heavy, f"{module} imports {heavy}"


def test_files_have_a_caption_and_stay_short() -> None:
    for path in MODULES.values():
        caption = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        assert caption, f"{path} has no caption"
        assert len(caption[0]) < 80, f"{path}: the caption is {len(caption[0])} characters"
        assert len(path.read_text().splitlines()) <= 400, f"{path} is over 400 lines"


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["quantize", "rtn", "--help"], ["recipes", "ls"]])
def test_help_starts_without_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from compress.cli.app import build
try:
    build({arguments!r})({arguments!r}, standalone_mode=False)
finally:
    heavy = [name for name in {sorted(SLOW_TO_IMPORT)!r} if name in sys.modules]
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
