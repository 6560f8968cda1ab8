"""The definition of ``add_norm``."""

from __future__ import annotations

import torch


def add_norm(stream, delta, weight, bias, eps, dtype):
    """Like :func:`cspd_kernels.ops.add_norm.add_norm`, in the stream's own type."""
    if delta is not None:
        stream += delta.to(stream.dtype)
    centred = stream - stream.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight + bias).to(dtype)
