"""report: one page for itself, with every section, escaped, and quality against bytes for several; in a browser where there is one."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import compress
from chromium import BINARY, browser
from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build
from compress.context import Context
from compress.evaluate.keep_quality import keep, records_of
from compress.evaluate.perplexity_kl import compare
from compress.layerwise.eval_windows import token_windows
from compress.report.charts import front
from compress.report.facts import read_facts
from compress.report.page import report, report_path, write_report
from hostile_facts import HOSTILE, hostile
from support import TEXT

SECTIONS = ("size", "quality", "kl", "layers", "sensitivity", "training", "cost", "notes", "readers", "recipe")
MQ = "calibrate(data='{text}', samples=8, length=64) | quantize.llm_mq(bits=3.5, ragged=divide) | pack(format=native)"
Said = tuple[int, str, str]


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.figures: dict[str, Any] = {}
        self.words = ""
        self._inside: dict[str, str | None] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self._inside = given if tag in ("script", "style") else {}

    def handle_endtag(self, tag: str) -> None:
        self._inside = {}

    def handle_data(self, data: str) -> None:
        if self._inside.get("type") == "application/json":
            self.figures[self._inside["id"] or ""] = json.loads(data)
        elif not self._inside:
            self.words += data


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """A command in this process, which has its imports behind it: status, stdout, stderr."""

    def call(*arguments: object) -> Said:
        filled = list(map(str, arguments))
        with pytest.raises(SystemExit) as end:
            build(filled)(filled)
        return (int(end.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def made(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three artifacts of the embedded model, two of them measured; do not write into them."""
    folder, text = tmp_path_factory.mktemp("report"), TEXT / "calibration.jsonl"
    recipes = {
        "w4": "quantize.rtn(scheme=w4a16g32) | pack",
        "mixed": MQ.format(text=text),
        "tuned": f"quantize.rtn(scheme=w3a16g32) | distill.logits(data='{text}', samples=4, length=32, batch=2) | pack",
    }
    source, windows = open_checkpoint(demo_model), token_windows(demo_model, TEXT / "evaluation.jsonl", 64, 512)
    for name, recipe in recipes.items():
        compress.run(recipe, demo_model, folder / name, Context(threads=2))
        if name != "tuned":
            artifact = open_checkpoint(folder / name)
            quality = compare(source, artifact, windows)
            assert keep([artifact], records_of([artifact], [quality], source, str(TEXT / "evaluation.jsonl"), "cpu"), [])[0]
    return {name: folder / name for name in recipes}


@pytest.fixture(scope="module")
def page(made: dict[str, Path]) -> Page:
    return Page(report([read_facts(made["mixed"])]))


def test_a_page_is_one_file_with_all_that_it_needs(made: dict[str, Path], tmp_path: Path) -> None:
    text = write_report([made["mixed"]], tmp_path / "page.html").read_text()
    assert len(text) < 5_000_000
    page = Page(text)
    assert page.addresses == ["data:,"], "nothing else is fetched"
    assert [one for one in page.ids if one.startswith("1-") and not one[-1].isdigit()] == [f"1-{name}" for name in SECTIONS]
    packed = re.search(r'id="library">([^<]+)</script>', text)
    assert packed is not None
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(packed[1]))[:200]
    outside = text.replace(packed[0], "")
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", re.sub(r"\\u003c|<!--.*?-->", "", outside))
    assert str(made["mixed"].parent) not in text, "no place of this machine"


def test_every_chart_shows_the_numbers_of_the_artifact(made: dict[str, Path], page: Page) -> None:
    facts = read_facts(made["mixed"])
    (fall,) = page.figures["1-size-1"]["data"]
    assert fall["x"] == ["source", "2. quantize.llm_mq", "3. pack", "artifact"]
    assert fall["text"][-1].endswith(" kB")
    assert sum(fall["y"]) * 1e6 == pytest.approx(facts.nbytes)
    (field,) = page.figures["1-layers-1"]["data"]
    known = {round(layer.bits, 4) for layer in facts.layers}
    assert {round(value, 4) for row in field["z"] for value in row} == known
    assert "model.layers.0.mlp.down_proj.weight" in field["text"][field["y"].index("mlp.down_proj")][0]
    (cloud,) = page.figures["1-sensitivity-1"]["data"]
    assert len(cloud["x"]) == len(facts.layers)
    assert min(cloud["y"]) > 0
    (bars,) = page.figures["1-kl-1"]["data"]
    assert sum(bars["y"]) == facts.quality[0].scored == 504
    times, peaks = page.figures["1-cost-1"]["data"], page.figures["1-cost-2"]["data"]
    spent = sum(value for bar in times for value in bar["x"])
    assert spent == pytest.approx(sum(stage.seconds or 0 for stage in facts.stages), abs=0.1)
    assert len(peaks[0]["x"]) == 3
    for words in ("KL to the source", "compress run ./model OUT -p", "Fewer", "0.99 of the tokens"):
        assert (words in page.words) == (words != "Fewer"), words


def test_what_is_not_known_is_said(made: dict[str, Path], tmp_path: Path) -> None:
    words = Page(report([read_facts(made["tuned"])])).words
    assert words.count("not measured: compress eval tuned --against SOURCE --data TEXTS.jsonl --stages") == 2
    assert "no step that is kept has decided bits by sensitivity" in words
    assert "no step that is kept has trained" not in words
    curves = Page(report([read_facts(made["tuned"])])).figures["1-training-1"]["data"]
    assert [len(curve["x"]) for curve in curves] == [2]
    # Without its steps an artifact has no curves, and all else.
    bare = shutil.copytree(made["tuned"], tmp_path / "tuned")
    page = Page(report([read_facts(bare)]))
    assert "1-training-1" not in page.figures
    assert "no step that is kept has trained" in page.words
    (fall,) = page.figures["1-size-1"]["data"]
    assert len(fall["x"]) == 5


