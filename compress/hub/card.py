"""Card: what a push changes in an artifact's README.md.

The metadata gets the licence, and the base model if it names none; the text says what no reader has verified, and that the base
model is gated. All else stays as it is. Nothing is written here: texts in, texts out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import InputError, Problem

_LICENCE = ("license", "license_name", "license_link")
_ID = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_MOST_BYTES = 1 << 20
"""Bytes of a README whose metadata is read."""
_UNVERIFIED = "**Unverified.** No reader's logits have been compared with what these weights mean."
_GATED = "The base model `{base}` is gated. Its terms hold for this model too; they are on its page."


@dataclass(frozen=True)
class Changes:
    """What a push knows of a model besides its README."""

    licence: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    """Hub id of the base model; empty if it is not one of the Hub."""
    gated: bool = False
    verified: bool = True


def fields(readme: Path | None) -> dict[str, Any]:
    """The metadata of a README; empty if there is none that can be read, which the Hub ignores, too."""
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(readme) or {}) if readme is not None and readme.stat().st_size <= _MOST_BYTES else {}
    except Exception:  # YAML raises whatever its types do
        return {}


def licence_of(
    source: dict[str, Any], own: dict[str, Any], known: str | None, given: str
) -> tuple[dict[str, Any], list[Problem]]:  # fmt: skip
    """The licence for the metadata of a card, or the problem with it.

    From the metadata of the source's README, or `known` from the Hub; `given` counts where neither names any. `own` is the
    metadata of the artifact's README, which may have been edited.
    """
    found = {key: value for key in _LICENCE if (value := _licence(key, source.get(key)))}
    if "license" not in found:
        ids = known.split(", ") if known else []
        found = {"license": ids[0] if len(ids) == 1 else ids} if ids and all(map(_ID.fullmatch, ids)) else {}
    mine = own.get("license")
    if found:
        asked = {"--license": given, "the license in README.md": mine if isinstance(mine, str) else ""}
        said = {found["license"]} if isinstance(found["license"], str) else set(found["license"])
        said |= {found.get("license_name", ""), ""}
        do = "leave it: what is made from a model keeps its licence"
        wrong = [Problem(w, f"the source's licence, {_shown(found)}", f"'{t}'", do) for w, t in asked.items() if t not in said]
        return found, wrong
    if given or (isinstance(mine, str) and _ID.fullmatch(mine)):
        return {"license": given or mine}, []
    do = "give it: --license apache-2.0, or what it is; in a recipe `license:` of push"
    return {}, [Problem("the licence", "that of the source, which is carried over", "none: the source names no licence", do)]


def _licence(key: str, value: Any) -> Any:
    """A licence's field if it is one: an id or several, or a line of text."""
    if key == "license":
        ids = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and _ID.fullmatch(text)]
        return ids[0] if len(ids) == 1 else ids
    return value if isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable() else None


def _shown(licence: dict[str, Any]) -> str:
    ids = licence["license"]
    return str(licence.get("license_name") or (ids if isinstance(ids, str) else ", ".join(ids)))


def metadata(readme: str, changes: Changes) -> dict[str, Any]:
    """The metadata that the card will have. Raises InputError for a README whose own cannot be read."""
    found, _ = _split(readme)
    base = {} if found.get("base_model") or not changes.base else {"base_model": changes.base}
    kept = {key: value for key, value in found.items() if key not in _LICENCE} if changes.licence else found
    return {**kept, **base, **changes.licence}


def edited(readme: str, changes: Changes) -> str:
    """The README as it is pushed. Raises InputError for one whose metadata cannot be read."""
    from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

    said = [_UNVERIFIED] if not changes.verified else []
    said += [_GATED.format(base=changes.base)] if changes.gated else []
    head = yaml_dump(metadata(readme, changes), sort_keys=False)
    return f"---\n{head}---\n" + "".join(f"\n> {line}\n" for line in said) + ("\n" if said else "") + _split(readme)[1]


def _split(readme: str) -> tuple[dict[str, Any], str]:
    """The metadata of a README, and what stands below it."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(readme)
    if block is None:
        return {}, readme
    try:
        found = yaml.safe_load(block[2])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = str(error).splitlines()[0]
        raise InputError("README.md", "metadata in YAML between its `---`", said, "mend it, or remove the block") from None
    if not isinstance(found, dict | None):
        raise InputError("README.md", "metadata in YAML between its `---`", "no mapping", "mend it, or remove the block")
    return found or {}, readme[: block.start()] + readme[block.end() :]
