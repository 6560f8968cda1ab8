"""accept_reject: the torch backend against its definition, addressing, and the distributions it must produce."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from seeds import BAD_SEED_TENSORS, SEEDS, seed_tensor

from cspd_kernels import Denoised, accept_reject, log_density_ratio
from cspd_kernels.noise import STREAM_PROPOSAL, normals
from cspd_kernels.ops.accept_reject import reference, torch_backend
from cspd_kernels.testing import random_chains

P = 1e-4  # a correct implementation fails a test of fixed seed below this with this probability
N = 20000


def take(chain, part):
    return Denoised(*(v[part] for v in chain))


def assert_same(a, b):
    for name, u, v in zip(("token", "accepted", "tries", "log_ratio"), a, b, strict=True):
        assert torch.equal(u, v), name


@pytest.mark.parametrize("rows", [0, 1, 1000])
@pytest.mark.parametrize("channels", [1, 3, 16, 64])
@pytest.mark.parametrize(
    ("seed", "relaxation", "sigma"), [(0, 1.0, "paper"), (2**63, 0.5, "released"), (7, 3, "paper")]
)
def test_equals_the_definition_token_by_token(rows, channels, seed, relaxation, sigma):
    x, draft, target = random_chains(rows, channels, channels)
    verdict = accept_reject(x, draft, target, seed=seed, relaxation=relaxation, sigma=sigma, max_tries=25)
    definition = reference.accept_reject(x, draft, target, seed, torch.arange(rows), relaxation, sigma, 25)
    assert_same(verdict, definition)
    if rows == 1000:
        assert set(verdict.tries.tolist()) >= {0, 1, 2}
    if rows == 1000 and channels <= 3:  # every outcome has been compared
        assert set(verdict.tries.tolist()) >= {0, 1, 2, 6, -1}


def test_relaxation_per_token():
    x, draft, target = random_chains(100, 3, 1)
    relaxation = torch.linspace(0.2, 5, 100)
    verdict = accept_reject(x, draft, target, seed=0, relaxation=relaxation)
    assert_same(verdict, reference.accept_reject(x, draft, target, 0, torch.arange(100), relaxation))
    row, number = torch.tensor([70]), float(relaxation[70])
    alone = accept_reject(x[row], take(draft, row), take(target, row), seed=0, rows=row, relaxation=number)
    assert_same([v[row] for v in verdict], alone)


def test_types_and_meaning_of_the_fields():
    x, draft, target = random_chains(500, 3, 2, shift=2.0)
    verdict = accept_reject(x, draft, target, seed=0, max_tries=3)
    assert [v.dtype for v in verdict] == [torch.float32, torch.bool, torch.int32, torch.float32]
    assert torch.equal(verdict.accepted, verdict.tries == 0)
    assert torch.equal(verdict.token[verdict.accepted], x[verdict.accepted])
    fell_back = verdict.tries == -1
    assert fell_back.any()
    assert torch.equal(verdict.token[fell_back], target.sample[fell_back])
    assert set(verdict.tries.tolist()) == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("relaxation", [1.0, 2.5])
def test_log_ratio_is_the_relaxed_one(relaxation):
    x, draft, target = random_chains(50, 3, 3)
    verdict = accept_reject(x, draft, target, seed=0, relaxation=relaxation, sigma="released")
    expected = log_density_ratio(x, draft, target, relaxation=relaxation, sigma="released")
    assert torch.equal(verdict.log_ratio, expected)


def test_accept_test_and_proposals_use_the_documented_addresses(python_philox):
    x, draft, target = random_chains(200, 3, 4, shift=1.0)
    seed, rows = 2**40 + 3, torch.arange(200) * 2**30
    verdict = accept_reject(x, draft, target, seed=seed, rows=rows)
    for i, row in enumerate(rows.tolist()):
        counter = (row % 2**32, row >> 32, 0, 2 << 24)
        log_u = math.log((python_philox((seed % 2**32, seed >> 32), counter)[0] + 0.5) * 2.0**-32)
        assert bool(verdict.accepted[i]) == (log_u <= float(verdict.log_ratio[i]))
        if verdict.tries[i] > 0:
            n = normals(seed, rows[[i]], int(verdict.tries[i]), 3, STREAM_PROPOSAL)[0]
            torch.testing.assert_close(verdict.token[i], target.mean[i] + target.log_std[i].exp() * n)
    assert (verdict.tries > 0).sum() > 20


def test_a_token_depends_on_its_address_and_not_on_its_batch_or_place():
    x, draft, target = random_chains(300, 5, 5)
    rows = torch.arange(300) * 7 + 2**35
    verdict = accept_reject(x, draft, target, seed=9, rows=rows)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for part in (shuffled, torch.tensor([250, 3, 17]), slice(4, 5)):
        again = accept_reject(x[part], take(draft, part), take(target, part), seed=9, rows=rows[part])
        assert_same([v[part] for v in verdict], again)
    assert not torch.equal(verdict.tries, accept_reject(x, draft, target, seed=9, rows=rows + 1).tries)
    assert not torch.equal(verdict.tries, accept_reject(x, draft, target, seed=10, rows=rows).tries)


def test_rows_default_to_their_numbers():
    x, draft, target = random_chains(50, 3, 6)
    default = accept_reject(x, draft, target, seed=1)
    assert_same(default, accept_reject(x, draft, target, seed=1, rows=torch.arange(50)))


@pytest.mark.parametrize("block", [1, 100, 5000])
def test_the_size_of_a_block_changes_nothing(monkeypatch, block):
    x, draft, target = random_chains(80, 3, 7)
    expected = accept_reject(x, draft, target, seed=2, max_tries=30)
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", block)
    assert_same(accept_reject(x, draft, target, seed=2, max_tries=30), expected)


@pytest.mark.parametrize("max_tries", [1, 4, 5, 21])
def test_fewer_tries_are_a_prefix(max_tries):
    x, draft, target = random_chains(200, 2, 8)
    full = accept_reject(x, draft, target, seed=2, max_tries=50)
    few = accept_reject(x, draft, target, seed=2, max_tries=max_tries)
    assert torch.equal(few.tries, torch.where(full.tries <= max_tries, full.tries, -1))


def test_no_tries_fall_back_to_the_targets_own_draw():
    x, draft, target = random_chains(100, 3, 9)
    verdict = accept_reject(x, draft, target, seed=0, max_tries=0)
    assert set(verdict.tries.tolist()) == {0, -1}
    assert torch.equal(verdict.token, torch.where(verdict.accepted[:, None], x, target.sample))


def test_impossible_redraw_falls_back_to_the_targets_own_draw():
    x, draft, target = random_chains(50, 3, 10)
    unlikely = target._replace(path_log_std=torch.full((50,), 1e6))
    verdict = accept_reject(x, draft, unlikely, seed=0)
    assert (verdict.tries == -1).all()
    assert torch.equal(verdict.token, target.sample)
    # With the path term's sign turned the same tokens are certain.
    assert accept_reject(x, draft, unlikely, seed=0, sigma="released").accepted.all()


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_identical_models_always_accept(seed):
    x, draft, _ = random_chains(2000, 3, 11)
    verdict = accept_reject(x, draft, draft, seed=seed)
    assert (verdict.log_ratio == 0).all()
    assert verdict.accepted.all()
    assert torch.equal(verdict.token, x)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize(("sigma_q", "sigma_p"), [(1e-6, 1e3), (1e3, 1e-6), (1e-6, 1e-6), (1e3, 1e3)])
@pytest.mark.parametrize("distance", [0.0, 1e4])
def test_extreme_inputs_leave_no_zero_and_no_infinite_token(seed, sigma_q, sigma_p, distance):
    generator = torch.Generator().manual_seed(0)
    mean, noise = (torch.randn(20, 64, generator=generator) for _ in range(2))
    draft, target = (
        Denoised(m + s * noise, m, torch.full_like(m, math.log(s)), torch.zeros(20))
        for m, s in ((mean, sigma_q), (mean + distance * sigma_p, sigma_p))
    )
    for path in (0.0, 1e6, -1e6):
        likely = target._replace(path_log_std=torch.full((20,), path))
        verdict = accept_reject(draft.sample, draft, likely, seed=seed, max_tries=8)
        assert torch.isfinite(verdict.token).all()
        assert (verdict.token != 0).all()
        assert not verdict.log_ratio.isnan().any()


@pytest.mark.parametrize("field", ["mean", "log_std", "path_log_std"])
@pytest.mark.parametrize("chain", ["draft", "target"])
def test_a_row_of_nan_takes_the_targets_own_draw_and_spoils_no_other(chain, field):
    x, draft, target = random_chains(40, 3, 12)
    chains = {"draft": draft, "target": target}
    clean = accept_reject(x, **chains, seed=0)
    spoiled = getattr(chains[chain], field).clone()
    spoiled[5] = math.nan
    chains[chain] = chains[chain]._replace(**{field: spoiled})
    verdict = accept_reject(x, **chains, seed=0)
    assert verdict.tries[5] == -1
    assert torch.equal(verdict.token[5], target.sample[5])
    others = torch.arange(40) != 5
    assert_same([v[others] for v in verdict], [v[others] for v in clean])


def test_inputs_stay_and_nothing_is_recorded():
    x, draft, target = random_chains(50, 3, 13)
    x.requires_grad_()
    kept = (x, *draft, *target)
    before = [v.detach().clone() for v in kept]
    verdict = accept_reject(x, draft, target, seed=0)
    assert all(map(torch.equal, before, kept))
    assert not verdict.token.requires_grad
    assert not any(verdict.token.data_ptr() == v.data_ptr() for v in kept)


# Distributions: x ~ N(mu_q, sigma_q), path terms 0. Then accepting is exact speculative sampling.


def gaussians(mu_q, sigma_q, mu_p, sigma_p, seed):
    """x ~ draft and N rows of one pair of Gaussians, each argument one number per channel."""
    generator = torch.Generator().manual_seed(seed)
    chains = []
    for mu, sigma in ((mu_q, sigma_q), (mu_p, sigma_p)):
        mean, std = torch.tensor(mu).expand(N, -1), torch.tensor(sigma).expand(N, -1)
        sample = mean + std * torch.randn(N, len(mu), generator=generator)
        chains.append(Denoised(sample, mean, std.log(), torch.zeros(N)))
    return chains[0].sample, *chains


PAIRS = [
    ([0.0], [1.0], [1.0], [1.0]),
    ([0.5], [2.0], [0.0], [1.0]),
    ([0.5], [0.7], [0.0], [1.0]),
    ([0.0, 1.0, -2.0], [1.0, 0.5, 3.0], [0.3, 0.8, -1.0], [1.0, 0.5, 3.0]),
    ([0.0, 1.0, -2.0], [1.0, 0.6, 2.5], [0.3, 0.8, -1.0], [0.9, 0.5, 3.0]),
]


@pytest.mark.parametrize(("mu_q", "sigma_q", "mu_p", "sigma_p"), [p for p in PAIRS if p[1] == p[3]])
@pytest.mark.parametrize("relaxation", [1.0, 2.0])
def test_acceptance_rate_at_equal_variances(mu_q, sigma_q, mu_p, sigma_p, relaxation):
    delta = math.dist([m / s for m, s in zip(mu_q, sigma_q)], [m / s for m, s in zip(mu_p, sigma_p)])
    rate = 2 * stats.norm.cdf(-delta / 2)
    if relaxation != 1:  # E min(1, exp(L / r^2)) for L ~ N(-delta^2 / 2, delta^2)
        t = np.linspace(-12, 12, 200001)
        log_ratio = (-(delta**2) / 2 + delta * t) / relaxation**2
        rate = np.trapezoid(np.minimum(1, np.exp(np.minimum(0, log_ratio))) * stats.norm.pdf(t), t)
    verdict = accept_reject(*gaussians(mu_q, sigma_q, mu_p, sigma_p, 0), seed=1, relaxation=relaxation, max_tries=0)
    assert stats.binomtest(int(verdict.accepted.sum()), N, float(rate)).pvalue > P


@pytest.mark.parametrize(("mu_q", "sigma_q", "mu_p", "sigma_p"), PAIRS)
def test_tokens_follow_the_target_exactly(mu_q, sigma_q, mu_p, sigma_p):
    x, draft, target = gaussians(mu_q, sigma_q, mu_p, sigma_p, 2)
    verdict = accept_reject(x, draft, target, seed=3, max_tries=400)
    assert (verdict.tries >= 0).all()
    z = ((verdict.token - target.mean) / target.log_std.exp()).double()
    for c in range(len(mu_p)):
        assert stats.kstest(z[:, c], "norm").pvalue > P
        before = (x[:, c] - target.mean[:, c]) / target.log_std[:, c].exp()
        assert stats.kstest(before.double(), "norm").pvalue < P  # the draft's own tokens do not
    assert stats.kstest((z**2).sum(dim=1), stats.chi2(len(mu_p)).cdf).pvalue > P  # jointly


def modified_cdf(mu_q, sigma_q, mu_p, sigma_p):
    """CDF of max(0, p - q) / Z by numerical integration."""
    grid = np.linspace(-25, 25, 400001)
    density = np.maximum(0, stats.norm.pdf(grid, mu_p, sigma_p) - stats.norm.pdf(grid, mu_q, sigma_q))
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return lambda y: np.interp(y, grid, cdf / cdf[-1])


@pytest.mark.parametrize(("mu_q", "sigma_q", "mu_p", "sigma_p"), [p for p in PAIRS if len(p[0]) == 1])
@pytest.mark.parametrize("relaxation", [1.0, 0.5, 3.0])
def test_rejected_tokens_follow_the_modified_distribution(mu_q, sigma_q, mu_p, sigma_p, relaxation):
    x, draft, target = gaussians(mu_q, sigma_q, mu_p, sigma_p, 4)
    verdict = accept_reject(x, draft, target, seed=5, relaxation=relaxation, max_tries=400)
    rejected = ~verdict.accepted
    assert rejected.sum() > 200
    assert (verdict.tries[rejected] > 0).all()
    cdf = modified_cdf(mu_q[0], sigma_q[0], mu_p[0], sigma_p[0])
    assert stats.kstest(verdict.token[rejected, 0].double(), cdf).pvalue > P
    # As many plain draws of the target, the proposal distribution, do not.
    assert stats.kstest(target.sample[rejected, 0].double(), cdf).pvalue < P


def test_path_term_enters_acceptance_and_redraw():
    x, draft, target = gaussians([0.0], [1.0], [0.5], [1.0], 6)
    for sign, sigma in ((1, "paper"), (-1, "released")):
        shifted = draft._replace(path_log_std=torch.full((N,), sign * 0.4))
        verdict = accept_reject(x, shifted, target, seed=7, sigma=sigma, max_tries=400)
        # r(y) = exp(0.5 y - 0.125 + 0.4) >= 1 for y >= -0.55: acceptance and the support of redrawn tokens
        ratio = torch.exp(0.5 * x[:, 0] - 0.125 + 0.4).clamp(max=1).double().mean()
        assert abs(float(verdict.accepted.double().mean() - ratio)) < stats.norm.isf(P / 2) * 0.5 / math.sqrt(N)
        redrawn = verdict.token[verdict.tries > 0, 0]
        assert -0.56 < float(redrawn.min()) < -0.4


@pytest.mark.parametrize("seed", [-1, 2**64, True, 0.5, None])
def test_seed_is_checked(seed):
    x, draft, target = random_chains(4, 3, 0)
    with pytest.raises(ValueError, match=r"seed to be an int in \[0, 2\*\*64\) or a tensor of one int64 element, got "):
        accept_reject(x, draft, target, seed=seed)


@pytest.mark.parametrize(("seed", "got"), BAD_SEED_TENSORS)
def test_seed_tensor_is_checked(seed, got):
    x, draft, target = random_chains(4, 3, 0)
    with pytest.raises(ValueError, match=f"seed tensor to be of one int64 element on cpu, got {got}"):
        accept_reject(x, draft, target, seed=seed)


@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_tensor_gives_the_bits_of_the_number(seed, residual):
    x, draft, target = random_chains(60, 5, 1)
    target = target._replace(log_std=draft.log_std.clone())
    one = (x, draft, target)
    number = accept_reject(*one, seed=seed, residual=residual)
    assert 0 < number.accepted.sum() < 60
    assert_same(accept_reject(*one, seed=seed_tensor(seed), residual=residual), number)
    options = (torch.arange(60), 1.0, "paper", 9, residual)
    for module in (reference, torch_backend):
        number, tensor = (module.accept_reject(*one, s, *options) for s in (seed, seed_tensor(seed)))
        assert all(map(torch.equal, tensor, number))
    every = torch_backend.accept_reject(*one, seed_tensor(seed), *options, compact=False)
    assert all(map(torch.equal, every, torch_backend.accept_reject(*one, seed, *options, compact=False)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rows": torch.arange(3)}, r"rows of shape \(4,\) to match x, got \(3,\)"),
        ({"rows": torch.arange(4.0)}, r"int64 tensor of shape \(N,\), got torch.float32 \(4,\)"),
        ({"rows": torch.arange(4).view(4, 1)}, r"int64 tensor of shape \(N,\), got torch.int64 \(4, 1\)"),
        ({"rows": torch.arange(4, device="meta")}, "rows on cpu, got meta"),
        ({"rows": range(4)}, "got range"),
        ({"max_tries": -1}, "max_tries as an int >= 0, got -1"),
        ({"max_tries": 1.5}, "max_tries as an int >= 0, got 1.5"),
        ({"max_tries": True}, "max_tries as an int >= 0, got True"),
    ],
)
def test_rows_and_tries_are_checked(bad, message):
    x, draft, target = random_chains(4, 3, 0)
    with pytest.raises(ValueError, match=message):
        accept_reject(x, draft, target, seed=0, **bad)


def test_target_sample_is_checked():
    x, draft, target = random_chains(4, 3, 0)
    with pytest.raises(ValueError, match=r"target.sample floating of shape \(4, 3\) to match x, got .*\(4, 2\)"):
        accept_reject(x, draft, target._replace(sample=torch.ones(4, 2)), seed=0)


@pytest.mark.parametrize("max_tries", [0, 3, 25])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_the_path_of_devices_decides_alike(rows, max_tries):
    x, draft, target = random_chains(rows, 3, 8, shift=2.0)
    arguments = (x, draft, target, 5, torch.arange(rows), 1.0, "paper", max_tries)
    assert_same(torch_backend.accept_reject(*arguments, compact=False), reference.accept_reject(*arguments))


def test_the_drafts_sample_is_not_looked_at():
    x, draft, target = random_chains(200, 3, 0)
    assert_same(accept_reject(x, draft._replace(sample=None), target, seed=0), accept_reject(x, draft, target, seed=0))
