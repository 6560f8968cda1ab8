"""The rows of a run: printed and written as they come, with what failed among them."""

from __future__ import annotations

import contextlib
import csv
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
    ("op", 19), ("size", 33), ("backend", 28), ("baseline", 38), ("median s", 9), ("p20..p80", 20),
    ("baseline s", 10), ("p20..p80", 20), ("ratio", 7), ("of floor", 8), ("error", 0),
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
    floor_seconds: float | None = None  # the least time that the device could take: see floors.py
    floor_of: str = ""  # "bytes" or "products", whichever sets it

    @property
    def correct(self) -> bool:
        return self.error <= self.bound  # false for NaN

    @property
    def ratio(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_seconds / self.seconds if self.correct else math.nan

    @property
    def share(self) -> float | None:
        """Of the floor: 1 is as fast as the device could be. None without a floor, and of a wrong row."""
        return self.floor_seconds / self.seconds if self.floor_seconds and self.correct else None

    def cells(self) -> list[str]:
        """What the table shows. A row whose accuracy fails shows no speed."""
        if self.correct:
            speed = [f"{self.seconds:.4g}", f"{self.seconds_p20:.4g}..{self.seconds_p80:.4g}"]
            speed += [f"{self.baseline_seconds:.4g}", f"{self.baseline_p20:.4g}..{self.baseline_p80:.4g}"]
            speed += [f"{self.ratio:.2f}x", "-" if self.share is None else percent(self.share)]
        else:
            speed = ["-", "-", "-", "-", "WRONG", "-"]
        return [self.op, self.size, self.backend, self.baseline, *speed, f"{self.error:.1e} ({self.accuracy})"]

    def record(self) -> dict:
        """For a file: all fields and what follows from them. A row without a floor says nothing of floors."""
        found = asdict(self)
        if self.floor_seconds is None:
            del found["floor_seconds"], found["floor_of"]
        else:
            found["share"] = self.share
        return found | {"ratio": self.ratio if self.correct else None}


class Report:
    """Rows and failures of one run. A case that raises is reported in its place, and the others go on.

    Args:
        path: of a JSON file. It is written again with every row, so it holds what there is however the run ends.
        table: of a CSV file with the same rows.
    """

    def __init__(self, path: Path | None = None, table: Path | None = None):
        self.path, self.table, self.rows, self.failures = path, table, [], []
        self.settings: dict = {}  # what else the JSON file holds
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
        rows = [row.record() for row in self.rows]
        if self.path is not None:
            failures = {"failures": self.failures} if self.failures else {}
            write_results(self.path, rows, **self.settings, **failures)
        if self.table is not None:
            write_table(self.table, rows)

    def finish(self) -> None:
        """Write, and end the process with status 1 where a row is wrong or something failed."""
        self.write()
        for path in filter(None, (self.path, self.table)):
            print(f"wrote {path}")
        wrong = [f"wrong: {row.op} {row.size} {row.backend}: {row.cells()[-1]}" for row in self.rows if not row.correct]
        failed = ["failed: {op} {size} {name}: {reason}".format(**failure) for failure in self.failures]
        if wrong or failed:
            raise SystemExit("\n".join(dict.fromkeys(wrong + failed)))


def percent(share: float) -> str:
    """Two digits or the point before them, as small shares are what one wants to see."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def write_results(path: Path, rows: list[dict], **settings) -> None:
    """Rows and settings as JSON, with the commit, the time and the environment."""
    result = {**_origin(), **settings, "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")


def write_table(path: Path, rows: list[dict]) -> None:
    """Rows as CSV: a column for every field that some row has."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


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
