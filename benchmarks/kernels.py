"""Microbenchmarks of the kernels: ``python benchmarks/kernels.py``.

How to call it::

    python benchmarks/kernels.py                             all cases of this device
    python benchmarks/kernels.py --list                      the cases, and which of them run here
    python benchmarks/kernels.py --only denoise --only 'evaluate/*/2/*'
    python benchmarks/kernels.py --quick                     one size of each op, few runs: a check, not a measurement
    python benchmarks/kernels.py --json FILE --csv FILE      files of the rows
    python benchmarks/kernels.py --compile-report            registers, spills and shared memory; no GPU needed

The cases are the table in ``registry.py``. A row is one contender beside one named baseline, measured in turns on the
same inputs. It holds medians, p20 and p80 of both, their ratio, the error and the share of the floor (``floors.py``).
A row whose error exceeds its bound shows no speed. Rows are printed and written as they come. What raises is reported
in its place. The rest goes on, and the exit status is 1. ``compare.py`` compares two files.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch

from baselines import Compilations
from floors import Rates
from groups import measure_group
from registry import HEADS, OPS, QUICK_RUNS, Case, all_cases, groups, selected, why_not_here
from rows import Report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the cases and whether they run here, and stop")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN",
        help="cases whose name op/size/N/dtype/backend holds this, or matches it as a glob; may be given several times",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one size of each op, few runs: a check, no measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, floors and environment")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as a table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile-report", action="store_true", help="registers, spills, shared memory of all kernels; no GPU needed"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.compile_report:
        import compile_report  # needs Triton

        return compile_report.print_report(compile_report.report(HEADS, args.quick, os.cpu_count() or 1), args.json)
    device = torch.device(args.device)
    cases = selected(all_cases(), args.only)
    if not cases:
        raise SystemExit(f"expected --only to name some of the cases that --list shows, got {', '.join(args.only)}")
    if args.quick:
        cases = [case for case in cases if case.quick]
    if args.list:
        return print_list(cases, device)
    reasons = {case: why_not_here(case, device) for case in cases}
    lines = (
        f"{OPS[case.op][1]}, {case.backend.partition(',')[0]}: not measured, {reason}"
        for case, reason in reasons.items()
        if reason and case.device == device.type
    )
    for line in dict.fromkeys(lines):
        print(line)
    runnable = [case for case, reason in reasons.items() if reason is None]
    if not runnable:
        raise SystemExit(
            f"none of the {len(cases)} cases runs on {device}: {', '.join(dict.fromkeys(reasons.values()))}"
        )
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}{threads}")
    run(runnable, args.quick, device, Report(args.json, args.csv))


def run(cases: list[Case], quick: bool, device: torch.device, report: Report) -> None:
    """Measure group by group; what raises costs no other group its rows."""
    rates, compilations = Rates(device), Compilations(device)
    report.settings["rates"] = rates.measured
    for together in groups(cases):
        first = together[0]
        size = f"{first.head} N={first.tokens} {first.variant}".strip()
        with report.trying(first.op, size):
            compilations.begin()
            group = importlib.import_module(OPS[first.op][0]).group(together, device, compilations)
            measure_group(group, QUICK_RUNS if quick else first.runs, device, report, rates)
    for name, rate in rates.measured.items():
        print(f"measured rate: {rate:.3g} {name}")
    report.finish()


def print_list(cases: list[Case], device: torch.device) -> None:
    """A line for each case: its name, its device, whether it runs here and its baselines."""
    width = max(len(case.name) for case in cases)
    for case in cases:
        reason = why_not_here(case, device)
        print(
            f"{case.name.ljust(width)}  {case.device.ljust(4)}  {'no: ' + reason if reason else 'runs here'}"
            f"  [against {', '.join(case.baselines)}]"
        )


if __name__ == "__main__":
    main()
