"""Schedule: the tables against formulas written out here, respacing, reading of foreign objects, errors."""

import math
from enum import Enum
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cspd.models import GaussianDiffusion
from cspd_kernels import Schedule

TABLES = (
    "timesteps", "x0_x", "x0_out", "mean_x0", "mean_x", "log_std_lower", "log_std_upper", "betas", "alphas_cumprod",
)  # fmt: skip
Mean = Enum("Mean", ["EPSILON", "START_X", "PREVIOUS_X"])
Var = Enum("Var", ["LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"])


def written_out(betas, variance="learned"):
    """The float64 tables, one scalar at a time."""
    acp, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        acp.append(product)
    before = [1.0, *acp[:-1]]
    posterior = [b * (1 - p) / (1 - a) for b, p, a in zip(betas, before, acp, strict=True)]
    posterior[0] = posterior[1]
    fixed = posterior if variance != "fixed_large" else [posterior[1], *betas[1:]]
    return {
        "alphas_cumprod": acp,
        "x0_x": [a**-0.5 for a in acp],
        "x0_out": [-(((1 - a) / a) ** 0.5) for a in acp],
        "mean_x0": [b * p**0.5 / (1 - a) for b, p, a in zip(betas, before, acp, strict=True)],
        "mean_x": [(1 - p) * (1 - b) ** 0.5 / (1 - a) for b, p, a in zip(betas, before, acp, strict=True)],
        "log_std_lower": [math.log(p) / 2 for p in fixed],
        "log_std_upper": [math.log(b) / 2 for b in (betas if variance == "learned" else fixed)],
    }


@pytest.mark.parametrize("variance", ["learned", "fixed_small", "fixed_large"])
def test_tables_follow_from_betas(variance):
    betas = [0.3, 0.01, 0.2, 0.05, 0.9]
    schedule = Schedule.diffusion(betas, variance=variance)
    for name, expected in written_out(betas, variance).items():
        np.testing.assert_allclose(getattr(schedule, name), expected, rtol=1e-12, err_msg=name)


def test_full_cosine_betas():
    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]
    np.testing.assert_allclose(Schedule.cosine(1000).betas, expected, rtol=1e-9)
    assert Schedule.cosine(1000).betas[0] == pytest.approx(4.1284e-05, rel=1e-4)  # published value


def test_full_linear_betas():
    schedule = Schedule.linear(1000)
    expected = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    np.testing.assert_allclose(schedule.betas, expected, rtol=1e-9)
    assert schedule.alphas_cumprod[-1] == pytest.approx(4.0358e-05, rel=1e-4)  # published value


def test_linear_scales_with_training_steps():
    betas = Schedule.linear(50, train_steps=50).betas
    np.testing.assert_allclose(betas[[0, -1]], [20 * 1e-4, 20 * 0.02], rtol=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [2, 7, 50, 100])
def test_respacing_keeps_timesteps_and_cumulative_products(kind, steps):
    make = getattr(Schedule, kind)
    schedule = make(steps)
    assert schedule.num_steps == steps
    assert schedule.timesteps.tolist() == [round(Fraction(999 * i, steps - 1)) for i in range(steps)]
    expected = make(1000).alphas_cumprod[schedule.timesteps.astype(int)]
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("make", [Schedule.cosine, Schedule.linear])
def test_one_step_is_finite(make):
    schedule = make(1)
    assert schedule.timesteps.tolist() == [0]
    assert all(np.isfinite(getattr(schedule, name)).all() for name in TABLES)
    assert (schedule.mean_x0[0], schedule.mean_x[0]) == (1.0, 0.0)  # the mean of the only step is x0


def test_tables_are_float64_and_read_only():
    betas = np.array([0.1, 0.2])
    schedule = Schedule.diffusion(betas, [0, 1])
    for name in TABLES:
        table = getattr(schedule, name)
        assert table.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1
    with pytest.raises(AttributeError):
        schedule.betas = betas
    betas[0] = 0.5  # the caller's array stays theirs
    assert schedule.betas[0] == 0.1


