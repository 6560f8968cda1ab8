"""The rows of a run: printed as they come, written as they come, and what failed among them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cspd_kernels.info import collect

# Column and width: fixed, as a row is printed before the next one is known.
COLUMNS = (
    ("op", 17), ("size", 33), ("backend", 28), ("baseline", 38), ("median s", 9), ("p20..p80", 20),
    ("baseline s", 10), ("p20..p80", 20), ("ratio", 7), ("error", 0),
)  # fmt: skip


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

    def cells(self) -> list[str]:
        """What the table shows; of a row whose accuracy fails, no speed."""
        if self.correct:
            speed = [f"{self.seconds:.4g}", f"{self.seconds_p20:.4g}..{self.seconds_p80:.4g}"]
            speed += [f"{self.baseline_seconds:.4g}", f"{self.baseline_p20:.4g}..{self.baseline_p80:.4g}"]
            speed += [f"{self.ratio:.2f}x"]
        else:
            speed = ["-", "-", "-", "-", "WRONG"]
        return [self.op, self.size, self.backend, self.baseline, *speed, f"{self.error:.1e} ({self.accuracy})"]


class Report:
    """Rows and failures of one run. A case that raises is told in its place, and the others go on.

    Args:
        path: of a JSON file, written again with every row, so that it holds what there is however the run ends.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.rows, self.failures = path, [], []
        self._begun = False

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._print(row.cells())
        self.write()

    def failed(self, op: str, size: str, name: str, error: BaseException) -> None:
        """A case, a contender or a baseline (``name``) that raised. The text is kept, not the error, which holds its
        frames and all tensors in them."""
        reason = first_line(error)
        self.failures.append({"op": op, "size": size, "name": name, "reason": reason})
        self._print([op, size, name, f"FAILED: {reason}"])
        self.write()

    @contextlib.contextmanager
    def trying(self, op: str, size: str, name: str = "all of it") -> Iterator[None]:
        """What raises in this block is reported, and the run goes on after it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  (of whatever kind)
            self.failed(op, size, name, error)

    def _print(self, cells: list[str]) -> None:
        if not self._begun:
            self._begun = True
            self._print([name for name, _ in COLUMNS])
        line = "  ".join(cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS))
        print(line.rstrip(), flush=True)

    def write(self) -> None:
        if self.path is not None:
            rows = [asdict(row) | {"ratio": row.ratio if row.correct else None} for row in self.rows]
            write_results(self.path, rows, **({"failures": self.failures} if self.failures else {}))

    def finish(self) -> None:
        """Write, and end the process with status 1 where a row is wrong or something failed."""
        self.write()
        if self.path is not None:
            print(f"wrote {self.path}")
        wrong = [f"wrong: {row.op} {row.size} {row.backend}: {row.cells()[-1]}" for row in self.rows if not row.correct]
        failed = ["failed: {op} {size} {name}: {reason}".format(**failure) for failure in self.failures]
        if wrong or failed:
            raise SystemExit("\n".join(dict.fromkeys(wrong + failed)))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def write_results(path: Path, rows: list[dict], **settings) -> None:
    """Rows and settings as JSON, with the commit, the time and the environment."""
    result = {**_origin(), **settings, "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")


@functools.cache
def _origin() -> dict:
    """Of all files of this process: asked once, while nothing has failed yet."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": collect(),
    }
