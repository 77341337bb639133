"""Every command and every line of Python of README.md, CONTRIBUTING.md and docs/ runs as it stands, or is marked.

A page has a directory to itself, and its blocks run there in their order. There are MODEL, a small one with the tokenizer of the
embedded model; TEXTS.jsonl and HELD_OUT.jsonl; and recipe.yaml, the page's last recipe. A comment before a block says that it does not run here:

    <!-- needs: gpu -->           or hub, install, torchrun: what a test does not have; its options are checked all the same
    <!-- run by: tests/FILE -->   another test runs it
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from compress.cli.app import build
from compress.pipeline.resolve import resolve
from compress.spec.recipe_file import parse_yaml
from support import TEXT, tiny_llama

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"gpu", "hub", "install", "torchrun"}
ELSEWHERE = {"git", "cd", "cp", "pip", "make", "pre-commit", "torchrun"}
"""What a marked block may call besides compress."""
_BLOCK = re.compile(r"(?:^<!-- (needs|run by): (.+?) -->\n)?^```(sh|python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^```(\S+)$", re.MULTILINE)


class Block(NamedTuple):
    """A block of a page: how it is marked, and what is in it."""

    mark: str
    value: str
    kind: str
    text: str

    def lines(self) -> list[list[str]]:
        """The commands of a shell block, word by word."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    return [Block(*(part or "" for part in match.groups())) for match in _BLOCK.finditer(page.read_text())]


def leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words name, and its arguments."""
    command: Any = typer.main.get_command(build(words))
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check(words: list[str]) -> None:
    """A command that is not run: it is there, and so is everything that it is given."""
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] in ("compress", "torchrun"):
        command, given = leaf(words[words.index("compress") + 1 :])
        command.make_context(" ".join(words), given)
    else:
        assert words[0] in ELSEWHERE, words


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ours, in this process. Fails with what it printed where its status is not 0."""
    assert words[0] == "compress", f"{words}: mark what it needs"
    monkeypatch.setattr(sys, "argv", words)
    build(words[1:])(words[1:], standalone_mode=False)


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with random weights, of widths that the groups in the pages divide."""
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 1024}
    made = tiny_llama(tmp_path_factory.mktemp("pages") / "model", **sizes)
    for path in demo_model.glob("tokenizer*"):
        shutil.copy(path, made)
    return made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_to_type_runs(
    page: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    shutil.copytree(model, "MODEL")
    shutil.copy(TEXT / "calibration.jsonl", "TEXTS.jsonl")
    Path("HELD_OUT.jsonl").write_text("".join((TEXT / "evaluation.jsonl").read_text().splitlines(keepends=True)[:2]))
    for block in found:
        if block.kind == "yaml" and block.text.startswith("version:"):
            resolve(parse_yaml(block.text))
            Path("recipe.yaml").write_text(block.text)
    names: dict[str, Any] = {}
    for block in found:
        if block.mark == "needs":
            assert block.value in NEEDS, f"{page}: needs {block.value}?"
        if block.mark == "run by":
            assert (ROOT / block.value).is_file(), f"{page}: {block.value} runs it?"
        elif block.kind == "sh":
            for words in block.lines():
                try:
                    check(words) if block.mark == "needs" else run_here(words, monkeypatch)
                except SystemExit as error:
                    pytest.fail(f"{page.name}: {shlex.join(words)}\nstatus {error.code}\n{capfd.readouterr().err}")
        elif block.kind == "python":
            code = compile(block.text, str(page), "exec")
            if block.mark != "needs":
                exec(code, names)


def test_commands_within_the_text_are_there_with_their_options() -> None:
    for page in PAGES:
        for span in re.findall(r"`compress ([^`]+)`", page.read_text()):
            words = span.replace("\\|", "|").split()
            for name in words[1].split("|") if words[0] == "recipes" else words[1:2] or [""]:
                command, _ = leaf([words[0], name, *words[2:]])
                known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
                assert set(re.findall(r"--[a-z][a-z-]*", span)) <= known, f"{page}: compress {span}"


def test_no_block_is_missed() -> None:
    """Other kinds of blocks are what something printed, or part of a file."""
    for page in PAGES:
        kinds = [kind for kind in _FENCE.findall(page.read_text()) if not kind.startswith("{")]
        assert set(kinds) <= {"sh", "python", "yaml", "text", "json"}, page
        assert len(blocks(page)) == sum(kind in ("sh", "python", "yaml") for kind in kinds), f"{page}: a block is not read"


def test_pages_of_measurements_name_what_measures() -> None:
    """Their commands take hours."""
    for page in (ROOT / "recipes").glob("*.md"):
        commands = [words for block in blocks(page) for words in block.lines()]
        assert commands
        for words in commands:
            check(words) if words[0] == "make" else Path(ROOT / words[1]).resolve(strict=True)


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s#]+)", page.read_text())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for target in links(page):
        assert "://" not in target, f"{page}: {target}: pages link to files of this repository"
        inside = (page.parent / target).resolve()
        # Pages of docs/generated are made when the documentation is built, which checks them.
        assert inside.exists() or inside.is_relative_to(ROOT / "docs" / "generated"), f"{page}: {target}"
    if page.name != "CHANGELOG.md":
        for name in re.findall(r"`((?:compress|passes|kernels|recipes|tests|examples)/[\w/.-]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists() or name == "passes/clip.py", f"{page}: {name}"


def test_the_readme_is_short_and_says_what_is_not_done() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert "**No kernel of a GPU has been timed, or run, on one yet.**" in text
