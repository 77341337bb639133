"""serve: a packed model behind transformers' server, asked by a client of the OpenAI protocol; mistakes end before it starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import compress as api
from compress import demo
from forked import compress
from support import run

openai: Any = pytest.importorskip("openai", reason="the extra `serve` is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "out"
    run(Path(demo.__file__).parent / "model", out, "quantize.rtn(scheme=w4a16g32, ragged=channel) | pack(format=native)")
    return out


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command = [sys.executable, "-m", "compress", "serve", str(artifact), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(600):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
        process.kill()


def test_a_client_gets_what_the_model_says(artifact: Path, server: tuple[str, Any]) -> None:
    from transformers import AutoTokenizer

    client = openai.OpenAI(base_url=server[0], api_key="none")
    assert [model.id for model in client.models.list()] == [str(artifact.resolve())]
    text = "def main(self):\n"
    found = client.completions.create(model=str(artifact.resolve()), prompt=text, max_tokens=12, temperature=0)
    tokenizer, model = AutoTokenizer.from_pretrained(artifact), api.load(artifact, "float32")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert found.choices[0].text == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.usage.completion_tokens == wanted.shape[1] - ids.shape[1]
    parts = client.completions.create(model=str(artifact.resolve()), prompt=text, max_tokens=12, temperature=0, stream=True)
    assert "".join(part.choices[0].text or "" for part in parts if part.choices) == found.choices[0].text


def test_an_interrupt_ends_it(server: tuple[str, Any]) -> None:
    # The last test here, for it ends the server.
    _, process = server
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    said = process.stdout.read()
    assert "its name in requests too" in said
    assert "Traceback" not in said


def test_mistakes_are_told(artifact: Path, tiny: Path) -> None:
    for arguments, status, line in (
        ((artifact, "--nonsense", 3), 2, "No such option"),
        ((tiny,), 3, "a dense one"),
        ((artifact / "none",), 3, "no such directory"),
    ):
        done = compress("serve", *arguments)
        assert (done.returncode, line in done.stderr) == (status, True), done.stderr
