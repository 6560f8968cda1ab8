"""Figures and charts of the pages from the files in ``results``: ``python benchmarks/report.py [--check]``.

It writes every block ``<!-- NAME -->`` ... ``<!-- /NAME -->`` of README.md and of docs/ anew, and every chart in
docs/images. ``--check`` writes nothing, names what differs and ends with status 1. Equal files give equal bytes.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path

import report_curves
import report_pages
import report_plots
import report_summary
import report_tables
import report_trained

ROOT = Path(__file__).parent.parent
_part = functools.partial
BLOCKS: dict[str, Callable[[], str]] = {
    "HEADLINE": report_summary.headline,
    "LIMITS": report_summary.limits,
    "DEMO": report_summary.demo,
    "HOST": report_summary.host,
    "KERNELS": _part(report_tables.kernels, "cpu"),
    "KERNELS-H100": _part(report_tables.kernels, "h100"),
    "SWEEPS-H100": report_tables.swept,
    "SWEEPS-CPU": report_summary.sweeps_on_the_cpu,
    "SWEEPS-OR-STEPS": report_summary.sweeps_or_steps,
    "END": _part(report_tables.whole_images, "cpu"),
    "END-H100": _part(report_tables.whole_images, "h100"),
    "QUALITY-DIGITS": _part(report_trained.quality, "digits"),
    "QUALITY-CLOTH": _part(report_trained.quality, "cloth"),
    "REACHED": _part(report_trained.sweeps_of_heads, report_trained.reached),
    "SETTLED": _part(report_trained.sweeps_of_heads, report_trained.settled),
    "BFLOAT16": _part(report_trained.sweeps_of_heads, report_trained.rounded),
    "COMPATIBLE-LOOPS": report_pages.compatible_loops,
    "COMPATIBLE-NETWORKS": report_pages.compatible_networks,
    "COMPATIBLE-NETWORKS-CPU": report_pages.compatible_networks_on_a_cpu,
    "COMPATIBLE-MAR": report_pages.compatible_mar_loops,
    "NETWORK-CALLS": report_pages.network_calls,
    "ANDERSON": report_pages.anderson,
    "STEP-SPECULATION": report_pages.step_speculation,
    "CONTEXT-RELAXATION": report_pages.context_relaxation,
    "ENTROPY-DRAFT": report_pages.entropy_draft,
}
IMAGES: dict[str, Callable[[], str]] = {
    "seconds": report_plots.seconds,
    "seconds-images": report_plots.seconds_images,
    "time-split": report_plots.time_split,
    "latency-h100": report_curves.latency_h100,
    "latency-cpu": report_curves.latency_cpu,
    "quality-calls": report_curves.quality_calls,
    "quality-seconds": report_curves.quality_seconds,
    "parallel": report_curves.parallel,
}
MARK = re.compile(r"^<!-- (/?)([A-Z0-9-]+) -->$", re.MULTILINE)


def pages(root: Path) -> list[Path]:
    """Those that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(text: str, page: str = "the page") -> str:
    """A page with all of its blocks written anew.

    Raises:
        ValueError: a mark is alone, stands twice, or has a name that is not known.
    """
    marks = [(match[2], bool(match[1])) for match in MARK.finditer(text)]
    names = [name for name, ends in marks if not ends]
    if marks != [(name, ends) for name in names for ends in (False, True)] or len(set(names)) != len(names):
        raise ValueError(f"expected each block of {page} to begin and end once, got the marks {marks}")
    for name in names:
        if name not in BLOCKS:
            raise ValueError(f"expected the blocks of {page} to be among {', '.join(BLOCKS)}, got {name}")
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = before + start + BLOCKS[name]() + end + rest.partition(end)[2]
    return text


def made(root: Path) -> dict[Path, str]:
    """What every page and every image is to hold."""
    texts = {page: filled(page.read_text(encoding="utf-8"), page.name) for page in pages(root)}
    return texts | {root / "docs" / "images" / f"{name}.svg": draw() for name, draw in IMAGES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; name what differs, with status 1")
    check = parser.parse_args().check
    differs = []
    for path, text in made(ROOT).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            differs.append(str(path.relative_to(ROOT)))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
    if differs:
        print(f"{'differs' if check else 'wrote'}: {', '.join(differs)}")
    if check and differs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
