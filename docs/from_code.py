"""Pages made from the code when the documentation is built: passes, formats, messages, commands, names, files.

Everything lies in `docs/generated/`, which is not kept. A file that holds part of a page, for `{include}`, ends in `.part.md`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import compress
from compress.contract.discover import caption, caption_of, load_pass, pass_files
from compress.errors import CompressError, Problem
from markup import COPIES, DOCS, GENERATED, ROOT, bullets, docstring, inline, link, prose, table


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", lambda app: generate())
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}


def generate() -> None:
    """Writes every page; one that has not changed keeps its time, so that it is not built again."""
    pages = dict(_pages())
    for old in GENERATED.rglob("*.md"):
        if str(old.relative_to(GENERATED)) not in pages:
            old.unlink()
    for name, text in pages.items():
        path = GENERATED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _pages() -> Iterator[tuple[str, str]]:
    from compress.kernels import dispatch

    for name in pass_files():
        yield f"passes/{name}.md", pass_page(name)
    for name in dispatch.formats():
        yield f"formats/{name}.md", format_page(name)
    yield "passes.part.md", bullets((f"[`{name}`](generated/passes/{name}.md)", caption(name)) for name in pass_files())
    formats = ((name, _layout(name)) for name in dispatch.formats())
    yield "formats.part.md", bullets((f"[`{n}`](generated/formats/{n}.md)", caption_of(path)) for n, path in formats)
    yield "backends.part.md", backends()
    yield "reader-matrix.part.md", "\n".join(matrix_of(name, f"### {name}\n") for name in dispatch.formats())
    yield "recipes.part.md", installed_recipes()
    yield "grammar.part.md", _said_by("spec/scheme.py")
    yield "selectors.part.md", _said_by("spec/selectors.py")
    yield "statuses.part.md", statuses()
    yield "message.part.md", example_message()
    yield "push.part.md", push_options()
    yield "floors.part.md", floors()
    yield "code-map.md", code_map()
    yield "commands.md", commands()
    yield "api.md", api()
    for source, name in COPIES.items():
        yield f"{name}.md", link((ROOT / source).read_text(encoding="utf-8"), ROOT / source, GENERATED)


def _read(app: Sphinx, name: str, content: list[str]) -> None:
    """Sphinx has read a page: its links become those of built pages."""
    path = DOCS / f"{name}.md"
    if path.is_file() and not path.is_relative_to(GENERATED):
        content[0] = link(content[0], path, path.parent)


def _said_by(file: str) -> str:
    """What a module of `compress/` says below its caption."""
    return prose(docstring(ROOT / "compress" / file).partition("\n")[2])


# Passes and formats.


def pass_page(name: str) -> str:
    """A pass: what it says of itself, the shapes it has, its options, and recipes that use it."""
    from compress.cli.passes import default_of, kind_of

    cls = load_pass(name)
    _, _, rest = docstring(pass_files()[name]).partition("\n")
    shapes = [c for c in cls.__mro__[1:] if c.__module__.startswith("compress.contract.") and c.__name__ != "Pass"]
    rows = [
        (f"`{key}`", f"`{kind_of(field.annotation)[1]}`", default_of(field).removeprefix("default: "), field.description)
        for key, field in cls.model_fields.items()
    ]
    command = f"compress {name.replace('.', ' ').replace('_', '-')} MODEL OUT"
    needed = "".join(f" --{key.replace('_', '-')} ..." for key, field in cls.model_fields.items() if field.is_required())
    used = [recipe for recipe, text in _recipes().items() if re.search(rf"^- {re.escape(name)}\b", text, re.MULTILINE)]
    return "\n".join(
        [
            f"# {name}\n",
            f"{inline(caption(name))}\n",
            prose(rest) if rest.strip() else "",
            f"In a recipe: `{name}`. By itself:\n",
            f"```text\n{command}{needed}\n```\n",
            f"An example: `{example}`.\n" if (example := getattr(cls, "example", "")) else "",
            "## Options\n",
            table(("option", "type", "default", "what"), rows),
            "## Shape\n",
            "What it is made of, nearest first; see [adding a pass](../../adding.md).\n",
            bullets((f"`{c.__name__}`", (c.__doc__ or "").strip().splitlines()[0]) for c in shapes),
            f"\nInstalled recipes with it: {', '.join(f'`{each}`' for each in used)}.\n" if used else "",
        ]
    )


def _layout(name: str) -> Path:
    from compress.kernels import dispatch

    return Path(str(dispatch.__file__)).parent / name.replace("-", "_") / "layout.py"


def format_page(name: str) -> str:
    """A format: its layout, what it holds, and who reads it."""
    from compress.kernels.dispatch import load_format

    cls = load_format(name)
    first, _, rest = docstring(_layout(name)).partition("\n")
    held = ", ".join("scales of keys and values" if word == "cache" else word for word in sorted(cls.holds))
    facts = [
        ("beside codes it holds", held or "nothing"),
        ("what is stored", "the dense weights that codes mean" if cls.expands else "codes"),
        ("smallest zero point of asymmetric codes", cls.least_zero),
    ]
    return "\n".join(
        [
            f"# {name}\n",
            f"{inline(first)} Written by `pack(format={name})`.\n",
            prose(rest) if rest.strip() else "",
            "## What it holds\n",
            f"{inline((cls.__doc__ or '').strip())}\n",
            table(("", ""), facts),
            matrix_of(name, "## Readers\n", reasons=True),
        ]
    )


def matrix_of(name: str, heading: str, reasons: bool = False) -> str:
    """Which reader loads which scheme of a linear in this format; why, if asked for."""
    from compress.cli.formats import SCHEMES, matrix

    rows = matrix(name, SCHEMES)
    held = {scheme: verdicts for scheme, verdicts in rows.items() if "" not in verdicts}
    readers = list(dict.fromkeys(reader for verdicts in held.values() for reader in verdicts))
    text = [heading]
    if held:
        text.append(table(("scheme", *readers), [(f"`{s}`", *(verdicts[r][0] for r in readers)) for s, verdicts in held.items()]))
    why: dict[str, list[str]] = {}
    for scheme, verdicts in rows.items():
        for reader, (loads, reason) in verdicts.items():
            why.setdefault(f"{f'{reader}, ' if reader else ''}{loads}: {reason}", []).append(scheme)
    refused = [scheme for scheme, verdicts in rows.items() if "" in verdicts]
    if reasons:
        text += ["Why:\n", bullets((", ".join(f"`{scheme}`" for scheme in schemes), reason) for reason, schemes in why.items())]
    elif refused:
        text.append(f"Refused: {', '.join(f'`{scheme}`' for scheme in refused)}.\n")
    return "\n".join(text)


def backends() -> str:
    """Backends of the native format, in the order in which they are asked."""
    from compress.kernels import dispatch

    folder = Path(str(dispatch.__file__)).parent / "native"
    return table(("backend", "what it is"), [(f"`{name}`", caption_of(folder / f"{name}.py")) for name in dispatch.BACKENDS])


# Recipes, messages and commands.


def _recipes() -> dict[str, str]:
    from compress.cli.complete import installed

    return {name: path.read_text(encoding="utf-8") for name, path in installed().items()}


def installed_recipes() -> str:
    """Each recipe as its file has it, which begins with its command and what it measured."""
    return "\n".join(f"### {name}\n\n```yaml\n{text}```\n" for name, text in _recipes().items())


def statuses() -> str:
    """Every exit status, by the error that ends with it."""
    from compress.cli import guard

    def below(cls: type[CompressError]) -> Iterator[type[CompressError]]:
        yield cls
        for each in cls.__subclasses__():
            if each.__module__ == "compress.errors":
                yield from below(each)

    rows: list[tuple[object, ...]] = [(0, "", "The command did what it was asked for.")]
    rows += sorted((cls.exit_status, f"`{cls.__name__}`", (cls.__doc__ or "").splitlines()[0]) for cls in below(CompressError))
    rows.append((guard.INTERNAL, "", "An internal error: a mistake in compress."))
    stops = ((2, "Stopped by Ctrl-C."), (13, "Whoever read the output has gone."), (15, "Stopped by SIGTERM."))
    rows += [(guard.STOPPED + number, "", what) for number, what in stops]
    return table(("status", "error", "what it says"), rows)


def example_message() -> str:
    """A message, made by what raises it, with its four parts."""
    from compress.pipeline.resolve import resolve
    from compress.spec.recipe import parse_one_liner

    try:
        resolve(parse_one_liner("quantize.rtn(scheme=w7a16)"))
    except CompressError as error:
        problem: Problem = error.problems[0]
        return f"```text\nerror: {problem}\n```\n"
    raise AssertionError("a scheme of seven bits was taken")


def push_options() -> str:
    """The options of a recipe's `push:`."""
    from compress.spec.push import PushOptions

    fields = PushOptions.model_fields.items()
    rows = [(f"`{key}`", "" if field.is_required() else f"`{field.default!r}`", field.description) for key, field in fields]
    return table(("option", "default", "what"), rows)


