"""Definition of ``accept_reject``: every row walks through every candidate and every try."""

from __future__ import annotations

import math

import torch

from ...noise import STREAM_PROPOSAL, normals, uniforms
from ..density_ratio.reference import log_density_ratio
from .candidates import SHORTEST, chosen_of, difference, judge, one_of, survival, with_candidates

FARTHEST = 6.0  # a closed-form draw starts at most so many sigma beyond the target's mean


def accept_reject(
    x, draft, target, seed, rows, relaxation=1.0, sigma="paper", max_tries=100, residual="rejection",
    *, dtype=torch.float32,
):  # fmt: skip
    """Like :func:`cspd_kernels.accept_reject`, densities computed in ``dtype`` (float32 or float64)."""
    x, draft, target, relaxation, named = with_candidates(x, draft, target, relaxation)
    candidate, log_c, log_ratio = judge(x, draft, target, seed, rows, relaxation, sigma, dtype=dtype)
    draft, target = one_of(draft, 0), one_of(target, 0)
    accepted = candidate >= 0
    token = torch.where(accepted[:, None], chosen_of(x, candidate), target.sample.float())
    tries = torch.where(accepted, 0, -1).to(torch.int32)
    max_tries = min(max_tries, 1) if residual == "closed_form" else max_tries
    for k in range(1, max_tries + 1):
        if residual == "closed_form":
            proposal, kept = closed_form(draft, target, seed, rows, sigma, log_c)
        else:
            proposal = propose(target, seed, rows, k)
            kept = keep(proposal, draft, target, sigma, uniforms(seed, rows, k), log_c, dtype)
        kept &= tries == -1
        token = torch.where(kept[:, None], proposal, token)
        tries = torch.where(kept, k, tries)
    return (token, accepted, candidate, tries, log_ratio) if named else (token, accepted, tries, log_ratio[:, 0])


def propose(target, seed, rows, k):
    """The k-th proposal of every row, float32: ``y = mu_p + sigma_p n`` with the normals of (seed; row, k)."""
    n = normals(seed, rows, k, target.mean.shape[-1], STREAM_PROPOSAL)
    return target.mean.float() + torch.exp(target.log_std.float()) * n


def keep(proposal, draft, target, sigma, u, log_c, dtype=torch.float32):
    """(N,) bool: u <= 1 - c / r_1(y), which is never true where r_1 <= c since u > 0."""
    log_ratio = log_density_ratio(proposal, draft, target, 1.0, sigma, dtype=dtype)
    return u <= -torch.expm1(log_c.to(dtype) - log_ratio)


def closed_form(draft, target, seed, rows, sigma, log_c=0.0):
    """One draw of the modified distribution, both models with the target's sigma: ((N, C), (N,) whether it exists).

    With ``d = (mu_p - mu_q) / sigma``, D = |d| and t the component of ``(y - mu_p) / sigma`` along d, the
    ratio is ``log r_1 - log c = D (t - t_0)``, ``t_0 = -D / 2 - (path - log c) / D``, c = 1 where there is one
    candidate. So t has a density proportional to ``phi(t) (1 - exp(-D (t - t_0)))`` beyond t_0, that is the
    survival function

        S(t) proportional to Q(t) - exp(D (t_0 + D / 2)) Q(t + D),        Q the normal's upper tail,

    which is inverted at the uniform of (seed; row, 1); what is orthogonal to d is the first proposal's.
    In float64: S is a small difference of tails where the models are close.
    """
    n = normals(seed, rows, 1, target.mean.shape[-1], STREAM_PROPOSAL).double()
    d, distance, path = difference(draft, target, sigma)
    t_0 = -0.5 * distance - (path - log_c) / distance
    exists = (t_0 <= FARTHEST) & torch.isfinite(distance)
    along = d / distance.clamp(min=1e-200)[:, None]
    t = _invert(distance.clamp(min=SHORTEST), t_0, uniforms(seed, rows, 1).double())
    n = n + (t - (n * along).sum(dim=1))[:, None] * along
    proposal = (target.mean.float().double() + torch.exp(target.log_std.float().double()) * n).float()
    return proposal, exists & torch.isfinite(proposal).all(dim=1)


def _invert(distance, t_0, u):
    """t with ``S(t) = u S(t_0)``, by halving: (N,) float64."""
    log_weight = distance * (t_0 + 0.5 * distance)
    low, high = t_0.clamp(min=-FARTHEST), torch.full_like(t_0, 2 * FARTHEST)
    goal = u * survival(low, distance, log_weight)
    for _ in range(math.ceil(math.log2(3 * FARTHEST / 1e-10))):
        middle = 0.5 * (low + high)
        beyond = survival(middle, distance, log_weight) > goal
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return low