def test_several_stand_side_by_side(made: dict[str, Path]) -> None:
    page = Page(report([read_facts(path) for path in made.values()]))
    line, points = page.figures["all-compare-1"]["data"]
    assert points["text"] == ["w4", "mixed"]
    assert len(line["x"]) in (1, 2)
    assert "Not measured on that text: tuned." in page.words
    assert [one for one in page.ids if one.endswith("-size")] == ["1-size", "2-size", "3-size"]
    assert front([(3, 1.0), (1, 2.0), (2, 3.0), (3, 0.5), (4, 0.5)]) == [1, 3]
    assert front([]) == []


def test_hostile_texts_make_no_tags(made: dict[str, Path]) -> None:
    facts = hostile(read_facts(made["mixed"]))
    training = {HOSTILE: [{"step": 1, HOSTILE: 2.0, "loss": 1.0}]}
    row = {"weight": HOSTILE, "state": HOSTILE, "bytes": 4, "numel": 8, "costs": {HOSTILE: 1.0, "codes(w2a16)": 2.0}}
    facts = replace(facts, training=training, allocations={HOSTILE: [row]})
    text = report([facts, facts])
    page = Page(text)
    assert {"a", "iframe", "img"}.isdisjoint(page.tags)
    assert page.tags.count("script") == len(page.figures) + 2
    assert "<script>alert" not in text
    assert HOSTILE.splitlines()[0] in page.words

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for one in value.values() for text in texts(one)]
        return (
            [text for one in value for text in texts(one)]
            if isinstance(value, list)
            else [value]
            if isinstance(value, str)
            else []
        )

    # plotly makes tags of what looks like them.
    said = [text for figure in page.figures.values() for text in texts(figure)]
    assert any("&lt;script&gt;" in text for text in said)
    assert not [text for text in said if "<" in text.replace("<br>", "").replace("<extra>", "").replace("</extra>", "")]


def test_as_a_user_types_it(
    made: dict[str, Path], tmp_path: Path, here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = here("report", made["w4"])
    assert (status, err) == (0, "")
    assert out.startswith(f"wrote:    {report_path(made['w4'])}, ")
    monkeypatch.chdir(tmp_path)
    status, out, _ = here("report", *made.values())
    assert (status, out.startswith("wrote:    compare.report.html, ")) == (0, True)
    assert (tmp_path / "compare.report.html").is_file()
    status, _, err = here("report", TEXT.parent / "model")
    assert status == 3
    assert "expected: a checkpoint that compress made (manifest.json)" in err
    status, _, err = here("report", made["w4"], "--to", tmp_path / "none" / "there" / "page.html")
    assert status == 6
    assert "a place to write" in err
    status, out, _ = here("card", made["w4"])
    assert status == 0
    assert "# model, w4a16g32 by compress" in out
    status, _, err = here("card", TEXT.parent / "model")
    assert status == 3
    status, out, _ = here("card", shutil.copytree(made["w4"], tmp_path / "w4"), "--write", "--as", "me/w4")
    assert (status, out) == (0, f"wrote:    {tmp_path / 'w4' / 'bits.svg'}\nwrote:    {tmp_path / 'w4' / 'README.md'}\n")
    assert 'from_pretrained("me/w4")' in (tmp_path / "w4" / "README.md").read_text()


def test_run_writes_one_and_says_where(demo_model: Path, tmp_path: Path, here: Callable[..., Said]) -> None:
    run = ("run", demo_model, tmp_path / "out", "-p", "quantize.rtn(scheme=w4a16g32) | pack")
    status, out, err = here(*run)
    assert status == 0, err
    place = tmp_path / "out.report.html"
    assert f"report:   {place}\n" in out
    assert place.stat().st_size > 1_000_000
    place.unlink()
    assert here(*run, "--no-report")[0] == 0
    assert not place.exists()
    status, out, _ = here("quantize", "rtn", demo_model, tmp_path / "other", "--scheme", "w4a16g32", "--no-report")
    assert (status, "report:" in out) == (0, False)
    assert (tmp_path / "other" / "README.md").is_file()
    place.mkdir()
    shutil.rmtree(tmp_path / "out")
    status, _, err = here(*run)
    assert status == 0
    assert f"note: no report: {place}: " in err


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="no chromium")
def test_a_browser_draws_every_chart_and_says_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    one = write_report([made["mixed"]], tmp_path / "one.html")
    several = write_report([*made.values()], tmp_path / "several.html")
    evil = tmp_path / "evil.html"
    evil.write_text(report([hostile(read_facts(made["mixed"]))]))
    charts = len(Page(one.read_text()).figures)
    with browser() as tab:
        for width in (390, 1280):
            for dark in (False, True):
                tab.show(one, width, dark)
                assert tab.problems() == []
                assert tab.ask("document.querySelectorAll('.chart[data-drawn] .main-svg').length") >= charts
                assert tab.ask("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
                ink = tab.ask("getComputedStyle(document.querySelector('.chart .xtick text')).fill")
                assert ink == ("rgb(228, 228, 228)" if dark else "rgb(34, 34, 34)")
        tab.show(several, 390, False)
        assert tab.ask("document.querySelectorAll('.chart[data-drawn]').length") == 1, "what is folded away is not drawn"
        tab.ask("document.querySelector('details.part').open = true")
        until = time.monotonic() + 60
        while tab.ask("document.querySelectorAll('.chart[data-drawn]').length") == 1:
            assert time.monotonic() < until, "what is opened is drawn"
            time.sleep(0.2)
        tab.show(evil, 390, False)
        assert tab.problems() == []
        assert tab.ask("document.querySelectorAll('.chart a').length") == 0
