"""Measures the real table: `python tests/benchmarks/real`, or `make real`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from benchmarks.real.table import main  # noqa: E402

sys.exit(main())
