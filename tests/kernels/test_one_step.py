"""A head of one step: its schedule, and that its token is the network's output at x_T, in every backend."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from chains import addressed, assert_agrees

from cspd.models.drift import DriftLoss
from cspd_kernels import DiffusionHead, Schedule, denoise
from cspd_kernels.testing import random_inputs, relative_error

WIDTH = 0.3


@pytest.fixture
def module(make_diffloss, kernel_device):
    """A ``DriftLoss`` whose every layer has its share in the result."""
    made = DriftLoss(5, 7, 1, 48, WIDTH)
    made.load_state_dict({**made.state_dict(), **make_diffloss(depth=1, learn_sigma=False, scale=0.15).state_dict()})
    return made.to(kernel_device)


@torch.no_grad()
def output(module, cond, x):
    """The network's output at x (N, C), guided by 2.5 where cond has 2 N rows, in float64."""
    net = copy.deepcopy(module.net).double()
    t = torch.zeros(len(cond), dtype=torch.int64, device=x.device)
    if len(cond) == len(x):
        return net(x.double(), t, cond.double())
    conditional, free = net(torch.cat([x, x]).double(), t, cond.double()).chunk(2)
    return free + 2.5 * (conditional - free)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noise", ["tensor", "philox"])
def test_its_token_is_the_networks_output(backend, module, shape, guided, noise):
    head = DiffusionHead.from_module(module)
    cond, x, drawn = random_inputs(head, 5, 0, guided)
    drawn = addressed(head, 5, 3) if noise == "philox" else drawn
    options = {"cfg_scale": 2.5 if guided else 1.0, "backend": backend, "temperature": 0.7}
    got = denoise(head, cond, x, drawn, **options)
    assert relative_error(got.sample, output(module, cond, x)) < 1e-5
    assert torch.equal(got.sample, got.mean)
    assert relative_error(got.log_std, torch.full_like(got.log_std, math.log(0.7 * WIDTH))) < 1e-6
    assert not got.path_log_std.any()
    assert_agrees(head, cond, x, drawn, **options)


def test_in_torch(module):
    head = DiffusionHead.from_module(module)
    cond, x, drawn = random_inputs(head, 5, 0)
    got = denoise(head, cond, x, drawn, backend="torch")
    assert relative_error(got.sample, output(module, cond, x)) < 1e-5
    assert torch.equal(got.sample, got.mean)


def test_in_sweeps_it_is_the_same(module):
    head = DiffusionHead.from_module(module)
    inputs = random_inputs(head, 5, 0)
    swept = denoise(head, *inputs, backend="torch", parallel_tol=1e-3)
    assert relative_error(swept.sample, denoise(head, *inputs, backend="torch").sample) < 1e-6


def test_a_network_with_a_variance_has_the_stated_width_all_the_same(make_diffloss):
    module = make_diffloss(depth=1)
    module.gen_diffusion.schedule = Schedule.one_step(WIDTH)
    head = DiffusionHead.from_module(module)
    got = denoise(head, *random_inputs(head, 3, 0), backend="torch")
    assert relative_error(got.log_std, torch.full_like(got.log_std, math.log(WIDTH))) < 1e-6


def test_tables():
    schedule = Schedule.one_step(WIDTH)
    values = {name: getattr(schedule, name).tolist() for name in ("x0_x", "x0_out", "mean_x0", "mean_x", "timesteps")}
    assert values == {"x0_x": [0.0], "x0_out": [1.0], "mean_x0": [1.0], "mean_x": [0.0], "timesteps": [0.0]}
    assert schedule.log_std_lower.tolist() == schedule.log_std_upper.tolist() == [pytest.approx(math.log(WIDTH))]
    assert (schedule.num_steps, schedule.learned, schedule.deterministic, schedule.width) == (1, False, False, WIDTH)
    assert repr(schedule) == "Schedule.one_step(0.3)"
    for again in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), schedule.last(1), schedule.last(10)):
        assert (again.width, again.mean_x0.tolist(), again.x0_x.tolist()) == (WIDTH, [1.0], [0.0])
    with pytest.raises(ValueError, match="read-only"):
        schedule.mean_x0[0] = 2.0


def test_the_last_steps_of_a_diffusion():
    whole, last = Schedule.linear(7), Schedule.linear(7).last(3)
    assert (last.num_steps, last.width, last.variance) == (3, None, whole.variance)
    np.testing.assert_array_equal(last.mean_x0, whole.mean_x0[:3])
    np.testing.assert_array_equal(last.betas, whole.betas[:3])


@pytest.mark.parametrize("width", [0.0, -1.0, math.inf, math.nan])
def test_a_width_that_is_none(width):
    with pytest.raises(ValueError, match="finite width > 0"):
        Schedule.one_step(width)
