"""Bench: tokens a second of a packed model, compared with the dense one.

Prompts go through the model in one forward; then tokens are generated greedily, one at a time, with a cache of keys and
values. On a GPU the cache is static and a step replays a CUDA graph; on the CPU it is one that grows without copies, and static
where a step is compiled. Every round runs all models, one after the other. Before anything is timed, the packed model's logits
are compared with those of the dequantized weights in fp32, computed with one block in memory.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.architecture.model_class import model_class
from compress.checkpoint.reader import Checkpoint
from compress.errors import FormatError, InputError, UsageError
from compress.evaluate.backend_report import check_device
from compress.evaluate.decoder import Decoder
from compress.freed_memory import trim_memory
from compress.importers import method_of
from compress.kernels.native.modules import PackedWeight
from compress.layerwise.eval_windows import token_windows, tokenizer_folder
from compress.layerwise.logits import Forward, label_of
from compress.pipeline.build_manifest import peak_resident_bytes
from compress.runtime import artifact
from compress.runtime.fill import refuse_other

if TYPE_CHECKING:
    from torch import nn

ALLOWED = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Allowed |packed - meant| / |meant| of logits, by the packed model's dtype; `meant` are dequantized weights in fp32."""
MARGIN = 2.0
"""How many times the same of a dense model in that dtype is allowed, if that is more: some models amplify any rounding."""
ROUNDED, ROUNDED_MARGIN = 0.1, 8.0
"""Both where a backend that was asked for rounds activations to 8 bits which the scheme leaves as they are."""
PACKED, DENSE, COMPILED = "packed", "dense", "packed, compiled"
PROMPT, DECODE = "prompt", "decode"
_CHECKED = 32
"""Tokens whose logits are compared."""


@dataclass(frozen=True)
class Settings:
    """What is timed, and how."""

    prompt: int = 512
    """Tokens of a prompt."""
    new: int = 64
    """Tokens that are generated after the prompt."""
    batches: tuple[int, ...] = (1, 8, 32)
    rounds: int = 3
    device: str = "cpu"
    dtype: str = "auto"
    backend: str | None = None
    seed: int = 0
    repack: bool = False
    """Whether an artifact of another tool is packed while it is loaded."""
    compile: bool = False
    """Whether decoding by the packed model is timed by compiled code, too."""


@dataclass(frozen=True)
class Memory:
    """Memory of a model after loading and one token; None where the system does not report it."""

    tensor_bytes: int
    """Bytes of parameters and buffers, shared ones counted once."""
    resident_bytes: int | None
    """Growth of the process's resident memory."""
    peak_bytes: int | None
    """Its peak growth during loading."""
    gpu_bytes: int | None = None
    gpu_peak_bytes: int | None = None


@dataclass
class Subject:
    """A model that is timed."""

    label: str
    model: Any
    memory: Memory
    backends: dict[str, int] = field(default_factory=dict)
    """How many packed weights each backend runs."""
    allowed: float = 0.0
    """The difference of logits that rounding explains, once `check` has found it."""

    @property
    def rounds(self) -> bool:
        """Whether a backend rounds activations that the scheme leaves as they are."""
        packed = [module for module in self.model.modules() if isinstance(module, PackedWeight)]
        return any(one.rounds_inputs and one.work.state.scheme and not one.work.state.scheme.inputs for one in packed)


