"""Shell completion: recipes, and the command line that a shell asks about."""

from __future__ import annotations

import importlib.util
import os
from glob import escape
from pathlib import Path


def installed() -> dict[str, Path]:
    """Name -> file of the recipes that came with the package."""
    spec = importlib.util.find_spec("compress.recipes")
    folders = spec.submodule_search_locations if spec else None
    return {path.stem: path for folder in folders or [] for path in sorted(Path(folder).glob("*.yaml"))}


def recipes(incomplete: str) -> list[str]:
    """Installed recipes and recipe files here that begin so."""
    folder, _, start = incomplete.rpartition("/")
    files = [path for ending in ("yaml", "yml") for path in Path(folder or ".").glob(f"{escape(start)}*.{ending}")]
    return [name for name in installed() if name.startswith(incomplete)] + sorted(map(str, files))


def words() -> list[str]:
    """The words of the line that a shell wants completed, without the command's name; none where no shell asks.

    typer answers for the app that was built, and only a pass that is named there has its options.
    """
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or ""
    return line.split()[1:] if any(name.endswith("_COMPLETE") for name in os.environ) else []
