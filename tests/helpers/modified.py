"""The modified distribution max(0, p - q) of two Gaussians with one sigma, and tests of samples against it."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from verdicts import cast, distance_and_start

from cspd_kernels import Denoised

P = 1e-4  # a correct implementation fails a test of fixed seed below this with this probability
# D, the path term L_q - L_p, channels. Where D = 0 does not hold the distribution is phi(t) (1 - exp(-D (t - t_0))).
CASES = [
    (1.0, 0.0, 1),
    (1.3, 0.4, 4),
    (0.8, -0.3, 16),
    (0.3, -1.2, 2),  # t_0 = 3.85: the far tail
    (1e-2, -2e-2, 3),  # t_0 = 2
    (1e-4, 0.0, 3),
    (1e-7, 0.0, 5),  # below the shortest distance: t is Rayleigh's
    (1e-4, 1e-3, 2),  # t_0 = -10: a plain draw
    (30.0, 0.0, 8),
    (30.0, -450.0, 8),  # t_0 = 0, and the second tail is nothing: a half normal
    (1e4, -5e7, 3),
]


def pair(distance, path, channels, rows, sigma="paper", seed=0):
    """(x, draft, target): models ``distance`` apart with one sigma; x so far on the draft's side that none is kept."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.randn(channels, generator=generator)
    along = along / along.norm()
    log_std = 0.5 * torch.randn(channels, generator=generator) - 0.5
    std = log_std.exp()
    mean_p = torch.zeros(channels)  # what D leaves of larger means would be their rounding
    if 0.1 < distance < 100:
        mean_p = torch.randn(channels, generator=generator)
    mean_q = mean_p - distance * along * std
    x = mean_q - (100 / distance + 100 * abs(path) / distance + 100) * along * std
    zeros, path = torch.zeros(rows), torch.full((rows,), path if sigma == "paper" else -path)
    mean_q, mean_p, log_std, x = (v.expand(rows, -1) for v in (mean_q, mean_p, log_std, x))
    sample = mean_p + 50 * log_std.exp()  # in nobody's way
    return x, Denoised(x, mean_q, log_std, path), Denoised(sample, mean_p, log_std, zeros)


def components(token, draft, target):
    """(t along mu_p - mu_q, what is left in channels - 1 orthogonal directions), in sigmas of the target, float64."""
    mean_q, mean_p, log_p = (v[0].double() for v in (draft.mean, target.mean, target.log_std))
    n, d = ((v - mean_p) / log_p.exp() for v in (token.double(), 2 * mean_p - mean_q))
    along = d / d.norm()
    basis, _ = torch.linalg.qr(torch.cat([along[:, None], torch.eye(len(d)).double()], dim=1))
    return n @ along, n @ basis[:, 1:]


def modified_cdf(distance, t_0):
    """The distribution function of t by numerical integration of its density; none of its tails are differences."""
    low = max(t_0, -12.0)
    grid = low + (max(12.0, low + 6) - low) * np.linspace(0, 1, 200001) ** 2
    density = np.exp(-(grid**2 - low**2) / 2) if t_0 > 0 else np.exp(-(grid**2) / 2)
    density = density * -np.expm1(-distance * (grid - t_0))
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    return lambda t: np.interp(t, grid, cdf / cdf[-1])


def assert_modified(token, draft, target, sigma="paper") -> None:
    """Tokens (N, C) of rows of one pair follow the modified distribution: along, across, and independently."""
    draft, target = cast(draft, "cpu"), cast(target, "cpu")
    t, across = components(token.cpu(), draft, target)
    distance, t_0 = (float(v[0]) for v in distance_and_start(draft, target, sigma))
    assert t.min() >= t_0 - 1e-5 * (1 + distance)
    assert stats.kstest(t.numpy(), modified_cdf(distance, t_0)).pvalue > P
    for component in across.T:
        assert stats.kstest(component.numpy(), "norm").pvalue > P
    if across.shape[1]:
        square = across.square().sum(dim=1)
        assert stats.kstest(square.numpy(), stats.chi2(across.shape[1]).cdf).pvalue > P
        for component in (*across.T, square):
            assert stats.spearmanr(t.numpy(), component.numpy()).pvalue > P
            assert stats.spearmanr(t.abs().numpy(), component.abs().numpy()).pvalue > P


def acceptance_rate(distance, path=0.0) -> float:
    """E min(1, exp(L)) for L ~ N(path - D^2 / 2, D^2), which the ratio of a draft's token has."""
    normal = stats.norm
    below = normal.logcdf((-path - distance**2 / 2) / distance)
    return float(normal.cdf((path - distance**2 / 2) / distance) + math.exp(path + below))
