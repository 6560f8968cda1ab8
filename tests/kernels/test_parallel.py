"""The chain in parallel over its steps: the definition against the sequential one, the torch backend against it."""

from __future__ import annotations

import itertools

import pytest
import torch
from chains import addressed

from cspd.demo.pair import load_pair
from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.ops.denoise import reference, torch_parallel
from cspd_kernels.testing import random_inputs, randomize_, relative_error


def random_head(steps=30, schedule="linear", dtype=torch.float32, **options) -> DiffusionHead:
    torch.manual_seed(0)
    options = dict(target_channels=5, z_channels=24, depth=2, width=32) | options
    module = DiffLoss(**options, num_sampling_steps=str(steps), schedule=schedule)
    return DiffusionHead.from_module(randomize_(module, seed=1).eval(), dtype=dtype)


@pytest.fixture(scope="module")
def trained() -> DiffusionHead:
    return DiffusionHead.from_module(load_pair()[0].diffloss)


def distance(out, expected) -> float:
    """Of the tokens, relative to the largest value of each row's trajectory."""
    size = torch.maximum(expected.mean.abs().amax(1), out.trajectory.abs().amax((1, 2)))
    return float(((out.mean - expected.mean).abs().amax(1) / size).max())


HEADS = {
    "linear": dict(steps=30),
    "cosine, diverges": dict(steps=30, schedule="cosine"),
    "fixed variance": dict(steps=20, learn_sigma=False),
    "one step": dict(steps=1),
    "two steps": dict(steps=2),
    "one channel": dict(steps=12, target_channels=1),
    "no blocks": dict(steps=12, depth=0),
}


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("cfg_scale", [1.0, 0.5, 10.0])
@pytest.mark.parametrize("name", HEADS)
def test_the_tokens_are_the_sequential_chains(name, cfg_scale, tolerance):
    head = random_head(**HEADS[name])
    inputs = random_inputs(head, 5, 3, guided=cfg_scale != 1)
    for temperature in (0.0, 1.5):
        options = dict(temperature=temperature, cfg_scale=cfg_scale)
        expected = denoise(head, *inputs, **options, parallel_tol=None)
        out = denoise(head, *inputs, **options, parallel_tol=tolerance)
        assert distance(out, expected) < 3 * tolerance + 2e-6
        torch.testing.assert_close(out.path_log_std, expected.path_log_std, rtol=tolerance + 1e-5, atol=0)
        assert out.log_std.isneginf().all() if temperature == 0 else out.log_std.isfinite().all()
        assert out.sample is out.mean
        assert out.sweeps.dtype == torch.int32 and out.sweeps.shape == (5,)
        assert out.trajectory.shape == (5, head.num_steps, head.channels)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_a_trained_heads_tokens(trained, cfg_scale, tolerance):
    inputs = random_inputs(trained, 16, 4, guided=cfg_scale != 1)
    expected = denoise(trained, *inputs, cfg_scale=cfg_scale, parallel_tol=None)
    assert distance(denoise(trained, *inputs, cfg_scale=cfg_scale, parallel_tol=tolerance), expected) < 3 * tolerance


@pytest.mark.parametrize("cfg_scale", [None, 3.0])
def test_the_definition_converges_to_the_sequential_one_in_float64(trained, cfg_scale):
    cond, x, noise = random_inputs(trained, 4, 5, guided=cfg_scale is not None)
    arguments = (trained, cond, x, noise, 0.9, cfg_scale)
    expected = reference.denoise(*arguments, dtype=torch.float64)
    out = reference.denoise_in_parallel(*arguments, 1e-12, dtype=torch.float64)
    for actual, wanted in zip(out[:4], expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)
    assert out[4].min() < trained.num_steps  # by sweeps


def test_the_first_k_steps_are_exact_after_k_sweeps_whatever_the_slopes():
    head = random_head(steps=8)
    arguments = (head, *random_inputs(head, 3, 6), 1.0, None)
    exact = list(itertools.islice(reference.sweeps(*arguments, dtype=torch.float64), 30))[-1]
    torch.testing.assert_close(exact.mean, reference.denoise(*arguments, dtype=torch.float64)[1])
    for slopes in (True, False):
        sweeps = reference.sweeps(*arguments, dtype=torch.float64, slopes=slopes)
        for k, sweep in enumerate(itertools.islice(sweeps, 8), start=1):
            torch.testing.assert_close(sweep.x[max(7 - k, 0) :], exact.x[max(7 - k, 0) :])
        torch.testing.assert_close(sweep.mean, exact.mean)


