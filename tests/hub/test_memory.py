"""Memory of a push: it does not depend on the model's size."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.manifest import Manifest, Source, Step
from hub_artifact import REPO, TOKEN, same, verified
from hub_server import Hub

PUSH = """
import sys
from compress.__main__ import main
from compress.pipeline.build_manifest import peak_resident_bytes
sys.argv = ["compress", "push", *sys.argv[1:]]
try:
    main()
finally:
    print("peak", peak_resident_bytes())
"""


def large(out: Path, shards: int, tensor_bytes: int) -> Path:
    """A dense artifact of random bytes, four tensors a shard."""
    out.mkdir()
    digests, places = {}, {}
    drawn = torch.Generator().manual_seed(0)
    for shard in range(1, shards + 1):
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        tensors = {
            f"model.layers.{shard}.{part}.weight": torch.randint(0, 200, (tensor_bytes // 4096, 4096), generator=drawn, dtype=torch.uint8)
            for part in "abcd"
        }  # fmt: skip
        save_file(tensors, out / file)
        places |= dict.fromkeys(tensors, file)
        digests |= {name: hashlib.sha256(tensor.numpy()).hexdigest() for name, tensor in tensors.items()}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Large\n")
    files = {"config.json": hashlib.sha256((out / "config.json").read_bytes()).hexdigest()}
    step = Step(id="0", parent="0", text="prune.magnitude()", options={}, revision=1)
    manifest = Manifest(
        compress_version="0", parent="0", source=Source(name="large", fingerprint="0"), lineage=(step,), seed=0, threads=1, isa="",
        format="canonical", coverage={"targeted": 0, "transformed": 0, "skipped": 0}, weights={}, digests=digests, files=files,
    )  # fmt: skip
    (out / "manifest.json").write_text(manifest.sealed().to_text())
    verified(out)
    return out


@pytest.mark.slow
def test_a_gigabyte_is_pushed_in_less_than_600_mb(hub: Hub, tmp_path: Path) -> None:
    artifact = large(tmp_path / "large", 4, 64 << 20)
    more = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-P", "-c", PUSH, str(artifact), REPO]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more, "HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rpartition("peak ")[2])
    print(f"peak {peak:,} bytes, of {sum(path.stat().st_size for path in artifact.iterdir()):,}\n{done.stderr}")
    assert peak < 600_000_000
    same(hub, artifact)
