"""``denoise`` in Triton: modulations hoisted into library products, then a few fused kernels a block."""

from __future__ import annotations

from ...head import DiffusionHead
from ...triton_support import why_unsupported_here
from .on_device import Kernels, denoise_on_device, why_not_covered
from .triton_chain import LayeredChain

KERNELS = Kernels("triton", LayeredChain)


def why_unsupported(head: DiffusionHead) -> str | None:
    """None when the kernels cover this head, else the limit it exceeds."""
    return why_not_covered(head) or why_unsupported_here(head.device)


def denoise(head, cond, x_T, noise, temperature, scales, workspace_bytes, parallel=None):
    """Like :func:`cspd_kernels.denoise`; ``scales``: of guidance."""
    return denoise_on_device(KERNELS, head, cond, x_T, noise, temperature, scales, workspace_bytes, parallel)
