"""Verdicts on several candidates of a token beside their definition in float64, and inputs to compare them on."""

from __future__ import annotations

import math

import torch
from scipy import integrate, stats
from verdicts import ROUNDING, Expected, assert_ratio, cast, judged_chains, ratio_and_scale, redraw

from cspd_kernels import CandidateVerdict, Denoised
from cspd_kernels.noise import CANDIDATE_STRIDE, uniforms
from cspd_kernels.ops.accept_reject.candidates import SHORTEST


def one(chain, i) -> Denoised:
    """Candidate i's chain."""
    return Denoised(*(v[:, min(i, v.shape[1] - 1)] for v in chain))


def own_chains(rows, candidates, channels, seed):
    """(x (N, K, C), draft, target): every candidate of chains of its own, of one sigma, about half of them accepted."""
    x, *chains = judged_chains(rows * candidates, channels, seed, same_sigma=True)
    draft, target = (Denoised(*(v.unflatten(0, (rows, candidates)) for v in chain)) for chain in chains)
    return x.unflatten(0, (rows, candidates)), draft, target


def shared_chains(rows, candidates, channels, seed):
    """(x (N, K, C), draft, target): candidates of one chain, (N, 1, ...), that differ in the last noise."""
    chains = judged_chains(rows, channels, seed, same_sigma=True)[1:]
    draft, target = (Denoised(*(v[:, None] for v in chain)) for chain in chains)
    noise = torch.randn(rows, candidates, channels, generator=torch.Generator().manual_seed(seed + 1))
    return draft.mean + draft.log_std.exp() * noise, draft, target


def expected_candidates(
    x, draft, target, seed, rows, relaxation=1.0, sigma="paper", max_tries=100, residual="rejection"
) -> Expected:  # fmt: skip
    """The definition in float64, candidate by candidate, with the decisions that rounding may turn."""
    x, draft, target = x.float(), *(cast(chain, torch.float32) for chain in (draft, target))
    candidate = torch.full((len(x),), -1, dtype=torch.int32)
    sure, log_c = torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.float64)
    ratios = []
    for i in range(x.shape[1]):
        chains = one(draft, i), one(target, i)
        ratio, scale = ratio_and_scale(x[:, i], *chains, relaxation_of(relaxation, i), sigma)
        log_u = uniforms(seed, rows + i * CANDIDATE_STRIDE, 0).double().log()
        ratios.append(ratio)
        log_mass = exact_log_mass(*chains, sigma, log_c) if i else None
        slack = ROUNDING * (1 + scale + (0 if log_mass is None else log_mass.abs().nan_to_num(posinf=0)))
        either = [accepts(ratio + e, log_u - e * (1 + log_u.abs()), log_c, log_mass) for e in (-slack, slack)]
        open_ = candidate < 0
        sure &= ~open_ | (either[0] == either[1])
        candidate[open_ & accepts(ratio, log_u, log_c, log_mass)] = i
        log_c = log_c if log_mass is None else torch.logaddexp(log_c, log_mass)
    accepted = candidate >= 0
    draft, target = one(draft, 0), one(target, 0)
    token = torch.where(accepted[:, None], x[torch.arange(len(x)), candidate.clamp(min=0)], target.sample).double()
    tries, tolerance = accepted.to(torch.int32) - 1, torch.zeros_like(token)
    redraw(token, tries, sure, tolerance, draft, target, seed, rows, sigma, max_tries, residual, log_c)
    verdict = CandidateVerdict(token.float(), accepted, candidate, tries, torch.stack(ratios, 1).float())
    return Expected(verdict, sure, tolerance)


def relaxation_of(relaxation, i):
    if not isinstance(relaxation, torch.Tensor):
        return relaxation
    return relaxation[:, i] if relaxation.dim() == 2 else relaxation


def accepts(ratio, log_u, log_c, log_mass):
    if log_mass is None:
        return log_u <= ratio
    gap = ratio - log_c
    return (gap > 0) & (log_u <= ratio + torch.log(-torch.expm1(-gap)) - log_mass)


def exact_log_mass(draft, target, sigma, log_c):
    """log of the integral of (e^path p - c q)_+, by logarithms of tails."""
    mean_q, mean_p, log_p = (v.double() for v in (draft.mean, target.mean, target.log_std))
    distance = ((mean_p - mean_q) / log_p.exp()).norm(dim=1).clamp(min=SHORTEST)
    path = (draft.path_log_std.double() - target.path_log_std.double()) * (1 if sigma == "paper" else -1)
    t = (log_c - path) / distance - distance / 2
    tail, other = (torch.special.log_ndtr(-v) for v in (t, t + distance))
    log_mass = path + tail + torch.log(-torch.expm1(log_c - path + other - tail))
    return torch.where(log_mass.isnan(), -torch.inf, log_mass)


def integrated_mass(c, distance, path=0.0) -> float:
    """The integral of (e^path p - c q)_+ for Gaussians ``distance`` sigma apart, by quadrature of its density."""
    start = (math.log(c) - path) / distance - distance / 2  # in sigmas from p's mean, where the two are equal

    def density(t):
        return math.exp(path) * stats.norm.pdf(t) - c * stats.norm.pdf(t + distance)

    low, high = max(start, -9.0), max(start + 12, 9.0)
    return integrate.quad(density, low, high, epsabs=0, epsrel=1e-10, limit=500)[0]


def rates(distance, candidates) -> list[float]:
    """How likely none of the first k candidates of a shared chain is accepted, for k = 1..K, by quadrature."""
    c, rate = 1.0, []
    for _ in range(candidates):
        rate.append(integrated_mass(c, distance))
        c += rate[-1]
    return rate


def assert_candidates(actual, x, draft, target, *, seed, rows, unsure=0.02, **options) -> Expected:
    """Row by row the definition in float64, but for at most a share of rows with a decision within rounding."""
    actual = CandidateVerdict(*(v.cpu() for v in actual))
    x, draft, target, rows = x.cpu(), cast(draft, "cpu"), cast(target, "cpu"), rows.cpu()
    if isinstance(options.get("relaxation"), torch.Tensor):
        options["relaxation"] = options["relaxation"].cpu()
    expected, sure, tolerance = expected_candidates(x, draft, target, seed, rows, **options)
    assert [v.dtype for v in actual] == [torch.float32, torch.bool, torch.int32, torch.int32, torch.float32]
    assert [v.shape for v in actual] == [v.shape for v in expected]
    assert (~sure).sum() <= unsure * len(sure) + 1
    for field in ("accepted", "candidate", "tries"):
        assert torch.equal(getattr(actual, field)[sure], getattr(expected, field)[sure]), field
    token, accepted, candidate, tries, log_ratio = actual
    assert torch.equal(accepted, candidate >= 0)
    assert torch.equal(accepted, tries == 0)
    assert not token.isnan().any()
    assert ((token - expected.token).abs() <= tolerance)[sure].all()
    kept = torch.arange(len(x))[accepted]
    assert torch.equal(token[accepted], x.float()[kept, candidate[accepted].long()])
    assert torch.equal(token[tries == -1], target.sample.float()[tries == -1, 0])
    for i in range(x.shape[1]):
        few = {"relaxation": relaxation_of(options.get("relaxation", 1.0), i), "sigma": options.get("sigma", "paper")}
        assert_ratio(log_ratio[:, i], x[:, i], one(draft, i), one(target, i), **few)
    return Expected(expected, sure, tolerance)
