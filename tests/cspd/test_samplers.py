"""Samplers that are no diffusion object's: what is stood in for, what is refused, and that nothing of it stays.

That the heads of the field sample as before is in test_field.py.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from field import FIELD
from field.flow_heads import FlowMatchingHead, RectifiedFlowHead, guided
from field.other_networks import DiffHead
from foreign import CHANNELS, conditions, made, run
from patch_checks import assert_accelerated, assert_own_loop

import cspd
from cspd import samplers
from cspd.loop import patch_of
from cspd.samplers import served
from cspd.samplers.bitdance import steps as bitdance_steps
from cspd.samplers.nextstep import NextStep
from cspd.samplers.nextstep import steps as nextstep_steps
from cspd_kernels.testing import relative_error

STEPS, Z = 6, conditions(6)


def unguided(head):
    return head.sample(Z, num_sampling_steps=STEPS)


def in_parts(head):
    return head.sample(Z, cfg=3.0, cfg2=1.5, num_sampling_steps=STEPS, noise_repeat=2)


def flow_mar(head):
    return head.sample(Z, cfg=2.0)


def bit_dance(head):
    with torch.no_grad():
        return head.sample(Z, 2.5, STEPS - 1)


@pytest.fixture
def made_by(monkeypatch) -> list[str]:
    """The methods that the kernels stood in for, call by call: a network by the kernels is not evaluated, either."""
    calls, make = [], served.run

    def noting(plan, *options):
        calls.append(plan.method)
        return make(plan, *options)

    monkeypatch.setattr(served, "run", noting)
    return calls


def by_the_kernels(head, call, made_by):
    """(tokens, generator) of a call that the kernels stand in for."""
    call(head)  # compared, where the network counts what its own code has evaluated meanwhile
    made_by.clear()
    tokens, generator, evaluations = run(head, call)
    assert (made_by, evaluations) == (["sample"], 0)
    return tokens, generator


# --- a sampler that is another one ---


class OtherScore(FlowMatchingHead):
    def get_score_from_velocity(self, velocity, x, t):
        return 1.01 * super().get_score_from_velocity(velocity, x, t)


class OtherParts(FlowMatchingHead):
    def get_velocity_from_cfg(self, velocity, cfg, cfg2, groups):
        return guided(velocity, *{1: (), 2: (cfg,), 3: (cfg2, cfg)}[groups])


class OtherLastStep(FlowMatchingHead):
    def sample(
        self, c, cfg=1.0, cfg2=1.0, timesteps_shift=1.0, num_sampling_steps=20, last_step_size=0.04, noise_repeat=1
    ):
        return super().sample(c, cfg, cfg2, timesteps_shift, num_sampling_steps, last_step_size + 0.001, noise_repeat)


class Changed(FlowMatchingHead):
    change = staticmethod(lambda tokens: tokens)

    def sample(self, *args, **kwargs):
        return self.change(super().sample(*args, **kwargs))

    sample.__wrapped__ = FlowMatchingHead.sample  # its signature


def drawn_from(tokens):
    torch.randn(1)
    return tokens


FORKS = {
    "the score": (OtherScore, "differ by"),
    "guidance of three parts": (OtherParts, "its sample at cfg 3.0, cfg2 1.5, .* differ by"),
    "the last step": (OtherLastStep, "differ by"),
    "a scale": ("change", lambda x: 1.001 * x, "differ by"),
    "one more draw": ("change", drawn_from, "random number generators in a different state"),
    "the type": ("change", torch.Tensor.double, r"returns torch.float64 \(12, 4\)"),
    "the shape": ("change", lambda x: x.repeat(2, 1), r"returns torch.float32 \(24, 4\)"),
    "no tensor": ("change", lambda x: x.tolist(), "returns list, not tensors"),
}


@pytest.mark.parametrize("fork", FORKS)
def test_a_sampler_that_is_another_one_keeps_its_loop(fork, caplog):
    kind, *change, match = FORKS[fork]
    kind = kind if not change else type("Fork", (Changed,), {"change": staticmethod(*change)})
    head = made(kind)
    torch.manual_seed(5)
    if fork == "no tensor":
        with caplog.at_level(logging.WARNING, "cspd"):
            cspd.patch(head)
        assert re.search(match, caplog.text)
    else:
        assert_own_loop(head, unguided, caplog, f".*{match}", STEPS)
    assert "sample" not in vars(head)


def test_the_sampler_that_the_forks_change_is_served(caplog):
    assert_accelerated(made(Changed), in_parts, caplog, STEPS)


def test_what_is_bound_to_other_numbers_is_compared_with_them(caplog, made_by):
    """A difference that shows with the head's own numbers alone."""

    class Shifted(DiffHead):
        def sample(self, z, cfg, num_sampling_steps):
            if self.time_shift != 1.0:
                num_sampling_steps += 1
            return super().sample(z, cfg, num_sampling_steps)

    head = made(Shifted)
    assert_accelerated(head, bit_dance, caplog, STEPS)
    head.time_shift = 2.0
    with caplog.at_level(logging.WARNING, "cspd"):
        bit_dance(head)
        bit_dance(head)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search("its sample at .* differ by", message)
    head.time_shift = 1.0
    by_the_kernels(head, bit_dance, made_by)


