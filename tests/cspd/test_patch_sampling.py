"""``cspd.patch(sampler=, eta=, sampling_steps=)``: other steps than the loop's own, made, told, and refused."""

from __future__ import annotations

import copy
import logging
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from foreign import Head, Mean, Spaced, conditions, made, run
from small_models import CSpDDiffLoss, sample, small_mar

import cspd
from cspd import head_patch
from cspd.models import DiffLoss, GaussianDiffusion
from cspd_kernels.testing import randomize_, relative_error

Z = conditions()


class ByDDIM(Head):
    """By DDIM where eta is not None."""

    eta = None

    def sample(self, z, temperature=1.0, cfg=1.0):
        if self.eta is None:
            return super().sample(z, temperature, cfg)
        args, options = self.call(z, cfg)
        return self.gen_diffusion.ddim_sample_loop(*args, **options, eta=self.eta)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_in_place_of_the_loops_steps(eta, cfg):
    head = made(ByDDIM)
    head.eta = eta
    expected, rng, _ = run(head, lambda h: h.sample(Z, 1.0, cfg)[:3])
    head.eta = None
    own = run(head, lambda h: h.sample(Z, 1.0, cfg)[:3])[0]
    with cspd.patched(head, sampler="ddim", eta=eta):
        actual, rng_after, evaluations = run(head, lambda h: h.sample(Z, 1.0, cfg)[:3])
    assert evaluations == 0
    assert relative_error(actual, expected) < 1e-5 < relative_error(actual, own)
    assert torch.equal(rng, rng_after)
    assert torch.equal(run(head, lambda h: h.sample(Z, 1.0, cfg)[:3])[0], own)


def test_fewer_of_the_steps():
    model = small_mar(num_sampling_steps="12")
    head, own = model.diffloss, model.diffloss.gen_diffusion
    z = torch.randn(5, 32)

    def tokens():
        torch.manual_seed(3)
        return head.sample(z)

    head.gen_diffusion = GaussianDiffusion(own.schedule.respaced(5))
    expected = tokens()
    head.gen_diffusion = own
    cspd.patch(head, sampling_steps=5)
    assert relative_error(tokens(), expected) < 1e-5
    cspd.patch(head, sampling_steps=12)
    few = tokens()
    cspd.patch(head)
    assert relative_error(few, tokens()) < 1e-5


def test_fewer_steps_of_a_loop_that_is_ddims_already():
    head = made(ByDDIM, Spaced(12))
    head.eta = 0.0
    cspd.patch(head, sampling_steps=6)
    with mock.patch.object(head_patch, "run_call", side_effect=head_patch.run_call) as called:
        head.sample(Z)
    schedule = called.call_args.args[1].schedule
    assert (schedule.name, schedule.num_steps, schedule.deterministic) == ("ddim", 6, True)


@pytest.mark.parametrize("sampler", [None, "ddim"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_fewer_steps_at_later_autoregressive_steps(sampler, cfg):
    model, options = small_mar(), {"sampler": sampler, "sampling_steps": (12, 3)}
    own = sample(model, cfg=cfg)
    cspd.patch(model, **options)
    with mock.patch.object(head_patch, "run_call", side_effect=head_patch.run_call) as called:
        images = sample(model, cfg=cfg)
    counts = [call.args[1].num_steps for call in called.call_args_list]
    assert (counts[0], counts[-1], len(counts)) == (12, 3, 6)
    assert counts == sorted(counts, reverse=True)
    assert relative_error(images, own) > 1e-2
    assert relative_error(sample(model, cfg=cfg), images) == 0  # counted anew
    cspd.patch(model, whole=True, **options)
    assert relative_error(sample(model, cfg=cfg), images) < 1e-4
    cspd.unpatch(model)
    assert torch.equal(sample(model, cfg=cfg), own)
    assert "sample_tokens" not in vars(model)


def test_the_head_alone_has_no_autoregressive_steps():
    model = cspd.patch(small_mar(), sampling_steps=(12, 3))
    with pytest.raises(RuntimeError, match="expected a call from its model's sample_tokens with num_iter"):
        model.diffloss.sample(torch.randn(2, 32))
    sample(model)
    with pytest.raises(ValueError, match=r"expected a model with sample_tokens .* found none in Head: pass one number"):
        cspd.patch(made(), sampling_steps=(12, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "euler"}, "expected sampler one of"),
        ({"eta": 0.5}, "expected eta=0.5 together with sampler='ddim'"),
        ({"sampler": "ddim", "eta": 1.5}, r"expected eta in \[0, 1\]"),
        ({"sampling_steps": 0}, "expected sampling_steps as an int >= 1 or a pair"),
        ({"sampling_steps": 13}, "left unpatched: its gen_diffusion: expected sampling_steps up to .* 12, got 13"),
    ],
)
def test_what_cannot_be(options, match):
    head = made()
    with pytest.raises(ValueError, match=match):
        cspd.patch(head, **options)
    assert not cspd.is_patched(head)


