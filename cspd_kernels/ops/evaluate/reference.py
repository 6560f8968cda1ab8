"""Definition of ``evaluate``: nothing kept, nothing fused."""

from __future__ import annotations

import torch

from ...time_embedding import embed
from ..denoise.reference import embedded, network


def evaluate(head, x, timesteps, cond, workspace_bytes=None, *, dtype=torch.float32):
    """Like :func:`cspd_kernels.evaluate`, every operand converted to ``dtype`` (float32 or float64) first.

    ``timesteps`` are (M,) or (M, K), on the head's device.
    """
    head = head.to(torch.float64) if dtype == torch.float64 else head.to(torch.float32)
    return network(head, x.to(dtype), embed(head.time, timesteps) + embedded(head, cond.to(dtype)))
