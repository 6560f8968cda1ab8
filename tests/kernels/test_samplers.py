"""Schedule: the steps of every sampler against formulas written out here, one number at a time."""

import copy
import math
import pickle

import numpy as np
import pytest

from cspd_kernels import Schedule

BETAS = np.array([0.02, 0.01, 0.2, 0.05, 0.6])
ACP = np.cumprod(1 - BETAS)
BEFORE = np.append(1.0, ACP[:-1])
GENERATOR = np.random.default_rng(0)


def step(schedule, i, x, out):
    """(x0, mean) of step i."""
    x0 = schedule.x0_x[i] * x + schedule.x0_out[i] * out
    if schedule.clip is not None:
        x0 = np.clip(x0, *schedule.clip)
    return x0, schedule.mean_x0[i] * x0 + schedule.mean_x[i] * x


def diffused(i):
    """(x, data, noise): x is data at step i."""
    data, noise = GENERATOR.normal(size=(2, 7))
    return math.sqrt(ACP[i]) * data + math.sqrt(1 - ACP[i]) * noise, data, noise


def output(prediction, i, data, noise):
    """What a network that knows all puts out."""
    v = math.sqrt(ACP[i]) * noise - math.sqrt(1 - ACP[i]) * data
    return {"epsilon": noise, "x0": data, "v": v}[prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("variance", ["learned", "fixed_small", "fixed_large"])
def test_ancestral_steps_are_the_posterior(prediction, variance):
    """Of x_next given x and the data, by Bayes' rule from the two Gaussians it is made of."""
    schedule = Schedule.diffusion(BETAS, variance=variance, prediction=prediction)
    assert (schedule.name, schedule.prediction, schedule.learned) == ("ddpm", prediction, variance == "learned")
    for i in range(5):
        x, data, noise = diffused(i)
        x0, mean = step(schedule, i, x, output(prediction, i, data, noise))
        np.testing.assert_allclose(x0, data, rtol=1e-12)
        if i == 0:
            np.testing.assert_allclose(mean, data, rtol=1e-12)
            continue
        of_x, of_data = (1 - BETAS[i]) / BETAS[i], 1 / (1 - BEFORE[i])  # precisions
        expected = of_x * x / math.sqrt(1 - BETAS[i]) + of_data * math.sqrt(BEFORE[i]) * data
        np.testing.assert_allclose(mean, expected / (of_x + of_data), rtol=1e-12)
        small, large = -0.5 * math.log(of_x + of_data), 0.5 * math.log(BETAS[i])
        lower, upper = {"learned": (small, large), "fixed_small": (small,) * 2, "fixed_large": (large,) * 2}[variance]
        np.testing.assert_allclose([schedule.log_std_lower[i], schedule.log_std_upper[i]], [lower, upper], rtol=1e-12)
    assert schedule.log_std_lower[0] == pytest.approx(0.5 * math.log(BETAS[1] * (1 - ACP[0]) / (1 - ACP[1])))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta, prediction):
    schedule = Schedule.diffusion(BETAS, prediction=prediction).ddim(eta)
    assert (schedule.name, schedule.learned, schedule.deterministic) == ("ddim", False, eta == 0)
    for i in range(5):
        x, data, noise = diffused(i)
        sigma = eta * math.sqrt((1 - BEFORE[i]) / (1 - ACP[i])) * math.sqrt(1 - ACP[i] / BEFORE[i])
        expected = math.sqrt(BEFORE[i]) * data + math.sqrt(1 - BEFORE[i] - sigma**2) * noise
        x0, mean = step(schedule, i, x, output(prediction, i, data, noise))
        np.testing.assert_allclose(x0, data, rtol=1e-12)
        np.testing.assert_allclose(mean, expected, rtol=1e-12)
        if i:
            assert np.exp(schedule.log_std_lower[i]) == pytest.approx(sigma, rel=1e-12, abs=0)
    assert schedule.log_std_lower[0] == schedule.log_std_lower[1]
    np.testing.assert_array_equal(schedule.log_std_lower, schedule.log_std_upper)


