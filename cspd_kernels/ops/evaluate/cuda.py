"""``evaluate`` in CUDA: the layered chain's network, once."""

from __future__ import annotations

from ..denoise.cuda import KERNELS, why_unsupported
from .on_device import evaluate_on_device

__all__ = ["evaluate", "why_unsupported"]


def evaluate(head, x, timesteps, cond, workspace_bytes):
    """Like :func:`cspd_kernels.evaluate`."""
    return evaluate_on_device(KERNELS, head, x, timesteps, cond, workspace_bytes)
