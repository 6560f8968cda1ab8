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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import cspd
from cspd.heads import HeadCache
from cspd.models import DiffLoss, GaussianDiffusion
from cspd.models.diffloss import TimestepEmbedder
from cspd_kernels import DiffusionHead, Schedule
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


def replace_data(values):
    def change(module):
        weight = module.net.cond_embed.weight
        weight.data = values(weight.data)

    return change


def replace_parameter(values):
    def change(module):
        layer = module.net.cond_embed
        layer.weight = nn.Parameter(values(layer.weight.detach()))

    return change


def replace_module(path, values):
    def change(module):
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, values(module.get_submodule(path)))

    return change


def parametrize(path):
    def change(module):
        nn.utils.parametrize.register_parametrization(module.net.get_submodule(path), "bias", nn.Hardtanh(-1, 0.5))

    return change


def changed(module):
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.add_(1.0)
    return module


def load(**options):
    def change(module):
        module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, **options)

    return change


CHANGES = {
    "in place": lambda module: module.net.cond_embed.weight.add_(1.0),
    "in place, a bias": lambda module: module.net.res_blocks[1].adaLN_modulation[1].bias.add_(1.0),
    "other data": replace_data(torch.randn_like),
    "data of another type": replace_data(lambda data: data.double() + 1),
    "data of another type in the same memory": replace_data(lambda data: data.view(torch.bfloat16)),
    "data of another shape in the same memory": replace_data(lambda data: data[:, :16]),
    "another parameter": replace_parameter(torch.randn_like),
    "an equal parameter": replace_parameter(torch.clone),
    "a parameter on the same memory": replace_parameter(lambda data: data),
    "a parameter that was None": lambda module: module.net.input_proj.register_parameter(
        "bias", nn.Parameter(torch.ones(32))
    ),
    "a parameter that becomes None": lambda module: module.net.cond_embed.register_parameter("bias", None),
    "a parametrization": parametrize("res_blocks.0.mlp.0"),
    "a parameter more, at the very end": lambda module: module.net.final_layer.adaLN_modulation[1].register_parameter(
        "gain", nn.Parameter(torch.ones(()))
    ),
    "another layer": replace_module("net.res_blocks.0.mlp.2", changed),
    "an equal layer": replace_module("net.res_blocks.0.mlp.2", copy.deepcopy),
    "another block": replace_module("net.res_blocks.1", changed),
    "a block less": replace_module("net.res_blocks", lambda blocks: blocks[:1]),
    "a block less, in place": lambda module: module.net.res_blocks.__delitem__(0),
    "a block more, in place": lambda module: module.net.res_blocks.append(changed(module.net.res_blocks[0])),
    "blocks in another order": replace_module("net.res_blocks", lambda blocks: nn.ModuleList(list(blocks)[::-1])),
    "another network": replace_module("net", changed),
    "loaded weights": load(),
    "loaded and assigned weights": load(assign=True),
    "another type": lambda module: module.double(),
    "half precision": lambda module: module.bfloat16(),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_change_of_the_weights_is_seen_at_the_next_call(how, dtype):
    module = small_mar().diffloss
    module.net.input_proj.bias = None
    if "same memory" in how and "type" in how:
        module.half()
    cache = HeadCache(module)
    before = cache.get(dtype)
    assert cache.get(dtype) is before
    CHANGES[how](module)
    after = cache.get(dtype)
    assert after is not before
    assert cache.get(dtype) is after
    expected = DiffusionHead.from_module(module, dtype=dtype)
    assert (after.depth, after.cond_channels) == (expected.depth, expected.cond_channels)
    for a, b in zip([after, *after.blocks], [expected, *expected.blocks], strict=True):
        tensors = {name: value for name, value in vars(a).items() if torch.is_tensor(value)}
        assert tensors
        assert all(torch.equal(value, getattr(b, name)) for name, value in tensors.items())
    # What stands there now is what is watched from here on.
    module.net.res_blocks[-1].mlp[2].weight.mul_(0.5)
    assert cache.get(dtype) is not after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_new_values_in_memory_that_was_given_back_are_seen(dtype):
    module = small_mar().diffloss
    cache, weight = HeadCache(module), module.net.cond_embed.weight
    for _ in range(30):
        before = cache.get(dtype)
        weight.data = torch.randn_like(weight)  # the old values' memory is free now
        weight.data = torch.randn_like(weight)
        assert torch.equal(cache.get(dtype).cond_weight, weight.to(dtype))
        assert cache.get(dtype) is not before


def test_a_layer_that_does_not_fit_any_more_is_refused_at_the_next_call():
    model = cspd.patch(small_mar())
    sample(model)
    model.diffloss.net.res_blocks[0].mlp[1] = nn.GELU()
    with pytest.raises(TypeError, match=r"res_blocks\[0\].mlp is not Linear, SiLU, Linear"):
        sample(model)


def test_what_leaves_the_weights_alone_packs_nothing():
    model = cspd.patch(small_mar(), dtype=torch.bfloat16)
    cache = model.diffloss.sample.__self__.cache
    first = cache.get(torch.bfloat16)
    sample(model)
    model.train().eval().requires_grad_(False).to("cpu").zero_grad()
    model.state_dict(), list(model.named_modules()), copy.deepcopy(model)
    model.diffloss.net(torch.randn(2, 4), torch.tensor([1, 2]), torch.randn(2, 32))
    with cspd.patched(model, dtype=torch.float32):
        sample(model)
    assert cache.get(torch.bfloat16) is first


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


class HostReads(TorchDispatchMode):
    """Counts the tensors read by the host; what the op does inside is its own matter."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sample", "sample_with_noise", "sample_with_inter_noise"])
@pytest.mark.parametrize(
    ("cfg", "reads"), [(1.0, 0), (3, 0), (np.float32(3.0), 0), (torch.tensor([1.0]), 1), (torch.tensor(3.0), 1)]
)
def test_a_guidance_scale_is_read_once_and_nothing_else_is(method, cfg, reads):
    head = cspd.patch(cspd_head())
    noises = {"sample": (), "sample_with_noise": (8,), "sample_with_inter_noise": (8, 12)}[method]
    noise = [torch.randn(n, 4) if n == 8 else torch.randn(n, 8, 4) for n in noises]
    for _ in range(2):  # the first call packs the head
        with HostReads() as host:
            getattr(head, method)(torch.randn(8, 32), *noise, 1.0, cfg)
    assert host.count == reads


@pytest.mark.gpu
@pytest.mark.parametrize("noise", ["upstream", "philox"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_on_a_gpu_the_host_waits_for_nothing_but_a_scale_that_lies_there(noise, cfg):
    head = cspd_head().cuda()
    z = torch.randn(8, 32).cuda()
    torch.manual_seed(0)
    expected = head.sample(z, 1.0, cfg)
    cspd.patch(head, noise=noise)
    torch.manual_seed(0)
    actual = head.sample(z, 1.0, cfg)
    if noise == "upstream":
        assert relative_error(actual, expected) < 1e-5
    scale = torch.tensor(cfg, device="cuda")
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        head.sample(z, 1.0, cfg)
        head.sample(z, 1.0, torch.tensor(cfg))
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            head.sample(z, 1.0, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


class Model(nn.Module):
    """A sampler between two layers."""

    def __init__(self, **options):
        super().__init__()
        self.diffloss = cspd.patch(small_mar(schedule="linear").diffloss, **options)
        self.before, self.after = nn.Linear(32, 32), nn.Linear(4, 4)

    def forward(self, z, temperature, cfg):
        return self.after(self.diffloss.sample(self.before(z).tanh(), temperature, cfg))


@pytest.mark.parametrize("noise", ["upstream", "philox"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_a_compiled_model_samples_the_same_and_sees_changed_weights(noise, backend):
    torch._dynamo.reset()
    model, z = Model(noise=noise), torch.randn(8, 32)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    assert torch.isfinite(compiled(z, 1.0, 1.5)).all()
    assert counter.frame_count == 2  # what stands before the sampler, and what stands after it
    weight = model.diffloss.net.final_layer.linear.weight

    def change(_):
        weight.data = torch.randn_like(weight)

    results = []
    for prepare in (lambda _: None, lambda _: weight.mul_(0.5), change, lambda m: m.diffloss.bfloat16()):
        prepare(model)
        for cfg in (3.0, 2.0, 1.0, 4.0, torch.tensor(3.0)):
            torch.manual_seed(1)
            expected = model(z, 1.0, cfg)
            torch.manual_seed(1)
            results.append(compiled(z, 1.0, cfg))
            assert relative_error(results[-1], expected) < 1e-5
    assert len({r.sum().item() for r in results}) == len(results) - 4  # the tensor of 3 equals the number
