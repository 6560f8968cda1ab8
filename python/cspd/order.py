"""The generation order: which positions are drawn at which autoregressive step.

Everything here follows from the orders and a few numbers known before the first step. It is computed before it,
as tensors on the models' device, and never depends on what is drawn: nothing is read back.
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


def known_of(orders: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L - length) positions already drawn where ``length`` tokens are masked, ascending within each image."""
    return positions(orders, orders.shape[1], length)


def mask_of(orders: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L) float32 mask, 1 where a token is still to be drawn."""
    mask = torch.zeros(orders.shape, dtype=torch.float32, device=orders.device)
    return mask.scatter_(1, orders[:, :length], 1.0)


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; from the host it goes through pinned memory, and the host does not wait for the copy."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def by_token(steps: list[Step], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) int64 and (L,) float32: step index and guidance of an image's tokens in the order of drawing."""
    tokens = [step for step in steps for _ in range(step.before - step.after)]
    index = torch.tensor([step.index for step in tokens], dtype=torch.int64, device="cpu")
    scale = torch.tensor([step.cfg for step in tokens], dtype=torch.float32, device="cpu")
    return to_device(index, device), to_device(scale, device)


@dataclass(frozen=True)
class Pass:
    """What one pass of a model over an image needs of the generation order: a step's, or a window's.

    Under guidance the batch is doubled, conditional images first; R is B or 2 B. n counts the tokens that the pass
    draws in each image: step by step, ascending within a step.
    """

    known: torch.Tensor  # (R, K) int64: the positions drawn before the first of its steps, ascending
    mask: torch.Tensor | None  # (R, L) float32: 1 elsewhere; None where no model asks for masks
    where: torch.Tensor  # (B, n) int64: the positions it draws
    wanted: torch.Tensor  # (R, n) int64: the same for the doubled batch
    rows: torch.Tensor  # (B n,) int64: their noise addresses, image number times L plus position
    steps: torch.Tensor  # (n,) int64: index of the step that draws each of them
    cfg_scale: float | torch.Tensor  # of each token's own step: a number where all are equal, else (B n,)
    counts: tuple[int, ...]  # how many of the n tokens each of its steps draws


@dataclass(frozen=True)
class WindowPlan:
    """The passes of one drafting window: the draft's, step by step, and the target's over all of them."""

    drafts: list[Pass]
    whole: Pass


class Plan:
    """All tables of a run.

    Args:
        orders: (B, L) int64 generation orders. images: (B,) int64 image numbers. Both on the models' device.
        steps: of :func:`plan_steps`. guided: whether the batch is doubled. masks: whether masks are wanted, too.
        tables: of :func:`by_token`.
    """

    def __init__(
        self,
        orders: torch.Tensor,
        images: torch.Tensor,
        steps: list[Step],
        guided: bool,
        masks: bool,
        tables: tuple[torch.Tensor, torch.Tensor],
    ):
        self.steps, self._orders, self._images = steps, orders, images
        self._guided, self._masks = guided, masks
        self._index, self._scale = tables
        self._drafts = [self._step(i) for i in range(len(steps))]

    def step(self, i: int) -> Pass:
        """The pass of the i-th step alone."""
        return self._drafts[i]

    def window(self, first: int, stop: int) -> WindowPlan:
        """The passes of the steps first..stop-1; the whole is joined from theirs."""
        drafts, steps = self._drafts[first:stop], self.steps[first:stop]
        if len(drafts) == 1:
            return WindowPlan(drafts, drafts[0])
        where = torch.cat([draft.where for draft in drafts], dim=1)
        counts = tuple(step.before - step.after for step in steps)
        scale = steps[0].cfg
        if self._guided and len({step.cfg for step in steps}) > 1:
            scale = self._scale[self._drawn(steps)].repeat(len(where))
        return WindowPlan(drafts, self._pass(drafts[0].known, drafts[0].mask, where, steps, scale, counts))

    def _step(self, i: int) -> Pass:
        step, double = self.steps[i], 2 if self._guided else 1
        known = known_of(self._orders, step.before).repeat(double, 1)
        mask = mask_of(self._orders, step.before).repeat(double, 1) if self._masks else None
        where = positions(self._orders, step.before, step.after)
        return self._pass(known, mask, where, [step], step.cfg, (step.before - step.after,))

    def _pass(self, known, mask, where, steps, scale, counts) -> Pass:
        return Pass(
            known=known,
            mask=mask,
            where=where,
            wanted=where.repeat(2 if self._guided else 1, 1),
            rows=(self._images[:, None] * self._orders.shape[1] + where).flatten(),
            steps=self._index[self._drawn(steps)],
            cfg_scale=scale if self._guided else 1.0,
            counts=counts,
        )

    def _drawn(self, steps: list[Step]) -> slice:
        length = self._orders.shape[1]
        return slice(length - steps[0].before, length - steps[-1].after)


def random_orders(seed: int, images: torch.Tensor, seq_len: int) -> torch.Tensor:
    """(B, L) generation orders, each a function of (seed; image number) alone."""
    rows = images[:, None] * seq_len + torch.arange(seq_len, device=images.device)
    return words(seed, rows, 0, 0, STREAM_ORDER)[0].argsort(dim=1, stable=True)
