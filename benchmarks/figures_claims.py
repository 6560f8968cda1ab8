"""What ``figures.py`` checks: for each page the figures in its sentences, and the numbers that are none."""

from __future__ import annotations

from figures import Claim

CLAIMS: dict[str, list[Claim]] = {}
SETTINGS: dict[str, list[str]] = {}  # tolerances, options, sizes: words that hold them