@pytest.mark.parametrize("convert", [np.asarray, list, torch.tensor], ids=["numpy", "list", "tensor"])
@pytest.mark.parametrize("variance", Var)
def test_from_diffusion_reads_a_foreign_object(convert, variance):
    source = Schedule.cosine(50)
    foreign = SimpleNamespace(
        betas=convert(source.betas.copy()),
        timestep_map=source.timesteps.tolist(),
        model_mean_type=Mean.EPSILON,
        model_var_type=variance,
    )
    schedule = Schedule.from_diffusion(foreign)
    expected = {"LEARNED_RANGE": "learned", "FIXED_SMALL": "fixed_small", "FIXED_LARGE": "fixed_large"}[variance.name]
    assert schedule.variance == expected
    assert schedule.timesteps.tolist() == source.timesteps.tolist()
    np.testing.assert_array_equal(schedule.betas, source.betas)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("sqrt_recip_alphas_cumprod", lambda s: s.x0_x),
        ("sqrt_recipm1_alphas_cumprod", lambda s: -s.x0_out),
        ("posterior_mean_coef1", lambda s: s.mean_x0),
        ("posterior_mean_coef2", lambda s: s.mean_x),
        ("posterior_log_variance_clipped", lambda s: 2 * s.log_std_lower),
    ],
)
def test_from_diffusion_refuses_tables_that_do_not_follow_from_betas(name, own):
    source = Schedule.linear(9)
    table = own(source).copy()
    foreign = SimpleNamespace(betas=source.betas, timestep_map=source.timesteps, **{name: table})
    np.testing.assert_array_equal(Schedule.from_diffusion(foreign).betas, source.betas)
    table[4] *= 1.001
    with pytest.raises(ValueError, match=f"expected {name} to follow from betas, but .* has another table"):
        Schedule.from_diffusion(foreign)


def test_from_diffusion_needs_betas_only():
    schedule = Schedule.from_diffusion(SimpleNamespace(betas=[0.1, 0.2, 0.3]))
    assert (schedule.variance, schedule.timesteps.tolist()) == ("learned", [0, 1, 2])


def test_from_diffusion_unwraps_and_passes_schedules_through():
    schedule = Schedule.linear(5)
    assert Schedule.from_diffusion(schedule) is schedule
    assert Schedule.from_diffusion(GaussianDiffusion(schedule)) is schedule


@pytest.mark.parametrize(
    ("obj", "error", "message"),
    [
        ([1, 2], TypeError, "expected one diffusion object, got a list of 2"),
        (
            SimpleNamespace(),
            TypeError,
            "expected a Gaussian diffusion object, with betas, got SimpleNamespace without betas: the kernels",
        ),
        (SimpleNamespace(betas=[0.1], model_mean_type=Mean.PREVIOUS_X), ValueError, "EPSILON, .*got PREVIOUS_X"),
        (SimpleNamespace(betas=[0.1, math.nan]), ValueError, r"every beta in \(0, 1\]"),
        (SimpleNamespace(betas=[0.1, 0.2], timestep_map=[0]), ValueError, r"timesteps of shape \(2,\), got \(1,\)"),
    ],
)
def test_from_diffusion_errors(obj, error, message):
    with pytest.raises(error, match=message):
        Schedule.from_diffusion(obj)


@pytest.mark.parametrize(
    ("betas", "timesteps", "variance", "message"),
    [
        ([], [], "learned", r"T >= 1, got \(0,\)"),
        ([[0.1]], [[0]], "learned", r"got \(1, 1\)"),
        ([0.0, 0.1], [0, 1], "learned", r"in \(0, 1\]"),
        ([0.1, 1.5], [0, 1], "learned", r"in \(0, 1\]"),
        ([0.1, 1.0], [0, 1], "learned", "positive cumulative product.*got 0"),
        ([0.1], [0], "large", "variance one of .*got 'large'"),
    ],
)
def test_constructor_errors(betas, timesteps, variance, message):
    with pytest.raises(ValueError, match=message):
        Schedule.diffusion(betas, timesteps, variance)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_number_of_steps_is_checked(steps):
    for make in (Schedule.cosine, Schedule.linear):
        with pytest.raises(ValueError, match=f"1 <= num_steps <= .*1000.* got num_steps = {steps}"):
            make(steps)


@pytest.mark.parametrize("steps", [2.5, "7", None])
def test_number_of_steps_is_an_int(steps):
    with pytest.raises(ValueError, match="expected 1 <= num_steps"):
        Schedule.linear(steps)