def test_where_its_own_code_does_not_run_the_first_call_compares(caplog, made_by):
    class Elsewhere(DiffHead):
        here = False

        def sample(self, z, cfg, num_sampling_steps):
            if not self.here:
                raise RuntimeError("No CUDA GPUs are available")
            return super().sample(z, cfg, num_sampling_steps)

    head = made(Elsewhere)
    with caplog.at_level(logging.INFO, "cspd"):
        cspd.patch(head)
    assert "its own code does not run here, so it is compared at its first call" in caplog.text
    assert "No CUDA GPUs are available" in caplog.text
    Elsewhere.here = True
    bit_dance(head)
    tokens, _ = by_the_kernels(head, bit_dance, made_by)
    assert relative_error(tokens, run(made(Elsewhere), bit_dance)[0]) < 1e-5


def test_a_head_that_always_changes_is_not_compared_for_ever(caplog, monkeypatch):
    monkeypatch.setattr(served, "_MOST", 3)
    head = cspd.patch(made(FlowMatchingHead))
    with caplog.at_level(logging.WARNING, "cspd"):
        for seen in range(4):
            head.seen = seen
            in_parts(head)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("its attributes change from call to call, so it would have to be compared at each")


# --- calls ---


class WithTemperature(FlowMatchingHead):
    def sample(
        self, c, cfg=1.0, cfg2=1.0, timesteps_shift=1.0, num_sampling_steps=20, last_step_size=0.04, noise_repeat=1,
        temperature=1.0,
    ):  # fmt: skip
        x = super().sample(c, cfg, cfg2, timesteps_shift, num_sampling_steps, last_step_size, noise_repeat)
        return x * temperature


def test_an_argument_that_is_not_known(caplog):
    head = made(WithTemperature)
    assert_accelerated(head, unguided, caplog, STEPS)
    expected = run(made(WithTemperature), lambda h: h.sample(Z, num_sampling_steps=STEPS, temperature=0.5))[0]
    with caplog.at_level(logging.WARNING, "cspd"):
        for _ in range(2):
            actual = run(head, lambda h: h.sample(Z, num_sampling_steps=STEPS, temperature=0.5))[0]
            assert relative_error(actual, expected) < 1e-5
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("its sample is called with temperature, which is not known")


def test_a_kind_of_call_that_was_not_compared(caplog, monkeypatch, made_by):
    class Unguided(NextStep):
        def trials(self, head, z):
            yield "sample", {"c": z(4), "num_sampling_steps": 3}

    monkeypatch.setattr(samplers, "ADAPTERS", [Unguided()])
    head = made(FlowMatchingHead)
    expected = run(head, in_parts)[0]
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(head)
        assert relative_error(run(head, in_parts)[0], expected) < 1e-5
        by_the_kernels(head, unguided, made_by)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("such a call of its sample was not compared")


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_any_number_of_rows(rows, caplog):
    z = conditions(2 * rows)
    assert_accelerated(made(FlowMatchingHead), lambda h: h.sample(z, cfg=2.0, num_sampling_steps=STEPS), caplog, STEPS)


