"""Builds the archives of cubins: `make cubins`.

That is `python -m compress.kernels.cuda.build`. With --check it only tells whether the archives are up to date. Variants that
are not in them are compiled when they are used.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from compress.errors import CompressError, few
from compress.kernels.cuda import cubins
from compress.kernels.cuda.nvrtc import nvrtc
from compress.kernels.cuda.variant import Variant, headers
from compress.kernels.dispatch import Work
from compress.kernels.native.cuda import expand, finish, outliers, skinny
from compress.kernels.native.kind import HALVES, Kind
from compress.kernels.native.table import counts
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State

CUDA = 12
"""The major version of NVRTC: the older one, because newer drivers load its code, too."""
_COMMON = (
    "w4a16g32", "w4a16g64", "w4a16g128", "w4a16g32-asym", "w4a16g64-asym", "w4a16g128-asym",
    "w8a16", "nf4g64", "nf4g128", "mxfp4", "nvfp4", "fp8",
)  # fmt: skip
_OTHERS = (
    "w3a16g64", "w3a16g128", "w3a16", "w2a16g64", "w2a16g128", "w2a16", "w8a16-asym", "fp4g64", "fp4g128",
    "w3a16g64-asym", "w3a16g128-asym", "w3a16-asym", "w2a16g64-asym", "w2a16g128-asym", "w2a16-asym",
)  # fmt: skip
_SCHEMES = {**dict.fromkeys(cubins.TARGETS, _COMMON + _OTHERS), "sm_89": _COMMON, "compute_80": _COMMON}
"""Schemes in the archive of each target. A GPU of 8.9 also runs code for 8.0; where only PTX runs, torch brings NVRTC."""
_OWN_SCALES = {"fp8": torch.float32, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}


def variants(target: str) -> list[Variant]:
    """The variants in the archive of a target."""
    halves = [dtype for dtype in HALVES if target != "sm_75" or dtype == torch.float16]
    kinds = {
        Kind.of(Work(State(scheme), 16, 128, x, _OWN_SCALES.get(str(scheme), scale), "cuda")): None
        for scheme in map(Scheme.parse, _SCHEMES[target])
        for x in halves
        # GPUs without bfloat16 run a model in bfloat16 with activations in float16.
        for scale in {x, *((torch.bfloat16,) if target == "sm_75" else ())}
    }
    found = [variant for kind in kinds for variant in (*(skinny(kind, count) for count in counts(kind)), expand(kind))]
    found += [finish(x) for x in halves] + [outliers(x, wide) for x in halves for wide in (False, True)]
    return sorted(found, key=str)


def main() -> int:
    """Exit status: 0 if all is built, 1 if --check finds something, or the status of an error."""
    parser = argparse.ArgumentParser(prog="python -m compress.kernels.cuda.build", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="tell what is not up to date, and build nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args()
    try:
        return _check() if options.check else _build(options.jobs)
    except CompressError as error:
        print(error, file=sys.stderr)
        return error.exit_status


def _check() -> int:
    stale = {target: cubins.stale(target, variants(target)) for target in cubins.TARGETS}
    outdated = [f"{cubins.archive(target)}: {few(lines)}" for target, lines in stale.items() if lines]
    print("\n".join(outdated) or "the archives of cubins are up to date")
    return 1 if outdated else 0


def _build(jobs: int) -> int:
    compiler, total = nvrtc(CUDA), 0
    with ProcessPoolExecutor(jobs) as pool:
        for target in cubins.TARGETS:
            wanted = variants(target)
            # Sources are read once, before, so that an edit meanwhile has no effect.
            images = pool.map(partial(compiled, target, headers()), wanted, [v.text for v in wanted], chunksize=4)
            cubins.pack(target, compiler.version, dict(zip(wanted, images, strict=True)))
            built = cubins.archive(target)
            total += built.stat().st_size
            line = f"{built.name}: {len(wanted)} kernels, {built.stat().st_size / 1e6:.2f} MB, NVRTC {compiler.version}"
            print(line, flush=True)
    print(f"{total / 1e6:.2f} MB")
    return 0


def compiled(target: str, included: dict[str, str], variant: Variant, text: str) -> bytes:
    """The code of a variant, whose source is `text`."""
    return nvrtc(CUDA).compile(f"{variant.source}.cu", text, included, target, variant.options)


if __name__ == "__main__":
    sys.exit(main())
