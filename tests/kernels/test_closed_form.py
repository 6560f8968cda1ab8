"""accept_reject with residual="closed_form": the distribution of the loop it replaces, its edges and its errors."""

import math

import pytest
import torch
from modified import CASES, P, acceptance_rate, assert_modified, components, pair
from scipy import stats
from verdicts import assert_verdict, cast, check_verdict, equal, judged_chains, take

from cspd_kernels import Denoised, accept_reject
from cspd_kernels.noise import STREAM_PROPOSAL, normals
from cspd_kernels.ops.accept_reject import Verdict, reference, torch_backend
from cspd_kernels.testing import random_chains, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

N = 20000


@pytest.mark.parametrize(("distance", "path", "channels"), CASES)
@pytest.mark.parametrize("sigma", ["paper", "released"])
def test_follows_the_modified_distribution(distance, path, channels, sigma):
    x, draft, target = pair(distance, path, channels, N, sigma)
    verdict = accept_reject(x, draft, target, seed=5, sigma=sigma, residual="closed_form")
    assert (verdict.tries == 1).all()  # none accepted, none without its draw
    assert_modified(verdict.token, draft, target, sigma)


@pytest.mark.parametrize("distance", [1e-9, 1e-17])
def test_the_limit_of_close_models_is_rayleighs(distance):
    x, draft, target = pair(distance, 0.0, 2, N)
    verdict = accept_reject(x, draft, target, seed=6, residual="closed_form")
    t, _ = components(verdict.token, draft, target)
    assert stats.kstest(t.numpy(), "rayleigh").pvalue > P


@pytest.mark.parametrize("case", [1, 3])
def test_samples_of_another_distribution_are_told(case):
    """The check is able to fail: plain draws, a neighbouring distance, a dependence."""
    distance, path, channels = CASES[case]
    x, draft, target = pair(distance, path, channels, N)
    token = accept_reject(x, draft, target, seed=5, residual="closed_form").token
    plain = reference.propose(target, 5, torch.arange(N), 1)
    nearer = draft._replace(path_log_std=draft.path_log_std + 0.1)
    t, across = components(token, draft, target)
    mirrored = token + (across[:, :1].sign() * t.abs()[:, None] - t[:, None]).float() * 0.3 * target.log_std.exp()
    for wrong in ((plain, draft, target), (token, nearer, target), (mirrored, draft, target)):
        with pytest.raises(AssertionError):
            assert_modified(*wrong)


@pytest.mark.parametrize(
    ("distance", "path", "channels"), [(1.0, 0.0, 1), (1.3, 0.4, 4), (0.8, -0.3, 16), (0.4, 0.0, 3)]
)
def test_is_the_distribution_of_the_loop(distance, path, channels):
    x, draft, target = pair(distance, path, channels, 4000)
    drawn = accept_reject(x, draft, target, seed=7, residual="closed_form")
    looped = accept_reject(x, draft, target, seed=8, max_tries=500)
    assert (looped.tries > 0).all()
    assert_modified(looped.token, draft, target)
    (t, across), (u, other) = (components(v.token, draft, target) for v in (drawn, looped))
    for a, b in ((t, u), *zip(across.T, other.T), (drawn.token.norm(dim=1), looped.token.norm(dim=1))):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > P


@pytest.mark.parametrize(("distance", "path"), [(1.0, 0.0), (1.3, 0.4), (0.8, -0.3), (1e-2, -2e-2), (5.0, 2.0)])
def test_acceptance_and_the_tokens_of_all_rows(distance, path):
    """The draft's own tokens: judged as ever, and with path terms 0 kept and redrawn ones together are the target's."""
    _, draft, target = pair(distance, path, 3, N)
    generator = torch.Generator().manual_seed(1)
    x = draft.mean + draft.log_std.exp() * torch.randn(N, 3, generator=generator)
    verdict = accept_reject(x, draft, target, seed=9, residual="closed_form")
    looped = accept_reject(x, draft, target, seed=9, max_tries=0)
    assert torch.equal(verdict.accepted, looped.accepted)
    assert stats.binomtest(int(verdict.accepted.sum()), N, acceptance_rate(distance, path)).pvalue > P
    assert torch.equal(verdict.token[verdict.accepted], x[verdict.accepted])
    assert_modified(verdict.token[~verdict.accepted], draft, target)
    if path == 0:
        z = ((verdict.token - target.mean) / target.log_std.exp()).double()
        for c in range(3):
            assert stats.kstest(z[:, c].numpy(), "norm").pvalue > P


