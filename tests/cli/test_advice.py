"""What the command line advises: in the words of the command that was typed, and true of each reader."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.checkpoint.reader import ADAPTER, ADAPTER_CONFIG
from compress.cli.app import build
from support import run, tiny_llama

Said = tuple[int, str, str]
Here = Callable[..., Said]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """`compress` in this process: status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> Said:
        filled = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["compress", *filled])
        with pytest.raises(SystemExit) as end:
            build(filled)(filled)
        return (int(end.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose linears have sizes that vLLM's kernel for zero points takes."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "num_hidden_layers": 1}
    return tiny_llama(tmp_path_factory.mktemp("wide") / "llama", **sizes)


@pytest.fixture(scope="module")
def foreign(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in a format that is not ours."""
    return run(demo_model, tmp_path_factory.mktemp("foreign") / "out", "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)").out


def test_repack_is_named_as_the_command_has_it(foreign: Path, here: Here) -> None:
    for command in (["bench", foreign], ["generate", foreign, "--prompt", "a", "--packed"]):
        status, _, err = here(*command)
        assert status == 3
        assert "make one with pack(format=native), or pack it while it loads: --repack" in err
    # A command that has no such flag does not name it.
    status, _, err = here("doctor", foreign)
    assert status == 3
    assert "pack(format=native)" in err
    assert "repack" not in err


@pytest.mark.parametrize(
    ("recipe", "held"),
    [
        ("quantize.rtn(scheme=nf4g32) | pack", "or pack(format=native), which holds it"),
        ("quantize.rtn(scheme=w8a16g32) | pack(format=awq)", "pack as gptq or compressed-tensors; or pack(format=gguf) or pack(format=mlx) or pack(format=native), which hold it"),
        ("quantize.rtn(scheme=w4a16g16-asym) | pack", "pack(format=awq) or pack(format=gptq) or pack(format=native), which hold it"),
        ("quantize.rtn(scheme=w4a16g32, targets=embeddings) | pack(format=gptq)", "or pack(format=mlx) or pack(format=native), which hold it"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_formats_that_hold_it(recipe: str, held: str, tiny: Path, tmp_path: Path, here: Here) -> None:
    status, _, err = here("run", tiny, tmp_path / "out", "-p", recipe)
    assert status == 5
    assert held in err
    assert not (tmp_path / "out").exists()


def test_zero_points_are_packed_for_the_reader_that_has_them(wide: Path, tmp_path: Path, here: Here) -> None:
    recipe = "quantize.rtn(scheme=w4a16g64-asym) | pack"
    unread = "5.23 and 5.24 with compressed-tensors 0.20 raise on packed zero points (size mismatch)"
    status, out, err = here("plan", wide, "-p", recipe)
    assert (status, err) == (0, "")
    assert f"reader:   transformers: no ({unread}; quantization_config=CompressedTensorsConfig(dequantize=True)" in out
    assert "reader:   vllm: yes (0.8.5 and later read packed zero points of 4 bits" in out
    assert "reader:   sglang: unknown (releases before June 2026 refuse zero points" in out
    status, out, _ = here("run", wide, tmp_path / "out", "-p", recipe)
    assert status == 0
    assert f"not read: 7 (by transformers: {unread}" in out
    assert "not read: 7" in here("show", tmp_path / "out")[1]
    # Where the reader expands at load, both have it.
    _, out, _ = here("plan", wide, "-p", f"{recipe}(dequantize=true)")
    assert "reader:   transformers: yes" in out
    assert "reader:   vllm: yes" in out
    assert "not read" not in out


@pytest.mark.usefixtures("warm")
def test_transformers_fails_and_loads_as_it_is_said(wide: Path, tmp_path: Path, here: Here) -> None:
    """What is said of packed zero points is true of the transformers that is here."""
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    run(wide, tmp_path / "out", "quantize.rtn(scheme=w4a16g64-asym) | pack")
    run(wide, tmp_path / "expanding", "quantize.rtn(scheme=w4a16g64-asym) | pack(dequantize=true)")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=wanted)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expanding")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    status, _, err = here("verify", tmp_path / "out", "--reader", "transformers")
    assert status == 5
    assert "it is known, by transformers: 5.23 and 5.24" in err


def test_zero_points_that_no_reader_has_are_refused(wide: Path, tmp_path: Path, here: Here) -> None:
    for scheme in ("w8a16g64-asym", "w3a16g64-asym", "w4a16g16-asym"):
        status, _, err = here("run", wide, tmp_path / "out", "-p", f"quantize.rtn(scheme={scheme}) | pack")
        assert status == 5
        assert f"no reader loads {scheme} here: transformers 5.23 and 5.24" in err
        assert "vLLM's kernels take those of 4 bits in groups of 32, 64, 128 or one per row" in err
        assert "pack with dequantize=true" in err


def test_sizes_that_vllm_may_not_take_are_said(tiny: Path, here: Here) -> None:
    _, out, _ = here("plan", tiny, "-p", "quantize.rtn(scheme=w4a16g32-asym) | pack")
    assert "reader:   vllm: unknown (its Marlin kernel takes zero points at multiples of 128 inputs and 64 outputs" in out


def test_presets_are_taken_and_said(wide: Path, tmp_path: Path, here: Here) -> None:
    status, out, err = here("plan", wide, "-p", "quantize.rtn(scheme=W4A16) | pack", "--details")
    assert (status, err) == (0, "note: W4A16 is w4a16g128 here\n")
    assert "quantize.rtn(scheme=w4a16g128)" in out
    assert here("plan", wide, "-p", "quantize.rtn(scheme=w8a16)")[2] == ""
    _, out, err = here("quantize", "rtn", wide, tmp_path / "out", "--scheme", "fp8")
    assert "note:" not in err
    _, out, err = here("plan", wide, "-p", "quantize.rtn(scheme=FP8)")
    assert "FP8 is fp8-tensor-afp8 here: activations get a scale per token as the model runs" in err
    _, out, err = here("quantize", "rtn", wide, tmp_path / "nv", "--scheme", "NVFP4")
    assert "NVFP4 is nvfp4 here: weights only" in err
    assert json.loads((tmp_path / "nv" / "manifest.json").read_text())["lineage"][0]["text"] == "quantize.rtn(scheme=nvfp4)"


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("int4", "a preset such as W4A16 (w4a16g128), W4A16_ASYM (w4a16g128-asym)"),
        ("w4a16g-128", "did you mean 'w4a16g128'?"),
        ("W4A16G64", "did you mean 'w4a16g64'?"),
    ],
)
def test_a_scheme_that_is_none_gets_a_suggestion(scheme: str, said: str, tiny: Path, tmp_path: Path, here: Here) -> None:
    for command in (["run", tiny, tmp_path / "out", "-p", f"quantize.rtn(scheme={scheme})"],
                    ["quantize", "rtn", tiny, tmp_path / "out", "--scheme", scheme]):  # fmt: skip
        status, _, err = here(*command)
        assert status == 2
        assert said in err


@pytest.mark.parametrize("model", ["runs/w4/out", "~nobody/out", "./out", "my.model"])
def test_a_path_that_is_not_there(model: str, tmp_path: Path, here: Here) -> None:
    status, _, err = here("run", model, tmp_path / "out", "rtn_w4")
    assert status == 3
    assert "no such directory" in err
    assert "cache" not in err


def test_passes_without_p(tiny: Path, tmp_path: Path, here: Here) -> None:
    for text in ("quantize.rtn(scheme=w4a16g32) | pack", "pack", "quantize.rtn(scheme=w8a16)"):
        for command in (["run", tiny, tmp_path / "out", text], ["plan", tiny, text]):
            status, _, err = here(*command)
            assert status == 2
            assert f"give them with -p: -p {shlex.quote(text)}" in err
            assert "five_stages" not in err


def test_the_command_that_takes_solved_steps_is_the_one_to_type(tiny: Path, tmp_path: Path, here: Here) -> None:
    two, out = "prune.magnitude(sparsity=0.5) | quantize.rtn(scheme=w4a16g32)", tmp_path / "out"
    assert here("run", tiny, out, "-p", f"{two} | pack")[0] == 0
    status, _, err = here("run", tiny, out, "-p", f"{two} | pack(format=gptq)", "--seed", "0")
    assert status == 3
    command = err.partition("this takes 2 of 3 steps from there: compress ")[2].strip()
    assert command.endswith(f"--seed 0 --steps {out}")
    status, said, _ = here(*shlex.split(command))
    assert status == 0
    assert f"steps:    2 of 3 steps taken from {out}.steps" in said
    assert (tmp_path / "out-gptq" / "quantize_config.json").is_file()
    # Of a pass by itself, too, whose own command has no such option.
    status, _, err = here("prune", "magnitude", tiny, out, "--sparsity", "0.5")
    command = err.partition("this takes 1 of 1 steps from there: compress ")[2].strip()
    status, said, _ = here(*shlex.split(command), "--no-keep", "--json")
    assert status == 0
    done = json.loads(said.splitlines()[-1])
    assert [one["step"] for one in done["taken"]] == ["prune.magnitude"]
    assert not (tmp_path / "out-other.steps").exists()


def test_steps_that_were_not_there_are_said(tiny: Path, foreign: Path, tmp_path: Path, here: Here) -> None:
    status, out, _ = here(
        "run", tiny, tmp_path / "out", "-p", "quantize.rtn(scheme=w8a16) | pack", "--steps", foreign, "--no-keep"
    )
    assert status == 0
    assert f"steps:    0 of 2 steps taken from {foreign}" in out
    assert "steps are kept" not in out
    assert not (tmp_path / "out.steps").exists()
    status, _, err = here("run", tiny, tmp_path / "two", "-p", "pack", "--steps", tmp_path / "nowhere")
    assert status == 2
    assert "the OUT of another run, or its OUT.steps" in err


def test_an_adapter_finds_its_base(tiny: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    import torch

    monkeypatch.chdir(tmp_path)
    recipe = "quantize.loftq(scheme=nf4g32, rank=4) | pack(format=peft)"
    status, out, _ = here("run", tiny, "out", "-p", recipe, "--threads", "2")
    assert status == 0
    assert "base: 1 (base_model_name_or_path is the directory it was made in; after moving or pushing it, write its path" in out
    assert json.loads(Path("out", ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "out")
    monkeypatch.chdir("/")
    ids = torch.arange(20)[None]
    logits = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / ADAPTER)(ids).logits
    # Into another directory: other bytes of that file, the same artifact.
    result = run(tiny, tmp_path / "other", recipe)
    assert result.manifest.fingerprint == json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprint"]
    # Moved, and told where to.
    (tmp_path / "out").rename(tmp_path / "moved")
    config = tmp_path / "moved" / ADAPTER_CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "moved")}))
    moved = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "moved" / ADAPTER)(ids).logits
    assert torch.equal(moved, logits)
    assert here("verify", tmp_path / "moved", "--reader", "peft")[0] == 0
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    status, _, err = here("verify", tmp_path / "moved")
    assert status == 3
    assert "adapter_config.json" in err
