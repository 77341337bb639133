"""`compress demo`: its table, its picture and its margins, and what it says when one is not there."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from compress.cli import demo
from compress.context import Context
from compress.evaluate.perplexity_kl import Estimate, Quality
from compress.evaluate.stages import Measured
from compress.pipeline.output_paths import clean
from compress.spec.recipe import Recipe, override

ROWS = ["source", "pruned", "quantized", "distilled", "packed", "rtn instead of gptq"]


def table(said: str) -> dict[str, list[str]]:
    """Cells of each row, by its name."""
    lines = said.splitlines()
    assert " ".join(lines[0].split()) == "stage tensor bytes bits/weight perplexity KL to source same top-1 seconds"
    found = zip(ROWS, lines[2:8], strict=True)
    return {name: line.removeprefix(name).replace(" +- ", "+-").split() for name, line in found if line.startswith(name + " ")}


def kl(row: list[str]) -> float:
    return float(row[3].partition("+-")[0])


def check(said: str, out: Path) -> None:
    """What holds of every demo that ends with status 0."""
    rows = table(said)
    assert list(rows) == ROWS
    assert rows["source"] == ["1,837,312", "16.000", "11.41", "-", "-", "-"]
    assert rows["pruned"][:2] == ["1,837,312", "16.000"]
    assert rows["quantized"][:2] == rows["distilled"][:2] == rows["rtn instead of gptq"][:2] == ["608,512", "3.500"]
    assert rows["packed"][1:-1] == ["3.505", *rows["distilled"][2:-1]]
    assert kl(rows["quantized"]) < kl(rows["rtn instead of gptq"])
    assert kl(rows["distilled"]) < kl(rows["quantized"])
    for word in ("margins:  GPTQ: KL 0.", "rounding to nearest (x0.", "distillation: 0.", "first 15,616 tokens", "28 weights"):
        assert word in said
    assert f"where:    {out}\npicture:  {out}.svg\nreader:   " in said
    nodes = ET.parse(f"{out}.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    texts = {"".join(node.itertext()).strip() for node in nodes}
    assert {*ROWS, "five_stages on the embedded model"} <= texts


@pytest.mark.slow
def test_the_demo_as_a_user_types_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "compress", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    check(done.stdout, tmp_path / "compress-demo")
    assert kl(table(done.stdout)["distilled"]) < 0.7 * kl(table(done.stdout)["quantized"])
    again = subprocess.run([*command, "--quiet"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    whole = demo.recipe_of

    def less(home: Path) -> Recipe:
        """Less to train on."""
        return override(whole(home), ["distill.logits.samples=16", "distill.logits.epochs=1"])

    monkeypatch.setattr(demo, "recipe_of", less)
    out = tmp_path / "out"
    demo.command(out, debug=True)
    said = capfd.readouterr()
    assert "distill.logits: step 4 of 5" in said.err
    check(said.out, out)
    steps = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "out.steps").iterdir() if path.is_dir())
    assert steps == ["1-calibrate", "2-prune.wanda", "3-quantize.gptq", "4-distill.logits"]

    # Stages that are gone cannot be measured again.
    clean(out, Context())
    with pytest.raises(SystemExit) as ended:
        demo.command(out)
    assert ended.value.code == 3
    assert f"remove {out} and run again" in capfd.readouterr().err


def test_the_demo_runs_the_installed_recipe(demo_model: Path) -> None:
    """All of it, on the embedded texts; it is never trained or calibrated on what it is measured on."""
    from compress.cli.complete import installed
    from compress.spec.recipe_file import read

    found, recipe = demo.recipe_of(demo_model.parent), read(installed()["five_stages"])
    assert [line.name for line in found.lines] == ["calibrate", "prune.wanda", "quantize.gptq", "distill.logits", "pack"]
    for line, written in zip(found.lines, recipe.lines, strict=True):
        text = {"data": str(demo_model.parent / "text" / "calibration.jsonl")} if "data" in written.options else {}
        assert line.options == written.options | text
    (nearest,) = demo.rounding(found).lines
    assert nearest.options == {"scheme": "w3a16g32", "ragged": "divide"}


def stages(gptq: float, nearest: float, distilled: float) -> list[Measured]:
    """Stages as they would be measured with these KLs."""
    quality = Quality(512, 256, 510, "all scored", Estimate(12.5, 0.1), Estimate(11.5, 0.1), top1=Estimate(0.75, 0.01))
    kls = {"prune.wanda": 0.5, "quantize.gptq": gptq, "distill.logits": distilled, "pack": distilled, "quantize.rtn": nearest}
    found = [(name, replace(quality, kl=Estimate(value, 0.01))) for name, value in kls.items()]
    made = [Measured(name, 1000, 4.5, quality.perplexity, each, 1.25) for name, each in found]
    return [Measured("source", 2000, 16.0, quality.source_perplexity), *made]


def test_margins_are_told_in_words() -> None:
    found = demo.margins(stages(0.6, 0.8, 0.45))
    assert found == "GPTQ: KL 0.600 instead of 0.800 by rounding to nearest (x0.75); distillation: 0.600 -> 0.450 (-25%)"
    assert not demo.missing(stages(0.6, 0.8, 0.45))


def test_rows() -> None:
    source, pruned, *_ = map(demo.row, stages(0.6, 0.8, 0.45))
    assert source == ("source", "2,000", "16.000", "11.50", "-", "-", "-")
    assert pruned == ("pruned", "1,000", "4.500", "12.50", "0.5000 +- 0.0100", "75.0%", "1.2")


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize(
    ("kls", "said"),
    [
        ((0.8, 0.8, 0.5), ["GPTQ"]),
        ((0.6, 0.8, 0.6), ["distillation"]),
        ((0.9, 0.8, 1.0), ["GPTQ", "distillation"]),
        ((0.6, 0.8, math.nan), ["distillation"]),
    ],
)
def test_a_margin_that_is_missing_is_said_and_has_a_status(
    kls: tuple[float, float, float], said: list[str], quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Result:
        out = tmp_path / "out"

        class manifest:  # noqa: N801
            weights = {"w": None}

    monkeypatch.setattr(demo, "measured", lambda home, out, quiet: (Result, stages(*kls)))
    monkeypatch.setattr(demo, "reader", lambda home, out: "not asked")
    with pytest.raises(SystemExit) as ended:
        demo.command(tmp_path / "out", quiet=quiet)
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert [name for name in ("GPTQ", "distillation") if f"margin of {name}" in printed.err] == said
    assert "margins:" not in printed.out
    assert bool(printed.out) is not quiet