@pytest.mark.parametrize("make", [Schedule.cosine, Schedule.linear])
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_ddim_at_eta_1_is_ancestral(make, steps):
    ancestral = make(steps, variance="fixed_small")
    ddim = make(steps).ddim(1.0)
    for name in ("x0_x", "x0_out", "mean_x0", "mean_x", "log_std_lower", "log_std_upper"):
        np.testing.assert_allclose(getattr(ddim, name), getattr(ancestral, name), rtol=1e-8, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_no_signal_at_the_first_step(prediction):
    """A noise estimate alone needs some (arXiv 2305.08891)."""
    betas = [*BETAS, 1.0]
    for schedule in (Schedule.diffusion(betas, prediction=prediction), Schedule.linear(5, prediction=prediction)):
        for made in (schedule, schedule.ddim(), schedule.ddim(0.5)):
            x, noise = np.zeros(3), -np.ones(3)
            out = noise if prediction == "x0" else -noise
            x0, mean = step(made, made.num_steps - 1, x, out)
            assert np.isfinite(mean).all()
            assert made.alphas_cumprod[-1] > 0 or (x0 == noise).all()
    with pytest.raises(ValueError, match="positive cumulative product"):
        Schedule.diffusion(betas)


TIMES = np.array([0.0, 0.05, 0.3, 0.6, 0.95, 1.0])


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
@pytest.mark.parametrize("data_at", [0, 1])
def test_euler_steps(data_at, prediction):
    """Along dx/dt = -3 x + t, which goes nowhere near a straight line, beside a plain loop."""
    times = TIMES if data_at == 1 else 1 - TIMES
    schedule = Schedule.euler(times, data_at=data_at, prediction=prediction)
    assert (schedule.name, schedule.num_steps, schedule.deterministic) == ("euler", 5, True)
    np.testing.assert_array_equal(schedule.timesteps, times[:-1][::-1])
    x = mine = np.array([1.5, -0.3])
    for k in range(5):
        i, t = 4 - k, times[k]
        slope = -3 * mine + t
        mine = mine + (times[k + 1] - t) * slope
        slope = -3 * x + t
        x = step(schedule, i, x, slope if prediction == "velocity" else x + (data_at - t) * slope)[1]
        np.testing.assert_allclose(x, mine, rtol=1e-12)
    assert np.isneginf(schedule.log_std_lower).all()


def test_euler_may_stop_before_the_data_and_step_beyond_it():
    for times in ([0.0, 0.5, 0.9], [0.0, 0.5, 1.1]):
        x, velocity = np.array([2.0]), np.array([-3.0])
        schedule = Schedule.euler(times, timesteps=[0, 500])
        assert schedule.timesteps.tolist() == [500, 0]
        np.testing.assert_allclose(step(schedule, 0, x, velocity)[1], x + (times[2] - 0.5) * velocity)


@pytest.mark.parametrize("sizes", [None, [0.1, 0.2, 0.3, 0.4, 0.04]])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
@pytest.mark.parametrize("data_at", [0, 1])
def test_euler_maruyama_steps(data_at, prediction, sizes):
    times = TIMES if data_at == 1 else 1 - TIMES
    schedule = Schedule.euler_maruyama(
        times[:-1] if sizes else times, data_at=data_at, sizes=sizes, prediction=prediction
    )
    assert (schedule.name, schedule.num_steps, schedule.deterministic) == ("euler_maruyama", 5, False)
    for i in range(5):
        t = TIMES[4 - i]  # the share of data
        dt = sizes[4 - i] if sizes else TIMES[5 - i] - t
        x, u = GENERATOR.normal(size=(2, 7))
        out = x + (1 - t) * u if prediction == "x0" else (u if data_at == 1 else -u)
        score = (t * u - x) / ((1 - t) ** 2 + t * (1 - t))
        drift = u + (1 - t) * score if i else u
        np.testing.assert_allclose(step(schedule, i, x, out)[1], x + drift * dt, rtol=1e-12, atol=1e-14)
        if i:
            assert math.exp(schedule.log_std_lower[i]) == pytest.approx(math.sqrt(2 * (1 - t)) * math.sqrt(dt))
    assert schedule.log_std_lower[0] == schedule.log_std_lower[1]


def gaussian(schedule, centre, width, draws=None):
    """(mean, variance) of tokens of normal data by its exact velocity: of draws, or, without, of their law."""
    mean, variance, x = 0.0, 1.0, None if draws is None else GENERATOR.normal(size=draws)
    for i in reversed(range(schedule.num_steps)):
        t = schedule.timesteps[i]
        # Of data d and noise n given (1 - t) n + t d = x: E[d - n | x] is affine in x.
        of_x = (t * width**2 - (1 - t)) / (t**2 * width**2 + (1 - t) ** 2)
        constant = centre - of_x * t * centre
        a = schedule.mean_x0[i] * (schedule.x0_x[i] + schedule.x0_out[i] * of_x) + schedule.mean_x[i]
        b = schedule.mean_x0[i] * schedule.x0_out[i] * constant
        std = math.exp(schedule.log_std_lower[i]) if i else 0.0
        mean, variance = a * mean + b, a**2 * variance + std**2
        if x is not None:
            x = a * x + b + std * GENERATOR.normal(size=draws)
    return (mean, variance) if x is None else (x.mean(), x.var())


@pytest.mark.parametrize("make", [Schedule.euler, Schedule.euler_maruyama])
def test_a_flow_ends_at_the_data(make):
    """Twice the steps, about half the error: the equation is the right one."""
    errors = []
    for steps in (200, 400, 800):
        mean, variance = gaussian(make(np.linspace(0, 1, steps + 1)), 0.7, 0.5)
        errors.append([abs(mean - 0.7), abs(variance - 0.25)])
    errors = np.array(errors)
    assert errors[-1].max() < 2e-3
    assert (errors[1:] < 0.65 * errors[:-1] + 1e-12).all()


def test_draws_of_a_flow_have_the_law_of_the_data():
    draws, rare = 40_000, 6.1  # standard deviations that chance exceeds once in 1e9

    def apart(schedule):
        mean, variance = gaussian(schedule, 0.7, 0.5, draws)
        return max(abs(mean - 0.7) / (0.5 / draws**0.5), abs(variance / 0.25 - 1) / (2 / draws) ** 0.5)

    times = np.linspace(0, 1, 401)
    assert apart(Schedule.euler_maruyama(times)) < rare
    right, mean_alone = Schedule.euler_maruyama(times), Schedule.euler(times)
    fields = {name: getattr(right, name) for name in ("timesteps", "x0_x", "x0_out", "log_std_lower")}
    wrong = Schedule(mean_x0=mean_alone.mean_x0, mean_x=mean_alone.mean_x, **fields)  # noise without the score
    assert apart(wrong) > 2 * rare


def test_respaced():
    whole = Schedule.cosine(1000, variance="fixed_large", prediction="v").clipped(-1, 1)
    kept = whole.respaced(7)
    np.testing.assert_array_equal(kept.timesteps, [0, 166, 333, 500, 666, 832, 999])
    np.testing.assert_allclose(kept.alphas_cumprod, whole.alphas_cumprod[kept.timesteps.astype(int)], rtol=1e-8)
    assert (kept.variance, kept.prediction, kept.clip.tolist()) == ("fixed_large", "v", [-1, 1])
    again = Schedule.cosine(20).respaced(20)
    np.testing.assert_allclose(again.betas, Schedule.cosine(20).betas, rtol=1e-9)


def test_clipped():
    schedule = Schedule.linear(5)
    assert schedule.clip is None
    assert schedule.clipped(-1, 0.5).clip.tolist() == [-1, 0.5]
    assert schedule.clipped([-1, -2], 3).ddim().last(2).clip.tolist() == [[-1, -2], [3, 3]]
    assert schedule.clipped(-math.inf, 0).clip.tolist() == [-math.inf, 0]
    assert schedule.clipped([-1], np.ones(1)).clip.tolist() == [-1, 1]  # one for all channels
    limits = np.linspace(-1, -0.5, 3), 0.5
    assert Schedule.diffusion(schedule.betas, clip=limits).clip[:, 2].tolist() == [-0.5, 0.5]
    assert Schedule.from_diffusion(schedule, clip=limits).clip[:, 0].tolist() == [-1, 0.5]
    with pytest.raises(ValueError, match="read-only"):
        schedule.clipped(-1, 1).clip[0] = 0


def test_a_table_of_somebodys_own():
    half = np.full(3, 0.5)
    schedule = Schedule(np.arange(3.0), half, half, half, half, np.array([-1.0, -np.inf, 0.0]))
    assert (schedule.name, schedule.num_steps, schedule.learned, schedule.deterministic) == ("custom", 3, False, True)
    np.testing.assert_array_equal(schedule.log_std_upper, schedule.log_std_lower)
    half[0] = 9  # the caller's
    assert schedule.x0_x[0] == 0.5
    several = Schedule(np.zeros((3, 2)), *np.ones((5, 3)))  # of a network with two time embeddings
    assert several.last(2).timesteps.shape == (2, 2)


BAD = {
    "no steps": (lambda: Schedule([], [], [], [], [], []), r"timesteps of shape \(T,\) or \(T, K\).*got \(0,\)"),
    "a short column": (lambda: Schedule([0, 1], *[[1, 1]] * 3, [1], [0, 0]), r"mean_x of shape \(2,\), got \(1,\)"),
    "NaN": (lambda: Schedule([0, 1], [1, math.nan], *[[1, 1]] * 4), "finite values in x0_x, got nan"),
    "infinite std": (lambda: Schedule([0], [1], [1], [1], [1], [math.inf]), "values in log_std_upper, got inf"),
    "learned of -inf": (
        lambda: Schedule([0], [1], [1], [1], [1], [-math.inf], [0.0], learned=True), "in log_std_lower, got -inf",
    ),
    "prediction": (lambda: Schedule.linear(3, prediction="score"), "prediction 'epsilon', 'x0' or 'v', got 'score'"),
    "a flow's": (lambda: Schedule.euler([0, 1], prediction="v"), "prediction 'velocity' or 'x0', got 'v'"),
    "clip": (lambda: Schedule.linear(3).clipped(1, -1), "no lower limit above its upper"),
    "clip of NaN": (lambda: Schedule.linear(3).clipped(math.nan, 1), "no lower limit above its upper"),
    "clip of three": (lambda: Schedule([0], [1], [1], [1], [1], [0], clip=[1, 2, 3]), r"clip as \(2,\) or \(2, C\)"),
    "clips of other lengths": (
        lambda: Schedule.linear(3).clipped([0, 0], [1, 1, 1]), "as many lower limits as upper ones, got 2 and 3",
    ),
    "one limit": (lambda: Schedule.euler([0, 1], clip=1.0), r"clip as a pair of limits, \(low, high\), got 1.0"),
    "last none": (lambda: Schedule.linear(3).last(0), "last expected steps as an int >= 1, got 0"),
    "last but one": (lambda: Schedule.linear(3).last(-1), "last expected steps as an int >= 1, got -1"),
    "eta": (lambda: Schedule.linear(3).ddim(1.5), r"eta in \[0, 1\], got 1.5"),
    "DDIM of DDIM": (lambda: Schedule.linear(3).ddim().ddim(), "ddim expected the ancestral steps"),
    "DDIM of a flow": (lambda: Schedule.euler([0, 1]).ddim(), "ddim expected the ancestral steps of a diffusion"),
    "respaced DDIM": (lambda: Schedule.linear(3).ddim().respaced(2), "got Schedule.ddim.*respace them first"),
    "respaced flow": (lambda: Schedule.euler([0, 1]).respaced(1), "respaced expected the ancestral steps"),
    "more steps": (lambda: Schedule.linear(3).respaced(4), "1 <= num_steps <= 3"),
    "times": (lambda: Schedule.euler([0.0]), r"finite times of shape \(T\+1,\)"),
    "times back": (lambda: Schedule.euler([0.0, 0.5, 0.4]), "times that go from noise, at 0, to data, at 1"),
    "times of the other kind": (lambda: Schedule.euler([1.0, 0.5, 0.0]), "times that go from noise, at 0, to data"),
    "past the data": (lambda: Schedule.euler([0.0, 1.0, 1.5]), "no step that begins at data"),
    "data_at": (lambda: Schedule.euler([0, 1], data_at=0.5), "data_at 0 or 1, got 0.5"),
    "sizes": (lambda: Schedule.euler_maruyama([0, 0.5, 1], sizes=[0.5]), r"sizes of shape \(T,\) beside times"),
    "a size of 0": (lambda: Schedule.euler_maruyama([0, 0.5], sizes=[0.5, 0]), "times that go from noise"),
    "timesteps": (lambda: Schedule.euler([0, 1], timesteps=[0, 1]), r"timesteps of shape \(1,\), got \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_repr():
    assert repr(Schedule.linear(3)) == "Schedule(ddpm, num_steps=3, prediction='epsilon', variance='learned')"
    assert repr(Schedule.euler([0, 1]).clipped(-1, 1)) == (
        "Schedule(euler, num_steps=1, prediction='velocity', clip=[-1.0, 1.0])"
    )
    assert repr(Schedule.one_step(0.5)) == "Schedule.one_step(0.5)"
    assert "clip=[-1.0, 1.0]" in repr(Schedule.one_step(0.5).clipped(-1, 1))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda schedule: pickle.loads(pickle.dumps(schedule))])
def test_copies_are_read_only_and_keep_nothing_of_a_device(copied):
    schedule = Schedule.linear(4).ddim(0.5).clipped(-1, 1)
    schedule.__dict__["_features"] = {"a device": "its tensors"}
    again = copied(schedule)
    assert repr(again) == repr(schedule)
    assert "_features" not in again.__dict__
    for name, value in vars(again).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(schedule, name))
            assert not value.flags.writeable, name
