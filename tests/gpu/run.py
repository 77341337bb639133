"""Everything that needs a GPU, in one command and a fixed time: `python -P tests/gpu/run.py`, or `make gpu`.

Tests of all parts run side by side, then the shape table alone. Each part is a process with a time limit, so that one that hangs
or dies takes nothing with it; what did not fit, and what never ended, is listed. Writes build/gpu.json and build/gpu.md. Nothing need
be installed: the rooms are imported from the checkout, other packages from wherever Python finds them or from build/site
(`pip install --target build/site ...` on another machine), and those that are missing are named. Products need torch, pydantic
and safetensors, tests pytest, and those of models transformers and greenlet too.

Status 0: everything ran and passed; 1: not so; 6: there is no GPU, and nothing was run. `--device cpu` rehearses without one, on
small sizes: it shows that the parts work, and says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"compress": "compress", "compress.passes": "passes", "compress.kernels": "kernels", "compress.recipes": "recipes"}
SITE = ROOT / "build" / "site"
TABLE = "table"
PARTS = {"operator": 8, "grouped": 3, "capture": 2, "models": 1, "calibrate": 3}
"""Files of tests, and how many processes share each."""
SECONDS, TESTS = 460, 0.6
"""For everything, and the share of it that tests may take."""
SCHEMES = ("w4a16g128", "w8a16g128", "w3a16g128", "nf4g64", "fp4g128", "w2a16g128", "fp8-afp8", "mxfp4", "masked(2:4)")
"""Of the table: all layers with the first, three with the others."""
_NO_GPU = 6


class Rooms(MetaPathFinder):
    """Imports the package from the folders of the checkout, whatever is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in ROOMS:
            return None
        folder = ROOT / ROOMS[name]
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def main() -> int:
    """The whole run, or one part of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--out", type=Path, default=ROOT / "build")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    # Behind everything that is installed: what a machine has fits its torch.
    sys.path.append(str(SITE))
    sys.meta_path.insert(0, Rooms())
    os.environ["COMPRESS_TEST_DEVICE"] = args.device
    if args.part == TABLE:
        return table(args.device, args.until)
    if args.part:
        return tests(args.part)
    return everything(args.device, args.seconds, args.out)


def missing() -> list[str]:
    """Our dependencies that are not there, or too old, in words."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for text in [*project["dependencies"], "pytest>=8"]:
        match = re.match(r"([\w.-]+)>=([\d.]+)", text)
        assert match is not None
        name, least = match.groups()
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} is missing ({text} is wanted)")
            continue
        if _numbers(there) < _numbers(least):
            found.append(f"{name} is {there} ({text} is wanted)")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


@dataclass
class Part:
    """A process, and the lines of JSON that it writes as it goes."""

    name: str
    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    ended: str = ""
    """How it ended, in words; nothing where it ended as it should."""

    def start(self) -> None:
        self.log.unlink(missing_ok=True)
        command = [sys.executable, "-P", __file__, "--part", *self.arguments]
        environment = {**os.environ, **self.environment, "COMPRESS_GPU_LOG": str(self.log), "OMP_NUM_THREADS": "2"}
        with open(self.log.with_suffix(".txt"), "wb") as said:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)

    def finish(self, until: float) -> None:
        """Waits for it until then, and no longer."""
        if self.process is None:
            self.ended = "there was no time to begin it"
            return
        try:
            status = self.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.ended = "its time was up"
            return
        # pytest: 1 is a test that failed, which the log tells; 5 is none to run.
        if status not in (0, 1, 5):
            lines = self.log.with_suffix(".txt").read_text(errors="replace").strip().splitlines()
            self.ended = f"status {status}: {lines[-1][:300] if lines else 'it said nothing'}"

    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        # The last line may be half written where its process was stopped.
        return [json.loads(line) for line in lines if line.endswith("}")]


def tests(name: str) -> int:
    """One part's tests, in this process."""
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-o", "addopts=", "-m", "gpu"]
    return int(pytest.main([*options, str(Path(__file__).with_name(f"test_{name}.py"))]))


def table(device: str, until: float) -> int:
    """The shape table, a line for each row."""
    import torch

    from compress.kernels import bench

    def tell(**event: Any) -> None:
        with open(os.environ["COMPRESS_GPU_LOG"], "a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")

    states = [bench.parse_state(text) for text in SCHEMES]
    layers, tokens = [*bench.LAYERS], (1, 8, 16, 32, 64, 128, 2048)
    few = [(4096, 4096), (22016, 4096), (8192, 8192)]
    if device == "cpu":
        states, layers, few, tokens = states[:2], [(512, 512)], [(512, 512)], (1, 16)
        bench.WEIGHT_BYTES = 1 << 20
    bandwidth, whence = bench.peak_bandwidth(device)
    tell(bandwidth=bandwidth, whence=whence)
    for shapes, some in ((layers, states[:1]), (few, states[1:])):
        skipped = lambda case: tell(skipped=case)  # noqa: E731
        for row in bench.table(shapes, some, tokens, device, torch.bfloat16, until=until, skipped=skipped):
            tell(row=bench.facts(row))
    return 0


