"""The trained pairs of ``benchmarks/quality.py``, and how good their images are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cspd.demo import cloth
from cspd.demo import pair as digits
from cspd.demo.drift import load_drift
from cspd.demo.quality import frechet_distance


@dataclass(frozen=True)
class Pair:
    """A target, its draft, and what is needed to measure them."""

    name: str
    target: torch.nn.Module
    draft: torch.nn.Module
    one_step: dict[str, torch.nn.Module]  # the draft with a head of one step, by the width that is stated of it
    steps: int  # of the target, at its best
    fewer: tuple[int, ...]  # of its honest alternatives
    batch: int
    labels: Callable[[int], torch.Tensor]
    figure: Callable[[torch.Tensor], float]  # of images: the lower, the better
    figure_name: str
    cfg: float = 1.0


def _digits() -> Pair:
    target, draft = digits.load_pair()
    log_std = target.diffloss.gen_diffusion.schedule.log_std_lower[0]
    one_step = {"measured width": load_drift(), "the target's sigma": load_drift(width=math.exp(log_std))}
    return Pair(
        "digits", target, draft, one_step, 16, (8, 4, 2), 512, lambda n: torch.arange(n) % 10,
        frechet_distance, "Frechet distance of pixels to the real digits",
    )  # fmt: skip


def _cloth() -> Pair:
    target, draft = cloth.load_pair(Path(__file__).parent / "pairs")
    steps = cloth.SIDE**2  # a token a step
    return Pair(
        "cloth", target, draft, {}, steps, (steps // 2, steps // 4, steps // 8), 256,
        lambda n: torch.zeros(n, dtype=torch.int64), cloth.frechet_distance,
        "Frechet distance of pixels to the formula",
    )  # fmt: skip


PAIRS = {"digits": _digits, "cloth": _cloth}


def load(name: str) -> Pair:
    """One of :data:`PAIRS`, with its weights."""
    return PAIRS[name]()
