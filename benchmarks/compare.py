"""Compares two result files: ``python benchmarks/compare.py OLD NEW [--least PERCENT] [--anyway] [--json [FILE]]``.

It marks what moved beyond both spreads: p20 to p80 of one run lies outside p20 to p80 of the other. Its marks::

    slower, faster   the new median moved, and by more than --least percent (default 2)
    wrong            the new result exceeds its bound, is not a number, or the case failed
    right again      the old one was wrong, the new one is not
    missing, new     the case is in one file only
    baseline ...     what a row is compared with moved: then the machine may be another one, or busy

The exit status is 1 where something is slower or wrong, else 0. It is 2 where the files cannot be compared, as when
they have no case in common. Files of different devices are refused, unless --anyway is given. Other numbers of threads
or versions of PyTorch give a warning.
Any file of rows with medians, p20 and p80 can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# What tells one row from another, where a row has it.
IDENTITY = (
    "op", "size", "backend", "kind", "name", "model", "case", "tokens", "channels", "cfg", "dtype", "weights", "steps",
    "gamma", "options",
)  # fmt: skip
FAILING = ("slower", "wrong")
LEAST = 2.0


class NotComparableError(ValueError):
    """Two files that cannot be compared; the message says why."""


@dataclass(frozen=True)
class Timed:
    """A median with its spread; ``wrong`` says why it counts for nothing."""

    median: float
    low: float
    high: float
    wrong: str = ""


@dataclass(frozen=True)
class Moved:
    """What became of one case; seconds are medians."""

    case: str
    what: str
    old: float | None
    new: float | None
    note: str = ""

    def __str__(self) -> str:
        both = isinstance(self.old, float) and isinstance(self.new, float) and self.old > 0
        change = f"  {self.old:.4g} s -> {self.new:.4g} s ({100 * (self.new / self.old - 1):+.1f} %)" if both else ""
        return f"{self.what:12s}  {self.case}{change}{f'  {self.note}' if self.note else ''}"


def load(path: Path) -> dict:
    """A result file.

    Raises:
        NotComparableError: there is none, or it holds no rows.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NotComparableError(f"expected a result file, cannot read {path}: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise NotComparableError(f"expected a file with rows, got none in {path}")
    return result


def made_on(result: dict) -> dict[str, str]:
    """Device, threads and PyTorch of a file, as far as it says."""
    environment = result.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    gpus, threads = environment.get("gpus"), environment.get("cpu threads", result.get("threads"))
    found = {}
    if isinstance(gpus, list):
        gpu = gpus[0] if gpus else None
        found["device"] = gpu.get("name", "a GPU") if isinstance(gpu, dict) else "a CPU"
    if threads is not None and found.get("device", "a CPU") == "a CPU":
        found["threads"] = str(threads)
    if "torch" in environment:
        found["torch"] = str(environment["torch"])
    return found


def differences(old: dict, new: dict) -> dict[str, str]:
    """What differs between two files: name (device, threads, torch) and a sentence."""
    before, after = made_on(old), made_on(new)
    found = {}
    for name in ("device", "threads", "torch"):
        if name in before and name in after and before[name] != after[name]:
            found[name] = f"the runs differ in {name}: {before[name]} and {after[name]}"
    if "device" not in before or "device" not in after:
        found["unknown"] = "one of the files does not say on what it was measured"
    return found


def timings(result: dict) -> dict[str, Timed]:
    """Every median of a file by the name of its case. Rows without a spread are left out."""
    found: dict[str, Timed] = {}
    for row in (row for row in result["rows"] if isinstance(row, dict)):
        case, wrong = case_of(row), why_wrong(row)
        for name, timed in timed_fields(row, wrong):
            if name == "baseline":
                key = " | ".join(str(row[part]) for part in ("op", "size", "baseline") if part in row)
                found.setdefault(f"baseline {key}", timed)
            else:
                key = f"{case} | {name}" if name else case
                found[key] = _worse(found.get(key), timed)
    return found


def _worse(one: Timed | None, other: Timed) -> Timed:
    """A case has a row for every baseline: it is wrong where one of them is."""
    return one if one is not None and (one.wrong or not other.wrong) else other


def case_of(row: dict) -> str:
    parts = [
        f"{row[name]}" if isinstance(row[name], str) else f"{name} {row[name]}" for name in IDENTITY if name in row
    ]
    return " | ".join(parts)


def why_wrong(row: dict) -> str:
    """Empty where the row's error is within its bound, or it has none."""
    error, bound = row.get("error"), row.get("bound")
    if "error" in row and not _number(error):
        return f"its error is {error}"
    if _number(error) and _number(bound) and error > bound:
        return f"its error {error:.1e} exceeds {bound:.1e}"
    return "it has no ratio" if "ratio" in row and not _number(row["ratio"]) else ""


def timed_fields(row: dict, wrong: str) -> list[tuple[str, Timed]]:
    """(name, median with spread): ``x``, ``x_p20`` and ``x_p80``, or a list of the three under ``x seconds``."""
    found = []
    for name, value in row.items():
        if name in ("seconds", "baseline_seconds"):
            stem = "baseline" if name.startswith("baseline") else "seconds"
            if not {f"{stem}_p20", f"{stem}_p80"} <= set(row):
                continue
            values = (value, row[f"{stem}_p20"], row[f"{stem}_p80"])
        elif name.endswith(" seconds") and isinstance(value, list) and len(value) == 3:
            stem, values = name.removesuffix(" seconds"), value
        else:
            continue
        if all(map(_number, values)):
            # Where the error exceeds its bound the baseline's time is still one.
            reason = "" if stem == "baseline" else wrong
            found.append(("" if stem == "seconds" else stem, Timed(*map(float, values), reason)))
        elif stem != "baseline":
            found.append(("" if stem == "seconds" else stem, Timed(*[math.nan] * 3, "its time is not a number")))
    return found


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def failures_of(result: dict) -> dict[str, str]:
    """Cases that raised, and why."""
    failed = [one for one in result.get("failures") or () if isinstance(one, dict)]
    return {" | ".join(str(one.get(k, "")) for k in ("op", "size", "name")): str(one.get("reason")) for one in failed}


def compare(old: dict, new: dict, least: float = LEAST) -> list[Moved]:
    """What moved; what is wrong comes first. Cases that stayed where they were are left out."""
    before, after, failed = timings(old), timings(new), failures_of(new)
    moved = [Moved(case, "wrong", None, None, f"it failed: {reason}") for case, reason in failed.items()]
    for case in dict.fromkeys([*before, *after]):
        own = judged(case, before.get(case), after.get(case), least)
        if own and not (own.what == "missing" and (case in failed or case.removeprefix("baseline ") in failed)):
            moved.append(own)
    order = ("wrong", "slower", "faster", "right again", "missing", "new")
    return sorted(moved, key=lambda one: order.index(one.what) if one.what in order else len(order))


def judged(case: str, old: Timed | None, new: Timed | None, least: float) -> Moved | None:
    """None where nothing moved."""
    if new is None or old is None:
        only = new or old
        if new is not None and new.wrong:
            return Moved(case, "wrong", None, new.median if math.isfinite(new.median) else None, new.wrong)
        what = "missing" if new is None else "new"
        baseline = "baseline " if case.startswith("baseline ") else ""
        return Moved(case, what, old and old.median, new and new.median) if not baseline and only else None
    if new.wrong:
        note = f"{new.wrong}{', as before' if old.wrong else ''}"
        return Moved(case, "wrong", old.median, new.median if math.isfinite(new.median) else None, note)
    if old.wrong:
        return Moved(case, "right again", None, new.median)
    enough = abs(new.median - old.median) > least / 100 * old.median
    what = "slower" if new.low > old.high else "faster" if new.high < old.low else None
    if what is None or not enough:
        return None
    if case.startswith("baseline "):
        return Moved(case.removeprefix("baseline "), f"baseline {what}", old.median, new.median)
    return Moved(case, what, old.median, new.median)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Exit status: 1 slower or wrong, 2 not comparable, else 0."
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--least", type=float, default=LEAST, metavar="PERCENT", help="smallest change of a median that counts"
    )
    parser.add_argument("--anyway", action="store_true", help="compare files of different devices, too")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path("-"),
        metavar="FILE",
        help="as JSON to a file, or instead of the text",
    )
    args = parser.parse_args(given)
    try:
        old, new = load(args.old), load(args.new)
        differ = differences(old, new)
        if "device" in differ and not args.anyway:
            raise NotComparableError(f"{differ['device']}; --anyway compares them nevertheless")
        both = len(set(timings(old)) & set(timings(new)))
        moved = compare(old, new, args.least)
        if not timings(old) and not moved:
            raise NotComparableError("expected rows with a median, p20 and p80, got none")
        if not both and not any(one.what in FAILING for one in moved):
            raise NotComparableError("expected cases that are in both files, got none")
    except NotComparableError as error:
        print(error, file=sys.stderr)
        return 2
    for sentence in differ.values():
        print(f"warning: {sentence}", file=sys.stderr)
    if args.json:
        text = json.dumps(
            {"warnings": list(differ.values()), "compared": both, "moved": list(map(asdict, moved))}, indent=2
        )
        print(text) if str(args.json) == "-" else args.json.write_text(text + "\n")
    if str(args.json) != "-":
        for one in moved:
            print(one)
        print(f"{both} medians compared, {len(moved)} lines above")
    return int(any(one.what in FAILING for one in moved))


if __name__ == "__main__":
    raise SystemExit(main())
