"""log_density_ratio against torch.distributions in float64, its conditioning, its extremes and its errors."""

import math

import pytest
import torch
from torch.distributions import Normal

from cspd_kernels import Denoised, accept_reject, log_density_ratio
from cspd_kernels.ops.density_ratio import reference
from cspd_kernels.testing import random_chains


def expected_ratio(x, draft, target, relaxation=1.0, path_sign=1):
    """(log ratio, sum of its terms' magnitudes), float64; a relaxation of squared residuals widens both sigmas."""
    x, draft, target = x.double(), [v.double() for v in draft], [v.double() for v in target]
    if isinstance(relaxation, torch.Tensor):
        relaxation = relaxation.double()[:, None]
    log_p = Normal(target[1], relaxation * target[2].exp()).log_prob(x)
    log_q = Normal(draft[1], relaxation * draft[2].exp()).log_prob(x)
    magnitude = (log_p.abs() + log_q.abs()).sum(dim=1) + draft[3].abs() + target[3].abs()
    return (log_p - log_q).sum(dim=1) + path_sign * (draft[3] - target[3]), magnitude


@pytest.mark.parametrize("channels", [1, 16, 64])
@pytest.mark.parametrize("relaxation", [1.0, 2, 0.5, 42.0, "per token"])
@pytest.mark.parametrize(("sigma", "path_sign"), [("paper", 1), ("released", -1)])
def test_equals_normal_log_probabilities(channels, relaxation, sigma, path_sign):
    x, draft, target = random_chains(200, channels, channels, shift=1.0, scale=0.6)
    if relaxation == "per token":
        relaxation = torch.linspace(0.3, 5, 200)
    expected, magnitude = expected_ratio(x, draft, target, relaxation, path_sign)
    actual = log_density_ratio(x, draft, target, relaxation=relaxation, sigma=sigma)
    assert actual.dtype == torch.float32
    assert actual.shape == (200,)
    assert ((actual - expected).abs() <= 1e-5 * (1 + magnitude)).all()


