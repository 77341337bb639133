"""Remote code: Python files of a checkpoint, run only if the user allows it.

`auto_map`, in config.json and tokenizer_config.json, names classes in .py files beside them. transformers' own machinery
loads them, only from the checkpoint's own files, and only for a checkpoint that was opened as trusted.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import read_json
from compress.errors import InputError, MachineError
from compress.spec.weight_state import Note

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.context import Context

OPTION = "--trust-remote-code"
NOTE = "remote code"
_REFERENCE = re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")
_LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModel")


def references(folder: Path) -> dict[str, tuple[str, ...]]:
    """Auto class -> the `module.Class` entries of auto_map for it, config.json's first.

    Raises InputError for code of another repository, and for an entry that is no such name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for file in ("config.json", "tokenizer_config.json"):
        entries = read_json(folder / file).get("auto_map") if (folder / file).is_file() else None
        if isinstance(entries, list):
            # The form for a tokenizer in older versions, which had no other auto classes.
            entries = {"AutoTokenizer": entries}
        if entries is not None and not isinstance(entries, dict):
            raise InputError(str(folder / file), "an object in auto_map", type(entries).__name__)
        for key, value in (entries or {}).items():
            named = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
            for one in named:
                if not isinstance(one, str) or not _REFERENCE.fullmatch(one):
                    do = "only code that lies beside it is run: copy that here, and name it without '--'"
                    raise InputError(str(folder / file), f"auto_map: module.Class for {key}", f"'{one}'", do)
            found[str(key)] = (*found.get(str(key), ()), *named)
    return found


def remedy(checkpoint: Checkpoint) -> str:
    """What to do about a class that transformers lacks; empty for a checkpoint that is trusted, or has no code."""
    return "" if checkpoint.trusted else would_run(checkpoint.path)


def would_run(folder: Path) -> str:
    """What to do about a class that only Python files in the folder define; empty if there are none."""
    try:
        named = sorted({one for ones in references(folder).values() for one in ones})
    except InputError as error:
        return f"its code is not run: auto_map names {error.problems[0].got}"
    return f"its code ({', '.join(named)}) is not run; read it, and pass {OPTION} if you trust it" if named else ""


def code_of(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of every Python file that may be run; none of a checkpoint that is not trusted. Raises InputError."""
    if not checkpoint.trusted:
        return {}
    from transformers.dynamic_module_utils import get_relative_imports

    waiting = sorted({f"{one.partition('.')[0]}.py" for ones in references(checkpoint.path).values() for one in ones})
    found: dict[str, str] = {}
    while waiting:
        file = waiting.pop(0)
        if file in found:
            continue
        path = checkpoint.path / file
        if file not in checkpoint.side_files or not path.is_file():
            raise InputError(str(path), "a Python file that the model's code needs, beside it", "no such file", "copy it there")
        try:
            found[file] = hashlib.sha256(path.read_bytes()).hexdigest()
            waiting += [f"{name}.py" for name in sorted(get_relative_imports(path))]
        except (OSError, ValueError) as error:
            raise InputError(str(path), "Python that can be read", str(error)) from None
    return found


def tell_code(checkpoint: Checkpoint, ctx: Context) -> None:
    """Sends an event that names every file, before any is run."""
    if code := code_of(checkpoint):
        ctx.tell("code", model=checkpoint.name, files=code)


def code_notes(checkpoint: Checkpoint, whose: str) -> list[Note]:
    """The manifest's line about code that was allowed to run."""
    files = tuple(code_of(checkpoint))
    return [Note(NOTE, f"Python of the {whose}, allowed by {OPTION}", files)] if files else []


def own_classes(checkpoint: Checkpoint, architecture: str | None) -> tuple[Any, Any]:
    """(config class, model class) that a trusted checkpoint defines, None for each that it does not. Runs its code.

    Raises InputError for code that fails or defines something else, MachineError for a library that it lacks.
    """
    if not checkpoint.trusted:
        return None, None
    from transformers import PreTrainedConfig, PreTrainedModel

    named = references(checkpoint.path)
    ends = f".{architecture}"
    keys = [key for key, ones in named.items() if ones and ones[0].endswith(ends)] if architecture else _LANGUAGE_MODELS
    model = next((named[key][0] for key in keys if named.get(key)), None)
    config = next(iter(named.get("AutoConfig", ())), None)
    return (
        _loaded(checkpoint, config, PreTrainedConfig) if config else None,
        _loaded(checkpoint, model, PreTrainedModel) if model else None,
    )


def _loaded(checkpoint: Checkpoint, reference: str, base: type) -> type:
    """Loads a class from the checkpoint's own code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    where = str(checkpoint.path / f"{reference.partition('.')[0]}.py")
    code_of(checkpoint)  # raises if a file that the code needs is missing
    try:
        found = get_class_from_dynamic_module(reference, str(checkpoint.path), local_files_only=True)
    except ImportError as error:
        raise MachineError(where, "the libraries that it imports", str(error).strip().splitlines()[0], "install them") from error
    except Exception as error:  # foreign code may raise anything
        got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise InputError(where, f"Python that defines {reference.rpartition('.')[2]}", got) from error
    if not isinstance(found, type) or not issubclass(found, base):
        raise InputError(where, f"{reference.rpartition('.')[2]}: a {base.__name__}", f"{found}")
    return found
