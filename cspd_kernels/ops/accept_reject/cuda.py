"""``accept_reject`` in CUDA: accept test and redraw in one launch.

The kernels read contiguous float32 values: operands of other types or strides are copied first.
"""

from __future__ import annotations

import torch

from ...cuda_support import extension, launch_stream, multiprocessors
from ...devices import on
from ..density_ratio.cuda import operands, pointers, why_unsupported

__all__ = ["accept_reject", "why_unsupported"]


def accept_reject(x, draft, target, seed, rows, relaxation, sigma, max_tries, residual):
    """As :func:`cspd_kernels.accept_reject`."""
    n, channels = x.shape
    token = torch.empty(n, channels, dtype=torch.float32, device=x.device)
    accepted = torch.empty(n, dtype=torch.bool, device=x.device)
    tries, log_ratio = (torch.empty(n, dtype=t, device=x.device) for t in (torch.int32, torch.float32))
    if n:
        with on(x.device):
            tensors, relaxation = operands(x, draft, target, relaxation)
            sample, rows = target.sample.float().contiguous(), rows.contiguous()
            extension().accept_reject(
                *pointers(tensors), relaxation, sample.data_ptr(), rows.data_ptr(), token.data_ptr(),
                accepted.data_ptr(), tries.data_ptr(), log_ratio.data_ptr(), n, channels, seed,
                max_tries, sigma == "released", residual == "closed_form",
                multiprocessors(x.device), launch_stream(x.device),
            )  # fmt: skip
    return token, accepted, tries, log_ratio
