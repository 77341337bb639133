"""Prints the table of bad input: class, case, status and the first line of the message."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

from bad_input import TABLE  # noqa: E402
from bad_input.bench import Bench  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    bench = Bench(Path(folder))
    for kind, cases in TABLE.items():
        for number, (name, case) in enumerate(cases.items()):
            if sys.argv[1:] and kind not in sys.argv[1:]:
                continue
            found = bench.run(case, f"{kind}-{number}")
            message = found.message.replace(f"{folder}/{kind}-{number}/", "")
            print(f"{kind:<10}  {name:<40}  {found.status}  {message[:140]}", flush=True)
            for problem in found.wrong(case):
                print(f"  WRONG: {problem}\n     in: {found.text[:600]}")
