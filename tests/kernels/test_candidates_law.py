"""Candidates of a shared chain leave the target's distribution as it is, and none of k is accepted with probability Z.

Seeds are fixed, and a correct implementation fails each test with a probability below 1e-9. What is wrong on purpose
has to fail, and is shown to do so but with a probability below 1e-9 as well.
"""

import math

import numpy as np
import pytest
import torch
from candidates import rates
from modified import components, modified_cdf
from scipy import integrate, stats
from slow import slow

from cspd_kernels import Denoised, accept_reject
from cspd_kernels.ops.accept_reject import candidates as definition
from cspd_kernels.ops.accept_reject import torch_backend

P = 1e-9
N = 200_000
DISTANCES = [(0.05, 1), (0.3, 3), (1.0, 2), (2.5, 4), (6.0, 1)]  # D, channels


def gaussians(distance, channels, candidates, seed=0):
    """(x (N, K, C), draft, target): draws of the draft, whose mean lies ``distance`` sigma from the target's."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.randn(channels, generator=generator)
    std = (0.3 * torch.randn(channels, generator=generator)).exp()
    mean_p = torch.randn(channels, generator=generator)
    mean_q = mean_p - distance * along / along.norm() * std
    x = mean_q + std * torch.randn(N, candidates, channels, generator=generator)
    sample = mean_p + std * torch.randn(N, 1, channels, generator=generator)
    zeros, log_std = torch.zeros(N, 1), std.log().expand(N, 1, -1)
    draft, target = (Denoised(sample, mean.expand(N, 1, -1), log_std, zeros) for mean in (mean_q, mean_p))
    return x, draft, target


def flat(token, draft, target):
    """(along, across) of tokens, float64."""
    return components(token, *(Denoised(*(v[:, 0] for v in chain)) for chain in (draft, target)))


def none_accepted(verdict, k) -> int:
    """In how many rows none of the first k candidates was accepted."""
    return int(((verdict.candidate < 0) | (verdict.candidate >= k)).sum())


def left_cdf(distance, rate):
    """The distribution along d of what K rejections leave, of probabilities ``rate``."""
    return modified_cdf(distance, math.log(1 + sum(rate[:-1])) / distance - distance / 2)


def assert_normal(along, across):
    assert stats.kstest(along.numpy(), "norm").pvalue > P
    for component in across.T:
        assert stats.kstest(component.numpy(), "norm").pvalue > P
    square = along.square() + across.square().sum(dim=1)
    assert stats.kstest(square.numpy(), stats.chi2(1 + across.shape[1]).cdf).pvalue > P


@pytest.mark.parametrize(("distance", "channels"), DISTANCES)
def test_how_often_none_is_accepted(distance, channels):
    x, draft, target = gaussians(distance, channels, 8)
    verdict = accept_reject(x, draft, target, seed=1, max_tries=0)
    rate = rates(distance, 8)
    assert rate[0] == pytest.approx(2 * stats.norm.cdf(distance / 2) - 1, rel=1e-9)
    for k in (1, 2, 4, 8):
        assert stats.binomtest(none_accepted(verdict, k), N, rate[k - 1]).pvalue > P


@pytest.mark.parametrize(("distance", "channels"), DISTANCES)
@pytest.mark.parametrize("candidates", [2, slow(5)])
@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
def test_tokens_follow_the_target(distance, channels, candidates, residual):
    x, draft, target = gaussians(distance, channels, candidates, seed=2)
    verdict = accept_reject(x, draft, target, seed=3, residual=residual, max_tries=20_000)
    assert (verdict.tries >= 0).all()
    along, across = flat(verdict.token, draft, target)
    assert_normal(along, across)
    # What was redrawn follows what the rejections left.
    redrawn = verdict.tries > 0
    cdf = left_cdf(distance, rates(distance, candidates))
    assert stats.kstest(along[redrawn].numpy(), cdf).pvalue > P
    for component in across[redrawn].T:
        assert stats.kstest(component.numpy(), "norm").pvalue > P


def test_the_drafts_tokens_do_not_follow_the_target():
    """The test of the normal's is able to fail: D = 0.3 moves a distribution function by 0.119, 0.0073 are allowed."""
    x, draft, target = gaussians(0.3, 3, 1, seed=2)
    allowed = math.sqrt(math.log(2 / P) / (2 * N))
    assert 2 * math.exp(-2 * N * (2 * stats.norm.cdf(0.15) - 1 - allowed) ** 2) < P  # Dvoretzky, Kiefer and Wolfowitz
    with pytest.raises(AssertionError):
        assert_normal(*flat(x[:, 0], draft, target))


