"""mlx-lm reads what we pack for it as we mean it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import FormatError
from compress.evaluate import readers
from compress.evaluate.readers.environment import clean_variables, ensure
from compress.evaluate.verify import read_with
from compress.kernels.mlx.families import VERSION
from compress.kernels.mlx.layout import spelled_out
from families import build as build_family
from support import do

pytestmark = pytest.mark.slow
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))
CASES = {
    "llama": ("w4a16g32", "linear, head"), "tied": ("w6a16g32-min", "linear, embeddings"), "qwen3": ("w3a16g32-min", "linear"),
    "gemma2": ("w8a16g32", "linear, embeddings"), "mixtral": ("w4a16g32-min", "linear, experts"),
    "olmoe": ("w5a16g32-min", "linear, experts"),
}  # fmt: skip


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("family", CASES)
def test_logits_are_those_of_the_codes(family: str, tmp_path: Path) -> None:
    scheme, targets = CASES[family]
    do(build_family(family, tmp_path), tmp_path / "out", f"quantize.rtn(scheme={scheme}, targets=[{targets}]) | pack(format=mlx)")
    found = read_with("mlx", tmp_path / "out", IDS, quiet)
    assert found.dtype == "float32"
    assert found.versions["mlx-lm"] == VERSION
    assert found.difference <= 1e-5 * found.largest


def test_what_mlx_lm_makes_is_read_in_codes(tmp_path: Path) -> None:
    source = build_family("llama", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(spelled_out(config, own_head=True)))
    script = Path(__file__).with_name("make_mlx.py")
    command = [str(ensure(readers.mlx(), print)), "-P", str(script), *map(str, (source, tmp_path / "theirs")), "5", "32"]
    subprocess.run(command, check=True, env=clean_variables())
    found = read_with("mlx", tmp_path / "theirs", IDS, quiet)
    assert found.difference <= 1e-5 * found.largest
    result = do(tmp_path / "theirs", tmp_path / "codes", "unpack")
    assert {record.state for record in result.manifest.weights.values()} == {"codes(w5a16g32-min)"}
    assert len(result.manifest.weights) == 2 * 7 + 2


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    do(build_family("llama", tmp_path), tmp_path / "out", "quantize.rtn(scheme=w4a16g32-min) | pack(format=mlx)")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.norm.weight"]
    for file in ("model.safetensors", "manifest.json"):
        (tmp_path / "out" / file).unlink()
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(FormatError, match=r"read by mlx[\s\S]*model\.norm\.weight"):
        readers.logits("mlx", tmp_path / "out", IDS, quiet)
