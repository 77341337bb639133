"""Output fit: fits outputs, by least squares, to fewer inputs.

With C the mean of x x^T over the calibration tokens and K the kept inputs, W' = W C[:, K] (C[K, K] + lambda I)^-1 has the least
squared error of outputs. It is done for every matrix that loses inputs, be they hidden channels, heads or neurons, block by
block on the activations of the source; a norm over fewer channels is scaled. Each tensor is written and journaled at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from compress.architecture.axes import Slice, rescaled
from compress.architecture.experts import INPUT, MIDDLE, Routed
from compress.device import made_on
from compress.errors import InputError
from compress.executors.forward_sweep import ForwardSweep
from compress.executors.sliced import put
from compress.executors.step_run import StepRun
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.batches import Batch
from compress.layerwise.meta_model import Block
from compress.layerwise.stepwise import Call, ForwardHooks, Key
from compress.numerics.hessian import Hessian
from compress.numerics.output_fit import NormScale, OutputFit
from compress.spec.kept import Kept

_MATRICES = ("linear", "expert", "router", "head")
Fits = Mapping[int | None, OutputFit | None]
"""By expert, None for the one of a plain matrix; no fit where no token came."""


def refit(run: StepRun, kept: Kept, parts: Sequence[Slice]) -> None:
    """Writes the tensors that are fitted anew and not journaled yet."""
    assert run.step.cut is not None
    wanted = [part for part in parts if loses(part, kept, run) and not run.writer.is_done(part.name)]
    if run.ctx.broadcast(bool(wanted)):
        Refit(run, kept, parts, wanted).all_blocks()


def loses(part: Slice, kept: Kept, run: StepRun) -> bool:
    """Whether a matrix has fewer inputs than before, or a norm fewer channels."""
    weight, cut = part.source, run.step.cut
    assert cut is not None
    if weight.kind == "norm":
        return weight.attribute == "weight" and part.numbers(kept, cut.before)[0] is not None
    if weight.kind not in _MATRICES or weight.attribute.endswith("bias") or len(part.dims) < 2:
        return False
    if part.layer is not None and part.stacked and _inputs(part) == "units":
        return any(len(units) < weight.in_features for name, units in kept.blocks[part.layer].units.items() if name.isdigit())
    return part.numbers(kept, cut.before)[_axis(part)] is not None


def _axis(part: Slice) -> int:
    """The stored dimension of a matrix that counts its inputs."""
    return len(part.dims) - (2 if part.source.transposed else 1)


def _inputs(part: Slice) -> str:
    return part.dims[_axis(part)]


class Refit:
    """One sweep over the blocks of the source; `parts` are the smaller model's tensors, `wanted` those that it writes."""

    def __init__(self, run: StepRun, kept: Kept, parts: Sequence[Slice], wanted: Sequence[Slice]) -> None:
        assert run.step.cut is not None
        self.run, self.kept, self.cut = run, kept, run.step.cut
        self.made = {weight.name: weight for weight in run.weights}
        self.sweep = ForwardSweep(run)
        self.parts: dict[int | None, list[Slice]] = defaultdict(list)
        for part in wanted:
            self.parts[part.source.block].append(part)
        self.end = _End(self, [part for part in parts if part.source.block is None])

    def all_blocks(self) -> None:
        """Fits every tensor."""
        self.sweep.all_blocks(self.block)
        self.end.write(self.parts[None])

    def block(self, block: Block, probe: BatchWalk, walks: list[BatchWalk], hooks: ForwardHooks) -> None:
        """Fits the tensors of one block, one activation after the other, and takes all batches through it."""
        parts = self.parts[block.index]
        keys = {part.name: self.key(part) for part in parts}
        forget = hooks.watch({path: bool(which) for path, which in keys.values()})
        first: dict[object, Key] = {}
        same: dict[Key, Key] = {}
        for key, x in probe.survey() if parts else ():
            # Several tensors read one activation.
            same[key] = first.setdefault(key if isinstance(x, Routed) else (x.data_ptr(), x.shape), key)
        for key in dict.fromkeys(same.values()):
            self.activation([part for part in parts if same.get(keys[part.name]) == key], key, walks)
        forget()
        for walk in walks:
            self.sweep.on(walk, partial(self.end.see, walk.batch) if self.sweep.last and self.parts[None] else None)
        self.run.ctx.tell(
            "progress", step=self.run.step.name, phase="refit", weight=block.path, total_bytes=1, done_bytes=0, unit="blocks",
            total=len(self.sweep.meta_model.blocks), done=block.index + 1,
        )  # fmt: skip

    def key(self, part: Slice) -> Key:
        """The activation that a tensor reads."""
        weight = part.source
        if weight.kind == "expert":
            return weight.module, MIDDLE if _inputs(part) == "units" else INPUT
        return self.sweep.meta_model.readers(weight.name)[0], ""

    def activation(self, parts: Sequence[Slice], key: Key, walks: list[BatchWalk]) -> None:
        """Fits what reads one activation."""
        matrices = [part for part in parts if part.source.kind != "norm"]
        for part in parts:
            if part.source.kind == "norm":
                scale = self.scale_of(part)
                for rows in _rows(key, walks):
                    scale.add(rows)
                self.norm(part, scale)
        if key[1] == MIDDLE:
            for part in matrices:
                own = range(part.source.experts) if part.source.experts is not None else [part.expert]
                self.matrix(part, {expert: self.fit(part, self.products(part, key, walks, expert), expert) for expert in own})
        elif matrices:
            fit = self.fit(matrices[0], self.products(matrices[0], key, walks))
            for part in matrices:
                self.matrix(part, {None: fit})

    def products(self, part: Slice, key: Key, walks: list[BatchWalk], expert: int | None = None) -> Hessian:
        """The products of a matrix's inputs, over this process's batches."""
        found: Hessian = made_on(self.sweep.meta_model.device, Hessian, part.source.in_features)
        for rows in _rows(key, walks, expert):
            found.add(rows)
        return found

    def fit(self, part: Slice, products: Hessian, expert: int | None = None) -> OutputFit | None:
        """The fit of all that reads what a matrix reads, over all processes; None without a token."""
        for sums in (tokens := torch.tensor(products.tokens), *products.parts()):
            self.run.ctx.add_up(sums)
        products.tokens = int(tokens)
        if not products.tokens:
            return None
        block = self.kept.blocks[part.layer] if part.layer is not None else None
        if block is not None and expert is not None:
            inputs: Sequence[int] | None = block.units.get(str(expert), ())
        else:
            inputs = part.numbers(self.kept, self.cut.before)[_axis(part)]
        assert inputs is not None
        try:
            return OutputFit(products.mean(), torch.tensor(inputs, dtype=torch.int64, device=self.sweep.meta_model.device))
        except ValueError as error:
            raise _not_finite(part, error) from None

    def scale_of(self, part: Slice) -> NormScale:
        """The scale of a norm, before any token."""
        (channels,) = part.numbers(self.kept, self.cut.before)
        module = self.sweep.meta_model.module_at(self.sweep.meta_model.readers(part.source.name)[0])
        which = torch.tensor(channels, device=self.sweep.meta_model.device)
        return NormScale(which, isinstance(module, torch.nn.LayerNorm))

    def norm(self, part: Slice, scale: NormScale) -> None:
        """Writes and journals a norm."""
        self.run.ctx.add_up(scale.sums)
        try:
            factor = scale.mean()
        except ValueError as error:
            raise _not_finite(part, error) from None
        value = self.run.source.read(part.source.name)
        # Gemma's norms multiply by 1 + w.
        one = float(self.cut.family.startswith("gemma"))
        self.put(part, ((value.float() + one) * factor - one).to(value.dtype), {"norm_scale": factor})

    def matrix(self, part: Slice, fits: Fits) -> None:
        """Fits, writes and journals a matrix, or a stack of them."""
        weight, whole = part.source, self.run.source.read(part.source.name)
        turned = whole.transpose(-1, -2) if weight.transposed else whole
        lost: list[tuple[float, float]] = []
        facts: dict[str, Any] = {}
        for expert, fit in fits.items():
            w = turned if weight.experts is None or expert is None else turned[expert]
            if fit is None:
                facts["notes"] = [["unrouted", "no calibration token: its outputs were not fitted anew"]]
                continue
            new, before, after = fit(w.flatten(0, -2).to(fit.kept.device))
            w[..., fit.kept.cpu()] = new.view(*w.shape[:-1], -1).cpu()
            lost.append((before, after))
        if lost:
            before, after = (sum(each) / len(lost) for each in zip(*lost, strict=True))
            facts |= {"output_error": after, "output_error_without_refit": before}
        self.put(part, whole, facts)

    def put(self, part: Slice, value: torch.Tensor, facts: dict[str, Any]) -> None:
        """Cuts, writes and journals a tensor of the source's shape."""
        run, cut = self.run, self.cut
        made = rescaled(part.cut(value, self.kept, cut.before), part, cut.family, cut.before, cut.after, cut.tied)
        if run.ctx.rank == sum(part.name.encode()) % run.ctx.world_size:
            put(run, self.made[part.name], made, facts)