def test_an_accepted_second_candidate_follows_its_share():
    """Its density is min(q, (p - q)_+ / Z): what it is drawn from, times how it is accepted."""
    distance = 1.5
    x, draft, target = gaussians(distance, 2, 3, seed=4)
    verdict = accept_reject(x, draft, target, seed=5, max_tries=0)
    along, across = (v[verdict.candidate == 1] for v in flat(verdict.token, draft, target))
    grid = np.linspace(-9, 9, 200001)
    p, q = stats.norm.pdf(grid), stats.norm.pdf(grid + distance)
    cdf = integrate.cumulative_trapezoid(np.minimum(q, np.maximum(0, p - q) / rates(distance, 1)[0]), grid, initial=0)
    assert stats.kstest(along.numpy(), lambda t: np.interp(t, grid, cdf / cdf[-1])).pvalue > P
    assert stats.kstest(across[:, 0].numpy(), "norm").pvalue > P


# --- what is wrong on purpose ---


def certain_to_fail(count_rate, rate) -> None:
    """A count of probability ``count_rate`` fails the test for ``rate`` but with a probability below P."""
    reached = (abs(count_rate - rate) * math.sqrt(N) - 6.2 * math.sqrt(rate * (1 - rate))) / 0.5
    assert stats.norm.sf(reached) < P


def test_a_residual_that_is_not_updated_shows(monkeypatch):
    """c stays 1, so that each later candidate is rejected as the second one is."""
    right = definition.try_next
    monkeypatch.setattr(definition, "try_next", lambda *a: (right(*a)[0], a[-1]))
    verdict = accept_reject(*gaussians(1.0, 2, 8), seed=1, max_tries=0)
    rate = rates(1.0, 8)
    for k in (1, 2):
        assert stats.binomtest(none_accepted(verdict, k), N, rate[k - 1]).pvalue > P
    for k in (4, 8):
        certain_to_fail(rate[0] * (rate[1] / rate[0]) ** (k - 1), rate[k - 1])
        assert stats.binomtest(none_accepted(verdict, k), N, rate[k - 1]).pvalue < P


def test_a_mass_that_is_not_divided_by_shows(monkeypatch):
    """The second candidate is then accepted with probability E min(1, (r - 1)_+) alone."""

    def undivided(log_ratio, draft, target, sigma, u, log_c):
        excess = log_ratio.double().exp() - log_c.exp()
        return u <= excess, torch.logaddexp(log_c, definition.log_mass_above(draft, target, sigma, log_c))

    monkeypatch.setattr(definition, "try_next", undivided)
    verdict = accept_reject(*gaussians(1.0, 2, 2), seed=1, max_tries=0)
    rate = rates(1.0, 2)
    t = np.linspace(-9, 9, 200001)
    kept = np.trapezoid(stats.norm.pdf(t) * np.clip(np.exp(t - 0.5) - 1, 0, 1), t)
    certain_to_fail(rate[0] * (1 - kept), rate[1])
    assert stats.binomtest(none_accepted(verdict, 2), N, rate[1]).pvalue < P


def test_a_redraw_that_forgets_the_candidates_shows(monkeypatch):
    """From (p - q)_+, as after one rejection, in place of (p - c q)_+."""
    right = torch_backend.closed_form
    monkeypatch.setattr(torch_backend, "closed_form", lambda *a: right(*a[:-1]))
    x, draft, target = gaussians(1.0, 2, 5, seed=2)
    verdict = accept_reject(x, draft, target, seed=3, residual="closed_form")
    redrawn = verdict.tries > 0
    along, _ = flat(verdict.token, draft, target)
    rate, grid = rates(1.0, 5), np.linspace(-6, 6, 2001)
    apart = np.abs(left_cdf(1.0, rate)(grid) - left_cdf(1.0, rate[:1])(grid)).max()
    n = int(redrawn.sum())
    assert 2 * math.exp(-2 * n * (apart - math.sqrt(math.log(2 / P) / (2 * n))) ** 2) < P
    assert stats.kstest(along[redrawn].numpy(), left_cdf(1.0, rate)).pvalue < P