def test_errors_are_its_own():
    head = cspd.patch(made(FlowMatchingHead))
    with pytest.raises(ValueError, match="no multiple of noise_repeat=4"):
        head.sample(Z, noise_repeat=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cfg3'"):
        head.sample(Z, cfg3=1.0)


def test_what_autograd_records_runs_its_own_code(caplog):
    head = made(DiffHead).requires_grad_(True)
    assert_accelerated(head, bit_dance, caplog, STEPS)
    with caplog.at_level(logging.WARNING, "cspd"):
        assert head.sample(Z, 1.0, 3).requires_grad
        assert head.requires_grad_(False).sample(Z.clone().requires_grad_(True), 1.0, 3).requires_grad
        assert not head.sample(Z, 1.0, 3).requires_grad
    assert "autograd records what its sample computes" in caplog.text


def test_a_head_in_bfloat16(made_by):
    head = made(FlowMatchingHead).bfloat16()
    z = Z.bfloat16()
    call = lambda h: h.sample(z, cfg=2.0, num_sampling_steps=STEPS)  # noqa: E731
    expected = run(head, call)[0]
    wide = run(copy.deepcopy(head).float(), lambda h: h.sample(z.float(), cfg=2.0, num_sampling_steps=STEPS))[0]
    cspd.patch(head)
    actual, _ = by_the_kernels(head, call, made_by)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, wide) < max(2e-2, 1.5 * relative_error(expected, wide))


