"""Heads of a flow in our own models: the loss of the velocity, and what is sampled by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign import CHANNELS, COND, DEPTH, WIDTH, conditions

import cspd
from cspd.models.diffloss import DiffLoss
from cspd.models.diffusion import GaussianDiffusion
from cspd_kernels import Schedule
from cspd_kernels.testing import randomize_, relative_error

X0 = torch.randn(7, CHANNELS, generator=torch.Generator().manual_seed(1))
TIMES = np.linspace(0.0, 1.0, 13)
SCHEDULES = {
    "to 1": Schedule.euler(TIMES),
    "to 0": Schedule.euler(1.0 - TIMES, data_at=0.0),
    "stochastic": Schedule.euler_maruyama(TIMES),
}


def towards_data(schedule):
    """The exact dx/dt of paths that all end in X0."""

    def velocity(x, t):
        t = t[:, None]
        return (x - X0) / t if schedule is SCHEDULES["to 0"] else (X0 - x) / (1 - t)

    return velocity


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_velocity_has_no_loss_and_samples_the_data(name):
    diffusion, velocity = GaussianDiffusion(SCHEDULES[name]), towards_data(SCHEDULES[name])
    torch.manual_seed(0)
    t = 0.98 * diffusion.random_times(len(X0), X0.device) + 0.01
    assert t.is_floating_point()
    assert diffusion.training_losses(velocity, X0, t).abs().max() < 1e-6
    shifted = diffusion.training_losses(lambda x, t: velocity(x, t) + torch.tensor([0.0, 2.0, 0.0, 0.0]), X0, t)
    assert relative_error(shifted, torch.ones(len(X0))) < 1e-4  # the mean over channels of 0, 4, 0, 0
    backwards = diffusion.training_losses(lambda x, t: -velocity(x, t), X0, t)
    assert backwards.min() > 0.5
    tokens = diffusion.p_sample_loop(velocity, X0.shape, clip_denoised=False)
    assert relative_error(tokens, X0) < 1e-5


def test_whose_loss_it_is_not():
    x, t = X0, torch.rand(len(X0))
    for schedule in (
        Schedule.euler(TIMES, timesteps=1000 * TIMES[:-1]),
        Schedule.euler(TIMES, timesteps=TIMES[:-1] ** 2),
    ):
        with pytest.raises(ValueError, match="is given the time itself, got Schedule"):
            GaussianDiffusion(schedule).training_losses(towards_data(schedule), x, t)
    with pytest.raises(ValueError, match="'cosine', 'linear', 'euler' or 'euler_maruyama', got 'flow'"):
        DiffLoss(CHANNELS, COND, DEPTH, WIDTH, 5, schedule="flow")


@pytest.mark.parametrize("schedule", ["euler", "euler_maruyama"])
def test_a_head_of_a_flow_is_trained_and_served(schedule):
    head = DiffLoss(CHANNELS, COND, DEPTH, WIDTH, 8, schedule=schedule)
    assert head.net.final_layer.linear.out_features == CHANNELS
    assert (head.gen_diffusion.num_timesteps, head.gen_diffusion.schedule.name) == (8, schedule)
    randomize_(head, 1)
    head(X0, conditions(len(X0))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    z = conditions(6)
    for options in ({}, {"cfg": 2.0, "temperature": 0.8}):
        torch.manual_seed(2)
        expected, state = head.sample(z, **options), torch.get_rng_state()
        cspd.patch(head)
        torch.manual_seed(2)
        actual = head.sample(z, **options)
        assert torch.equal(torch.get_rng_state(), state)
        assert relative_error(actual[:3], expected[:3]) < 1e-5
        assert relative_error(actual, expected) < 1e-5 or "cfg" in options
        assert not cspd.describe(head).heads[0].own_code
        cspd.unpatch(head)


def test_times_of_a_diffusion_are_drawn_as_before():
    diffusion = GaussianDiffusion(Schedule.cosine(20))
    torch.manual_seed(3)
    t = diffusion.random_times(50, X0.device)
    torch.manual_seed(3)
    assert torch.equal(t, torch.randint(0, 20, (50,)))
