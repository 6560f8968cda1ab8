"""A residual branch added to its stream, and the LayerNorm in front of the next branch: one pass over the stream."""

from __future__ import annotations

import os

import torch

from ...backends import ENVIRONMENT_VARIABLE, implementation, interpreting, why_unavailable
from ...logs import log_once


def norm_backend(backend: str | None, device: torch.device) -> str:
    """What serves ``add_norm`` beside the other ops of a backend: Triton's kernel on a CUDA device, unless "torch" or
    "cuda", which has none of its own, was asked for."""
    asked = backend or os.environ.get(ENVIRONMENT_VARIABLE)
    if device.type != "cuda":
        return "triton" if asked == "triton" and interpreting() else "torch"
    reason = None if asked in (None, "", "triton") else f"backend={asked!r} has none of its own"
    slow_on = device if reason is None else None  # else it was asked for
    reason = reason or why_unavailable("triton", "add_norm")
    if reason is not None:
        log_once(f"add_norm is done by PyTorch's kernels: {reason}", slow_on=slow_on, cause=reason)
    return "torch" if reason else "triton"


def add_norm(
    stream: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``stream += delta`` in place, then ``LN(stream) weight + bias`` in the type of the next product's operands.

    Statistics and the stream are float32 under half precision, as under autocast. Inference only.

    Args:
        stream: (..., E) contiguous, float32 or float64; changed where there is a delta.
        delta: of its shape, contiguous, of any floating type; None adds nothing.
        weight, bias: (E,) in the stream's type.
        dtype: of the result.
        backend: "torch", "triton", or None: as :func:`norm_backend` chooses.

    Returns:
        (..., E) of ``dtype``.
    """
    backend = norm_backend(backend, stream.device) if backend is None else backend
    function = implementation("add_norm", backend, stream.device, stream)
    return function(stream, delta, weight, bias, eps, dtype)
