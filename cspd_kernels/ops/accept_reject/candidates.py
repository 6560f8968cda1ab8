"""Several candidates of one token, tried in order: the part of ``accept_reject``'s definition before the redraw.

Given that candidates 0..i-1 were rejected, the token must still follow the density ``(e^delta p - c_i q)_+ / Z_i``,
with delta the path term. Candidate i, drawn from q, is accepted with probability ``min(1, (r_i - c_i)_+ / Z_i)``; what
then is left is proportional to ``(e^delta p - (c_i + Z_i) q)_+``: the same family again, with

    c_{i+1} = c_i + Z_i,        Z_i = Z(c_i) = integral of (e^delta p - c_i q)_+ .

It starts at ``c_0 = 0`` and ``Z_0 = 1``, the test of one candidate. Without a path term that is Z(0), and the token
follows p; with one Z(0) is e^delta, and what is compared are trajectories, as with one candidate.

One number per row is all that a rejection leaves behind. Of two Gaussians of one sigma, D sigma apart, Z is a
difference of two of the normal's upper tails Q::

    Z(c) = e^delta S(t),   S(t) = Q(t) - (c / e^delta) Q(t + D),   t = (log c - delta) / D - D / 2

The scheme is that of SpecInfer (arXiv 2305.09781) and of recursive rejection (arXiv 2402.14160).
"""

from __future__ import annotations

from numbers import Real

import torch

from ...noise import CANDIDATE_STRIDE, uniforms
from ..denoise import Denoised
from ..density_ratio.reference import log_density_ratio

SHORTEST = 1e-6  # below this distance of the means, in sigma, the distribution's shape no longer depends on it


def with_candidates(x, draft, target, relaxation):
    """(x (N, K, C), draft, target, relaxation with an axis of candidates, whether x had it already)."""
    draft, target = without_sample(draft), plain(target)
    if named := x.dim() == 3:
        return x, draft, target, relaxation, named
    draft, target = (Denoised(*(None if v is None else v[:, None] for v in chain)) for chain in (draft, target))
    relaxation = relaxation[:, None] if isinstance(relaxation, torch.Tensor) else relaxation
    return x[:, None], draft, target, relaxation, named


def plain(chain) -> Denoised:
    """The fields that count of a chain of whatever kind."""
    return Denoised(*(getattr(chain, name, None) for name in Denoised._fields))


def without_sample(draft) -> Denoised:
    """Likewise of a draft, whose sample is not looked at: it may be missing, or of any shape."""
    return plain(draft)._replace(sample=None)


def one_of(value, i):
    """What belongs to candidate i of a chain, or of a value per row and candidate; one of all candidates is its too."""
    if isinstance(value, torch.Tensor):
        return value[:, min(i, value.shape[1] - 1)]
    if value is None or isinstance(value, Real):
        return value
    return Denoised(*(one_of(v, i) for v in plain(value)))


def chosen_of(x, candidate):
    """(N, C) float32: the candidate of that number, the first one where it is negative."""
    if x.shape[1] == 1:
        return x[:, 0].float()
    return torch.take_along_dim(x, candidate.clamp(min=0).long()[:, None, None], dim=1)[:, 0].float()


def take(chain, part) -> Denoised:
    """Some rows of a chain; its mean stands in for the sample, which nothing looks at."""
    mean = chain.mean[part]
    return Denoised(mean, mean, chain.log_std[part], chain.path_log_std[part])


def judge(x, draft, target, seed, rows, relaxation, sigma, *, compact=False, dtype=torch.float32):
    """(number of the accepted candidate (N,) int32 or -1, log c_K (N,) float64, log ratios (N, K)).

    With ``compact``, rows that have accepted one are not looked at any more, and their log c_K means nothing.
    """
    log_ratio = [
        log_density_ratio(x[:, i], *(one_of(v, i) for v in (draft, target, relaxation)), sigma, dtype=dtype)
        for i in range(x.shape[1])
    ]
    accepted = torch.log(uniforms(seed, rows, 0)) <= log_ratio[0]
    candidate, log_c = accepted.to(torch.int32) - 1, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(1, x.shape[1]):
        part = (candidate < 0).nonzero()[:, 0] if compact else slice(None)
        chains = (take(one_of(chain, i), part) for chain in (draft, target))
        u = uniforms(seed, rows[part] + i * CANDIDATE_STRIDE, 0)
        accepted, log_c[part] = try_next(log_ratio[i][part], *chains, sigma, u, log_c[part])
        candidate[part] = torch.where(accepted & (candidate[part] < 0), i, candidate[part])
    return candidate, log_c, torch.stack(log_ratio, dim=1)


def try_next(log_ratio, draft, target, sigma, u, log_c):
    """For a candidate after the first: (whether u <= (r - c)_+ / Z (N,), log (c + Z) (N,) float64).

    A Z that is no number, of chains that are not finite, counts as 0; r > c is then certain.
    """
    log_ratio = log_ratio.double()
    log_mass = log_mass_above(draft, target, sigma, log_c)
    excess = log_ratio + torch.log(-torch.expm1(log_c - log_ratio))  # log (r - c)
    accepted = (log_ratio > log_c) & (torch.log(u.double()) <= excess - log_mass)
    return accepted, torch.logaddexp(log_c, log_mass)


def log_mass_above(draft, target, sigma, log_c):
    """log Z(c), (N,) float64, both models with the target's sigma."""
    _, distance, path = difference(draft, target, sigma)
    distance = distance.clamp(min=SHORTEST)
    t = (log_c - path) / distance - 0.5 * distance
    log_mass = path + torch.log(survival(t, distance, log_c - path))
    return torch.where(torch.isnan(log_mass), -torch.inf, log_mass)


def difference(draft, target, sigma):
    """(d = (mu_p - mu_q) / sigma_p (N, C), D = |d| (N,), path (N,)), float64; NaN where the path is not finite."""
    mean_q, mean_p, log_p, path_q, path_p = (
        v.float().double() for v in (draft.mean, target.mean, target.log_std, draft.path_log_std, target.path_log_std)
    )
    d = (mean_p - mean_q) * torch.exp(-log_p)
    path = path_q - path_p if sigma == "paper" else path_p - path_q
    return d, d.square().sum(dim=1).sqrt(), path + 0.0 * path


def survival(t, distance, log_weight):
    """Q(t) - exp(log_weight) Q(t + D), float64."""
    log_tail, log_other = (torch.special.log_ndtr(-v) for v in (t, t + distance))
    return torch.exp(log_tail) - torch.exp(log_weight + log_other)
