"""``cspd.patch``: same tokens, per instance, and nothing else changes."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
from small_models import CSpDDiffLoss, Manager, sample, small_mar

import cspd
from cspd.models import DiffLoss, GaussianDiffusion
from cspd.models.diffloss import TimestepEmbedder
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


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_same_seed_gives_the_same_tokens(options, schedule):
    model = small_mar(schedule=schedule, num_sampling_steps="100")
    expected = sample(model, **options)
    assert cspd.patch(model) is model
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
    z = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.diffloss.sample(z)
    packed = model.diffloss.sample.__self__.cache._packed
    assert list(packed) == [torch.bfloat16]


@pytest.mark.parametrize("cfg", [torch.tensor([3.0]), torch.tensor(3.0), 3])
def test_guidance_scale_may_be_a_tensor(cfg):
    model = small_mar()
    z = torch.randn(8, 32)
    torch.manual_seed(0)
    expected = model.diffloss.sample(z, 1.0, 3.0)
    cspd.patch(model)
    torch.manual_seed(0)
    actual = model.diffloss.sample(z, 1.0, cfg)
    assert actual.shape == expected.shape
    assert relative_error(actual[:4], expected[:4]) < 1e-5


def test_tensor_scale_of_one_means_no_guidance():
    model = small_mar()
    z = torch.randn(5, 32)
    torch.manual_seed(0)
    expected = model.diffloss.sample(z)
    cspd.patch(model)
    torch.manual_seed(0)
    assert relative_error(model.diffloss.sample(z, 1.0, torch.tensor([1.0])), expected) < 1e-5


def test_zero_rows_and_odd_guided_rows():
    model = cspd.patch(small_mar())
    assert model.diffloss.sample(torch.randn(0, 32)).shape == (0, 4)
    with pytest.raises(ValueError, match="expected 2N rows of z"):
        model.diffloss.sample(torch.randn(5, 32), 1.0, 2.0)


def test_philox_noise_is_drawn_from_the_global_seed():
    model = cspd.patch(small_mar(), noise="philox")
    first, again, other = sample(model), sample(model), sample(model, seed=5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_patch_is_idempotent_and_unpatch_restores():
    model = small_mar()
    before = dict(model.diffloss.__dict__)
    keys = list(model.state_dict())
    cspd.patch(cspd.patch(model), dtype=torch.bfloat16)
    assert cspd.is_patched(model)
    assert list(model.state_dict()) == keys
    assert cspd.unpatch(model) is model
    assert not cspd.is_patched(model)
    assert model.diffloss.__dict__ == before
    cspd.unpatch(model)


def test_classes_and_other_instances_are_untouched():
    one, two, three = small_mar(0), small_mar(1), small_mar(2)
    cspd.patch(one)
    cspd.patch(two, dtype=torch.bfloat16)
    assert not cspd.is_patched(three)
    assert type(one.diffloss) is type(three.diffloss)
    assert one.diffloss.sample.__self__.dtype is None
    assert two.diffloss.sample.__self__.dtype is torch.bfloat16


def test_replaced_instance_method_comes_back():
    model = small_mar()

    def mine(z, temperature=1.0, cfg=1.0):
        return z

    model.diffloss.sample = mine
    cspd.patch(model)
    cspd.patch(model)
    cspd.unpatch(model)
    assert model.diffloss.sample is mine


def test_patched_restores_options_and_survives_exceptions():
    model = cspd.patch(small_mar(), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="inside"), cspd.patched(model, noise="philox"):
        assert model.diffloss.sample.__self__.noise == "philox"
        raise RuntimeError("inside")
    assert model.diffloss.sample.__self__.dtype is torch.bfloat16
    cspd.unpatch(model)
    with pytest.raises(RuntimeError, match="inside"), cspd.patched(model):
        raise RuntimeError("inside")
    assert not cspd.is_patched(model)


def test_changed_weights_are_picked_up():
    model, other = small_mar(0), small_mar(7)
    expected = sample(other)
    cspd.patch(model, dtype=torch.float32)
    sample(model)
    model.load_state_dict(other.state_dict())
    assert relative_error(sample(model), expected) < 1e-5
    with torch.no_grad():
        model.diffloss.net.final_layer.linear.weight.mul_(0.5)
    assert relative_error(sample(model), expected) > 1e-3


def test_reduced_precision_copies_are_packed_again_only_when_weights_change():
    model = cspd.patch(small_mar(), dtype=torch.bfloat16)
    cache = model.diffloss.sample.__self__.cache
    first = cache.get(torch.bfloat16)
    assert cache.get(torch.bfloat16) is first
    with torch.no_grad():
        model.diffloss.net.cond_embed.weight.add_(1.0)
    second = cache.get(torch.bfloat16)
    assert second is not first
    assert torch.equal(second.cond_weight, model.diffloss.net.cond_embed.weight.bfloat16())


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        model = cspd.patch(small_mar())
        first = sample(model)
        model.diffloss.net.final_layer.linear.weight.mul_(0.5)
        assert relative_error(sample(model), first) > 1e-3


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


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_their_own_patch(how):
    model = cspd.patch(small_mar())
    expected = sample(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        model.diffloss.net.final_layer.linear.weight.zero_()  # the twin must not read the original's weights
    assert cspd.is_patched(twin)
    assert twin.diffloss.sample.__self__.module is twin.diffloss
    assert torch.equal(sample(twin), expected)
    cspd.unpatch(twin)
    assert cspd.is_patched(model)
    assert not cspd.is_patched(twin)


def test_every_head_in_the_tree_is_found():
    pair = nn.ModuleDict({"teacher": small_mar(0), "student": small_mar(1)})
    cspd.patch(pair)
    assert cspd.is_patched(pair["teacher"])
    assert cspd.is_patched(pair["student"])


def cspd_head() -> CSpDDiffLoss:
    torch.manual_seed(0)
    return randomize_(CSpDDiffLoss(4, 32, 2, 32, "12"), 1)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("given", ["all noise", "first noise", "no noise"])
def test_cspd_methods_and_their_manager(cfg, given):
    head = cspd_head()
    rows = 5 if cfg == 1.0 else 10
    z, noise, inter = torch.randn(rows, 32), torch.randn(5, 4), torch.randn(12, 5, 4)
    if cfg != 1.0:
        noise, inter = torch.cat([noise, noise]), torch.cat([inter, inter], dim=1)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        manager = head.gen_diffusion.manager = Manager()
        if given == "all noise":
            tokens = head.sample_with_inter_noise(z, noise, inter, 0.8, cfg)
        elif given == "first noise":
            tokens = head.sample_with_noise(z, noise, 0.8, cfg)
        else:
            tokens = head.sample(z, 0.8, cfg)
        fields = [tokens, manager.sample, manager.mean, manager.variance]
        if given == "all noise":
            fields.append(manager.log_var.sum(1, keepdim=True))
        else:
            assert manager.log_var is None
        assert all(field.shape[0] == rows for field in fields)
        results.append([field[:5] for field in fields])
        cspd.patch(head)
    for expected, actual in zip(*results):
        assert relative_error(actual, expected) < 1e-5


def test_unknown_arguments_run_the_replaced_code_with_one_warning(caplog):
    class Fork(CSpDDiffLoss):
        def sample(self, z, temperature=1.0, cfg=1.0, index=None):
            return z if index is not None else super().sample(z, temperature, cfg)

    torch.manual_seed(0)
    head = cspd.patch(randomize_(Fork(4, 32, 2, 32, "12"), 1))
    z = torch.randn(3, 32)
    with caplog.at_level(logging.WARNING, "cspd"):
        assert head.sample(z, index=2) is z
        assert head.sample(z, 1.0, 1.0, 2) is z
    assert len(caplog.records) == 1
    assert head.sample(z).shape == (3, 4)


def test_head_with_other_arithmetic_is_refused():
    model = small_mar()
    model.diffloss.net.forward = lambda x, t, c: torch.ones(len(x), 8)
    with pytest.raises(ValueError, match="computes something else"):
        cspd.patch(model)
    model.diffloss.net.forward = lambda x, t, c, index: None
    with pytest.raises(ValueError, match=r"cannot be called as net\(x, t, c\)"):
        cspd.patch(model)
    assert not cspd.is_patched(model)


def test_nothing_to_patch_lists_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no diffusion head found in Linear.*gen_diffusion.*No module came near"):
        cspd.patch(nn.Linear(2, 2))
    model = small_mar()
    model.diffloss.net.time_embed = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"came near:\s+diffloss \(DiffLoss\): it lacks net.time_embed.mlp"):
        cspd.patch(model)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module.*got str"):
        cspd.patch("model")


def test_list_of_schedules_is_refused_before_anything_changes():
    pair = nn.ModuleList([small_mar(0), small_mar(1)])
    pair[1].diffloss.gen_diffusion = [Schedule.cosine(10), Schedule.cosine(20)]
    with pytest.raises(TypeError, match="expected one diffusion object, got a list of 2"):
        cspd.patch(pair)
    assert not cspd.is_patched(pair)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"noise": "white"}, ValueError, "expected noise one of"),
        ({"dtype": torch.int8}, ValueError, "expected dtype"),
        ({"backend": "metal"}, ValueError, "expected backend one of torch, triton, cuda, got 'metal'"),
    ],
)
def test_bad_options(options, error, match):
    model = small_mar()
    with pytest.raises(error, match=match):
        cspd.patch(model, **options)
    assert not cspd.is_patched(model)


def test_non_finite_conditions_raise_on_the_cpu():
    model = cspd.patch(small_mar())
    z = torch.randn(3, 32)
    z[1, 2] = float("nan")
    with pytest.raises(ValueError, match="finite values in cond"):
        model.diffloss.sample(z)


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


def test_swapped_schedules_are_picked_up():
    model = cspd.patch(small_mar())
    for steps in range(3, 40):  # a new object may take the place of the old one in memory
        model.diffloss.gen_diffusion = None
        model.diffloss.gen_diffusion = GaussianDiffusion(Schedule.linear(steps))
        assert model.diffloss.sample.__self__.cache.get().num_steps == steps
    model.diffloss.gen_diffusion.schedule = Schedule.linear(5)
    assert model.diffloss.sample.__self__.cache.get().num_steps == 5


def test_other_arithmetic_is_seen_on_fresh_weights_too():
    torch.manual_seed(0)
    head = DiffLoss(4, 32, 2, 32, "12")  # modulations and output layer are zero

    class Swapped(type(head.net.time_embed)):
        @staticmethod
        def timestep_embedding(t, dim):
            cos, sin = TimestepEmbedder.timestep_embedding(t, dim).chunk(2, dim=-1)
            return torch.cat([sin, cos], dim=-1)

    cspd.patch(head)
    cspd.unpatch(head)
    head.net.time_embed.__class__ = Swapped
    with pytest.raises(ValueError, match="computes something else"):
        cspd.patch(head)


def test_heads_that_cannot_be_served_beside_one_that_can_are_named(caplog):
    pair = nn.ModuleDict({"good": small_mar(0), "odd": small_mar(1)})
    pair["odd"].diffloss.net.res_blocks[0].in_ln = nn.Identity()
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(pair)
    assert "odd.diffloss (DiffLoss): net.res_blocks[0].in_ln is Identity(), not a LayerNorm" in caplog.text
    assert cspd.is_patched(pair["good"])
    assert not cspd.is_patched(pair["odd"])


def test_wider_model_with_narrower_operands():
    model = small_mar(schedule="linear").double()
    z = torch.randn(4, 32, dtype=torch.float64)
    torch.manual_seed(0)
    exact = cspd.patch(model).diffloss.sample(z)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        cspd.patch(model, dtype=dtype)
        torch.manual_seed(0)
        assert relative_error(model.diffloss.sample(z), exact) < bound


def test_numpy_numbers():
    model = cspd.patch(small_mar())
    z = torch.randn(4, 32)
    torch.manual_seed(0)
    expected = model.diffloss.sample(z, 0.5, 3.0)
    torch.manual_seed(0)
    assert torch.equal(model.diffloss.sample(z, np.float32(0.5), np.float32(3.0)), expected)
