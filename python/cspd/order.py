"""The generation order: which positions are drawn at which autoregressive step.

Everything here follows from the orders and a few numbers known before the first step, so it is
computed once, on the host, and never depends on what is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from cspd_kernels.noise import STREAM_ORDER, words


def mask_lengths(seq_len: int, num_iter: int) -> list[int]:
    """How many tokens are still masked before step 0, after step 0, ..., after the last step.

    After step k of K, ``floor(L cos(pi/2 (k+1)/K))`` tokens stay masked, at least one fewer than
    before and at least one, until the last step draws all that remain (MaskGIT, arXiv 2202.04200;
    MAR). Length K + 1, from L down to 0; equal neighbours mean a step with nothing to draw.
    """
    if num_iter < 1:
        raise ValueError(f"expected num_iter >= 1, got {num_iter}")
    lengths = [seq_len]
    for step in range(num_iter - 1):
        cosine = math.floor(seq_len * math.cos(math.pi / 2.0 * (step + 1) / num_iter))
        lengths.append(max(1, min(lengths[-1] - 1, cosine)))
    return [*lengths, 0]


def guidance_scale(cfg: float, cfg_schedule: str, masked: int, seq_len: int) -> float:
    """Guidance of a step that leaves ``masked`` tokens: constant, or growing linearly from 1 to cfg (Muse)."""
    if cfg_schedule == "constant":
        return float(cfg)
    if cfg_schedule == "linear":
        return 1.0 + (float(cfg) - 1.0) * (seq_len - masked) / seq_len
    raise ValueError(f"expected cfg_schedule 'linear' or 'constant', got {cfg_schedule!r}")


@dataclass(frozen=True)
class Step:
    """One autoregressive step: it draws ``orders[:, after:before]`` at guidance ``cfg``."""

    index: int
    before: int
    after: int
    cfg: float


def plan_steps(seq_len: int, num_iter: int, cfg: float, cfg_schedule: str) -> list[Step]:
    """The steps that draw at least one token, in order."""
    lengths = mask_lengths(seq_len, num_iter)
    return [
        # The last step counts as leaving one token, as in MAR's loop.
        Step(k, before, after, guidance_scale(cfg, cfg_schedule, max(after, 1), seq_len))
        for k, (before, after) in enumerate(pairwise(lengths))
        if before > after
    ]


def positions(orders: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """(B, before - after) positions drawn between two mask lengths, ascending within each image."""
    return orders[:, after:before].sort(dim=1).values


def mask_of(orders: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L) float32 mask, 1 where a token is still to be drawn."""
    mask = torch.zeros(orders.shape, device=orders.device)
    return mask.scatter_(1, orders[:, :length], 1.0)


@dataclass(frozen=True)
class Pass:
    """What one pass of a model over an image needs of the generation order: a step's, or a window's.

    Under guidance the batch is doubled, conditional images first; R is B or 2 B.
    """

    mask: torch.Tensor  # (R, L) float32: the tokens still unknown before the first of its steps
    where: torch.Tensor  # (B, n) int64: the positions it draws, step by step, ascending within a step
    gather: torch.Tensor  # (R, n, 1) int64: the same for the doubled batch
    rows: torch.Tensor  # (B n,) int64: their noise addresses, image number times L plus position
    cfg_scale: float | torch.Tensor  # of each token's own step: a number where all are equal, else (B n,)


def plan_pass(orders: torch.Tensor, images: torch.Tensor, steps: list[Step], guided: bool) -> Pass:
    """The tables of a pass that draws the tokens of ``steps`` for ``images`` (B,) with ``orders`` (B, L)."""
    mask = mask_of(orders, steps[0].before)
    where = torch.cat([positions(orders, step.before, step.after) for step in steps], dim=1)
    rows = (images[:, None] * orders.shape[1] + where).flatten()
    scales = [step.cfg for step in steps for _ in range(step.before - step.after)]
    scale = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=orders.device).repeat(len(orders))
    double = 2 if guided else 1
    return Pass(mask.repeat(double, 1), where, where.repeat(double, 1)[..., None], rows, scale if guided else 1.0)


def random_orders(seed: int, images: torch.Tensor, seq_len: int) -> torch.Tensor:
    """(B, L) generation orders, each a function of (seed; image number) alone."""
    rows = images[:, None] * seq_len + torch.arange(seq_len, device=images.device)
    return words(seed, rows, 0, 0, STREAM_ORDER)[0].argsort(dim=1, stable=True)