@dataclass(frozen=True)
class Speed:
    """Tokens a second, a number for each round; `how` is graph, compiled, eager, or why it is neither of the others."""

    label: str
    batch: int
    phase: str
    rates: tuple[float, ...]
    how: str = "eager"
    compile_seconds: float | None = None

    @property
    def best(self) -> float:
        return max(self.rates)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def check_settings(checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
    """Checks everything that can be checked before a model is loaded. Raises CompressError."""
    check_device(settings.device)
    if not settings.repack:
        refuse_other(checkpoints[0], "--repack")
    for dense in checkpoints[1:]:
        if method_of(dense) is not None:
            do = "give the model that the artifact was made from"
            raise InputError(label_of(dense), "a dense checkpoint", f"one in codes ({method_of(dense)})", do)
    for checkpoint in checkpoints:
        cls, config = model_class(checkpoint)
        kind: Any = cls
        if not kind.can_generate() or config.is_encoder_decoder or kind.main_input_name != "input_ids":
            raise InputError(label_of(checkpoint), "a decoder, which goes on from a text", cls.__name__, "take a language model")
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        used = settings.prompt + settings.new
        if isinstance(positions, int) and used > positions:
            raise UsageError("--prompt and --new", f"at most {positions} tokens, the model's positions", f"{used}", "lower them")


def prompts(checkpoints: Sequence[Checkpoint], settings: Settings, data: str | None) -> torch.Tensor:
    """Ids [largest batch, prompt]: the first windows of a text, else random ids. Raises InputError for a text too short."""
    most = max(settings.batches)
    if data is not None:
        folder = tokenizer_folder(checkpoints[1] if len(checkpoints) > 1 else None, checkpoints[0])
        return token_windows(folder, data, settings.prompt, most * settings.prompt)
    vocabulary = model_class(checkpoints[0])[1].get_text_config().vocab_size
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(vocabulary, (most, settings.prompt), generator=generator)


def load_packed(checkpoint: Checkpoint, settings: Settings) -> Subject:
    """An artifact in the native format. Raises CompressError."""
    asked = (settings.dtype, settings.backend, settings.device, settings.repack)
    found = _loaded(PACKED, settings, lambda: artifact.load(checkpoint.path, *asked))
    found.backends = dict(artifact.backends(found.model))
    return found


def load_dense(checkpoint: Checkpoint, settings: Settings, dtype: torch.dtype) -> Subject:
    """A dense checkpoint by transformers' own loader."""
    cls, config = model_class(checkpoint)
    loader: Any = cls
    where = {"dtype": dtype, "device_map": settings.device, "local_files_only": True}
    return _loaded(DENSE, settings, lambda: loader.from_pretrained(checkpoint.path, config=config, **where))


def _loaded(label: str, settings: Settings, load: Callable[[], nn.Module]) -> Subject:
    gpu = settings.device == "cuda"
    trim_memory()
    before, before_gpu = resident_bytes(), torch.cuda.memory_allocated() if gpu else 0
    _forget_peak()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    model: Any = load().eval()
    # Pages of mapped files count as resident once they are read, so one token is run first.
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    trim_memory()
    after = resident_bytes()
    grown = (None, None) if before is None or after is None else (after - before, peak_resident_bytes() - before)
    on_gpu = (torch.cuda.memory_allocated() - before_gpu, torch.cuda.max_memory_allocated() - before_gpu) if gpu else (None, None)
    return Subject(label, model, Memory(tensor_bytes(model), *grown, *on_gpu))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; those that share memory are counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not report it (all but Linux)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else None


def _forget_peak() -> None:
    """Resets the system's record of peak memory, on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def check(checkpoint: Checkpoint, subject: Subject, ids: torch.Tensor) -> float:
    """|packed - meant| / |meant| of logits on some of the ids. Raises FormatError if rounding does not explain it."""
    some = ids[:1, :_CHECKED]
    meant = _dense_logits(Forward(checkpoint, rounded=False), some)
    found = subject.model(input_ids=some.to(subject.model.device), use_cache=False).logits.float().cpu()
    difference, allowed = float((found - meant).norm() / meant.norm()), ALLOWED[dtype_name(subject.model)]
    margin = MARGIN
    if subject.rounds:
        margin, allowed = ROUNDED_MARGIN, max(allowed, ROUNDED)
    if not difference <= allowed and subject.model.dtype != torch.float32:
        dense = _dense_logits(Forward(checkpoint, dtype=subject.model.dtype), some)
        allowed = max(allowed, margin * float((dense - meant).norm() / meant.norm()))
    subject.allowed = allowed
    # Written so that a NaN is refused as well.
    if not difference <= allowed:
        expected = f"logits within {allowed:g} of what its codes mean (relative, {dtype_name(subject.model)})"
        do = "name another --backend; `compress verify --reader native` tells more"
        raise FormatError(label_of(checkpoint), expected, f"{difference:.3g}; nothing was timed", do)
    return difference


def _dense_logits(forward: Forward, ids: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 of ids [1, length]."""
    found = forward.logits([ids])
    logits = next(found).float()
    found.close()
    return logits


def dtype_name(model: Any) -> str:
    """The compute dtype of a model."""
    return str(model.dtype).removeprefix("torch.")


@torch.no_grad()
def timed(subjects: Sequence[Subject], ids: torch.Tensor, settings: Settings) -> list[Speed]:
    """Tokens a second of each model at each batch, of prompts and of decoding; ids [largest batch, prompt].

    Of compiled code decoding alone is timed: prompts are not compiled.
    """
    found: list[Speed] = []
    for batch in settings.batches:
        decoders = {s.label: _warm(s.model, ids[:batch], settings) for s in subjects}
        timings = [(label, phase) for label in decoders for phase in (PROMPT, DECODE)]
        if settings.compile:
            decoders[COMPILED] = compiled = Decoder(subjects[0].model, ids[:batch], settings.new, static=True)
            compiled.compile()
            timings.append((COMPILED, DECODE))
        rates: dict[tuple[str, str], list[float]] = {timing: [] for timing in timings}
        for _ in range(settings.rounds):
            for label, decoder in decoders.items():
                seconds = _seconds(decoder.prompt, 1, settings.device)
                if (label, PROMPT) in rates:
                    rates[label, PROMPT].append(batch * settings.prompt / seconds)
                rates[label, DECODE].append(batch * settings.new / _seconds(decoder.advance, settings.new, settings.device))
        for (label, phase), numbers in rates.items():
            decoder = decoders[label]
            how = "eager" if phase == PROMPT else decoder.how
            found.append(Speed(label, batch, phase, tuple(numbers), how, decoder.compile_seconds))
    return found


def _warm(model: Any, ids: torch.Tensor, settings: Settings) -> Decoder:
    decoder = Decoder(model, ids, settings.new, static=settings.device == "cuda")
    if decoder.static:
        decoder.capture()
    else:
        decoder.prompt()
        decoder.step()
    return decoder


def _seconds(run: Callable[[], None], times: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