def test_it_is_told_once_and_described(caplog):
    head = made()
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(head, sampler="ddim", eta=0.5, sampling_steps=6)
        head.sample(Z)
        head.sample(Z)
    (record,) = caplog.records
    assert (
        "samples by sampler 'ddim', eta 0.5, sampling_steps 6, as you asked: its tokens differ from those of its own "
        "sampler" in (record.getMessage())
    )
    assert "patched, sampler 'ddim', eta 0.5, sampling_steps 6, parallel_tol=auto" in str(cspd.describe(head))
    assert "sampler" not in str(cspd.describe(cspd.patch(head)))


def test_a_loop_whose_noise_is_given_runs_its_own_code():
    head = randomize_(CSpDDiffLoss(4, 32, 2, 32, "12", schedule="linear"), 1)
    z, noise, inter = torch.randn(5, 32), torch.randn(5, 4), torch.randn(12, 5, 4)
    expected = head.sample_with_inter_noise(z, noise, inter)
    cspd.patch(head, sampling_steps=6)
    assert torch.equal(head.sample_with_inter_noise(z, noise, inter), expected)
    assert "the noise of its steps is passed in" in str(cspd.describe(head))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.diffloss = made()

    def sample_tokens(self, bsz):
        return self.diffloss.sample(Z)


def test_a_model_that_does_not_say_how_many_steps():
    model = cspd.patch(Two(), sampling_steps=(6, 3))
    with pytest.raises(RuntimeError, match="with num_iter"):
        model.sample_tokens(1)


class Flow(nn.Module):
    """A head without a diffusion object."""

    def __init__(self):
        super().__init__()
        self.net = made().net


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [(made, {"loop": "own"}, "loop='own' was asked for"), (Flow, {}, "it holds no diffusion object")],
)
def test_other_steps_of_a_loop_that_is_kept(model, options, why):
    match = f"sampler 'ddim', eta 0 needs a head with a diffusion object; it keeps its own loop: {why}"
    with pytest.raises(ValueError, match=match):
        cspd.patch(model(), sampler="ddim", **options)


def test_other_steps_of_a_diffusion_object_that_is_not_read():
    head = made(Head, Spaced(mean=Mean.PREVIOUS_X))
    with pytest.raises(ValueError, match="left unpatched: its gen_diffusion cannot be sampled by sampling_steps 5: "):
        cspd.patch(head, sampling_steps=5)
    assert not cspd.is_patched(head)


class Fork(DiffLoss):
    """MAR's head, of another class: it is compared with its own sample before whole images are taken over."""

    def sample(self, z, temperature=1.0, cfg=1.0):
        return super().sample(z, temperature, cfg)


@pytest.mark.parametrize("options", [{"sampler": "ddim"}, {"sampling_steps": (12, 3)}])
def test_whole_images_are_compared_with_the_heads_own_steps(options):
    model = small_mar()
    model.diffloss.__class__ = Fork
    own = sample(model)
    images = sample(cspd.patch(model, whole=True, **options))
    copied = copy.deepcopy(model)  # which compares anew, patched
    assert torch.equal(sample(copied), images)
    assert torch.equal(sample(pickle.loads(pickle.dumps(model))), images)
    assert "ran its own code" not in str(cspd.describe(copied))
    assert relative_error(sample(cspd.patch(model, whole=True)), own) < 1e-4
    assert "ran its own code" not in str(cspd.describe(model))


def test_the_number_of_steps_as_any_whole_number():
    model = cspd.patch(small_mar(), sampling_steps=(12, 3))
    images = sample(model, num_iter=4)
    assert torch.equal(sample(model, num_iter=np.int64(4)), images)
    assert torch.equal(sample(pickle.loads(pickle.dumps(model)), num_iter=4), images)  # compared at its first step
    with pytest.raises(TypeError, match="unexpected keyword argument 'iterations'"):
        model.sample_tokens(1, iterations=4)


def test_a_step_that_runs_its_own_code_is_counted_too():
    model = cspd.patch(small_mar(), sampling_steps=(12, 3))
    diffusion, calls, counts = model.diffloss.gen_diffusion, [], []
    loop = diffusion.p_sample_loop

    def first_otherwise(*args, **kwargs):
        calls.append(None)
        more = {"denoised_fn": lambda x: x} if len(calls) == 1 else {}
        return loop(*args, **kwargs, **more)

    diffusion.p_sample_loop = first_otherwise
    with mock.patch.object(head_patch, "run_call", side_effect=head_patch.run_call) as called:
        sample(model, num_iter=4)
    counts = [call.args[1].num_steps for call in called.call_args_list]
    assert counts == [9, 6, 3]