def test_definition_in_float64_is_exact():
    x, draft, target = random_chains(50, 16, 0)
    expected, _ = expected_ratio(x, draft, target)
    actual = reference.log_density_ratio(x, draft, target, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_sigma_turns_the_path_term_alone():
    x, draft, target = random_chains(20, 4, 1)
    paper, released = (log_density_ratio(x, draft, target, sigma=s) for s in ("paper", "released"))
    torch.testing.assert_close(paper - released, 2 * (draft.path_log_std - target.path_log_std), rtol=1e-4, atol=1e-5)
    flat = draft._replace(path_log_std=target.path_log_std)
    assert torch.equal(*(log_density_ratio(x, flat, target, sigma=s) for s in ("paper", "released")))


def test_relaxation_leaves_scales_and_path_alone():
    x, draft, target = random_chains(20, 4, 2)
    far = log_density_ratio(x, draft, target, relaxation=1e6)
    scales = (draft.log_std - target.log_std).sum(dim=1) + draft.path_log_std - target.path_log_std
    torch.testing.assert_close(far, scales, rtol=1e-4, atol=1e-5)


def test_swapping_draft_and_target_turns_the_sign():
    x, draft, target = random_chains(20, 4, 3)
    forth, back = log_density_ratio(x, draft, target), log_density_ratio(x, target, draft)
    torch.testing.assert_close(forth, -back, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shift", "scale"), [(1e-4, 0.0), (0.0, 1e-4), (1e-4, -1e-4)])
def test_close_models_far_from_x_do_not_cancel(shift, scale):
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(100, 16, generator=generator) for _ in range(2))
    std, zeros = log_std.exp(), torch.zeros(100)
    x = mean + 5 * std * torch.where(torch.rand(100, 16, generator=generator) < 0.5, -1, 1)
    draft, target = Denoised(x, mean, log_std, zeros), Denoised(x, mean + shift * std, log_std + scale, zeros)
    expected, magnitude = expected_ratio(x, draft, target)
    # In proportion to the channels' own contributions, which are thousands of times below the densities.
    contributions = sum(
        expected_ratio(x[:, [c]], *(Denoised(*(v[:, [c]] for v in d[:3]), zeros) for d in (draft, target)))[0].abs()
        for c in range(16)
    )
    assert (contributions < 1e-3 * magnitude).all()
    error = (log_density_ratio(x, draft, target) - expected).abs()
    assert (error <= 1e-5 * contributions).all()
    naive = (Normal(target.mean, target.log_std.exp()).log_prob(x) - Normal(mean, std).log_prob(x)).sum(dim=1)
    assert ((naive - expected).abs() > 1e-5 * contributions).any()  # what this test is able to see


@pytest.mark.parametrize("log10_p", [-6, 0, 3])
@pytest.mark.parametrize("log10_q", [-6, 0, 3])
@pytest.mark.parametrize("distance", [0.0, 1e4])
def test_extreme_inputs_are_finite_and_right(log10_p, log10_q, distance):
    mean = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    zeros, ones = torch.zeros(4), torch.ones(4, 256)
    draft = Denoised(mean, mean, ones * math.log(10**log10_q), zeros)
    target = Denoised(mean, mean + distance * 10**log10_p, ones * math.log(10**log10_p), zeros)
    actual = log_density_ratio(mean, draft, target)
    expected, magnitude = expected_ratio(mean, draft, target)
    assert torch.isfinite(actual).all()
    assert ((actual - expected).abs() <= 1e-5 * (1 + magnitude)).all()


def test_very_small_ratios_are_kept():
    x, draft, target = random_chains(3, 4, 4)
    ratio = log_density_ratio(x, draft, target._replace(path_log_std=torch.full((3,), 1e6)))
    torch.testing.assert_close(ratio, torch.full((3,), -1e6), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("chain", "field", "value"),
    [(chain, field, math.nan) for chain in ("draft", "target") for field in ("mean", "log_std", "path_log_std")]
    + [("x", None, math.nan), ("target", "log_std", -math.inf), ("draft", "log_std", -math.inf)],
)
def test_a_row_that_cannot_be_judged_is_never_accepted_and_spoils_no_other(chain, field, value):
    arguments = dict(zip(("x", "draft", "target"), random_chains(5, 3, 5)))
    clean = log_density_ratio(**arguments)
    tensor = (arguments["x"] if field is None else getattr(arguments[chain], field)).clone()
    tensor[2] = value
    arguments[chain] = tensor if field is None else arguments[chain]._replace(**{field: tensor})
    ratio = log_density_ratio(**arguments)
    assert ratio[2] == -math.inf
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(ratio[others], clean[others])


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    x, draft, target = random_chains(rows, 3, 6)
    ratio = log_density_ratio(x, draft, target, relaxation=torch.ones(rows))
    assert ratio.shape == (rows,)
    assert torch.isfinite(ratio).all()


def test_rows_do_not_depend_on_their_batch_and_inputs_stay():
    x, draft, target = random_chains(20, 5, 7)
    before = [v.clone() for v in (x, *draft, *target)]
    ratio, part = log_density_ratio(x, draft, target), torch.tensor([13, 2])
    few = log_density_ratio(x[part], Denoised(*(v[part] for v in draft)), Denoised(*(v[part] for v in target)))
    assert torch.equal(ratio[part], few)
    assert all(map(torch.equal, before, (x, *draft, *target)))


def test_wider_inputs_are_judged_in_float32():
    x, draft, target = random_chains(20, 5, 8)
    expected = log_density_ratio(x, draft, target)
    wide = [Denoised(*(v.double() for v in chain)) for chain in (draft, target)]
    assert torch.equal(log_density_ratio(x.double(), *wide), expected)


def test_nothing_is_recorded_for_autograd():
    x, draft, target = random_chains(3, 5, 9)
    assert not log_density_ratio(x.requires_grad_(), draft, target).requires_grad


BAD = {
    "x type": (lambda a: {"x": None}, ValueError, r"expected x as a floating tensor \(N, C\).*, got NoneType"),
    "x dims": (lambda a: {"x": a["x"][0]}, ValueError, r"expected x as .*got torch.float32 \(3,\)"),
    "x integer": (lambda a: {"x": a["x"].long()}, ValueError, r"expected x as .*got torch.int64 \(4, 3\)"),
    "draft type": (lambda a: {"draft": None}, TypeError, "expected draft as a Denoised.*got NoneType"),
    "target type": (lambda a: {"target": a["x"]}, TypeError, "expected target as a Denoised.*got Tensor"),
    "mean shape": (
        lambda a: {"draft": a["draft"]._replace(mean=torch.ones(4, 2))}, ValueError,
        r"draft.mean floating of shape \(4, 3\) to match x, got torch.float32 \(4, 2\)",
    ),
    "log_std type": (
        lambda a: {"target": a["target"]._replace(log_std=torch.ones(4, 3).long())}, ValueError,
        r"target.log_std floating of shape \(4, 3\) to match x, got torch.int64",
    ),
    "path shape": (
        lambda a: {"target": a["target"]._replace(path_log_std=torch.ones(4, 1))}, ValueError,
        r"target.path_log_std floating of shape \(4,\) to match x, got torch.float32 \(4, 1\)",
    ),
    "device": (
        lambda a: {"draft": a["draft"]._replace(mean=torch.ones(4, 3, device="meta"))}, ValueError,
        "draft.mean on the device of x, cpu, got meta",
    ),
    "sigma": (lambda a: {"sigma": "published"}, ValueError, "sigma one of .*'paper', 'released'.*got 'published'"),
    "relaxation zero": (lambda a: {"relaxation": 0}, ValueError, "finite relaxation > 0, got 0"),
    "relaxation negative": (lambda a: {"relaxation": -1.0}, ValueError, "finite relaxation > 0, got -1.0"),
    "relaxation NaN": (lambda a: {"relaxation": math.nan}, ValueError, "finite relaxation > 0, got nan"),
    "relaxation infinite": (lambda a: {"relaxation": math.inf}, ValueError, "finite relaxation > 0, got inf"),
    "relaxation type": (lambda a: {"relaxation": "1"}, ValueError, "finite relaxation > 0, got '1'"),
    "relaxation shape": (
        lambda a: {"relaxation": torch.ones(4, 1)}, ValueError, r"a floating tensor \(4,\) on cpu, got .*\(4, 1\)",
    ),
    "relaxation integer": (
        lambda a: {"relaxation": torch.ones(4).long()}, ValueError, r"a floating tensor \(4,\) on cpu, got torch.int64",
    ),
    "relaxation values": (
        lambda a: {"relaxation": torch.tensor([1.0, 0, 1, 1])}, ValueError, "every relaxation finite and > 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", [log_density_ratio, accept_reject])
def test_bad_arguments_raise_before_anything_is_computed(monkeypatch, op, case):
    change, error, message = BAD[case]
    for package in ("density_ratio", "accept_reject"):
        monkeypatch.setattr(
            f"cspd_kernels.ops.{package}.remembered", lambda *_, **__: lambda *_: pytest.fail("computed")
        )
    arguments = dict(zip(("x", "draft", "target"), random_chains(4, 3, 0)))
    seed = {"seed": 0} if op is accept_reject else {}
    with pytest.raises(error, match=message):
        op(**(arguments | change(arguments)), **seed)


def test_samples_are_not_looked_at():
    x, draft, target = random_chains(20, 3, 0)
    bare = [chain._replace(sample=None) for chain in (draft, target)]
    assert torch.equal(log_density_ratio(x, *bare), log_density_ratio(x, draft, target))


def test_tiny_scales_and_tiny_relaxation_are_judged():
    mean = torch.tensor([[0.5, -1.0]])
    chain = Denoised(mean, mean, torch.full((1, 2), -90.0), torch.zeros(1))  # 1 / sigma exceeds float32
    assert log_density_ratio(mean, chain, chain).item() == 0.0
    x, draft, target = random_chains(50, 3, 0)
    tiny = torch.full((50,), 1e-25)
    assert torch.equal(log_density_ratio(x, draft, draft, relaxation=tiny), torch.zeros(50))
    judged = log_density_ratio(x, draft, target, relaxation=tiny)
    assert not torch.isnan(judged).any()
    assert (judged > 0).any()
