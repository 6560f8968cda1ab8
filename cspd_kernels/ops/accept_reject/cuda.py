"""``accept_reject`` in CUDA: accept test and redraw in one launch.

The kernels read contiguous float32 values: operands of other types or strides are copied first.
"""

from __future__ import annotations

import torch

from ...cuda_support import extension, launch_stream, multiprocessors
from ...devices import on
from ..density_ratio.cuda import operands, plain, pointers
from ..density_ratio.cuda import why_unsupported as why_too_wide

__all__ = ["accept_reject", "why_unsupported"]


def why_unsupported(x: torch.Tensor) -> str | None:
    """None when the kernels cover tokens like x, else why not."""
    if x.dim() == 3:
        return "its kernels judge one candidate a token: use backend='triton' or backend='torch'"
    return why_too_wide(x)


def accept_reject(x, draft, target, seed, rows, relaxation, sigma, max_tries, residual):
    """As :func:`cspd_kernels.accept_reject`."""
    n, channels = x.shape
    device = x.device
    token = torch.empty(n, channels, dtype=torch.float32, device=device)
    accepted = torch.empty(n, dtype=torch.bool, device=device)
    tries = torch.empty(n, dtype=torch.int32, device=device)
    log_ratio = torch.empty(n, dtype=torch.float32, device=device)
    if n:
        with on(device):
            tensors, relaxation = operands(x, draft, target, relaxation)
            sample, rows = plain(target.sample), rows.contiguous()
            seed, seeds = (0, seed.data_ptr()) if isinstance(seed, torch.Tensor) else (seed, 0)
            extension().accept_reject(
                *pointers(tensors), relaxation, sample.data_ptr(), rows.data_ptr(), token.data_ptr(),
                accepted.data_ptr(), tries.data_ptr(), log_ratio.data_ptr(), n, channels, seed,
                seeds, max_tries, sigma == "released", residual == "closed_form",
                multiprocessors(device), launch_stream(device),
            )  # fmt: skip
    return token, accepted, tries, log_ratio
