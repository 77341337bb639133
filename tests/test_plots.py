"""Pictures: the same bytes from the same numbers, and every name and number in them."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from compress.plots import Stage, domains, losses, stages

ROWS = [{"step": i, "loss": 2 / i, "lr": 1e-4 / i, "tokens": 2048.0 * i} for i in range(1, 60)]
STAGES = [
    Stage("source", 16_060_000_000, 16.0, 6.24, None, None),
    Stage("prune.wanda <2:4> & $more$", 16_060_000_000, 16.0, 9.71, 0.4213, 0.013),
    Stage("rtn w4a16g128", 5_730_000_000, 4.25, 7.7, 0.0009, 0.0021),
    Stage("pack", 5_210_000, 4.25, math.nan, 0.0, None),
    Stage("one window", 5_210_000, 4.25, 7.7, 0.25, math.nan),
]


def texts(path: Path) -> list[str]:
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_losses_show_steps_tokens_and_rates(tmp_path: Path) -> None:
    path = tmp_path / "losses.svg"
    losses(path, ROWS, "A title")
    assert {"A title", "loss, nats per token", "learning rate", "smoothed", "step (120,832 tokens in all)"} <= set(texts(path))


def updates(count: int, names: int = 2) -> list[dict[str, object]]:
    """Rows of `count` updates, the loss of the first domain missing in the last."""
    found = []
    for i in range(count):
        told = {f"d{n} & <$>": {"weight": 1 / names, "loss": 2.0 + n / (1 + i), "reference": 2.1} for n in range(names)}
        if i == count - 1:
            told["d0 & <$>"]["loss"] = None
        found.append({"step": 50 * (i + 1), "domains": told})
    return found


@pytest.mark.parametrize(("count", "names"), [(20, 2), (1, 2), (3, 11)])
def test_domains_show_every_name(count: int, names: int, tmp_path: Path) -> None:
    domains(tmp_path / "a.svg", updates(count, names), "A title")
    wanted = {"A title", "share of the samples from here on", "loss above the reference, nats per token", "step"}
    assert wanted | {f"d{n} & <$>" for n in range(names)} <= set(texts(tmp_path / "a.svg"))
    domains(tmp_path / "b.svg", updates(count, names), "A title")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_stages_show_every_name_and_number(tmp_path: Path) -> None:
    path = tmp_path / "stages.svg"
    stages(path, STAGES, "A title")
    found = texts(path)
    assert {"A title", *(stage.name for stage in STAGES)} <= set(found)
    assert {"16.06 GB, 16.00 bits", "5.73 GB, 4.25 bits", "5.21 MB, 4.25 bits"} <= set(found)
    wanted = ["the source, ppl 6.24", "0.421 ± 0.013, ppl 9.71", "0.0009 ± 0.0021, ppl 7.70", "0", "0.25, ppl 7.70"]
    assert [text for text in found if text in wanted][-5:] == wanted


def test_the_same_numbers_are_the_same_bytes(tmp_path: Path) -> None:
    """Also in another process, whatever that one's settings of matplotlib are, and these stay as they were."""
    import matplotlib

    paths = [tmp_path / name for name in ("a.svg", "b.svg", "c.svg", "d.svg")]
    losses(paths[0], ROWS, "A title")
    stages(paths[1], STAGES, "A title")
    changed = {"font.size": 20.0, "svg.fonttype": "path", "axes.grid": True}
    with matplotlib.rc_context(changed):
        losses(paths[2], ROWS, "A title")
        assert {key: matplotlib.rcParams[key] for key in changed} == changed
    code = f"""
from pathlib import Path
from math import nan
from compress.plots import Stage, stages
stages(Path({str(paths[3])!r}), {STAGES!r}, "A title")
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert paths[0].read_bytes() == paths[2].read_bytes()
    assert paths[1].read_bytes() == paths[3].read_bytes()
    assert b"matplotlib" not in paths[0].read_bytes().split(b"<defs>")[0]


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:2], [{**ROWS[0], "loss": math.nan}, *ROWS[1:3]], [{**ROWS[0], "lr": 0.0}]])
def test_few_steps_and_odd_ones_are_drawn(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "losses.svg"
    losses(path, rows, "few")
    assert "few" in texts(path)


@pytest.mark.parametrize("chosen", [STAGES[:1], STAGES[1:2], STAGES[3:4], [Stage("empty", 0, 0.0, math.inf, math.nan, None)]])
def test_one_stage_is_drawn(tmp_path: Path, chosen: list[Stage]) -> None:
    path = tmp_path / "stages.svg"
    stages(path, chosen, "one")
    assert chosen[0].name in texts(path)


def test_a_suffix_is_a_format_and_nothing_is_no_plot(tmp_path: Path) -> None:
    losses(tmp_path / "losses.png", ROWS, "A title")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows"):
        losses(tmp_path / "a.svg", [], "none")
    with pytest.raises(ValueError, match="no rows"):
        domains(tmp_path / "a.svg", [], "none")
    with pytest.raises(ValueError, match="no stages"):
        stages(tmp_path / "a.svg", [], "none")


def test_matplotlib_waits_until_something_is_drawn() -> None:
    code = "import sys, compress.plots; assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
