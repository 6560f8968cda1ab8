"""Definition of ``accept_reject``: every row walks through every try."""

from __future__ import annotations

import torch

from ...noise import STREAM_PROPOSAL, normals, uniforms
from ..density_ratio.reference import log_density_ratio


def accept_reject(x, draft, target, seed, rows, relaxation=1.0, sigma="paper", max_tries=100, *, dtype=torch.float32):
    """As :func:`cspd_kernels.accept_reject`, densities computed in ``dtype`` (float32 or float64)."""
    log_ratio = log_density_ratio(x, draft, target, relaxation, sigma, dtype=dtype)
    accepted = torch.log(uniforms(seed, rows, 0)) <= log_ratio
    token = torch.where(accepted[:, None], x, target.sample.float())
    tries = torch.where(accepted, 0, -1).to(torch.int32)
    for k in range(1, max_tries + 1):
        proposal = propose(target, seed, rows, k)
        kept = keep(proposal, draft, target, sigma, uniforms(seed, rows, k), dtype) & (tries == -1)
        token = torch.where(kept[:, None], proposal, token)
        tries = torch.where(kept, k, tries)
    return token, accepted, tries, log_ratio


def propose(target, seed, rows, k):
    """The k-th proposal of every row, float32: ``y = mu_p + sigma_p n`` with the normals of (seed; row, k)."""
    n = normals(seed, rows, k, target.mean.shape[-1], STREAM_PROPOSAL)
    return target.mean.float() + torch.exp(target.log_std.float()) * n


def keep(proposal, draft, target, sigma, u, dtype=torch.float32):
    """(N,) bool: u <= 1 - exp(-log r_1(y)), which is never true where log r_1 <= 0 since u > 0."""
    log_ratio = log_density_ratio(proposal, draft, target, 1.0, sigma, dtype=dtype)
    return u <= -torch.expm1(-log_ratio)
