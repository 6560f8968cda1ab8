"""The trained pairs of ``benchmarks/quality.py``, and how good their images are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cspd.demo import pair as digits
from cspd.demo.quality import frechet_distance


@dataclass(frozen=True)
class Pair:
    """A target, its draft, and what is needed to measure them."""

    name: str
    target: torch.nn.Module
    draft: torch.nn.Module
    one_step: torch.nn.Module | None  # the draft with a head of one step
    steps: int  # of the target, at its best
    fewer: tuple[int, ...]  # of its honest alternatives
    batch: int
    labels: Callable[[int], torch.Tensor]
    figure: Callable[[torch.Tensor], float]  # of images: the lower, the better
    figure_name: str
    cfg: float = 1.0


def _digits() -> Pair:
    target, draft = digits.load_pair()
    return Pair(
        "digits", target, draft, digits.load_drift(), 16, (8, 4, 2), 512, lambda n: torch.arange(n) % 10,
        frechet_distance, "Frechet distance of pixels to the real digits",
    )  # fmt: skip


PAIRS = {"digits": _digits}


def load(name: str) -> Pair:
    """One of :data:`PAIRS`, with its weights."""
    return PAIRS[name]()
