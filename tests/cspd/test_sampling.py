"""Other samplers of a head, and fewer or annealed denoising steps: in whole images, and in speculative runs."""

from __future__ import annotations

import copy
import math

import fake_graphs
import numpy as np
import pytest
import torch
from gaussian_pair import IMPOSSIBLE, log_p_values
from residuals import projected, residuals, strictly
from small_models import sample, small_mar
from strict_loop import gentle, image, near

import cspd
from cspd.models import GaussianDiffusion
from cspd.sampling import OWN, Sampling
from cspd_kernels import Schedule
from cspd_kernels.testing import relative_error

FLOW = Schedule.euler_maruyama(np.linspace(0.0, 1.0, 7))


def small(seed: int, **changes):
    """With a schedule that leaves the tokens of random weights in bounds."""
    model = small_mar(seed, **changes)
    model.diffloss.gen_diffusion = GaussianDiffusion(Schedule.linear(12))
    return model


class Annealed(GaussianDiffusion):
    """A diffusion object that samples by another schedule at every call of its loop."""

    def __init__(self, schedules):
        super().__init__(schedules[0])
        self.schedules, self.calls = schedules, 0

    def p_sample_loop(self, *args, **kwargs):
        self.schedule, self.calls = self.schedules[self.calls % len(self.schedules)], self.calls + 1
        return super().p_sample_loop(*args, **kwargs)


CASES = {
    "fewer": Sampling(steps=5),
    "DDIM": Sampling("ddim"),
    "DDIM, half the noise, fewer": Sampling("ddim", 0.5, 4),
    "annealed": Sampling(steps=(9, 2)),
    "annealed DDIM": Sampling("ddim", 1.0, (3, 10)),
}


@pytest.mark.parametrize("noise", ["upstream", "philox"])
@pytest.mark.parametrize("name", CASES)
def test_whole_images_are_those_of_a_model_with_these_steps(name, noise, monkeypatch):
    sampling, model, steps = CASES[name], small(2), 6
    own = model.diffloss.gen_diffusion.schedule
    schedules = [sampling.schedule(own, i, steps) for i in range(steps)]
    other = copy.deepcopy(model)
    other.diffloss.gen_diffusion = Annealed(schedules)
    options = {"sampler": sampling.sampler, "eta": sampling.eta, "sampling_steps": sampling.steps, "noise": noise}

    def drawn():
        torch.manual_seed(3)
        np.random.seed(3)
        return cspd.sample_tokens(model, 3, steps, cfg=2.0, labels=torch.tensor([1, 4, 9]), **options)

    if noise == "upstream":
        expected = sample(other, 3, cfg=2.0)
        assert relative_error(drawn(), expected) < 1e-5
        assert relative_error(expected, sample(model, 3, cfg=2.0)) > 1e-2
    first = drawn()
    fake_graphs.use(monkeypatch)
    model.__dict__.pop("_cspd_samplers")
    assert all(relative_error(drawn(), first) < 1e-5 for _ in range(3))


def test_counts():
    annealed = Sampling(steps=(50, 5))
    assert [annealed.count(i, 10) for i in range(10)] == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    assert [Sampling(steps=(2, 6)).count(i, 3) for i in range(3)] == [2, 4, 6]
    assert (annealed.count(0, 1), Sampling(steps=7).count(3, 9), OWN.count(0, 1)) == (50, 7, None)
    schedule = Schedule.linear(50)
    assert OWN.schedule(schedule) is schedule
    made = annealed.schedule(schedule, 9, 10)
    assert made.num_steps == 5
    assert annealed.schedule(schedule, 9, 10) is made  # whose head is kept
    assert not OWN.changes
    assert annealed.anneals
    assert not Sampling(steps=[4, 4]).anneals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampler="DDIM"), "sampler one of"),
        (dict(sampler="ddim", eta=1.5), r"eta in \[0, 1\], got 1.5"),
        (dict(sampler="ddim", eta=math.nan), "eta in"),
        (dict(eta=0.5), "eta=0.5 together with sampler='ddim'"),
        (dict(sampling_steps=0), "sampling_steps as an int >= 1 or a pair"),
        (dict(sampling_steps=(4,)), "sampling_steps as an int >= 1 or a pair"),
        (dict(sampling_steps=(4, 3, 2)), "sampling_steps as an int >= 1 or a pair"),
        (dict(sampling_steps=True), "sampling_steps as an int >= 1 or a pair"),
        (dict(sampling_steps=13), "sampling_steps up to the head's own 12, got 13"),
        (dict(sampling_steps=(4, 13)), "sampling_steps up to the head's own 12, got 13"),
        (dict(sampler="ddim"), "eta > 0"),
        (dict(sampling_steps=(6, 2), verify="strict"), "one number as sampling_steps with verify='strict'"),
    ],
)
def test_a_runner_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        cspd.SpecDecodeRunner(small_mar(0), small_mar(1), **options)


