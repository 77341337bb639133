"""The table of bad input: each case ends with its status and message, and has touched nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest

from bad_input import TABLE
from bad_input.bench import Bench, Case
from bad_input.data import file
from compress.contract.discover import load_pass, pass_files
from compress.errors import RecipeError
from compress.pipeline.memory_check import machine_bytes
from compress.pipeline.resolve import resolve
from compress.spec.recipe import parse_one_liner
from compress.spec.recipe_file import parse_yaml


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in TABLE.items() for name in cases])
def test_bad_input_is_refused_in_words_and_nothing_is_touched(kind: str, name: str, bench: Bench) -> None:
    case = TABLE[kind][name]
    found = bench.run(case, f"{kind}-{list(TABLE[kind]).index(name)}")
    assert not found.wrong(case), found.text


@pytest.mark.parametrize("kind", TABLE)
def test_every_class_has_cases(kind: str) -> None:
    assert len(TABLE[kind]) >= 5


def test_the_bench_sees_what_a_run_leaves(bench: Bench) -> None:
    """A sound run: status 0, and OUT is told as a change; so the table's cases would fail if one had run."""
    case = Case(0, ("where:", "next:"))
    found = bench.run(case, "sound")
    assert found.wrong(case)[0].startswith("changed: out")
    assert not [path for path in found.changed if not path.startswith("out")]


def test_one_huge_line_is_a_text(bench: Bench) -> None:
    argv = "calibrate {model} {out} --data {work}/data.txt --samples 4 --length 32"
    case = Case(0, ("where:",), argv, file("data.txt", "word " * 600_000), "demo")
    assert not [problem for problem in bench.run(case, "huge-line").wrong(case) if "changed: out" not in problem]


def test_memory_is_what_the_smallest_cgroup_has(tmp_path: Path) -> None:
    physical = machine_bytes(tmp_path)
    groups = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc/self").mkdir(parents=True)
    (groups / "a/b").mkdir(parents=True)
    (groups / "memory/job").mkdir(parents=True)
    listed = tmp_path / "proc/self/cgroup"
    listed.write_text("0::/a/b\n")
    (groups / "a/b/memory.max").write_text("max\n")
    assert machine_bytes(tmp_path) == physical
    (groups / "a/memory.max").write_text("5000\n")
    assert machine_bytes(tmp_path) == 5000, "a group is held by those around it"
    listed.write_text("9:name=systemd:/\n5:cpu,memory:/job/inner:x\n1:cpu:/a\n")
    (groups / "memory/job/memory.limit_in_bytes").write_text("7000\n")
    assert machine_bytes(tmp_path) == 7000, "version 1, and a group that only the host sees"
    (groups / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine_bytes(tmp_path) == 7000


def test_what_does_not_fit_runs_if_it_is_told_to(bench: Bench) -> None:
    case = Case(0, ("where:",), "quantize rtn {model} {out} --scheme w4a16g32 --allow-overcommit", there_bytes=1000)
    assert not [problem for problem in bench.run(case, "overcommit").wrong(case) if "changed: out" not in problem]


def test_the_plan_as_json_has_the_machine(bench: Bench) -> None:
    case = Case(0, (), "plan {model} -p 'quantize.rtn(scheme=w4a16g32)' --json", there_bytes=1000)
    facts = json.loads(bench.run(case, "plan-json").text)
    assert facts["machine_memory_bytes"] == 1000 < facts["peak_resident_bytes"]


def numbers(annotation: Any) -> set[type]:
    """The kinds of number that a field's type holds."""
    inner = set().union(*map(numbers, (arg for arg in get_args(annotation) if arg is not NoneType)))
    return inner | ({annotation} if annotation in (int, float) else set())


def fields() -> Iterator[tuple[str, str]]:
    """Every numeric option of every pass; sparsity and scheme are texts, with tests of their own."""
    for name in pass_files():
        for key, field in load_pass(name).model_fields.items():
            if numbers(field.annotation):
                yield name, key


@pytest.mark.parametrize(("name", "key"), list(fields()))
@pytest.mark.parametrize("value", ["nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "much", "''", "[nan]", "[0.5, inf]"])
def test_every_number_of_every_pass_is_a_finite_number(name: str, key: str, value: str) -> None:
    """As a one-liner and as YAML; what else is wrong with the line is told as well."""
    for recipe in (
        parse_one_liner(f"{name}({key}={value})"),
        parse_yaml(f"version: 1\npasses:\n- {name}: {{{key}: {value}}}\n"),
        parse_yaml(f"version: 1\npasses:\n- {name}: {{{key}: {value.replace('nan', '.nan').replace('inf', '.inf')}}}\n"),
    ):
        with pytest.raises(RecipeError) as caught:
            resolve(recipe)
        told = [problem for problem in caught.value.problems if f"{name}.{key}" in problem.where]
        assert told, str(caught.value)
        assert any(word in p.expected for p in told for word in ("number", "integer", "tuple")), str(caught.value)


def test_there_are_numbers_to_test() -> None:
    assert {("quantize.gptq", "damping"), ("distill.logits", "lr"), ("distill.logits", "betas"), ("calibrate", "samples")} <= set(
        fields()
    )
