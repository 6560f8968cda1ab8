"""``cspd.patch``: same tokens for the same seed, whatever its options; unpatching restores everything."""

from __future__ import annotations

import copy
import logging
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from foreign import STEPS, Head, conditions, made, own_messages, run, state, unchanged
from slow import slow
from small_models import CSpDDiffLoss, sample, small_mar

import cspd
from cspd.loop import patch_of
from cspd.models import DiffLoss, GaussianDiffusion
from cspd_kernels import Schedule
from cspd_kernels.testing import randomize_, relative_error

SETTINGS = [
    {},
    {"cfg": 3.0},
    {"cfg": 3.0, "cfg_schedule": "constant"},
    {"cfg": 1.5, "labels": None},
    {"temperature": 0.7},
    {"num_iter": 1},
    {"num_iter": 40},
]
Z = conditions()


def only_the_kernels(model):
    """A patch of the model that fails where its own code runs."""
    cspd.patch(model)
    for each in model.modules():
        if (patch := patch_of(each)) is not None:
            patch.tell = pytest.fail
    return model


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("schedule", [slow("cosine"), "linear"])
def test_same_seed_gives_the_same_tokens(options, schedule):
    model = small_mar(schedule=schedule, num_sampling_steps="100")
    expected = sample(model, **options)
    assert cspd.patch(model) is model
    only_the_kernels(model)
    assert relative_error(sample(model, **options), expected) < 1e-5
    assert relative_error(sample(model, seed=1, **options), expected) > 1e-2  # not a constant


def test_half_precision_operands_stay_close():
    model = small_mar(schedule="linear")
    expected = sample(model)
    for dtype in (torch.bfloat16, torch.float16):
        with cspd.patched(model, dtype=dtype):
            error = relative_error(sample(model), expected)
        assert 0 < error < 5e-2


def test_follows_autocast():
    model = cspd.patch(small_mar())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.diffloss.sample(torch.randn(3, 32))
    assert list(patch_of(model.diffloss.net).cache._forms) == [torch.bfloat16]
    model.diffloss.sample(torch.randn(3, 32))
    assert list(patch_of(model.diffloss.net).cache._forms) == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("cfg", [torch.tensor([3.0]), torch.tensor(3.0), 3, np.float32(3.0), np.int64(3)])
