"""Scripts of benchmarks/, run in this process."""

from __future__ import annotations

import sys


def shrink(benchmarks, monkeypatch, *plans, steps: int = 4) -> None:
    """``kernels.py`` measures these plans alone; a head is "small", and so is what rates are measured with."""
    monkeypatch.setitem(benchmarks.registry.HEADS, "small", (1, 32, 16))
    monkeypatch.setattr(benchmarks.registry, "TABLE", plans)
    monkeypatch.setattr(benchmarks.registry, "STEPS", steps)
    monkeypatch.setitem(benchmarks.floors.SQUARE, "cpu", 64)


def run_main(module, monkeypatch, *arguments):
    """(what it exits with, None where it returns)."""
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", *map(str, arguments)])
    try:
        module.main()
    except SystemExit as end:
        return end
    return None