def test_flows_are_refused_where_they_cannot_be():
    flow, still = small_mar(0, learn_sigma=False), small_mar(1, learn_sigma=False)
    flow.diffloss.gen_diffusion = GaussianDiffusion(FLOW)
    still.diffloss.gen_diffusion = GaussianDiffusion(Schedule.euler(np.linspace(0.0, 1.0, 7)))
    with pytest.raises(ValueError, match="a head with a noise schedule"):
        cspd.SpecDecodeRunner(flow, flow, sampling_steps=3)
    with pytest.raises(ValueError, match=r"whose steps add noise.*Euler-Maruyama"):
        cspd.SpecDecodeRunner(still, still)
    with pytest.raises(ValueError, match="the same noise schedule"):
        cspd.SpecDecodeRunner(flow, still)
    cspd.SpecDecodeRunner(still, still, prefill=1.0).run(1, 3)  # nothing is drafted


@pytest.mark.parametrize("graphs", [False, True])
def test_windows_of_one_step_anneal_as_the_target_alone(graphs, monkeypatch):
    """Draft and target are one model, so that all is accepted."""
    model = small(3)
    if graphs:
        fake_graphs.use(monkeypatch)
    drawn = []
    for prefill in (1.0, 0.4):
        made = cspd.SpecDecodeRunner(model, model, 1.0, prefill, sampling_steps=(10, 3))
        drawn.append([made.run(2, 5, 1, seed=seed) for seed in (1, 2, 1)])
    assert made.stats.acceptance == 1.0
    for ours, alone in zip(drawn[1], drawn[0]):
        assert relative_error(ours, alone) < 1e-5
    assert relative_error(cspd.SpecDecodeRunner(model, model, 1.0, 1.0).run(2, 5, 1, seed=1), alone) > 1e-2


def test_a_window_has_the_steps_of_its_first():
    seen = []
    made = cspd.SpecDecodeRunner(small(4), small(3), prefill=0.2, sampling_steps=(12, 2))
    state = made.begin(1, 6, seed=0)
    for step in range(len(state.plan.steps)):
        state.go_to(step)
        assert state.draft.head.num_steps == state.target.head.num_steps
        seen.append(state.target.head.num_steps)
    assert seen == [12, 10, 8, 6, 4, 2]
    assert made.run(2, 6, 3, seed=1).isfinite().all()


def flow():
    target = gentle()
    target.diffloss.gen_diffusion = GaussianDiffusion(FLOW)
    return target


EXACT = {
    "a flow, closed form": (flow, dict(residual="closed_form"), 0.9),
    "a flow, candidates": (flow, dict(num_candidates=2, branches=2), 0.9),
    "a flow, guided": (flow, dict(residual="closed_form", cfg=2.0), 0.9),
    "DDIM of a learned variance": (
        lambda: gentle(learned=True), dict(residual="closed_form", sampler="ddim", eta=1.0), 0.9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_tokens_have_the_targets_law(name, monkeypatch):
    """Draft and target share sigma, so the closed form is exact: the residuals of all tokens are standard normals."""
    make, options, size = EXACT[name]
    target, options = make(), dict(options)
    arguments = {"cfg": options.pop("cfg")} if "cfg" in options else {}
    made = strictly(near(target, size), target, **options)
    residual, difference = residuals(monkeypatch, made, **arguments)
    stats = made.stats
    assert 0.2 < stats.acceptance < 0.95
    assert stats.fallback < 1e-3
    assert log_p_values(residual)[0] > IMPOSSIBLE + math.log(2300 / 200)
    assert abs(projected(residual, difference)) < 6.1


def test_another_law_would_be_found(monkeypatch):
    """A relaxed test keeps too many of the draft's tokens."""
    target = flow()
    made = strictly(near(target, 0.9), target, residual="closed_form")
    made.relaxation = 5.0
    residual, difference = residuals(monkeypatch, made)
    assert abs(projected(residual, difference)) > 6.1 + 5


def test_rounds_of_a_flow_equal_a_loop_of_one_image():
    target = flow()
    made = strictly(near(target, 0.6), target, residual="closed_form")
    images = made.target_model.patchify(made.run(3, 6, 2, seed=5))
    for number in range(3):
        tokens, _ = image(made, number, 6, 2, 5)
        assert relative_error(images[number], tokens) < 1e-4


def test_a_learned_variance_needs_its_own_sampler_to_count():
    pair = gentle(learned=True), gentle(learned=True)
    with pytest.raises(ValueError, match="fixed variance"):
        cspd.SpecDecodeRunner(*pair, residual="closed_form")
    cspd.SpecDecodeRunner(*pair, residual="closed_form", sampler="ddim", eta=1.0)
