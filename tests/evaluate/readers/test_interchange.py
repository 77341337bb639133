"""Interchange with AutoGPTQ itself: what it writes we read and pack anew, and what we write it reads."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.evaluate import readers
from compress.evaluate.perplexity_kl import compare
from compress.evaluate.readers.environment import clean_variables, ensure
from compress.evaluate.verify import read_with, verify_bytes
from compress.layerwise.dense_view import DenseView
from support import dense_meaning, run, step_of, tiny_llama

IDS = torch.randint(0, 128, (3, 24), generator=torch.Generator().manual_seed(5))


def quiet(line: str) -> None:
    pass


def ours(directory: Path) -> torch.Tensor:
    return readers.logits("ours", directory, IDS, quiet).logits


def packed_by_auto_gptq(canonical: Path, folder: Path, bits: int, group: int) -> Path:
    """The artifact that AutoGPTQ makes of what a canonical checkpoint means, from its scales and zero points."""
    dense, given = dense_meaning(canonical, folder / "old"), {}
    dense_view = DenseView(open_checkpoint(canonical))
    for name in dense_view.weights:
        q: Any = dense_view.qtensor(name)
        path = name.removesuffix(".weight")
        given |= {f"{path}.scales": q.scale.float().contiguous(), f"{path}.zeros": q.zero.float().contiguous()}
    save_file(given, folder / "given.safetensors")
    config = json.loads((dense / "config.json").read_text())
    # In the words of the transformers that it lives with.
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    (dense / "config.json").write_text(json.dumps(config))
    python, script = ensure(readers.auto_gptq(), print), Path(__file__).with_name("make_auto_gptq.py")
    command = [python, "-P", script, dense, folder / "given.safetensors", folder / "theirs", str(bits), str(group)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_variables(HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    return folder / "theirs"


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_what_auto_gptq_writes_and_what_we_write_are_one(tmp_path: Path, bits: int) -> None:
    group = 32
    source = tiny_llama(tmp_path / "source", dtype="float16", initializer_range=0.2, tie_word_embeddings=False)
    artifact = tmp_path / "artifact"
    run(source, artifact, f"quantize.rtn(scheme=w{bits}a16g{group}-asym, least_zero=1) | pack(format=gptq)")
    canonical = step_of(artifact, "quantize.rtn")
    meant = ours(canonical)
    assert meant.std() > 0.1
    theirs = packed_by_auto_gptq(canonical, tmp_path, bits, group)

    # The same bytes, from code that shares nothing with ours.
    mine, written = load_file(artifact / "model.safetensors"), {}
    for file in theirs.glob("*.safetensors"):
        written |= load_file(file)
    packed = [name for name in mine if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert len(packed) == 14 * 4
    for name in packed:
        assert mine[name].dtype == written[name].dtype, name
        assert torch.equal(mine[name], written[name]), name

    # As it left them, and with the config.json that a writer of today would have left there.
    today = shutil.copytree(theirs, tmp_path / "today")
    shutil.copyfile(source / "config.json", today / "config.json")
    for place in (theirs, today):
        found = verify_bytes(open_checkpoint(place), Context())
        assert (found.named, found.decoded, found.corrected) == (False, 14, ()), place
        assert torch.allclose(ours(place), meant, atol=1e-5)
        quality = compare(open_checkpoint(canonical), open_checkpoint(place), IDS)
        assert quality.kl.value < 1e-6
        out = tmp_path / f"{place.name}-repacked"
        run(place, out, "unpack | pack(dequantize=true)")
        assert torch.allclose(ours(out), meant, atol=1e-5)
        codes, repacked = DenseView(open_checkpoint(canonical)), DenseView(open_checkpoint(out))
        assert set(codes.weights) == set(repacked.weights)
        for name in codes.weights:
            a: Any = codes.qtensor(name)
            b: Any = repacked.qtensor(name)
            assert all(torch.equal(getattr(a, part).float(), getattr(b, part).float()) for part in ("codes", "scale", "zero"))
        assert read_with("transformers", out, IDS, quiet).equal

    # And what we write is what it computes.
    reading = read_with("auto-gptq", artifact, IDS, quiet)
    assert (reading.dtype, reading.versions["auto-gptq"]) == ("float32", "0.7.1")
    assert reading.difference < 1e-4
    assert torch.allclose(readers.logits("auto-gptq", artifact, IDS, quiet).logits, meant, atol=1e-4)
