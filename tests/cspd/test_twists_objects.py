"""``cspd.patch`` where heads, diffusion objects and samplers are not one of each; copies, pickles, several patches."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.nn as nn
from foreign import CHANNELS, STEPS, Head, Mean, Spaced, conditions, made, own_messages, run
from patch_checks import assert_accelerated, assert_own_code, assert_own_loop
from slow import mostly_slow

import cspd
from cspd import heads
from cspd.loop import LoopHook, patch_of
from cspd_kernels.testing import relative_error

Z = conditions()


class Stepped(Head):
    """One of several diffusion objects, picked by an argument."""

    def __init__(self, several):
        super().__init__(several)

    def sample(self, z, temperature=1.0, cfg=1.0, step=0):
        args, options = self.call(z, cfg)
        return self.gen_diffusion[step].p_sample_loop(*args, **options, temperature=temperature)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_a_list_of_diffusion_objects(cfg, caplog):
    head = made(Stepped, [Spaced(12), Spaced(5), Spaced(31)])
    for step, steps in enumerate((12, 5, 31)):
        assert_accelerated(head, lambda h, step=step: h.sample(Z, 0.9, cfg, step)[:3], caplog, steps)
    for step in range(3):
        head.sample(Z, 0.9, cfg, step)
    assert len(patch_of(head.net).verdicts) == 2  # with guidance and without; of one sort, whatever their T


def test_a_dictionary_of_lists_of_diffusion_objects(caplog):
    class Named(Stepped):
        def sample(self, z, temperature=1.0, cfg=1.0, step=("coarse", 0)):
            args, options = self.call(z, cfg)
            name, i = step
            return self.gen_diffusion[name][i].p_sample_loop(*args, **options, temperature=temperature)

    head = made(Named, {"coarse": [Spaced(5)], "fine": [Spaced(31), Spaced(12)]})
    for step, steps in ((("coarse", 0), 5), (("fine", 0), 31), (("fine", 1), 12)):
        assert_accelerated(head, lambda h, step=step: h.sample(Z, step=step), caplog, steps)


def test_many_schedules_share_the_weights(monkeypatch):
    monkeypatch.setattr(heads, "_MAX_SCHEDULES", 64)
    head = cspd.patch(made(Stepped, [Spaced(steps) for steps in range(3, 80)]))
    for step in range(77):
        head.sample(Z, step=step)
    packed = patch_of(head.net).cache._forms[torch.float32].heads.values()
    assert len(packed) == 64
    assert len({each.cond_weight.data_ptr() for each in packed}) == 1
    assert head.net.evaluations == 0


def test_one_of_the_diffusion_objects_is_of_another_kind(caplog):
    head = made(Stepped, [Spaced(12), Spaced(12, mean=Mean.START_X), Spaced(12, mean=Mean.PREVIOUS_X)])
    assert_accelerated(head, lambda h: h.sample(Z, step=0), caplog)
    assert_accelerated(head, lambda h: h.sample(Z, step=1), caplog)
    assert_own_code(head, lambda h: h.sample(Z, step=2), caplog, "PREVIOUS_X")


def test_one_of_the_diffusion_objects_computes_otherwise(caplog):
    class Shifted(Spaced):
        def mean(self, x0, x, i):
            return super().mean(x0, x, i) + 0.05

    head = made(Stepped, [Spaced(12), Shifted(12)])
    assert_accelerated(head, lambda h: h.sample(Z, step=0), caplog)
    assert_own_code(head, lambda h: h.sample(Z, step=1), caplog, "its sampling loop and the kernels' differ by")
    head = made(Stepped, [Shifted(12), Spaced(12)])
    assert_own_loop(head, lambda h: h.sample(Z, step=0), caplog, "its sample at .* differ by")


def test_options_of_a_diffusion_object_are_looked_at_again(caplog):
    class Optional(Spaced):
        clip_always = False

        def estimate(self, model, x, i, clip_denoised, *rest):
            return super().estimate(model, x, i, clip_denoised or self.clip_always, *rest)

    head = made(Head, Optional())
    head.gen_diffusion.clip_always = True
    expected = run(head, lambda h: h.sample(Z))[0]
    head.gen_diffusion.clip_always = False
    cspd.patch(head)
    for clip, evaluations in ((False, 0), (True, STEPS), (True, STEPS), (False, 0)):
        head.gen_diffusion.clip_always = clip
        with caplog.at_level(logging.WARNING, "cspd"):
            actual, _, counted = run(head, lambda h: h.sample(Z))
        assert counted == evaluations
        assert torch.equal(actual, expected) == clip
    (message,) = own_messages(caplog)
    assert "its sampling loop and the kernels' differ by" in message


def test_limits_in_a_table_are_looked_at_again():
    class Limited(Spaced):
        def __init__(self):
            super().__init__()
            self.limits = torch.ones(CHANNELS + STEPS)

        def limited(self, x0):
            return torch.minimum(torch.maximum(x0, -self.limits[:CHANNELS]), self.limits[:CHANNELS])

    class Clipped(Head):
        def call(self, *args, **more):
            arguments, options = super().call(*args, **more)
            return arguments, {**options, "clip_denoised": True}

    head = made(Clipped, Limited())
    head.gen_diffusion.limits *= 0.3
    expected = run(head, lambda h: h.sample(Z))[0]
    head.gen_diffusion.limits.fill_(1.0)
    cspd.patch(head)
    assert run(head, lambda h: h.sample(Z))[2] == 0
    head.gen_diffusion.limits *= 0.3
    assert torch.equal(run(head, lambda h: h.sample(Z))[0], expected)


@pytest.mark.parametrize("how", ["the list", "one of it"])
def test_a_list_that_is_exchanged_after_patching(how, caplog):
    class Listed(Head):
        def __init__(self):
            super().__init__()
            self.others = [Spaced(5), Spaced(9)]

        def sample(self, z, temperature=1.0):
            args, options = self.call(z)
            return self.others[1].p_sample_loop(*args, **options, temperature=temperature)

    head = made(Listed)
    others, head.others = head.others, [Spaced(4), Spaced(7)]
    expected = run(head, lambda h: h.sample(Z))[0]
    new, head.others = head.others, others
    cspd.patch(head)
    if how == "the list":
        head.others = new
    else:
        head.others[1] = new[1]
    with caplog.at_level(logging.WARNING, "cspd"):
        actual, _, evaluations = run(head, lambda h: h.sample(Z))
    assert evaluations == 0
    assert relative_error(actual, expected) < 1e-5
    cspd.unpatch(head)
    assert not any("p_sample_loop" in vars(diffusion) for diffusion in (*new, *others))


class Several(nn.Module):
    """Heads on one diffusion object."""

    def __init__(self, count=2):
        super().__init__()
        diffusion = Spaced()
        self.heads = nn.ModuleList(made(Head, diffusion, seed=seed) for seed in range(count))


def test_several_heads_on_one_diffusion_object():
    model = Several()
    one, two = model.heads
    expected = [run(head, lambda h: h.sample(Z))[0] for head in model.heads]

    def served():
        counts = []
        for head, tokens in zip(model.heads, expected):
            actual, _, evaluations = run(head, lambda h: h.sample(Z))
            assert relative_error(actual, tokens) < 1e-5
            counts.append(evaluations == 0)
        return counts

    assert served() == [False, False]
    cspd.patch(one)
    assert served() == [True, False]
    cspd.patch(two)
    assert served() == [True, True]
    assert "p_sample_loop" in vars(one.gen_diffusion)
    cspd.unpatch(one)
    assert served() == [False, True]
    cspd.unpatch(two)
    assert served() == [False, False]
    assert "p_sample_loop" not in vars(one.gen_diffusion)
    cspd.patch(model)
    assert served() == [True, True]
    cspd.unpatch(model)
    assert served() == [False, False]
    assert "p_sample_loop" not in vars(one.gen_diffusion)


def test_a_head_given_away_with_its_diffusion_object_still_patched():
    model = Several()
    cspd.patch(model)
    del model.heads[0]
    actual, _, evaluations = run(model.heads[0], lambda h: h.sample(Z))
    assert evaluations == 0
    cspd.unpatch(model)
    assert torch.equal(run(model.heads[0], lambda h: h.sample(Z))[0], run(made(seed=1), lambda h: h.sample(Z))[0])
    assert relative_error(actual, run(made(seed=1), lambda h: h.sample(Z))[0]) < 1e-5


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
def test_copies_have_a_patch_of_their_own(how):
    head = cspd.patch(made(), dtype=torch.float32)
    expected = run(head, lambda h: h.sample(Z))[0]
    twin = COPIES[how](head)
    with torch.no_grad():
        head.net.final_layer.linear.weight.zero_()  # the twin must not read the original's weights
    actual, _, evaluations = run(twin, lambda h: h.sample(Z))
    assert (torch.equal(actual, expected), evaluations) == (True, 0)
    assert LoopHook.of(twin.gen_diffusion).diffusion is twin.gen_diffusion
    assert patch_of(twin.net).net is twin.net
    assert patch_of(twin.net).options == patch_of(head.net).options
    cspd.unpatch(twin)
    assert (cspd.is_patched(head), cspd.is_patched(twin)) == (True, False)
    assert run(twin, lambda h: h.sample(Z))[2] == STEPS
    assert run(head, lambda h: h.sample(Z))[2] == 0
    assert "p_sample_loop" not in vars(twin.gen_diffusion)
    assert "sample" not in vars(twin)
    cspd.unpatch(head)
    assert run(head, lambda h: h.sample(Z))[2] == STEPS


@pytest.mark.parametrize("how", mostly_slow(COPIES, fast=("deepcopy",)))
def test_unpatching_the_original_leaves_a_copy_patched(how):
    head = cspd.patch(made())
    twin = COPIES[how](head)
    cspd.unpatch(head)
    assert run(twin, lambda h: h.sample(Z))[2] == 0
    assert run(head, lambda h: h.sample(Z))[2] == STEPS


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_heads_on_one_diffusion_object(how):
    model = cspd.patch(Several())
    twin = COPIES[how](model)
    del model
    assert twin.heads[0].gen_diffusion is twin.heads[1].gen_diffusion
    assert [run(head, lambda h: h.sample(Z))[2] for head in twin.heads] == [0, 0]
    cspd.unpatch(twin.heads[1])
    assert [run(head, lambda h: h.sample(Z))[2] for head in twin.heads] == [0, STEPS]
    cspd.unpatch(twin)
    assert [run(head, lambda h: h.sample(Z))[2] for head in twin.heads] == [STEPS, STEPS]


def test_two_models_patched_differently():
    one, two, three = (made(seed=seed) for seed in range(3))
    exact = [run(head, lambda h: h.sample(Z))[0] for head in (one, two, three)]
    cspd.patch(one)
    cspd.patch(two, dtype=torch.bfloat16)
    errors = []
    for head, expected, steps in zip((one, two, three), exact, (0, 0, STEPS)):
        actual, _, evaluations = run(head, lambda h: h.sample(Z))
        assert evaluations == steps
        errors.append(relative_error(actual, expected))
    assert errors[0] < 1e-5 < 1e-4 < errors[1] < 0.1
    assert errors[2] == 0
    assert patch_of(one.net).options.dtype is None
    assert patch_of(two.net).options.dtype is torch.bfloat16


class SecondSampler(Head):
    """A second method that samples, by the loop or by a sampler of its own."""

    def sample_again(self, z):
        args, options = self.call(z)
        return 2 * self.gen_diffusion.p_sample_loop(*args, **options, temperature=0.5)

    def sample_ddim(self, z):
        args, options = self.call(z)
        return self.gen_diffusion.ddim_sample_loop(*args, **options)


def test_a_second_sampling_method(caplog):
    assert_accelerated(made(SecondSampler), lambda h: h.sample(Z), caplog)
    assert_accelerated(made(SecondSampler), lambda h: h.sample_again(Z), caplog)
    head = made(SecondSampler)
    assert_accelerated(head, lambda h: h.sample_ddim(Z), caplog)
    assert cspd.describe(head).heads[0].untouched == ("sample_again", "sample_ddim")


def test_a_shallow_copy_of_the_network_runs_its_own_code(caplog):
    head = made()
    expected = run(head, lambda h: h.sample(Z))[0]
    cspd.patch(head)
    other = copy.copy(head)
    other._modules = {**head._modules, "net": copy.copy(head.net)}
    with caplog.at_level(logging.WARNING, "cspd"):
        actual, _, evaluations = run(other, lambda h: Head.sample(h, Z))
    assert torch.equal(actual, expected)
    assert evaluations == STEPS
    assert "this is a replica or a shallow copy of the patched network" in own_messages(caplog)[0]
