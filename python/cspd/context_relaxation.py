"""Relaxation from what the target makes of a token: how much its next conditions depend on it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .errors import InvalidInput
from .policies import Window


class ContextRelaxation:
    """Relaxation that grows where the target's next hidden states hardly depend on what is drawn now.

    A token that a relaxed test keeps may lie ``relaxation`` times as far from the target's as at 1. This changes the
    conditions of later tokens, by about its distance squared times how strongly they depend on it. The rule holds the
    product constant, so a token of step d gets ::

        relaxation = least sqrt(scale / change_d),        limited to [least, most]
        change_d   = (settled + (w - 1) interchanged) / w

    Both terms are means over the tokens u of step d + 1, and z are the target's hidden states::

        settled      = |z_u - z_u without the tokens of step d|^2 / V
        interchanged = sum over the branches b of |z_ub - mean z_u|^2 / (w - 1) / V        w branches
        V            = variance of z over the tokens of the window of this image and branch, summed over channels

    Depth: the context is settled if step d was drawn and z_u stays as it was. Breadth: candidates are interchangeable
    if they lead to the same z_u. Each term estimates how far step d may spread z_u, relative to the spread of the
    tokens. The first has one degree of freedom, the second w - 1. Without branches there is the first alone.

    The tokens of a window's last step get ``least``, because nothing is known of what follows them. That costs no
    round: no later step is undone if they are rejected. A window of one token gets ``least`` too, because its V is not
    known. A step that draws several tokens counts as one: its tokens have the change that they make together.

    The rule does not change if all hidden states are moved by the same vector or scaled by the same number. MAR adds a
    learned embedding to each position. It cancels in the differences, though not in V. A cosine would not cancel it: on
    the digits of ``cspd.demo`` the median cosine of z with and without a step is 0.997 to 0.999. The change there is
    0.0006 to 0.11 (5 % to 95 %, at one and two tokens a step), so the defaults relax by 3 to 40. It orders the tokens
    by what an error does to later ones: the rank correlation with the change of all later hidden states per squared
    error is 0.46. At the same acceptance it does only 2 to 13 % less damage than one number. docs/method.md has the
    derivation.

    The rule is ours. It is inspired by CASCADE (Yildirim et al. 2026, arXiv 2605.07230), which relaxes for discrete
    tokens where hidden states are redundant along depth and breadth of a tree of drafts.

    It is for ``SpecDecodeRunner(..., verify="strict")``; the breadth needs ``branches`` > 1.

    Args:
        least, most: bounds of the relaxation, 0 < least <= most.
        scale: > 0, the change from which on nothing is relaxed beyond ``least``. 1 is the change of a token whose
            hidden state becomes another token's.

    Raises:
        InvalidInput: an argument is out of range, or a window does not look ahead.

    Example:
        >>> import cspd
        >>> from cspd.demo.pair import load_pair
        >>> target, draft = load_pair()
        >>> runner = cspd.SpecDecodeRunner(draft, target, cspd.ContextRelaxation(most=20.0), verify="strict")
        >>> runner.relaxation, runner.run(1, steps=4, gamma=2, seed=0).stats.verify
        (ContextRelaxation(1.0, 20.0, scale=1.0), 'strict')
    """

    looks_ahead = True

    def __init__(self, least: float = 1.0, most: float = 42.0, *, scale: float = 1.0) -> None:
        if not 0 < least <= most < math.inf:
            raise InvalidInput(f"expected 0 < least <= most, both finite, got {least!r} and {most!r}")
        if not 0 < scale < math.inf:
            raise InvalidInput(f"expected a finite scale > 0, got {scale!r}")
        self.least, self.most, self.scale = float(least), float(most), float(scale)

    def __repr__(self) -> str:
        return f"ContextRelaxation({self.least}, {self.most}, scale={self.scale})"

    def __call__(self, window: Window) -> torch.Tensor:
        """(B, n) float32."""
        change = change_behind(window)
        relaxation = (self.least * (self.scale / change).sqrt()).clamp(self.least, self.most)
        return torch.where(change.isfinite(), relaxation, self.least)


def change_behind(window: Window) -> torch.Tensor:
    """(B, n) float32, the change of :class:`ContextRelaxation`. It is not finite where it is not known."""
    if window.target_before is None or window.known is None:
        raise InvalidInput(
            'expected a window that shows what the target makes of the tokens that follow, as verify="strict" '
            "computes it, got one without target_before and known"
        )
    z, branches = window.target_z.float(), window.target_branches
    valid = torch.ones_like(window.known, dtype=torch.bool) if window.valid is None else window.valid
    moved = (z - window.target_before.float()).square().sum(dim=-1)  # (B, n), of each token by the step before its own
    if branches is not None and branches.shape[1] > 1:
        # The squares of all w degrees of freedom: var's own divisor is w - 1.
        spread = branches.float().var(dim=1).sum(dim=-1) * (branches.shape[1] - 1)
        moved = (moved + spread) / branches.shape[1]
    return _mean_of_next_step(moved, window.known, valid) / _variance(z, valid)


def _mean_of_next_step(value: torch.Tensor, known: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, n): of each token the mean over the tokens of the step behind its own; NaN where there is none."""
    step = F.pad((known[:, 1:] > known[:, :-1]).cumsum(dim=1), (1, 0))  # 0, 1, ... from the window's first
    of_next = (step[:, None, :] == step[:, :, None] + 1) & valid[:, None, :]  # (B, n, n)
    return torch.where(of_next, value[:, None, :], 0.0).sum(dim=-1) / of_next.sum(dim=-1)


def _variance(z: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, 1): of the valid tokens of each row, summed over channels; NaN for a single one."""
    taken, count = valid[..., None], valid.sum(dim=1, keepdim=True)
    mean = torch.where(taken, z, 0.0).sum(dim=1, keepdim=True) / count[..., None]
    return torch.where(taken, (z - mean).square(), 0.0).sum(dim=(1, 2))[:, None] / (count - 1)
