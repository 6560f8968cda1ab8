"""``log_density_ratio`` in CUDA: one pass over the operands.

The kernels read contiguous float32 values: operands of other types or strides are copied first.
"""

from __future__ import annotations

import torch

from ...cuda_support import extension, launch_stream
from ...devices import on
from .shared import why_too_wide as why_unsupported

__all__ = ["log_density_ratio", "operands", "pointers", "why_unsupported"]


def operands(x, draft, target, relaxation) -> tuple[list[torch.Tensor], float]:
    """(x, both chains and a relaxation per token as the kernels read them, the relaxation where it is one number)."""
    tensors = [x, draft.mean, draft.log_std, draft.path_log_std, target.mean, target.log_std, target.path_log_std]
    if isinstance(relaxation, torch.Tensor):
        tensors, relaxation = [*tensors, relaxation], 1.0
    return [plain(v) for v in tensors], relaxation


def plain(v: torch.Tensor) -> torch.Tensor:
    """Contiguous float32; nothing is asked of torch where it is that already."""
    return v if v.dtype is torch.float32 and v.is_contiguous() else v.detach().float().contiguous()


def pointers(tensors: list[torch.Tensor]) -> list[int]:
    """Pointers as the kernels take the tensors of :func:`operands`: no pointer for the relaxation where it is one
    number."""
    return [v.data_ptr() for v in tensors] + [0] * (8 - len(tensors))


def log_density_ratio(x, draft, target, relaxation, sigma):
    """Like :func:`cspd_kernels.log_density_ratio`."""
    n, channels = x.shape
    device = x.device
    out = torch.empty(n, dtype=torch.float32, device=device)
    if n:
        with on(device):
            tensors, relaxation = operands(x, draft, target, relaxation)
            extension().log_density_ratio(
                *pointers(tensors), relaxation, out.data_ptr(), n, channels, sigma == "released", launch_stream(device),
            )  # fmt: skip
    return out
