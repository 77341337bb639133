"""Structure scores: what a slicing pass asks about a model, in one forward.

One block is in memory at a time. What was observed of a block is kept in a file at once; after a crash that block is only run, to
get to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from compress.architecture.axes import Slice, slices
from compress.architecture.experts import MIDDLE, OUTPUT, Routed
from compress.checkpoint.atomic import write_bytes
from compress.contract.slicing_pass import Fact, Observed
from compress.contract.step_plan import Cut
from compress.errors import CoverageError, InputError
from compress.executors.forward_sweep import ForwardSweep
from compress.executors.step_run import StepRun
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.batches import Batch
from compress.layerwise.meta_model import Block
from compress.layerwise.stepwise import Call, ForwardHooks, Key
from compress.numerics.importance import Importance, by_head
from compress.spec.kept import MLP, SHARED

Tensors = dict[str, torch.Tensor]
_UNITS = "units:"


class Observations:
    """Observes the model of a step's source."""

    def __init__(self, run: StepRun, what: Cut, facts: Sequence[Fact]) -> None:
        self.run, self.what, self.facts, self.ctx = run, what, facts, run.ctx
        layers = tuple(range(what.before.layers))
        every = [tuple(range(what.before.experts))] * len(layers)
        self.parts = slices(what.weights, what.family, layers, every)

    def all(self) -> Observed:
        """Everything that the pass asked for."""
        found = Observed()
        if {*self.facts} & {"influence", "activations", "experts"}:
            self.sweep = ForwardSweep(self.run)
            self.sweep.all_blocks(self.block)
            blocks = [
                self.ctx.broadcast(_load(self.file(n)) if self.ctx.is_main else None) for n in range(self.what.before.layers)
            ]
            self.collect(found, blocks)
        if "loss" in self.facts:
            from compress.executors.leave_out import losses

            found.loss = losses(self.run)
        return found

    def file(self, block: int) -> Path:
        """The file of what was observed of a block, in the step's .tmp."""
        return self.run.writer.path / f".observed-{block}.safetensors"

    def block(self, block: Block, probe: BatchWalk, walks: list[BatchWalk], hooks: ForwardHooks) -> None:
        """Observes one block, and takes all batches through it."""
        known = self.ctx.broadcast(self.file(block.index).is_file())
        seen = _BlockSums(self, block) if not known else None
        order = seen.watch(probe, hooks) if seen is not None else None
        for walk in walks:
            if seen is None or order is None:
                self.sweep.on(walk)
            else:
                seen.take(walk, order)
        if seen is not None:
            seen.forget()
            tensors = seen.result()
            if self.ctx.is_main:
                _save(tensors, self.file(block.index))
        self.ctx.tell(
            "progress", step=self.run.step.name, phase="observe", weight=block.path, kept=int(known), total_bytes=1, done_bytes=0,
            unit="blocks", total=self.what.before.layers, done=block.index + 1,
        )  # fmt: skip

    def collect(self, found: Observed, blocks: list[Tensors]) -> None:
        """Joins what was observed of each block."""
        for tensors in blocks:
            if "influence" in tensors:
                found.influence.append(float(tensors["influence"]))
            if "hidden" in tensors:
                found.hidden = tensors["hidden"] if found.hidden is None else found.hidden + tensors["hidden"]
            if "queries" in tensors:
                found.queries.append(tensors["queries"])
            found.units.append({n.removeprefix(_UNITS): t for n, t in tensors.items() if n.startswith(_UNITS)})
            if "experts" in tensors:
                found.experts.append(tensors["experts"])
                found.routed.append(tensors["routed"])