class _End:
    """What comes after the last block: its norm, and the head, which reads that."""

    def __init__(self, refit: Refit, parts: Sequence[Slice]) -> None:
        self.refit = refit
        self.norms = [part for part in parts if part.source.kind == "norm" and part.source.attribute == "weight"]
        self.fits_head = any(part.source.kind == "head" for part in refit.parts[None])
        self.scales = {part.name: refit.scale_of(part) for part in refit.parts[None] if part.source.kind == "norm"}
        self.products: Hessian | None = None

    def see(self, batch: Batch, call: Call, output: object) -> None:
        """Takes what the last block made of a batch."""
        x = output[0] if isinstance(output, tuple) else output
        assert isinstance(x, torch.Tensor)
        rows = _counted(x, batch, call)
        for scale in self.scales.values():
            scale.add(rows)
        if self.fits_head and self.norms:
            meta_model = self.refit.sweep.meta_model
            norm = meta_model.module_at(meta_model.readers(self.norms[0].source.name)[0])
            if self.products is None:
                self.products = made_on(meta_model.device, Hessian, rows.shape[1])
            self.products.add(norm(rows))

    def write(self, wanted: Sequence[Slice]) -> None:
        """Fits, writes and journals those of `wanted`."""
        for part in wanted:
            if part.source.kind == "norm":
                self.refit.norm(part, self.scales[part.name])
            elif self.products is not None:
                self.refit.matrix(part, {None: self.refit.fit(part, self.products)})


def _not_finite(part: Slice, error: ValueError) -> InputError:
    return InputError(f"what '{part.source.name}' reads", "finite activations", str(error), "try --dtype float32")


def _rows(key: Key, walks: Sequence[BatchWalk], expert: int | None = None) -> Iterator[torch.Tensor]:
    """What a reader reads of each batch [tokens, width], without padding; of one expert, or of all."""
    for walk in walks:
        try:
            x = walk.until(key)
        except LookupError:
            continue
        assert walk.call is not None
        if isinstance(x, Routed):
            valid = walk.batch.valid(None, walk.call)
            rows, tokens = (x.rows, x.tokens) if expert is None else x.of(expert)
            yield rows if valid is None else rows[valid[tokens]]
        else:
            yield _counted(x, walk.batch, walk.call)


def _counted(x: torch.Tensor, batch: Batch, call: Call) -> torch.Tensor:
    """Activations [..., width] as [tokens, width], without padding."""
    rows, valid = x.reshape(-1, x.shape[-1]), batch.valid(x, call)
    return rows if valid is None else rows[valid]