@pytest.mark.parametrize("temperature", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_numbers_may_be_tensors_and_numpys(cfg, temperature):
    model = small_mar()
    z = torch.randn(8, 32)
    torch.manual_seed(0)
    expected = model.diffloss.sample(z, 0.5, 3.0)
    only_the_kernels(model)
    torch.manual_seed(0)
    actual = model.diffloss.sample(z, temperature, cfg)
    assert actual.shape == expected.shape
    assert relative_error(actual[:4], expected[:4]) < 1e-5


def test_a_guidance_scale_for_each_row():
    class Rowwise(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            args, options = self.call(z, 1.0 if isinstance(cfg, float) and cfg == 1.0 else 2.0)
            if args[0].__name__ == "forward_with_cfg":
                options["model_kwargs"]["cfg_scale"] = cfg
            return self.gen_diffusion.p_sample_loop(*args, **options, temperature=temperature)

    head, z, scale = made(Rowwise), conditions(8), torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    expected = run(head, lambda h: h.sample(z, cfg=scale))[0]
    actual, _, evaluations = run(cspd.patch(head), lambda h: h.sample(z, cfg=scale))
    assert evaluations == 0
    assert relative_error(actual[:4], expected[:4]) < 1e-5
    four = run(head, lambda h: h.sample(z, cfg=scale.flatten()))  # channels, as the network multiplies them
    assert four[2] == STEPS
    assert torch.equal(four[0], run(cspd.unpatch(head), lambda h: h.sample(z, cfg=scale.flatten()))[0])


def test_a_tensor_of_one_means_no_guidance():
    model = small_mar()
    z = torch.randn(5, 32)
    torch.manual_seed(0)
    expected = model.diffloss.sample(z)
    only_the_kernels(model)
    torch.manual_seed(0)
    assert relative_error(model.diffloss.sample(z, 1.0, torch.tensor([1.0])), expected) < 1e-5


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_zero_rows(cfg):
    assert only_the_kernels(small_mar()).diffloss.sample(torch.randn(0, 32), 1.0, cfg).shape == (0, 4)


def test_philox_noise_is_drawn_from_the_global_seed():
    model = cspd.patch(small_mar(), noise="philox")
    first, again, other = sample(model), sample(model), sample(model, seed=5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "build", [lambda: small_mar().diffloss, made, lambda: cspd_head()], ids=["MAR", "tables", "CSpD"]
)
def test_patch_is_idempotent_and_unpatch_restores(build):
    head = build()
    before, keys = state(head), list(head.state_dict())
    cspd.patch(cspd.patch(head), dtype=torch.bfloat16)
    assert cspd.is_patched(head)
    assert list(head.state_dict()) == keys
    assert len(vars(head.net)["_cspd_patches"]) == 1
    head.sample(torch.randn(4, head.net.cond_embed.in_features))
    assert cspd.unpatch(head) is head
    assert not cspd.is_patched(head)
    if hasattr(head.gen_diffusion, "manager"):
        head.gen_diffusion.manager.__init__()
    assert unchanged(before, state(head))
    cspd.unpatch(head)


def cspd_head() -> CSpDDiffLoss:
    torch.manual_seed(0)
    return randomize_(CSpDDiffLoss(4, 32, 2, 32, "12"), 1)


def test_classes_and_other_instances_are_untouched():
    before = [dict(vars(kind)) for kind in (DiffLoss, GaussianDiffusion, Head)]
    one, two, three = small_mar(0), small_mar(1), small_mar(2)
    cspd.patch(one)
    cspd.patch(two, dtype=torch.bfloat16)
    assert (cspd.is_patched(one), cspd.is_patched(two), cspd.is_patched(three)) == (True, True, False)
    assert type(one.diffloss) is type(three.diffloss)
    assert patch_of(one.diffloss.net).options.dtype is None
    assert patch_of(two.diffloss.net).options.dtype is torch.bfloat16
    assert [dict(vars(kind)) for kind in (DiffLoss, GaussianDiffusion, Head)] == before


def test_replaced_instance_methods_come_back():
    head = made()

    def halved(self, *args, **options):
        return 0.5 * Head.sample(self, *args, **options)

    def loop(self, *args, **options):
        return type(self).p_sample_loop(self, *args, **options)

    head.sample = mine = types.MethodType(halved, head)
    head.gen_diffusion.p_sample_loop_with_noise = other = types.MethodType(loop, head.gen_diffusion)
    expected = run(head, lambda h: h.sample(Z))[0]
    cspd.patch(head)
    cspd.patch(head)
    actual, _, evaluations = run(head, lambda h: h.sample(Z))
    assert evaluations == 0
    assert relative_error(actual, expected) < 1e-5
    cspd.unpatch(head)
    assert head.sample is mine
    assert head.gen_diffusion.p_sample_loop_with_noise is other
    assert "p_sample_loop" not in vars(head.gen_diffusion)


def test_the_signature_of_sample_stays():
    import inspect

    head = made()
    before = inspect.signature(head.sample)
    cspd.patch(head)
    assert inspect.signature(head.sample) == before
    assert inspect.signature(copy.deepcopy(head).sample) == before


def test_half_and_back():
    model = cspd.patch(small_mar(schedule="linear"))
    z = torch.randn(3, 32)
    torch.manual_seed(0)
    expected = model.diffloss.sample(z)
    model.half()
    torch.manual_seed(0)
    half = model.diffloss.sample(z.half())
    assert half.dtype == torch.float32
    assert relative_error(half, expected) < 2e-2
    model.to(torch.float64)
    torch.manual_seed(0)
    assert relative_error(model.diffloss.sample(z.double()), expected) < 2e-2


def test_every_head_in_the_tree_is_found():
    pair = nn.ModuleDict({"teacher": small_mar(0), "student": small_mar(1)})
    cspd.patch(pair)
    assert cspd.is_patched(pair["teacher"])
    assert cspd.is_patched(pair["student"])


def test_defaults_are_those_of_the_replaced_method():
    class Cold(CSpDDiffLoss):
        def sample(self, z, temperature=0.25, cfg=1.0):
            return super().sample(z, temperature, cfg)

    torch.manual_seed(0)
    head, z = randomize_(Cold(4, 32, 2, 32, "12"), 1), torch.randn(3, 32)
    torch.manual_seed(0)
    expected = head.sample(z)
    cspd.patch(head)
    torch.manual_seed(0)
    assert relative_error(head.sample(z), expected) < 1e-5


def test_changed_schedules_are_picked_up(caplog):
    model = cspd.patch(small_mar())
    head, z = model.diffloss, torch.randn(4, 32)
    for steps in range(3, 40):
        head.gen_diffusion.schedule = None
        head.gen_diffusion.schedule = Schedule.linear(steps)
        head.sample(z)
        assert list(patch_of(head.net).cache._forms[torch.float32].heads)[-1].num_steps == steps
    other = made()
    cspd.patch(other)
    other.gen_diffusion.betas[:] *= 1.001  # in place; the tables stay
    with caplog.at_level(logging.WARNING, "cspd"):
        assert run(other, lambda h: h.sample(Z))[2] == STEPS
    assert "to follow from betas, but" in own_messages(caplog)[0]


def test_a_new_diffusion_object_is_taken_over_at_the_next_call(caplog):
    model = cspd.patch(small_mar())
    head, z = model.diffloss, torch.randn(4, 32)
    head.gen_diffusion = GaussianDiffusion(Schedule.linear(9))
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "cspd"):
        actual = head.sample(z)
    assert own_messages(caplog) == []
    torch.manual_seed(0)
    assert torch.equal(head.sample(z), actual)
    cspd.unpatch(model)
    assert "p_sample_loop" not in vars(head.gen_diffusion)
    torch.manual_seed(0)
    assert 0 < relative_error(head.sample(z), actual) < 1e-5


def test_wider_model_with_narrower_operands():
    model = small_mar(schedule="linear").double()
    z = torch.randn(4, 32, dtype=torch.float64)
    torch.manual_seed(0)
    exact = cspd.patch(model).diffloss.sample(z)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        cspd.patch(model, dtype=dtype)
        torch.manual_seed(0)
        assert relative_error(model.diffloss.sample(z), exact) < bound