class _BlockSums:
    """What is summed over the batches in one block."""

    def __init__(self, asked: Observations, block: Block) -> None:
        self.asked, self.block, self.device = asked, block, asked.sweep.meta_model.device
        self.sizes = asked.what.before
        self.cosine = torch.zeros(2, dtype=torch.float64)
        self.sums: dict[str, Importance] = {}
        self.saliency = torch.zeros(2, max(1, self.sizes.experts), dtype=torch.float64, device=self.device)
        self.readers: dict[Key, str] = {}
        """What the inputs of a reader count: hidden, queries or the name of a feed-forward."""
        self.forget: Callable[[], None] = lambda: None

    def watch(self, probe: BatchWalk, hooks: ForwardHooks) -> list[Key]:
        """Finds the readers of a block; returns one of each activation, in the order of a forward."""
        meta_model = self.asked.sweep.meta_model
        stacks: set[str] = set()
        if {*self.asked.facts} & {"activations", "experts"}:
            for part in self.asked.parts:
                weight = part.source
                if (
                    weight.block != self.block.index
                    or weight.attribute == "bias"
                    or weight.kind not in ("linear", "expert", "router")
                ):
                    continue
                if weight.kind == "expert":
                    stacks.add(weight.module)
                elif "activations" in self.asked.facts and (word := self._reads(part)):
                    self.readers |= {(path, ""): word for path in meta_model.readers(weight.name)}
        forget = hooks.watch({key[0]: False for key in self.readers} | dict.fromkeys(stacks, True))
        self.forget = forget
        found: list[Key] = []
        taken: set[object] = set()
        for key, x in probe.survey():
            same = key if isinstance(x, Routed) else (x.data_ptr(), x.shape[-1], self.readers[key])
            wanted = key[1] in ("", MIDDLE, OUTPUT) if "experts" in self.asked.facts else key[1] in ("", MIDDLE)
            if wanted and same not in taken:
                taken.add(same)
                found.append(key)
        if "experts" in self.asked.facts and not any(key[1] == OUTPUT for key in found):
            raise CoverageError(self.block.path, "routed experts whose outputs can be observed", "none", "use another pass")
        return found

    def _reads(self, part: Slice) -> str:
        """What a matrix reads: `hidden`, `queries`, or the name of a feed-forward."""
        word = part.logical[-1]
        return (SHARED if "shared" in part.source.module else MLP) if word == "units" else word

    def take(self, walk: BatchWalk, order: list[Key]) -> None:
        """Takes one batch through the block."""
        for key in order:
            try:
                x = walk.until(key)
            except LookupError:
                continue
            assert walk.call is not None
            samples = len(walk.batch.ids)
            length = walk.batch.ids.shape[1]
            valid = walk.batch.valid(x if isinstance(x, torch.Tensor) else None, walk.call)
            if isinstance(x, torch.Tensor):
                rows = x.reshape(-1, x.shape[-1])
                self._add(self.readers[key], rows, torch.arange(len(rows), device=rows.device), valid, samples, length)
            else:
                self._experts(key, x, valid, samples, length)
        self.asked.sweep.on(walk, partial(self._influence, walk.batch) if "influence" in self.asked.facts else None)

    def _add(
        self, word: str, rows: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor | None, samples: int, length: int
    ) -> None:
        if valid is not None:
            rows, tokens = rows[valid[tokens]], tokens[valid[tokens]]
        if word not in self.sums:
            self.sums[word] = Importance(rows.shape[1], self.device)
        self.sums[word].add(rows, tokens // length, samples)

    def _experts(self, key: Key, routed: Routed, valid: torch.Tensor | None, samples: int, length: int) -> None:
        for expert in range(self.sizes.experts):
            rows, tokens = routed.of(expert)
            if key[1] == MIDDLE and "activations" in self.asked.facts:
                self._add(str(expert), rows, tokens, valid, samples, length)
            elif key[1] == OUTPUT:
                norms = rows.float().norm(dim=1).double()
                if valid is not None:
                    norms = norms[valid[tokens]]
                self.saliency[:, expert] += torch.stack([norms.sum(), norms.new_tensor(float(len(norms)))])

    def _influence(self, batch: Batch, call: Call, output: object) -> None:
        before = call.args[0] if call.args else call.kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        assert isinstance(after, torch.Tensor)
        cosines = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).reshape(-1)
        if (valid := batch.valid(after, call)) is not None:
            cosines = cosines[valid]
        self.cosine += torch.tensor([float(cosines.sum(dtype=torch.float64)), cosines.numel()], dtype=torch.float64)

    def result(self) -> Tensors:
        """The scores of the block, over all processes. Raises InputError for activations that are not finite."""
        asked, found = self.asked, {}
        for part in (self.cosine, self.saliency, *(self.sums[word].squares for word in sorted(self.sums))):
            asked.ctx.add_up(part)
        if "influence" in asked.facts:
            share = float(self.cosine[0] / self.cosine[1])
            if not math.isfinite(share):
                raise InputError(
                    self.block.path, "finite hidden states", f"{share}", "try --dtype float32, or look at the source"
                )
            found["influence"] = torch.tensor(1 - share, dtype=torch.float64)
        try:
            for word, sums in self.sums.items():
                scores = sums.scores()
                plain = word in ("hidden", "queries")
                found[word if plain else _UNITS + word] = by_head(scores, self.sizes.queries) if word == "queries" else scores
        except ValueError as error:
            raise InputError(self.block.path, "finite activations", str(error), "try --dtype float32") from None
        if "experts" in asked.facts:
            found["experts"] = (self.saliency[0] / self.saliency[1].clamp(min=1)).cpu()
            found["routed"] = self.saliency[1].cpu()
        return found


def _save(tensors: Tensors, path: Path) -> None:
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _load(path: Path) -> Tensors:
    from safetensors.torch import load_file

    found: Tensors = load_file(path)
    return found
