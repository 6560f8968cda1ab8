"""``accept_reject`` in CUDA: accept test, of all candidates of a token, and redraw in one launch.

The kernels read contiguous float32 values: operands of other types or strides are copied first. What the candidates
of a token share is read where it lies, once for all.
"""

from __future__ import annotations

import torch

from ...cuda_support import extension, launch_stream, multiprocessors
from ...devices import on
from ..denoise import Denoised
from ..density_ratio.cuda import operands, plain, pointers, why_unsupported
from .candidates import without_sample

__all__ = ["accept_reject", "why_unsupported"]


def accept_reject(x, draft, target, seed, rows, relaxation, sigma, max_tries, residual):
    """Like :func:`cspd_kernels.accept_reject`."""
    n, channels = x.shape[0], x.shape[-1]
    count = x.shape[1] if x.dim() == 3 else None
    device = x.device
    token = torch.empty(n, channels, dtype=torch.float32, device=device)
    accepted = torch.empty(n, dtype=torch.bool, device=device)
    candidate = None if count is None else torch.empty(n, dtype=torch.int32, device=device)
    tries = torch.empty(n, dtype=torch.int32, device=device)
    log_ratio = torch.empty(*x.shape[:-1], dtype=torch.float32, device=device)
    if n:
        with on(device):
            if count is not None:
                draft, target = _without_copies(without_sample(draft)), _without_copies(target)
            tensors, relaxation = operands(x, draft, target, relaxation)
            sample, rows, own, chosen = plain(target.sample), rows.contiguous(), 0, 0
            if count is not None:
                own = sum(1 << i for i, v in enumerate((sample, *tensors[1:])) if v.shape[1] > 1)
                chosen = candidate.data_ptr()
            seed, seeds = (0, seed.data_ptr()) if isinstance(seed, torch.Tensor) else (seed, 0)
            extension().accept_reject(
                *pointers(tensors), relaxation, sample.data_ptr(), rows.data_ptr(), token.data_ptr(),
                accepted.data_ptr(), tries.data_ptr(), log_ratio.data_ptr(), chosen, n, count or 1, own, channels,
                seed, seeds, max_tries, sigma == "released", residual == "closed_form",
                multiprocessors(device), launch_stream(device),
            )  # fmt: skip
    return (token, accepted, tries, log_ratio) if count is None else (token, accepted, candidate, tries, log_ratio)


def _without_copies(chain: Denoised) -> Denoised:
    """The chain, with the one row a token that there is of what was expanded to all candidates."""
    fields = chain.sample, chain.mean, chain.log_std, chain.path_log_std
    return Denoised(*(v if v is None or v.stride(1) else v[:, :1] for v in fields))
