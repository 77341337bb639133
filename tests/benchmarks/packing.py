"""Benchmark: packing the codes of a synthetic 1.1 B model for llama.cpp and for MLX.

    python tests/benchmarks/packing.py [--formats gguf,mlx] [--scheme w4a16g64] [--keep DIR]

The model of the stream benchmark (TinyLlama's shapes, random weights), its codes by rounding to nearest; then one process for each
format, which reads the codes, writes the artifact and makes it durable. Status 1 if one takes over 30 s of the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from sparse import measured
from stream import synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="gguf,mlx")
    parser.add_argument("--scheme", default="w4a16g64")
    parser.add_argument("--keep", type=Path, help="where the codes are kept between runs")
    args = parser.parse_args()
    over = False
    with tempfile.TemporaryDirectory() as scratch:
        codes, command = args.keep or Path(scratch) / "codes", (sys.executable, "-P", "-m", "compress", "run")
        if not codes.exists():
            model = synthetic(Path(scratch) / "model", 22)
            measured(*command, str(model), str(codes), "-p", f"quantize.rtn(scheme={args.scheme})", "--quiet", "--no-report")
        for form in args.formats.split(","):
            out = Path(scratch) / form
            seconds, used, peak, said = measured(
                *command, str(codes), str(out), "-p", f"pack(format={form})", "--json", "--no-report"
            )
            step = next(event for line in said.splitlines() if (event := _event(line)).get("event") == "step")
            nbytes = sum(file.stat().st_size for file in out.iterdir())
            over |= used > 30
            print(f"{form:6} {seconds:6.1f} s wall  {used:6.1f} s CPU  peak {peak / 1e9:.2f} GB  {nbytes / 1e9:.2f} GB written; "
                  f"the step itself {step['seconds']:.1f} s", flush=True)  # fmt: skip
    sys.exit(1 if over else 0)


def _event(line: str) -> dict[str, object]:
    found = json.loads(line) if line.startswith("{") else {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    main()
