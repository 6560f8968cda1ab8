"""Scripts of benchmarks/, run in this process."""

from __future__ import annotations

import sys


def run_main(module, monkeypatch, *arguments):
    """(what it exits with, None where it returns)."""
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", *map(str, arguments)])
    try:
        module.main()
    except SystemExit as end:
        return end
    return None