def commands() -> str:
    """Every command of the command line but those of passes, with its options."""
    import typer.main

    from compress.cli.app import build

    root: Any = typer.main.get_command(build([]))
    text = ["# Commands\n", "Each pass has a command, too: its options are on [the pages of the passes](../passes.md).\n"]
    groups = {name.partition(".")[0] for name in pass_files()}

    def one(name: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for each, inner in command.commands.items():
                one(f"{name} {each}", inner)
            return
        asked = [p for p in command.params if p.param_type_name == "argument"]
        arguments = " ".join(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in asked)
        rows = [
            (" ".join(f"`{word}`" for word in [*p.opts, *p.secondary_opts]), p.help or "")
            for p in command.params
            if p.param_type_name == "option"
        ]
        text.append(f"## compress {name}\n\n```text\ncompress {name} {arguments}\n```\n\n{prose(command.help or '')}")
        text.append(table(("option", "what"), rows))

    for name, command in root.commands.items():
        if name not in groups:
            one(name, command)
    return "\n".join(text)


# Names and files.


def api() -> str:
    """What `import compress` offers."""
    text = [
        "# Python\n",
        "Names are loaded when they are asked for: `import compress` imports no torch.\n",
    ]
    for name in sorted(compress.__all__):
        value = getattr(compress, name)
        text.append(f"## compress.{name}\n\nHome: `{value.__module__}`.\n")
        shown = "" if inspect.isclass(value) and issubclass(value, BaseException) else _signature(value)
        text.append(f"```python\n{'class ' if inspect.isclass(value) else ''}{name}{shown}\n```\n" if shown else "")
        text.append(prose(inspect.getdoc(value) or ""))
        if inspect.isclass(value):
            text.append(bullets(_members(value)))
    return "\n".join(text)


class _Plain(str):
    """An annotation as its source has it."""

    __repr__ = str.__str__


def _plain(annotation: Any) -> Any:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return annotation if annotation is inspect.Parameter.empty else _Plain(text)


def _signature(value: Callable[..., Any]) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = [each.replace(annotation=_plain(each.annotation)) for each in signature.parameters.values()]
    shown = [re.sub(r"<factory>|<function .* at 0x\w+>", "...", str(each)) for each in plain]
    told = signature.return_annotation
    end = ")" if inspect.isclass(value) or told is inspect.Signature.empty else f") -> {_plain(told)}"
    text = f"({', '.join(shown)}{end}"
    return text if len(text) < 100 else "\n".join(["(", *(f"    {each}," for each in shown), end])


def _members(cls: type) -> Iterator[tuple[str, str]]:
    """Public methods and properties of a class of ours, with the first line of what each says."""
    for name, value in vars(cls).items():
        inner = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
        if not name.startswith("_") and inspect.isfunction(inner) and inner.__doc__:
            yield f"`{name}`", inspect.getdoc(inner).splitlines()[0]  # type: ignore[union-attr]


def folders() -> tuple[str, ...]:
    """The order of folders, lowest first, that the tests hold the imports to."""
    tree = ast.parse((ROOT / "tests" / "house" / "test_floors.py").read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FOLDERS")
    return tuple(ast.literal_eval(next(assigned).value))


def _home(folder: str) -> Path:
    """Where a folder, or a module that stands alone, lies."""
    places = (ROOT / folder, ROOT / "compress" / folder) if folder in ("passes", "kernels") else (ROOT / "compress" / folder,)
    return next(path for path in (*places, ROOT / "compress" / f"{folder}.py") if path.exists())


def floors() -> str:
    """The order of folders, with what each is and what it imports."""
    rows = []
    for folder in folders():
        home = _home(folder)
        said = docstring(home / "__init__.py" if home.is_dir() else home)
        first, imports = said.splitlines()[0], re.search(r"Imports ([^.]*)\.\s*$", " ".join(said.split()))
        rows.append((f"`{home.relative_to(ROOT)}{'/' if home.is_dir() else ''}`", first, imports[1] if imports else ""))
    return table(("lowest first", "what it is", "imports"), rows)


def code_map() -> str:
    """Every file with its caption, by folder, in the order of folders."""
    text = [
        "# Code map\n",
        "Every file and its caption, folder by folder, the lowest first. A file may import what stands above it.\n",
    ]
    for folder in folders():
        home = _home(folder)
        files = [home] if home.is_file() else sorted(path for path in home.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))
        rows = [(f"`{path.relative_to(ROOT)}`", _caption(path)) for path in files if path.name != "__init__.py"]
        text.append(f"## {home.relative_to(ROOT)}\n")
        text.append(f"{inline(docstring(home / '__init__.py').splitlines()[0])}\n" if home.is_dir() else "")
        text.append(table(("file", "what it is"), rows) if rows else "")
    return "\n".join(text)


def _caption(path: Path) -> str:
    if path.suffix == ".py":
        return caption_of(path)
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("/ ")
