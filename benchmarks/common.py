"""What the benchmarks share: timing, the result row, the environment, printing."""

from __future__ import annotations

import datetime
import functools
import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cspd_kernels.info import collect


@dataclass
class Row:
    """One measured case: a contender against a named baseline on the same inputs in the same run."""

    op: str
    size: str
    backend: str
    baseline: str
    seconds: float  # median
    seconds_p20: float
    seconds_p80: float
    baseline_seconds: float  # median, like the next two
    baseline_p20: float
    baseline_p80: float
    runs: int
    error: float  # as `accuracy` names it
    bound: float  # above which no speed is reported
    accuracy: str

    @property
    def correct(self) -> bool:
        return self.error <= self.bound  # false for NaN

    @property
    def ratio(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_seconds / self.seconds if self.correct else math.nan


def measure(
    contenders: dict[str, Callable], inputs: list, runs: int, device: torch.device, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every run of every contender; they take turns, so that drift of the machine hits all alike.

    Every contender is called with ``inputs[run % len(inputs)]`` and, unless the caller has seen to it,
    warmed up on each of them once.
    """
    for function in contenders.values() if warm_up else ():
        for arguments in inputs:
            function(*arguments)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs):
        for name, function in contenders.items():
            seconds[name].append(_time(function, inputs[run % len(inputs)], device))
    return seconds


def _time(function: Callable, arguments: tuple, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    # Between two calls of a head a whole transformer passes through the cache. Read, not written: nothing is left to
    # write back; and waited for, or a launch would hide behind it.
    _l2_flush(device).sum()
    torch.cuda.synchronize(device)
    start.record(stream)
    function(*arguments)
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(function: Callable[[], object], device: torch.device) -> Callable:
    """Replays of a CUDA graph of ``function``: what the device does, without the gaps between launches."""
    with torch.cuda.device(device):
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    return lambda *_: graph.replay()


@functools.cache
def _l2_flush(device: torch.device) -> torch.Tensor:
    """Larger than any L2."""
    return torch.zeros(64 << 20, dtype=torch.int32, device=device)


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """(median, p20, p80)."""
    return tuple(float(value) for value in np.percentile(seconds, (50, 20, 80)))


def print_rows(rows: list[Row]) -> None:
    """The table; a row whose accuracy fails shows no speed."""
    columns = ["op", "size", "backend", "baseline", "median s", "p20..p80", "baseline s", "p20..p80", "ratio", "error"]
    lines = [columns]
    for row in rows:
        if row.correct:
            speed = [f"{row.seconds:.4g}", f"{row.seconds_p20:.4g}..{row.seconds_p80:.4g}"]
            speed += [f"{row.baseline_seconds:.4g}", f"{row.baseline_p20:.4g}..{row.baseline_p80:.4g}"]
            speed += [f"{row.ratio:.2f}x"]
        else:
            speed = ["-", "-", "-", "-", "WRONG"]
        lines.append([row.op, row.size, row.backend, row.baseline, *speed, f"{row.error:.1e} ({row.accuracy})"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def write_json(path: Path, rows: list[Row]) -> None:
    """Every row with its ratio, and where and when it was measured."""
    write_results(path, [asdict(row) | {"ratio": row.ratio if row.correct else None} for row in rows])


def write_results(path: Path, rows: list[dict], **settings) -> None:
    """Rows and settings as JSON, with the commit, the time and the environment."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    result = {
        "commit": commit.stdout.strip() or "unknown",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": collect(),
        **settings,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")
