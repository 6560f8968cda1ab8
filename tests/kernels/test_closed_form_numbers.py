"""The closed form's one number: inverting the distribution of t, in torch and in Triton, against many digits."""

import numpy as np
import pytest
import torch

from cspd_kernels.noise import uniforms
from cspd_kernels.ops.accept_reject import reference

mp = pytest.importorskip("mpmath", reason="mpmath is not installed; torch brings it with sympy")
special = pytest.importorskip("scipy.special")

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

DISTANCES = [1e-6, 1e-3, 0.5, 3.0, 40.0, 1e6]
STARTS = [-1e6, -7.0, -6.0, -3.0, 0.0, 0.7, 4.0, 6.0]
UNIFORMS = [2.0**-33, 1e-3, 0.4, 0.9, 1 - 2.0**-24, 1.0]


def exact_survival(t, distance, t_0):
    """Q(t) - exp(D (t_0 + D / 2)) Q(t + D) with 60 digits."""
    with mp.workdps(60):
        t, distance, t_0 = mp.mpf(t), mp.mpf(distance), mp.mpf(t_0)

        def tail(v):
            return mp.erfc(v / mp.sqrt(2)) / 2

        return tail(t) - mp.exp(distance * (t_0 + distance / 2)) * tail(t + distance)


def assert_inverted(t, distance, t_0, u, within):
    """``t`` lies ``within`` the place where the survival function is u of what it is at the start.

    The function itself may be off by 1e-6 of its value: near its start, and where it is the difference of two tails
    that are nearly the same, this moves t by more.
    """
    low = max(t_0, -reference.FARTHEST)
    assert low <= t <= 2 * reference.FARTHEST
    goal = u * exact_survival(low, distance, t_0)
    assert exact_survival(t + within, distance, t_0) <= goal * (1 + 1e-6)
    assert t - within <= low or exact_survival(t - within, distance, t_0) >= goal * (1 - 1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_inversion_in_torch(distance):
    t_0, u = (v.flatten().double() for v in torch.meshgrid(torch.tensor(STARTS), torch.tensor(UNIFORMS), indexing="ij"))
    t = reference._invert(torch.full_like(t_0, distance), t_0, u)
    for case in zip(t.tolist(), t_0.tolist(), u.tolist()):
        assert_inverted(case[0], distance, *case[1:], within=1e-9)


def test_the_check_of_an_inversion_can_fail():
    for off in (-1e-5, 1e-5):
        with pytest.raises(AssertionError):
            t = float(reference._invert(*torch.tensor([[1.0], [0.0], [0.4]]).double()))
            assert_inverted(t + off, 1.0, 0.0, 0.4, within=1e-6)


def test_larger_uniforms_are_nearer_to_the_start():
    u = torch.linspace(2**-33, 1, 1001).double()
    for distance, t_0 in ((1e-6, 0.0), (1.0, -1.0), (1e3, 5.0)):
        t = reference._invert(torch.full_like(u, distance), torch.full_like(u, t_0), u)
        assert (t.diff() <= 0).all()
        assert t[-1] - t_0 < 1e-3


triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton.language as tl  # noqa: E402

from cspd_kernels.ops.accept_reject.triton_redraw import (  # noqa: E402
    invert,
    mills_ratio,
    survival,
    uniform_of,
    weighted_tail,
)


@triton.jit
def _mills_kernel(out, t, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, mills_ratio(tl.load(t + at)))


@triton.jit
def _tail_kernel(out, t, weight, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(out + at, weighted_tail(tl.load(t + at), tl.load(weight)))


@triton.jit
def _survival_kernel(out, t, distance, weight, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(out + at, survival(tl.load(t + at), tl.load(distance), tl.load(weight)))


@triton.jit
def _invert_kernel(out, distance, t_0, u):
    at = tl.program_id(0)
    tl.store(out + at, invert(tl.load(distance + at), tl.load(t_0 + at), tl.load(u + at)))


@triton.jit
def _uniform_kernel(out, seed, rows, index, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(out + at, uniform_of(tl.load(seed), tl.load(rows + at), index))


def double(device, *values):
    return tuple(torch.tensor(v, dtype=torch.float64, device=device) for v in values)


def test_mills_ratio(triton_device):
    grid = np.concatenate([np.linspace(0, 40, 4096 - 64), np.geomspace(40, 1e7, 64)])
    (t,) = double(triton_device, grid)
    out = torch.empty_like(t)
    _mills_kernel[(4,)](out, t, BLOCK=1024)
    expected = np.sqrt(np.pi / 2) * special.erfcx(grid / np.sqrt(2))
    assert np.abs(out.cpu().numpy() / expected - 1).max() < 2e-14


@pytest.mark.parametrize("weight", [0.0, 3.0, -20.0])
def test_weighted_tail(triton_device, weight):
    grid = np.linspace(-12, 36, 1024)
    t, log_weight = double(triton_device, grid, [weight])
    out = torch.empty_like(t)
    _tail_kernel[(1,)](out, t, log_weight, BLOCK=1024)
    expected = np.exp(weight) * special.ndtr(-grid)
    assert np.abs(out.cpu().numpy() / expected - 1).max() < 1e-12


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("t_0", [-6.0, 0.0, 6.0])
def test_survival(triton_device, distance, t_0):
    grid = max(t_0, -6.0) + np.linspace(0, 6, 32)
    t, apart, weight = double(triton_device, grid, [distance], [distance * (t_0 + distance / 2)])
    out = torch.empty_like(t)
    _survival_kernel[(1,)](out, t, apart, weight, BLOCK=32)
    expected = np.array([float(exact_survival(v, distance, t_0)) for v in grid])
    # The weight's exponent is rounded in proportion to itself.
    error = 1e-13 * special.ndtr(-grid) + 1e-15 * distance**2 * (special.ndtr(-grid) - expected)
    assert (np.abs(out.cpu().numpy() - expected) <= error).all()


def test_a_weight_beyond_what_exp_can_hold(triton_device):
    t, weight = double(triton_device, [2e3 + 6, 2e3 + 7], [2e3 * (6 + 1e3)])
    out = torch.empty_like(t)
    _tail_kernel[(1,)](out, t, weight, BLOCK=2)
    expected = np.exp(weight.cpu().numpy() + special.log_ndtr(-t.cpu().numpy()))
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("distance", DISTANCES)
def test_inversion_in_triton(triton_device, distance):
    cases = [(t_0, u) for i, t_0 in enumerate(STARTS) for j, u in enumerate(UNIFORMS) if (i + j) % 4 == 0]
    t_0, u = double(triton_device, *zip(*cases))
    out = torch.empty_like(t_0)
    _invert_kernel[(len(cases),)](out, torch.full_like(t_0, distance), t_0, u)
    for t, case in zip(out.tolist(), cases):
        assert_inverted(t, distance, *case, within=6e-7)  # 18 / 33^5, one-sided


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1])
def test_uniforms_are_those_of_the_definition(triton_device, seed):
    rows = torch.randint(0, 2**63 - 1, (64,), generator=torch.Generator().manual_seed(0))
    rows[:8] = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 1, 2**62, 2**63 - 1])
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=triton_device)
    for index in (0, 1, 7):
        out = torch.empty(64, device=triton_device)
        _uniform_kernel[(1,)](out, signed, rows.to(triton_device), index, BLOCK=64)
        assert torch.equal(out.cpu(), uniforms(seed, rows, index))