def test_the_network_is_given_times_as_wide_as_its_conditions():
    narrow, wide = (nextstep_steps(30, 1.5, 0.04, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert np.array_equal(narrow.timesteps, torch.tensor(wide.timesteps).bfloat16().double().numpy())
    assert np.array_equal(narrow.x0_out, wide.x0_out)
    assert nextstep_steps(30, 1.5, 0.04, torch.float32) is wide


def test_steps_whose_times_run_past_the_last_one(made_by):
    """The last step is at 0.95 whatever the shift made of the grid, and nothing is divided by less than 0.05."""
    schedule = bitdance_steps(50, 0.2)
    assert schedule.timesteps[1] > schedule.timesteps[0] == 0.95
    head, call = made(DiffHead, 0.2), lambda h: h.sample(Z, 1.0, 50)
    with torch.no_grad():
        expected = run(head, call)[0]
        actual, _ = by_the_kernels(cspd.patch(head), call, made_by)
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("shared", [1, 2])
def test_addressed_noise_is_shared_as_drawn_noise_is(shared, made_by):
    head, same = made(FlowMatchingHead), Z[:1].expand(6, -1)
    call = lambda h: h.sample(same, num_sampling_steps=STEPS, noise_repeat=shared)  # noqa: E731
    drawn, _ = by_the_kernels(cspd.patch(head), call, made_by)
    addressed, _ = by_the_kernels(cspd.patch(head, noise="philox"), call, made_by)
    for tokens in (drawn, addressed):
        assert relative_error(tokens.view(-1, shared, CHANNELS), tokens[:shared].expand(6 // shared, -1, -1)) < 1e-6
    assert relative_error(addressed, drawn) > 0.1
    assert torch.equal(run(head, call)[0], addressed)


# --- the instance ---


def test_copies_and_pickles_carry_it(made_by):
    head = made(DiffHead)
    expected = run(head, bit_dance)[0]
    cspd.patch(head)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert relative_error(by_the_kernels(twin, bit_dance, made_by)[0], expected) < 1e-5
        assert twin.sample.__self__.module is twin
        cspd.unpatch(twin)
        assert "sample" not in vars(twin)
    by_the_kernels(head, bit_dance, made_by)


@torch.no_grad()
def test_a_copy_knows_which_of_its_specs_the_network_is(made_by):
    head = FIELD["flow_mar"].make()
    tokens, generator = by_the_kernels(cspd.patch(head), flow_mar, made_by)
    assert patch_of(head.net).cache.choice == 1
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        again, state = by_the_kernels(twin, flow_mar, made_by)
        assert torch.equal(again, tokens)
        assert torch.equal(state, generator)


def test_fewer_steps_than_a_sampler_makes_are_its_own_matter():
    head = cspd.patch(made(FlowMatchingHead))
    with contextlib.suppress(IndexError):
        head.sample(Z, num_sampling_steps=1)
    assert "it makes no step with num_sampling_steps=1" in str(cspd.describe(head))


def test_shallow_copies_run_their_own_code(caplog):
    head = cspd.patch(made(DiffHead))
    expected = run(head, bit_dance)[0]
    with caplog.at_level(logging.WARNING, "cspd"):
        assert relative_error(run(copy.copy(head), bit_dance)[0], expected) < 1e-5
    assert not caplog.records  # as of other patches: what stands in is bound to the head that was patched


def test_weights_are_followed(made_by):
    head, other = made(FlowMatchingHead), made(FlowMatchingHead)
    cspd.patch(head)
    run(head, in_parts)
    with torch.no_grad():
        for part in (head, other):
            part.net.res_blocks[0].mlp[0].weight.mul_(1.5)
    tokens, _ = by_the_kernels(head, in_parts, made_by)
    assert relative_error(tokens, run(other, in_parts)[0]) < 1e-5


def test_a_method_that_had_been_replaced(caplog):
    head = made(DiffHead)
    head.sample = lambda z, cfg, num_sampling_steps: torch.ones(2)
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(head)
        assert torch.equal(bit_dance(head), torch.ones(2))
    assert re.search(r"its sample at .* returns torch.float32 \(2,\)", caplog.text)
    assert torch.equal(bit_dance(cspd.unpatch(head)), torch.ones(2))


def test_a_method_that_had_been_replaced_by_its_like(caplog):
    def as_before(self, z, cfg, num_sampling_steps):
        return DiffHead.sample(self, z, cfg, num_sampling_steps)

    head = made(DiffHead)
    head.sample = as_before.__get__(head)
    expected = run(head, bit_dance)[0]
    with caplog.at_level(logging.WARNING, "cspd"):
        assert relative_error(run(cspd.patch(head), bit_dance)[0], expected) < 1e-5
    assert "its sample had been replaced on the instance" in caplog.text
    assert cspd.unpatch(head).sample.__func__ is as_before


def test_a_network_that_was_exchanged(caplog):
    head, other = cspd.patch(made(FlowMatchingHead)), made(FlowMatchingHead)
    for parameter in other.net.parameters():
        parameter.data *= 0.5
    head.net = other.net
    with caplog.at_level(logging.WARNING, "cspd"):
        assert torch.equal(run(head, in_parts)[0], run(other, in_parts)[0])
    assert "the net of FlowMatchingHead was replaced since it was patched: patch again" in caplog.text


def test_two_heads_of_one_network_patched_at_the_same_time(caplog, made_by):
    first, second = made(FlowMatchingHead), FlowMatchingHead()
    second.net = first.net
    expected = run(first, in_parts)[0]
    with caplog.at_level(logging.WARNING, "cspd"), cspd.patched(first), cspd.patched(second):
        assert relative_error(by_the_kernels(second, in_parts, made_by)[0], expected) < 1e-5
        made_by.clear()
        assert relative_error(run(first, in_parts)[0], expected) < 1e-5
    assert not made_by
    assert "its network has since been patched as that of another head" in caplog.text
    assert not {"sample"} & {*vars(first), *vars(second)}


def test_a_head_inside_of_another_that_passes_calls_on(caplog):
    class DiffLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = RectifiedFlowHead()
            self.net = self.head.net

        def sample(self, z, temperature=1.0, cfg=1.0):
            return self.head.sample(z, temperature, cfg)

    outer = made(DiffLoss)
    assert_accelerated(outer, torch.no_grad()(lambda h: h.sample(Z, 0.8, 2.0)), caplog, 10)
    assert "sample" not in vars(outer)
    assert outer.head.sample.__name__ == "sample"
    assert "sample_additive_cfg" in vars(outer.head)
    cspd.unpatch(outer)
    assert not {"sample", "sample_additive_cfg"} & {*vars(outer.head)}


def test_what_describe_says():
    head = made(FlowMatchingHead)
    (before,) = cspd.describe(head).heads
    assert before.samplers == {"sample": "as of stepfun-ai/NextStep-1"}
    assert before.own_loop is None
    (after,) = cspd.describe(cspd.patch(head)).heads
    assert after.samplers == before.samplers
    assert after.line.endswith("patched, parallel_tol=auto")
    (own,) = cspd.describe(cspd.patch(head, loop="own")).heads
    assert own.samplers == {}
    assert own.own_loop == "loop='own' was asked for"
    assert "sample" not in vars(head)


def test_other_samplers_are_of_diffusions():
    head = made(FlowMatchingHead)
    with pytest.raises(ValueError, match="sampler 'ddim', eta 0 needs a head with a diffusion object"):
        cspd.patch(head, sampler="ddim")
    assert not cspd.is_patched(head)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "options"), [(FlowMatchingHead, {"cfg2": 1.5, "noise_repeat": 2}), (DiffHead, {})])
@torch.no_grad()
def test_on_a_gpu(kind, options, made_by):
    head, z = made(kind).cuda(), conditions(36).cuda()
    call = lambda h: h.sample(z, cfg=3.0, num_sampling_steps=STEPS, **options)  # noqa: E731
    expected, _, _ = run(head, call)
    state = torch.cuda.get_rng_state()
    cspd.patch(head)
    actual, _ = by_the_kernels(head, call, made_by)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert relative_error(actual, expected) < 1e-4
    cspd.patch(head)
    with (
        pytest.raises(RuntimeError, match="expected a first call like this one"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(head)
