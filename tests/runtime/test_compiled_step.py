"""A step of one token in compiled code: the same tokens, compiled once, with weights that are the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import compress
from compress.errors import InputError, MachineError
from compress.evaluate.decoder import Decoder
from compress.kernels.native.modules import PackedLinear, PackedWeight
from compress.runtime import compiled_step
from compress.runtime.compiled_step import CHECKED, Numbered, compile_steps, copy_to_compile
from families import build as build_family
from support import run

NEW = 10


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made, and run by torch as they are, so that no C++ is compiled."""
    monkeypatch.setattr(compiled_step, "BACKEND", "eager")


def packed(
    name: str, tmp_path: Path, dtype: str = "float32", recipe: str = "quantize.rtn(scheme=w4a16g32, ragged=channel)"
) -> Any:
    run(build_family(name, tmp_path), tmp_path / "out", f"{recipe} | pack(format=native)")
    return compress.load(tmp_path / "out", dtype)


@torch.no_grad()
def tokens(decoder: Decoder) -> list[list[int]]:
    decoder.prompt()
    found = [decoder.token.flatten().tolist()]
    for _ in range(NEW):
        decoder.advance()
        found.append(decoder.token.flatten().tolist())
    return found


def decoders(model: Any) -> tuple[Decoder, Decoder]:
    """One of two prompts that is eager, and one that is compiled."""
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    eager, compiled = (Decoder(model, ids, NEW, static) for static in (False, True))
    counters.clear()
    with torch.no_grad():
        compiled.compile()
    return eager, compiled


@pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("gpt2", 1), ("gemma3", 2)])
def test_tokens_are_the_models_and_no_length_is_compiled_for_itself(name: str, graphs: int, traced: None, tmp_path: Path) -> None:
    """Windows that slide count tokens by a number, which torch takes for one that changes when it sees the second."""
    eager, compiled = decoders(packed(name, tmp_path))
    assert compiled.how == "compiled"
    assert compiled.compile_seconds is not None
    assert compiled.compile_seconds > 0
    for _ in range(2):
        assert tokens(compiled) == tokens(eager)
    assert counters["stats"]["unique_graphs"] == graphs


def test_inputs_that_are_rounded_and_heads_in_codes_are_in_it(traced: None, tmp_path: Path) -> None:
    recipe = "quantize.rtn(scheme=w8a8) | quantize.rtn(scheme=w8a16g32, targets=[embeddings], skip_defaults=false)"
    eager, compiled = decoders(packed("tied", tmp_path, recipe=recipe))
    assert compiled.how == "compiled"
    assert tokens(compiled) == tokens(eager)


def test_the_copy_has_the_models_weights_and_the_model_stays(tmp_path: Path) -> None:
    model = packed("llama", tmp_path)
    had = [*model.modules()]
    found = copy_to_compile(model)
    assert [*model.modules()] == had
    assert not any(isinstance(one, Numbered) for one in had)
    kinds = [type(one) for one in found.modules()]
    # Of a block, four projections, a gated product and two norms; and a norm at the end.
    assert kinds.count(Numbered) == 2 * (4 + 1 + 2) + 1
    held = {id(one) for one in (*model.parameters(), *model.buffers())}
    assert held >= {id(one) for one in (*found.parameters(), *found.buffers())}
    numbers = [one.number for one in found.modules() if isinstance(one, Numbered)]
    assert numbers == [one.number for one in copy_to_compile(model).modules() if isinstance(one, Numbered)]
    assert PackedWeight not in kinds
    assert not any(issubclass(kind, PackedLinear) for kind in kinds)


def test_other_tokens_and_code_that_cannot_be_made_are_told(
    traced: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed("llama", tmp_path)
    right = compiled_step._run
    wrong = torch.library.Library("compress", "IMPL")
    wrong.impl("numbered", lambda x, *which: -right(x, *which), "CPU")
    try:
        eager, compiled = decoders(model)
    finally:
        wrong._destroy()
    assert compiled.how == "eager, for compiling gave: other tokens"
    assert tokens(compiled) == tokens(eager)

    def broken(graph: Any, inputs: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(compiled_step, "BACKEND", broken)
    eager, compiled = decoders(model)
    assert compiled.how == "eager, for compiling gave: RuntimeError: no compiler"
    assert tokens(compiled) == tokens(eager)


def test_models_of_one_class_have_code_of_their_own(traced: None, tmp_path: Path) -> None:
    """torch keeps compiled code by the code that it was made of, which is the same for both."""
    (tmp_path / "other").mkdir()
    first = decoders(packed("llama", tmp_path))
    second = decoders(packed("llama", tmp_path / "other", recipe="quantize.rtn(scheme=w2a16g32)"))
    for eager, compiled in (first, second, first):
        assert compiled.how == "compiled"
        assert tokens(compiled) == tokens(eager)
    assert tokens(first[0]) != tokens(second[0])


def test_generate_runs_it_with_a_static_cache_only(traced: None, tmp_path: Path) -> None:
    model = packed("llama", tmp_path)
    ids = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    meant = model.generate(ids, **options)
    step = compile_steps(model)
    assert torch.equal(model.generate(ids, **options), meant)
    assert not step.seconds
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), meant)
    assert step.seconds > 0


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a decoder"):
        compile_steps(packed("t5", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_code_says_the_same(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = packed(name, tmp_path, dtype)
    eager, compiled = decoders(model)
    assert compiled.how == "compiled"
    assert tokens(compiled)[: 1 + CHECKED] == tokens(eager)[: 1 + CHECKED]


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    torch.compiler.reset()
    model = packed("llama", tmp_path)
    compile_steps(model)
    with pytest.raises(MachineError, match="No working C\\+\\+ compiler") as caught:
        model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert "leave out --compile" in caught.value.problems[0].do
