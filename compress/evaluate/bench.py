"""Bench: tokens a second of a packed model, compared with the dense one.

Prompts go through the model in one forward; then tokens are generated greedily, one at a time, with a cache of keys and
values. On a GPU the cache is static and a step replays a CUDA graph; on the CPU it is one that grows without copies. Every
round runs all models, one after the other. Before anything is timed, the packed model's logits are compared with those of
the dequantized weights in fp32, computed with one block in memory.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.architecture.model_class import model_class
from compress.checkpoint.reader import Checkpoint
from compress.errors import CompressError, FormatError, InputError, UsageError
from compress.evaluate.backend_report import check_device
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
PACKED, DENSE = "packed", "dense"
PROMPT, DECODE = "prompt", "decode"
_CHECKED = 32
"""Tokens whose logits are compared."""
_WARM = 3
"""Warm-up steps before a graph is captured."""


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
    """Tokens a second, a number for each round; `how` is graph, eager, or why no graph could be captured."""

    label: str
    batch: int
    phase: str
    rates: tuple[float, ...]
    how: str = "eager"

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


class Decoder:
    """Greedy decoding by one model, of prompts of one shape.

    With `static` the cache has a fixed size, which a CUDA graph needs.
    """

    def __init__(self, model: Any, ids: torch.Tensor, new: int, static: bool) -> None:
        from transformers import StaticCache

        from compress.layerwise.growing_cache import GrowingCache, argument

        self.model, self.ids = model, ids.to(model.device)
        most = ids.shape[1] + new + 2 * _WARM
        self.cache: Any = StaticCache(config=model.config, max_cache_len=most) if static else None
        self._takes = argument(model)
        self._dynamic = partial(GrowingCache, model.config)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self.token = torch.zeros(len(ids), 1, dtype=torch.long, device=model.device)
        self.static, self.how, self.advance = static, "eager", self.step

    def prompt(self) -> None:
        """Runs the prompts from an empty cache; `token` [batch, 1] is then the next token of each."""
        if self.static:
            self.cache.reset()
        else:
            self.cache = self._dynamic()
        self.token.copy_(self._next(self.ids))

    def step(self) -> None:
        """Replaces `token` by the next one."""
        self.token.copy_(self._next(self.token))

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.model(input_ids=ids, use_cache=True, **{self._takes: self.cache}, **self._last)
        best: torch.Tensor = found.logits[:, -1:].argmax(-1)
        return best

    def capture(self) -> None:
        """Makes `advance` replay a CUDA graph; if none can be captured, it stays eager and `how` says why."""
        self.prompt()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except (RuntimeError, CompressError) as error:
            self.how = f"eager, for no CUDA graph could be captured: {str(error).strip().splitlines()[0]}"
            return
        if self._tokens(graph.replay) != self._tokens(self.step):
            self.how = "eager, for a CUDA graph generates other tokens"
            return
        self.advance, self.how = graph.replay, "graph"

    def _tokens(self, advance: Callable[[], None]) -> list[list[int]]:
        """The first few tokens after each prompt, to compare graph and eager."""
        self.prompt()
        found = []
        for _ in range(_WARM):
            advance()
            found.append(self.token.flatten().tolist())
        return found


@torch.no_grad()
def timed(subjects: Sequence[Subject], ids: torch.Tensor, settings: Settings) -> list[Speed]:
    """Tokens a second of each model at each batch, of prompts and of decoding; ids [largest batch, prompt]."""
    found: list[Speed] = []
    for batch in settings.batches:
        decoders = {s.label: _warm(s.model, ids[:batch], settings) for s in subjects}
        rates: dict[tuple[str, str], list[float]] = {(s.label, phase): [] for s in subjects for phase in (PROMPT, DECODE)}
        for _ in range(settings.rounds):
            for label, decoder in decoders.items():
                rates[label, PROMPT].append(batch * settings.prompt / _seconds(decoder.prompt, 1, settings.device))
                rates[label, DECODE].append(batch * settings.new / _seconds(decoder.advance, settings.new, settings.device))
        found += [
            Speed(label, batch, phase, tuple(numbers), "eager" if phase == PROMPT else decoders[label].how)
            for (label, phase), numbers in rates.items()
        ]
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