@pytest.mark.parametrize("channels", [1, 4, 33])
@pytest.mark.parametrize("max_tries", [0, 1, 100])
@pytest.mark.parametrize(("relaxation", "sigma"), [(1.0, "paper"), (3.0, "released")])
def test_every_path_through_the_backend_decides_alike(channels, max_tries, relaxation, sigma):
    x, draft, target = judged_chains(300, channels, 0, same_sigma=True)
    rows = torch.arange(300) * 2**33 + 5
    arguments = (x, draft, target, 2**64 - 1, rows, relaxation, sigma, max_tries, "closed_form")
    definition = reference.accept_reject(*arguments)
    for compact in (False, True):
        verdict = torch_backend.accept_reject(*arguments, compact=compact)
        for actual, expected in zip(verdict[1:], definition[1:], strict=True):
            assert torch.equal(actual, expected)
        assert relative_error(verdict[0], definition[0]) < 1e-6
    options = {"seed": 2**64 - 1, "rows": rows, "relaxation": relaxation, "sigma": sigma, "residual": "closed_form"}
    check_verdict("torch", x, draft, target, max_tries=max_tries, **options)
    fell_back = (verdict[2] == -1).sum()
    assert fell_back == (~verdict[1]).sum() if max_tries == 0 else fell_back < 3


def test_a_token_depends_on_its_address_and_not_on_its_batch_or_place():
    x, draft, target = judged_chains(300, 5, 5, same_sigma=True)
    rows = torch.arange(300) * 7 + 2**35
    verdict = accept_reject(x, draft, target, seed=9, rows=rows, residual="closed_form")
    for part in (torch.randperm(300, generator=torch.Generator().manual_seed(0)), torch.tensor([250, 3]), slice(4, 5)):
        few = (x[part], take(draft, part), take(target, part))
        again = accept_reject(*few, seed=9, rows=rows[part], residual="closed_form")
        assert torch.equal(verdict.tries[part], again.tries)
        assert relative_error(again.token, verdict.token[part]) < 1e-6


def edge(distance, path, channels=2, rows=2):
    """Rejected rows with this D and L_q - L_p."""
    zeros = torch.zeros(rows, channels)
    mean = zeros.clone()
    mean[:, 0] = -distance
    target = Denoised(zeros + 7, zeros, zeros, torch.zeros(rows))
    return zeros - 1e30, Denoised(zeros, mean, zeros, torch.full((rows,), path)), target


def start(distance, t_0):
    """The path term at which the distribution begins at t_0."""
    return -distance * t_0 - distance**2 / 2


@pytest.fixture(params=["torch", "triton", "cuda"])
def judge(request, device_of):
    """accept_reject by a backend where it runs here, the verdict on the CPU."""
    device = "cpu" if request.param == "torch" else device_of(request.param)

    def judge(x, draft, target, **options):
        chains = x.to(device), cast(draft, device), cast(target, device)
        options = {"seed": 0, "residual": "closed_form"} | options
        return Verdict(*(v.cpu() for v in accept_reject(*chains, backend=request.param, **options)))

    return judge


@pytest.mark.parametrize(
    ("distance", "t_0", "tries"),
    [(1.0, 5.999, 1), (1.0, 6.001, -1), (1e-3, 5.999, 1), (1e-3, 6.001, -1), (1.0, 100.0, -1), (1.0, -1e6, 1),
     (20.0, 5.99, 1), (20.0, 6.01, -1), (1e-6, -1e6, 1), (1e-18, 1e18, -1), (1e-10, 0.0, 1), (1e-17, 0.0, 1),
     (1e4, 0.0, 1)],
)  # fmt: skip
def test_where_a_draw_exists(judge, distance, t_0, tries):
    x, draft, target = edge(distance, start(distance, t_0))
    verdict = judge(x, draft, target)
    assert verdict.tries.tolist() == [tries] * 2
    if tries == -1:
        assert torch.equal(verdict.token, target.sample)
    else:
        t = verdict.token[:, 0]
        assert (t >= t_0 - 1e-5 * (1 + distance)).all()
        assert (t.abs() < 12).all()
        definition = reference.closed_form(draft, target, 0, torch.arange(2), "paper")[0]
        torch.testing.assert_close(t, definition[:, 0], rtol=0, atol=1e-5 * (1 + distance))
        across = normals(0, torch.arange(2), 1, 2, STREAM_PROPOSAL)[:, 1]
        torch.testing.assert_close(verdict.token[:, 1], across, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("path", "tries"), [(0.5, 1), (1e-30, 1), (0.0, -1), (-0.5, -1)])
def test_identical_means_leave_the_target_itself_or_nothing(judge, path, tries):
    x, draft, target = edge(0.0, path, channels=5)
    for sigma, sign in (("paper", 1), ("released", -1)):
        signed = draft._replace(path_log_std=sign * draft.path_log_std)
        verdict = judge(x * math.nan, signed, target, sigma=sigma)  # fmt: skip
        assert verdict.tries.tolist() == [tries] * 2
        plain = normals(0, torch.arange(2), 1, 5, STREAM_PROPOSAL) if tries == 1 else target.sample
        torch.testing.assert_close(verdict.token, plain, rtol=1e-5, atol=1e-5)


def test_a_temperature_of_0_takes_the_targets_own_draw(judge):
    x, draft, target = judged_chains(4, 3, 1)
    target = target._replace(log_std=torch.full_like(x, -math.inf))
    for mean in (draft.mean, target.mean, target.mean + 1e-3):
        cold = Denoised(x, mean, target.log_std, draft.path_log_std)
        verdict = judge(x, cold, target)
        assert torch.equal(verdict.token, target.sample)
        assert verdict.tries.tolist() == [-1] * 4
        assert (verdict.log_ratio == -math.inf).all()


