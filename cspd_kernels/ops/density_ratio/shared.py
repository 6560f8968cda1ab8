"""What the kernels of both ops that judge tokens share, Triton's and CUDA's."""

from __future__ import annotations

import torch

MAX_CHANNELS = 256


def why_too_wide(x: torch.Tensor) -> str | None:
    """None when the kernels cover tokens like x, C channels in its last axis, else the limit they exceed."""
    if x.shape[-1] > MAX_CHANNELS:
        return (
            f"its kernels cover up to {MAX_CHANNELS} channels, and these tokens have {x.shape[-1]}: use backend='torch'"
        )
    return None
