"""How many tokens and steps fit the workspace of the hoisted modulations; shared by the backends."""

from __future__ import annotations

from collections.abc import Callable

import torch


def in_blocks_of_rows(
    chain: Callable,
    cond,
    x,
    noise,
    cfg_scale,
    bytes_per_row: int,
    workspace_bytes: int,
    guess: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """``chain(cond, x, noise, cfg_scale, guess, steps_at_once)`` on all tokens, or on blocks of them.

    Modulations of several steps at a time where those of one step of all rows fit the workspace;
    else of one step, of as many rows as fit.

    Args:
        cond: (G, N, Z), G = 2 under guidance. cfg_scale: None, a number, or a tensor (1 or N, 1).
        bytes_per_row: of one step's modulations of one token. guess: None, or (N, ...).
    """
    rows = len(x)
    block = max(1, workspace_bytes // bytes_per_row)
    if rows <= block:
        return chain(cond, x, noise, cfg_scale, guess, max(1, block // max(rows, 1)))
    parts = []
    for start in range(0, rows, block):
        part = slice(start, start + block)
        scale = cfg_scale[part] if isinstance(cfg_scale, torch.Tensor) and len(cfg_scale) > 1 else cfg_scale
        part_noise = noise[:, part] if isinstance(noise, torch.Tensor) else noise[part]
        part_guess = None if guess is None else guess[part]
        parts.append(chain(cond[:, part], x[part], part_noise, scale, part_guess, 1))
    return tuple(map(torch.cat, zip(*parts)))