@pytest.mark.parametrize("field", ["mean", "log_std", "path_log_std"])
@pytest.mark.parametrize("chain", ["draft", "target"])
def test_a_row_of_nan_takes_the_targets_own_draw_and_spoils_no_other(judge, chain, field):
    x, draft, target = judged_chains(5, 3, 12, same_sigma=True)
    x = x - 100 * (target.mean - draft.mean)
    chains = {"draft": draft, "target": target}
    clean = judge(x, **chains, target_sigma=True)
    assert (clean.tries == 1).all()
    spoiled = getattr(chains[chain], field).clone()
    spoiled.view(5, -1)[2, 0] = math.nan
    chains[chain] = chains[chain]._replace(**{field: spoiled})
    verdict = judge(x, **chains, target_sigma=True)
    others = torch.arange(5) != 2
    equal([v[others] for v in verdict], [v[others] for v in clean])
    assert verdict.log_ratio[2] == -math.inf
    if (chain, field) != ("draft", "log_std"):  # which the closed form does not look at
        assert verdict.tries[2] == -1
        assert torch.equal(verdict.token[2], target.sample[2])


# --- sigma ---


@pytest.mark.parametrize("sigma", ["paper", "released"])
def test_target_sigma_judges_with_both_and_redraws_with_the_targets(judge, sigma):
    x, draft, target = judged_chains(12, 4, 2)
    verdict = judge(x, draft, target, sigma=sigma, target_sigma=True)
    options = {"seed": 0, "rows": torch.arange(12), "sigma": sigma}
    assert_verdict(verdict, x, draft, target, residual="closed_form", **options)
    looped = judge(x, draft, target, sigma=sigma, max_tries=0, residual="rejection")
    assert torch.equal(verdict.accepted, looped.accepted)
    assert torch.equal(verdict.log_ratio, looped.log_ratio)
    same = draft._replace(log_std=target.log_std)
    far = x - 1e3 * (target.mean - draft.mean)
    expected = judge(far, same, target, sigma=sigma)
    redrawn = ~verdict.accepted & ~expected.accepted
    assert redrawn.sum() > 1
    assert torch.equal(verdict.tries[redrawn], expected.tries[redrawn])
    assert torch.equal(verdict.token[redrawn], expected.token[redrawn])


def test_unequal_sigmas_are_refused_where_it_costs_nothing_to_look():
    x, draft, target = judged_chains(4, 3, 3)
    message = r"same log_std for residual='closed_form', got values that differ by up to .*target_sigma=True"
    with pytest.raises(ValueError, match=message):
        accept_reject(x, draft, target, seed=0, residual="closed_form")
    accept_reject(x, draft, target, seed=0, residual="closed_form", target_sigma=True)
    accept_reject(x, draft, target, seed=0)
    for off, refused in ((0.9e-5, False), (1.5e-5, True)):
        log_std = torch.zeros_like(x)
        log_std[2, 1] = off
        near = draft._replace(log_std=torch.zeros_like(x)), target._replace(log_std=log_std)
        if refused:
            with pytest.raises(ValueError, match=r"differ by up to 1.5e-05"):
                accept_reject(x, *near, seed=0, residual="closed_form")
        else:
            accept_reject(x, *near, seed=0, residual="closed_form")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"residual": "exact"}, r"residual one of \('rejection', 'closed_form'\), got 'exact'"),
        ({"residual": None}, "residual one of .*got None"),
        ({"target_sigma": True}, "True only with residual='closed_form' or several candidates, got True"),
        ({"target_sigma": 1, "residual": "closed_form"}, "target_sigma as a bool.*got 1 with"),
        ({"target_sigma": None}, "target_sigma as a bool.*got None with"),
        ({"residual": "closed_form", "max_tries": -1}, "max_tries as an int >= 0, got -1"),
    ],
)
def test_options_are_checked_before_anything_is_computed(monkeypatch, bad, message):
    monkeypatch.setattr(
        "cspd_kernels.ops.accept_reject.remembered", lambda *_, **__: pytest.fail("asked for a backend")
    )
    x, draft, target = random_chains(4, 3, 0)
    with pytest.raises(ValueError, match=message):
        accept_reject(x, draft, target, seed=0, **bad)


def test_wider_inputs_are_redrawn_as_their_float32(judge):
    x, draft, target = judged_chains(8, 4, 4, same_sigma=True)
    draft = draft._replace(path_log_std=target.path_log_std, mean=torch.cat([target.mean[:4], draft.mean[4:]]))
    x = x * math.nan
    expected = judge(x, draft, target)
    assert expected.tries.tolist() == [-1] * 4 + [1] * 4
    wide = [cast(chain, torch.float64) for chain in (draft, target)]
    off = wide[1]._replace(mean=wide[1].mean * (1 + 1e-12), path_log_std=wide[1].path_log_std - 1e-12)
    for one in (wide[1], off):
        equal(judge(x.double(), wide[0], one), expected)
