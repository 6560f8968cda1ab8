"""How many tokens and steps fit the workspace of the hoisted modulations; shared by the backends."""

from __future__ import annotations

from collections.abc import Callable

import torch


def in_blocks_of_rows(
    chain: Callable,
    cond,
    x,
    noise,
    scales: tuple,
    bytes_per_row: int,
    workspace_bytes: int,
    guess: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """``chain(cond, x, noise, scales, guess, steps_at_once)`` on all tokens, or on blocks of them.

    Modulations of several steps at a time where those of one step of all rows fit the workspace;
    else of one step, of as many rows as fit.

    Args:
        cond: (G, N, Z). scales: G - 1 numbers or tensors (1 or N, 1).
        bytes_per_row: of one step's modulations of one token. guess: None, or (N, ...).
    """
    rows = len(x)
    block = max(1, workspace_bytes // bytes_per_row)
    if rows <= block:
        return chain(cond, x, noise, scales, guess, max(1, block // max(rows, 1)))
    parts = []
    for start in range(0, rows, block):
        part = slice(start, start + block)
        part_noise = noise[:, part] if isinstance(noise, torch.Tensor) else noise[part]
        part_guess = None if guess is None else guess[part]
        parts.append(chain(cond[:, part], x[part], part_noise, of_rows(scales, part), part_guess, 1))
    return tuple(map(torch.cat, zip(*parts)))


def of_rows(scales: tuple, rows) -> tuple:
    """Guidance scales of some of the rows."""
    return tuple(s[rows] if isinstance(s, torch.Tensor) and len(s) > 1 else s for s in scales)
