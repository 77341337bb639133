"""Recipe: one grammar in two notations, both printing back; every problem at once, with its place."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.cli.recipes import opened
from compress.errors import CompressError, RecipeError
from compress.pipeline.resolve import resolve
from compress.spec.recipe import Line, Recipe, override, parse_one_liner, parse_value, print_value
from compress.spec.recipe_file import parse_yaml

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
)
values = scalars | st.lists(scalars, max_size=3).map(tuple)
names = st.from_regex(r"[a-z][a-z0-9_]{0,5}(\.[a-z][a-z0-9_]{0,5})?", fullmatch=True)
lines = st.builds(Line, names, st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), values, max_size=3))
recipes = st.builds(Recipe, st.lists(lines, min_size=1, max_size=3).map(tuple))


@settings(max_examples=300, deadline=None)
@given(recipes)
def test_both_notations_print_back(recipe: Recipe) -> None:
    assert parse_one_liner(recipe.one_liner()) == recipe
    assert parse_yaml(recipe.to_yaml()) == recipe


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_an_error_of_ours(text: str) -> None:
    for parse in (parse_one_liner, parse_yaml):
        with contextlib.suppress(RecipeError):
            parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("1e-4", 1e-4),
        ("0.5", 0.5),
        ("'0.5'", "0.5"),
        ("yes", "yes"),
        ("true", True),
        ("017", 17),
        ("[a, 2]", ("a", 2)),
        ("~", None),
    ],
)
def test_values_are_typed_as_in_yaml_1_2(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert parse_yaml(f"version: 1\npasses:\n- x: {{a: {text}}}").lines[0].options["a"] == value


def test_absurd_numbers_are_errors_of_ours() -> None:
    for text in (
        "quantize.rtn(scheme=" + "9" * 5000 + ")",
        "quantize.rtn(scheme=w4a16g" + "9" * 30 + ")",
        "quantize.rtn(scheme=w٤a16)",
    ):
        with pytest.raises(RecipeError):
            resolve(parse_one_liner(text))
    with pytest.raises(RecipeError):
        override(parse_one_liner("pack"), ["².format=x"])


def test_numbers_print_as_numbers() -> None:
    assert print_value(1e-05) == "1e-05"
    assert parse_value(print_value(1e-05)) == 1e-05


SLIPS = {
    "options beside their pass": ("- quantize.rtn:\n  scheme: w4a16g64\n  clip: mse\n", 4, "'scheme, clip' in the column of quantize.rtn", "- quantize.rtn:\n    scheme: w4a16g64\n    clip: mse"),
    "an option in no column": ("- quantize.rtn:\n    scheme: w4a16g64\n   clip: mse\n", 5, "'clip: mse' behind 3 spaces", "    scheme: w4a16g64\n    clip: mse"),
    "an option too deep": ("- quantize.rtn:\n    scheme: w4a16g64\n     clip: mse\n", 5, "'clip: mse' behind 5 spaces", "    scheme: w4a16g64\n    clip: mse"),
    "an option that is not indented": ("- quantize.rtn:\nscheme: w4a16g64\n", 4, "'scheme: w4a16g64' behind no spaces", "- quantize.rtn:\n    scheme: w4a16g64"),
    "a pass in no column": ("  - quantize.rtn: {scheme: w4a16g64}\n - prune.magnitude: {sparsity: 0.5}\n", 4, "'- prune.magnitude: {sparsity: 0.5}' behind 1 space", "  - quantize.rtn: {scheme: w4a16g64}\n  - prune.magnitude: {sparsity: 0.5}"),
    "a pass under a pass": ("- quantize.rtn: {scheme: w4a16g64}\n  - prune.magnitude: {sparsity: 0.5}\n", 4, "behind 2 spaces", "- quantize.rtn: {scheme: w4a16g64}\n- prune.magnitude: {sparsity: 0.5}"),
    "a tab": ("- quantize.rtn:\n\tscheme: w4a16g64\n", 4, "'scheme: w4a16g64' behind a tab", "- quantize.rtn:\n    scheme: w4a16g64"),
    "an option in the line of its pass": ("- quantize.rtn: scheme: w4a16g64\n", 3, "'- quantize.rtn: scheme: w4a16g64'", "- quantize.rtn: {scheme: w4a16g64}"),
    "no dashes": ("  quantize.rtn: {scheme: w4a16g64}\n", 3, "a mapping", "passes:\n- quantize.rtn: {scheme: w4a16g64}"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_of_indentation_is_told_with_the_lines_as_they_should_be(slip: str, tmp_path: Path) -> None:
    """And what is wrong in the lines after it is told at once, options included."""
    text, line, got, lines = SLIPS[slip]
    path = tmp_path / "r.yaml"
    last = (
        "  pack: {formt: native}\n"
        if slip == "no dashes"
        else f"{' ' * 2 if text.startswith('  ') else ''}- pack: {{formt: native}}\n"
    )
    path.write_text(f"version: 1\npasses:\n{text}{last}")
    with pytest.raises(RecipeError) as caught:
        opened(str(path))
    first, *others = caught.value.problems
    assert first.where.startswith(f"r.yaml:{line}:")
    assert got in first.got
    assert "\n".join(row.removeprefix(" " * 12) for row in first.do.splitlines()[1:]).startswith(lines)
    assert ["formt" in problem.where and "did you mean 'format'" in problem.got for problem in others] == [True]
    # The lines that it shows are what it asks for.
    if slip != "no dashes":
        mended = parse_yaml("version: 1\npasses:\n" + ("- quantize.rtn:\n" if lines.startswith("    ") else "") + lines + "\n")
        assert mended.lines[0].options["scheme"] == "w4a16g64"


def test_a_file_that_cannot_be_mended_is_told_with_its_line_and_a_recipe() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml("version: 1\npasses:\n- quantize.rtn: {scheme: w4a16g64\n- pack: {}\n", "r.yaml")
    (problem,) = caught.value.problems
    assert problem.where == "r.yaml:4:7"
    assert problem.got.endswith("in '- pack: {}'")
    assert "- quantize.rtn: {scheme: w4a16g64}" in problem.do
    long = "version: 1\npasses:\n- a:\n    b: 1\n   c: 2\n" + "# a long file is not mended\n" * 2000
    with pytest.raises(RecipeError, match="valid YAML"):
        parse_yaml(long)


def test_every_problem_of_every_line_is_told_with_its_place() -> None:
    text = "version: 1\npasses:\n- quantize.rtn: {scheme: w7a16}\n- quantize.rtm: {}\n- pack: {formt: x}\n"
    with pytest.raises(RecipeError) as caught:
        resolve(parse_yaml(text, "r.yaml"))
    said = str(caught.value)
    assert len(caught.value.problems) == 3
    for part in ("r.yaml:3:3", "r.yaml:4:3", "r.yaml:5:3", "did you mean 'quantize.rtn'", "did you mean 'format'", "3, 4, 5, 6"):
        assert part in said


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("version: 2\npasses: [pack]", "r:1:1", "version: 1"),
        ("passes: [pack]", "r", "no version"),
        ("version: 1", "r", "a list"),
        ("version: 1\npasses: []", "r:2:9", "a list"),
        ("version: 1\npasses: [pack]\nmodle: x", "r:3:1", "did you mean 'model'"),
        ("version: 1\npasses: [{a: 1, b: 2}]", "r:2", "one pass"),
        ("version: 1\npasses: [{a: {b: {c: 1}}}]", "r:2", "flat list"),
        ("version: 1\nseed: -1\npasses: [pack]", "r:2:7", ">= 0"),
        ("a: &x 1\nb: *x", "r:1:4", "anchor"),
        ("a: !!python/name:os.system x", "r:1:4", "tag"),
        ("[" * 50, "r:1", "nesting"),
        ("a: [", "r:1", "YAML"),
        ("x" * (1 << 21), "r", "at most"),
        ("version: 1\nversion: 1\npasses: [pack]", "r:2:1", "each key once"),
    ],
)
def test_bad_yaml_names_its_place(text: str, place: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r")
    assert caught.value.problems[0].where.startswith(place)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("a(", 3, "option"), ("a(b)", 4, "'='"), ("a(b=)", 5, "a value"), ("a | ", 5, "name of a pass"), ("a(b=1) c", 8, "'|'"),
        ("a(b=1, b=2)", 8, "once"), ('a(b="x)', 5, "closing"), ("a(b=[1,2)", 9, "']'"), ("A", 1, "name of a pass"), ("", 1, "name of a pass"),
    ],
)  # fmt: skip
def test_bad_one_liners_name_their_column(text: str, column: int, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_one_liner(text)
    assert caught.value.problems[0].where == f"-p:1:{column}"
    assert said in str(caught.value)


def test_set_changes_one_line_by_name_or_position() -> None:
    recipe = parse_one_liner("quantize.rtn(scheme=w4a16) | quantize.rtn(scheme=w8a16) | pack")
    assert override(recipe, ["pack.format=gptq"]).lines[2].options == {"format": "gptq"}
    assert override(recipe, ["2.scheme=w3a16"]).lines[1].options == {"scheme": "w3a16"}
    for bad in ("quantize.rtn.scheme=x", "4.scheme=x", "pak.format=x", "nonsense", "pack.format"):
        with pytest.raises(CompressError, match="expected"):
            override(recipe, [bad])
