"""Launches that depend on a flag in a device's memory, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Callable

import torch


def run_while(flag: torch.Tensor, body: Callable[[], None], at_most: int) -> None:
    """Repeat launches while ``flag`` (1,) int32 is not 0, which they change; ``at_most`` so often.

    Where the host cannot see the flag it launches all ``at_most`` times: the kernels then leave everything as it is.
    """
    for _ in range(at_most):
        if flag.device.type == "cpu" and not flag.item():
            return
        body()


def run_if(flag: torch.Tensor, body: Callable[[], None]) -> None:
    """Launch if ``flag`` is not 0, or where the host cannot see it."""
    run_while(flag, body, 1)
