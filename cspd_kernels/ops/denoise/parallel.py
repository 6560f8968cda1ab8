"""What a call of ``denoise`` in parallel over its steps is given, whatever the backend."""

from __future__ import annotations

import os
from numbers import Real
from typing import NamedTuple

import torch

from ...errors import InvalidInput
from ...head import DiffusionHead

PARALLEL_VARIABLE = "CSPD_PARALLEL"
AUTO = "auto"
# Changes between two sweeps that are the arithmetic's own: from here on nothing improves. Under strong guidance those
# of bfloat16 may stay above it (docs/parallel.md): such tokens are made step by step in the end, which takes longer.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


class Parallel(NamedTuple):
    """Sweeps in place of steps, until a row changes by no more than ``tolerance``."""

    tolerance: float
    guess: torch.Tensor | None  # (N, T, C) inputs of all steps, in the stream's type


def switched_off() -> bool:
    """Whether the environment asks ``"auto"`` for the sequential chain.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(PARALLEL_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise InvalidInput(
            f"expected {PARALLEL_VARIABLE} as 0 (the sequential chain) or 1 (as measured), got {value!r}"
        )
    return value == "0"


def check_tolerance(who: str, parallel_tol) -> None:
    """Raise where it is not what ``parallel_tol`` may be."""
    if parallel_tol is None or (isinstance(parallel_tol, str) and parallel_tol == AUTO):
        return
    number = isinstance(parallel_tol, Real) and not isinstance(parallel_tol, bool)
    if not number or not 0 < parallel_tol < 1:
        raise InvalidInput(f"{who} expected parallel_tol None, {AUTO!r} or a number in (0, 1), got {parallel_tol!r}")


def nothing(head: DiffusionHead, x_T: torch.Tensor, parallel: Parallel | None) -> tuple[torch.Tensor, ...]:  # noqa: N803
    """What a backend returns for no rows."""
    chain = (*(x_T.new_empty(0, head.channels) for _ in range(3)), x_T.new_empty(0))
    if parallel is None:
        return chain
    sweeps = torch.empty(0, dtype=torch.int32, device=x_T.device)
    return *chain, sweeps, x_T.new_empty(0, head.num_steps, head.channels)