def everything(device: str, seconds: int, out: Path) -> int:
    """All parts, and what they found."""
    started = time.monotonic()
    lacking = missing()
    for line in lacking:
        print(f"note: {line}")
    try:
        import torch
    except ImportError:
        print(
            "error: torch\n  expected: PyTorch with CUDA\n  got:      none that Python finds\n  do:       install it",
            file=sys.stderr,
        )
        return _NO_GPU
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "error: make gpu\n  expected: an NVIDIA GPU that torch can use\n"
            f"  got:      no GPU (torch {torch.__version__}, CUDA {torch.version.cuda}): nothing was run\n"
            "  do:       run it where there is one; `python -P tests/gpu/run.py --device cpu` rehearses it here",
            file=sys.stderr,
        )  # fmt: skip
        return _NO_GPU
    logs = out / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    parts = [
        Part(
            f"{name} {number + 1}/{count}",
            [name, "--device", device],
            logs / f"{name}-{number}.jsonl",
            {"COMPRESS_GPU_PART": f"{number}/{count}"},
        )
        for name, count in PARTS.items()
        for number in range(count)
    ]
    print(f"tests: {len(parts)} processes, {TESTS * seconds:.0f} s at most", flush=True)
    _run(parts, started + TESTS * seconds, together=len(parts) if device == "cuda" else 1)
    until = started + seconds
    last = Part(TABLE, [TABLE, "--until", str(until - 15), "--device", device], logs / "table.jsonl")
    print(f"table: {until - time.monotonic():.0f} s at most", flush=True)
    _run([last], until, together=1)
    found = collected(parts, last)
    found |= {"device": device, "missing": lacking, "seconds": round(time.monotonic() - started), "machine": machine(device)}
    (out / "gpu.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    text = report(found)
    (out / "gpu.md").write_text(text)
    print(text)
    print(f"written: {out / 'gpu.json'}, {out / 'gpu.md'}")
    return 0 if sound(found) else 1


def _run(parts: list[Part], until: float, together: int) -> None:
    for start in range(0, len(parts), together):
        some = parts[start : start + together]
        for part in some:
            if time.monotonic() < until:
                part.start()
        for part in some:
            part.finish(until)


def collected(parts: list[Part], last: Part) -> dict[str, Any]:
    """What the logs tell, and what they should have told."""
    tests_, unfinished = [], []
    for part in parts:
        events = part.events()
        done = [event for event in events if "test" in event]
        names = [name for event in events for name in event.get("collected", ())]
        tests_ += done
        unfinished += [name for name in names if name not in {event["test"] for event in done}]
    events = last.events()
    first: dict[str, Any] = next((event for event in events if "bandwidth" in event), {})
    ended = {part.name: part.ended for part in [*parts, last] if part.ended}
    return {
        "tests": tests_, "unfinished": unfinished, "ended": ended, "peak": first,
        "rows": [event["row"] for event in events if "row" in event],
        "notes": [event["note"] for part in parts for event in part.events() if "note" in event],
        "skipped_cases": [event["skipped"] for event in events if "skipped" in event],
    }  # fmt: skip


def sound(found: dict[str, Any]) -> bool:
    """Whether everything ran, and was right."""
    wrong = [event for event in found["tests"] if event["outcome"] == "failed"]
    faults = [row for row in found["rows"] if row["ours"] and row["fault"]]
    passed = any(event["outcome"] == "passed" for event in found["tests"])
    return (
        passed
        and bool(found["rows"])
        and not (wrong or faults or found["unfinished"] or found["ended"] or found["skipped_cases"])
    )


def machine(device: str) -> dict[str, Any]:
    """What it ran on, as doctor has it; what there is to say without it where that cannot be imported."""
    try:
        from compress.evaluate import backend_report

        return {**backend_report.machine(), "runs_on": backend_report.runs_on(device)}
    except ImportError as error:
        import torch

        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        return {"runs_on": f"{name}, torch {torch.__version__}", "doctor": f"cannot be imported: {error}"}


def report(found: dict[str, Any]) -> str:
    """The page: machine, tests, what went wrong or did not fit, and the table."""
    counts: dict[str, dict[str, int]] = {}
    for event in found["tests"]:
        file = Path(event["test"].partition("::")[0]).name
        of = counts.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0})
        of[event["outcome"]] += 1
    title = "# Measured on a GPU" if found["device"] == "cuda" else "# A rehearsal on the CPU: nothing here was measured on a GPU"
    lines = [title, "", f"{found['machine']['runs_on']}; {found['seconds']} s in all.", ""]
    lines += [f"* {line}" for line in found["missing"]]
    lines += [
        "",
        *_rows(("tests", "passed", "failed", "skipped"), [(file, *of.values()) for file, of in sorted(counts.items())]),
        "",
    ]
    lines += [f"* {note}" for note in found.get("notes", ())]
    lines += [f"* {part} was cut short: {why}" for part, why in found["ended"].items()]
    lines += [f"* failed: {event['test']}: {event['why']}" for event in found["tests"] if event["outcome"] == "failed"]
    lines += [f"* did not fit: {name}" for name in found["unfinished"]]
    lines += [f"* did not fit: {case}" for case in found["skipped_cases"]]
    reasons: dict[str, int] = {}
    for event in found["tests"]:
        if event["outcome"] == "skipped":
            reasons[event["why"]] = reasons.get(event["why"], 0) + 1
    lines += [f"* skipped: {count}: {why}" for why, count in reasons.items()]
    if found["rows"]:
        lines += ["", f"Peak {found['peak']['bandwidth'] / 1e9:,.0f} GB/s, {found['peak']['whence']}.", "", *_table(found)]
    return "\n".join(lines) + "\n"


def _table(found: dict[str, Any]) -> list[str]:
    from compress.kernels import bench

    names = set(bench.Row.__dataclass_fields__)
    rows = [bench.Row(**{k: v for k, v in row.items() if k in names}) for row in found["rows"]]
    return _rows(bench.HEAD, bench.cells(rows, found["peak"]["bandwidth"]))


def _rows(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


if __name__ == "__main__":
    sys.exit(main())