def test_the_secants_pay(trained):
    """Sweeps to 1e-4, with them and without."""
    arguments = (trained, *random_inputs(trained, 8, 7), 1.0, None)
    counts = [
        next(
            k for k, s in enumerate(reference.sweeps(*arguments, slopes=slopes), 1) if (s.change < 1e-4 * s.size).all()
        )
        for slopes in (True, False)
    ]
    assert counts[0] < 0.8 * counts[1]


@pytest.mark.parametrize("kind", ["stored", "addressed"])
@pytest.mark.parametrize("cfg_scale", [None, 2.5, "per token"])
@pytest.mark.parametrize("name", ["linear", "fixed variance", "two steps"])
def test_torch_sweep_by_sweep(name, cfg_scale, kind):
    """Every sweep of the backend against the definition's, before any row or step has left."""
    head = random_head(**HEADS[name])
    cond, x, noise = random_inputs(head, 5, 8, guided=cfg_scale is not None)
    if kind == "addressed":
        noise = addressed(head, 5)
    scale = torch.linspace(0.5, 4, 5)[:, None] if cfg_scale == "per token" else cfg_scale
    halves = cond.reshape(-1, 5, cond.shape[-1])
    parallel = torch_parallel.Parallel(1e-30, None)
    state = torch_parallel._Sweeps(head, halves, x, noise, 0.9, reference.as_scales(scale), parallel)
    expected = reference.sweeps(head, cond, x, noise, 0.9, scale)
    for sweep in itertools.islice(expected, min(head.num_steps, 12)):
        state.sweep()
        size = float(sweep.size.max())
        torch.testing.assert_close(state.mean, sweep.mean, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(state.x, sweep.x, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(state.log_std[1:].sum((0, 2)), sweep.path_log_std, rtol=1e-5, atol=1e-5)


def test_a_rows_sweeps_and_tokens_do_not_depend_on_its_batch(trained):
    cond, x, noise = random_inputs(trained, 9, 9)
    out = denoise(trained, cond, x, noise, parallel_tol=1e-3)
    assert out.sweeps.unique().numel() > 1  # they settle one by one
    part = torch.tensor([7, 0, 4])
    alone = denoise(trained, cond[part], x[part], noise[:, part], parallel_tol=1e-3)
    assert torch.equal(alone.sweeps, out.sweeps[part])
    torch.testing.assert_close(alone.mean, out.mean[part], rtol=1e-5, atol=1e-6)


def test_a_row_that_does_not_settle_is_the_sequential_chains(trained, monkeypatch):
    monkeypatch.setattr(torch_parallel, "most_sweeps", lambda steps: 12)
    inputs = random_inputs(trained, 7, 0)
    out, expected = denoise(trained, *inputs, parallel_tol=1e-5), denoise(trained, *inputs, parallel_tol=None)
    left = out.sweeps > 12
    assert left.any() and not left.all()
    assert (out.sweeps[left] == 12 + trained.num_steps).all()
    torch.testing.assert_close(out.mean, expected.mean, rtol=0, atol=1e-4)
    for name in ("mean", "log_std", "path_log_std"):
        torch.testing.assert_close(getattr(out, name)[left], getattr(expected, name)[left], rtol=1e-6, atol=1e-6)


def test_no_nan_that_the_sequential_chain_has_not():
    """A guess of NaN and infinity heals from the noise end on, or leaves the row to the sequential chain."""
    head = random_head(steps=12)
    inputs = random_inputs(head, 4, 10)
    cond, x, noise = inputs
    guess = torch.full((12, 4, 5), 1e30)
    guess[3, 1] = torch.inf
    guess[5, 2] = torch.nan
    expected = denoise(head, *inputs, parallel_tol=None)
    out = reference.denoise_in_parallel(head, cond, x, noise, 1.0, None, 1e-4, guess.movedim(0, 1))
    torch.testing.assert_close(out[1], expected.mean, rtol=1e-3, atol=1e-3)
    parallel = torch_parallel.Parallel(1e-4, guess.movedim(0, 1))
    made = torch_parallel.in_parallel(head, cond[None], x, noise, 1.0, (), parallel, lambda *_: pytest.fail("settles"))
    torch.testing.assert_close(made[1], expected.mean, rtol=1e-3, atol=1e-3)


def test_a_guess_saves_sweeps_and_changes_no_token(trained):
    inputs = random_inputs(trained, 8, 11)
    first = denoise(trained, *inputs, parallel_tol=1e-4)
    again = denoise(trained, *inputs, parallel_tol=1e-4, guess=first.trajectory)
    assert (again.sweeps == 2).all()  # the second has something to compare with
    assert distance(again, first) < 1e-4


def test_small_workspaces_and_no_rows(trained):
    inputs = random_inputs(trained, 6, 12, guided=True)
    scale = torch.linspace(0.5, 2, 6)
    options = dict(cfg_scale=scale, parallel_tol=1e-6)
    expected, guess = denoise(trained, *inputs, **options), torch.randn(6, 40, 4)
    for more in (dict(workspace_bytes=1), dict(guess=guess), dict(workspace_bytes=1, guess=guess)):
        out = denoise(trained, *inputs, **options, **more)
        assert distance(out, expected) < 3e-6
    out = denoise(trained, *(v[..., :0, :] for v in inputs), **options | dict(cfg_scale=1.0))
    assert out.mean.shape == (0, 4) and out.sweeps.shape == (0,) and out.trajectory.shape == (0, 40, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_the_sequential_chain(trained, dtype):
    head = trained.to(dtype)
    inputs = random_inputs(head, 16, 13)
    exact = denoise(head.to(torch.float64), *inputs, parallel_tol=None).mean
    errors = [
        float((denoise(head, *inputs, parallel_tol=tolerance).mean - exact).abs().max() / exact.abs().max())
        for tolerance in (None, 1e-3)
    ]
    assert errors[1] < 2 * errors[0] + 1e-3


def test_the_tokens_of_float64(trained):
    head = trained.to(torch.float64)
    inputs = random_inputs(head, 4, 14)
    expected = denoise(head, *inputs, parallel_tol=None)
    torch.testing.assert_close(denoise(head, *inputs, parallel_tol=1e-12).mean, expected.mean, rtol=1e-9, atol=1e-10)


def test_nothing_is_written_to(trained):
    cond, x, noise = random_inputs(trained, 3, 15)
    guess = torch.randn(3, 40, 4)
    kept = [v.clone() for v in (cond, x, noise, guess)]
    denoise(trained, cond, x, noise, parallel_tol=1e-3, guess=guess)
    assert all(map(torch.equal, (cond, x, noise, guess), kept))


@pytest.mark.parametrize("value", ["fast", 0, 1, -1e-3, float("nan"), True, torch.tensor(1e-3)])
def test_a_tolerance_out_of_range(trained, value):
    with pytest.raises(ValueError, match=r"expected parallel_tol None, 'auto' or a number in \(0, 1\)"):
        denoise(trained, *random_inputs(trained, 2, 0), parallel_tol=value)


@pytest.mark.parametrize(
    ("guess", "message"),
    [
        (torch.zeros(2, 39, 4), r"guess of shape \(2, 40, 4\)"),
        (torch.zeros(2, 40, 4, dtype=torch.float64), "guess in a floating dtype no wider"),
        (torch.full((2, 40, 4), torch.nan), "finite values in guess"),
    ],
)
def test_a_guess_that_does_not_fit(trained, guess, message):
    with pytest.raises(ValueError, match=message):
        denoise(trained, *random_inputs(trained, 2, 0), parallel_tol=1e-3, guess=guess)


def test_torch_compile_sees_one_operator(trained):
    inputs = random_inputs(trained, 3, 16)

    def call(cond, x, noise):
        out = denoise(trained, cond, x, noise, parallel_tol=1e-4)
        return out.mean + 0, out.sweeps + 0, out.trajectory + 0

    for actual, expected in zip(torch.compile(call, fullgraph=True, backend="eager")(*inputs), call(*inputs)):
        assert torch.equal(actual, expected)


def test_auto_is_sequential_where_nothing_was_measured_to_be_faster(trained):
    cond, x, _ = random_inputs(trained, 3, 17)
    noise = PhiloxNoise(3, torch.arange(3))
    expected = denoise(trained, cond, x, noise, parallel_tol=None)
    out = denoise(trained, cond, x, noise)
    assert torch.equal(out.mean, expected.mean) and out.sweeps is None


@pytest.mark.parametrize("value", [1e6, 1e8, 1e18, 3e38])
@pytest.mark.parametrize("step", [0, 5, 20])
def test_one_wild_value_of_a_guess_changes_no_token(trained, step, value):
    """A step is not taken for settled because a value that is still wrong, further on, is large beside its change."""
    cond, x, noise = random_inputs(trained, 1, 18)
    expected = denoise(trained, cond, x, noise, parallel_tol=None)
    for guess in (denoise(trained, cond, x, noise, parallel_tol=1e-6).trajectory + 0.1, torch.zeros(1, 40, 4)):
        guess[0, step] = value
        out = denoise(trained, cond, x, noise, parallel_tol=1e-4, guess=guess)
        assert relative_error(out.mean, expected.mean) < 1e-4


def test_infinite_rows_do_not_settle():
    x, infinite = torch.zeros(3, 2, 1), torch.tensor([1.0, torch.inf])
    sweep = reference.Sweep(x, x[0], x[0], x[0, :, 0], change=infinite * 1e-9, size=infinite)
    for sweeps in (1, 2, 3):
        assert sweep.settled(1e-3, sweeps).tolist() == [sweeps > 1, False]
