"""The packed head of a patched model follows its weights, whatever changes them and however."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn as nn
from small_models import sample, small_mar

import cspd
from cspd.heads import HeadCache
from cspd.loop import patch_of
from cspd_kernels import DiffusionHead, Schedule
from cspd_kernels.testing import relative_error

SCHEDULE = Schedule.linear(7)
WIDE = small_mar(width=160).diffloss.net  # with matrices of which sums are compared, not copies


def with_data(values):
    def change(net):
        net.cond_embed.weight.data = values(net.cond_embed.weight.data)

    return change


def with_parameter(values):
    def change(net):
        net.cond_embed.weight = nn.Parameter(values(net.cond_embed.weight.detach()))

    return change


def with_module(path, values):
    def change(net):
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, values(net.get_submodule(path)))

    return change


def changed(module):
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.add_(1.0)
    return module


def load(**options):
    def change(net):
        net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, **options)

    return change


def rows_swapped(weight):
    weight.copy_(weight.flip(0))


def columns_swapped(weight):
    weight.copy_(weight[:, [1, 0, *range(2, weight.shape[1])]])


def one_bit(weight):
    weight.view(torch.int32 if weight.element_size() == 4 else torch.int16)[3, 5] ^= 1 << 13


def fused_step(net):
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(net.parameters(), lr=0.1, fused=True).step()
    net.zero_grad(set_to_none=True)


def of_weights(change, *paths):
    def apply(net):
        for path in paths:
            change(net.get_parameter(path))

    return apply


MATRIX = "res_blocks.0.mlp.0.weight"
IN_PLACE = {
    "in place": of_weights(lambda w: w.add_(1.0), "cond_embed.weight"),
    "in place, a bias": of_weights(lambda w: w.add_(1.0), "res_blocks.0.adaLN_modulation.1.bias"),
    "in place, the time embedding": of_weights(lambda w: w.mul_(1.5), "time_embed.mlp.0.weight"),
    "in place, the time embedding's bias": of_weights(lambda w: w.add_(1.0), "time_embed.mlp.2.bias"),
    "in place, a norm": of_weights(lambda w: w.mul_(2.0), "res_blocks.0.in_ln.weight"),
    "in place, by data": of_weights(lambda w: w.data.mul_(2.0), MATRIX, "final_layer.linear.weight"),
    "in place, by numpy": of_weights(lambda w: w.detach().view(torch.int16).numpy().__ixor__(64), MATRIX),
    "in place, one bit": of_weights(one_bit, MATRIX),
    "in place, rows swapped": of_weights(rows_swapped, MATRIX),
    "in place, columns swapped": of_weights(columns_swapped, MATRIX),
    "in place, by foreach": lambda net: torch._foreach_mul_([p.data for p in net.parameters()], 1.5),
    "in place, by a fused optimiser": fused_step,
    "loaded weights": load(),
}
REPLACED = {
    "other data": with_data(torch.randn_like),
    "data of another type": with_data(lambda data: data.double() + 1),
    "data of another type in the same memory": with_data(lambda data: data.view(torch.bfloat16)),
    "another parameter": with_parameter(torch.randn_like),
    "an equal parameter": with_parameter(torch.clone),
    "a parameter on the same memory": with_parameter(lambda data: data),
    "a parameter that was None": lambda net: net.input_proj.register_parameter(
        "bias", nn.Parameter(torch.ones(len(net.input_proj.weight)))
    ),
    "a parameter that becomes None": lambda net: net.cond_embed.register_parameter("bias", None),
    "a parameter more, at the very end": lambda net: net.final_layer.adaLN_modulation[1].register_parameter(
        "gain", nn.Parameter(torch.ones(()))
    ),
    "another layer": with_module("res_blocks.0.mlp.2", changed),
    "an equal layer": with_module("res_blocks.0.mlp.2", copy.deepcopy),
    "another block": with_module("res_blocks.0", changed),
    "a block less": with_module("res_blocks", lambda blocks: blocks[:1]),
    "a block less, in place": lambda net: net.res_blocks.__delitem__(0),
    "a block more, in place": lambda net: net.res_blocks.append(changed(net.res_blocks[0])),
    "blocks in another order": with_module("res_blocks", lambda blocks: nn.ModuleList(list(blocks)[::-1])),
    "loaded and assigned weights": load(assign=True),
    "another type": lambda net: net.double(),
    "half precision": lambda net: net.bfloat16(),
}


def assert_equals_a_fresh_one(head, net, dtype):
    expected = DiffusionHead.from_network(net, head.schedule, dtype=dtype)
    assert (head.depth, head.cond_channels, head.dtype) == (expected.depth, expected.cond_channels, dtype)
    for a, b in zip([head, *head.blocks], [expected, *expected.blocks], strict=True):
        tensors = {name: value for name, value in vars(a).items() if torch.is_tensor(value)}
        assert tensors
        for name, value in tensors.items():
            assert torch.equal(value, getattr(b, name)), name


@pytest.mark.parametrize("how", [*IN_PLACE, *REPLACED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True], ids=["small", "wide"])
@torch.no_grad()
def test_every_change_of_the_weights_is_seen_at_the_next_call(how, dtype, wide):
    net = copy.deepcopy(WIDE) if wide else small_mar().diffloss.net
    net.input_proj.bias = None
    if "same memory" in how and "type" in how:
        net.half()
    cache, other = HeadCache(net), Schedule.linear(5)
    before, second = cache.get(SCHEDULE, dtype), cache.get(other, dtype)
    assert cache.get(SCHEDULE, dtype) is before
    {**IN_PLACE, **REPLACED}[how](net)
    after = cache.get(SCHEDULE, dtype)
    assert (after is before) == (how in IN_PLACE)
    assert cache.get(SCHEDULE, dtype) is after
    assert_equals_a_fresh_one(after, net, dtype)
    assert (cache.get(other, dtype) is second) == (how in IN_PLACE)
    assert_equals_a_fresh_one(cache.get(other, dtype), net, dtype)
    # What stands there now is what is watched from here on.
    net.res_blocks[-1].mlp[2].weight.mul_(0.5)
    assert_equals_a_fresh_one(cache.get(SCHEDULE, dtype), net, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_new_values_in_memory_that_was_given_back_are_seen(dtype):
    net = small_mar().diffloss.net
    cache, weight = HeadCache(net), net.cond_embed.weight
    for _ in range(30):
        before = cache.get(SCHEDULE, dtype)
        weight.data = torch.randn_like(weight)  # the old values' memory is free now
        weight.data = torch.randn_like(weight)
        assert torch.equal(cache.get(SCHEDULE, dtype).cond_weight, weight.to(dtype))
        assert cache.get(SCHEDULE, dtype) is not before


@torch.no_grad()
def test_packed_weights_go_with_the_networks_memory():
    net = small_mar().diffloss.net
    cache = HeadCache(net)
    cache.get(SCHEDULE, torch.bfloat16)
    assert cache._forms
    net.double()
    gc.collect()
    assert not cache._forms


def test_frozen_weights_are_packed_once():
    model = cspd.patch(small_mar(), weights="frozen")
    first = sample(model)
    with torch.no_grad():
        model.diffloss.net.time_embed.mlp[2].bias.add_(1.0)
    assert torch.equal(sample(model), first)
    cspd.patch(model, weights="frozen")
    assert relative_error(sample(model), first) > 1e-3


def test_frozen_weights_are_not_looked_at():
    net = small_mar().diffloss.net
    cache = HeadCache(net, "frozen")
    head = cache.get(SCHEDULE)
    net.cond_embed.register_forward_hook(lambda *_: None)
    net.res_blocks[0].mlp[1] = nn.GELU()
    assert cache.get(SCHEDULE) is head


def test_copies_of_a_cache_pack_their_own():
    cache = HeadCache(small_mar().diffloss.net, "frozen")
    head = cache.get(SCHEDULE)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.weights == "frozen"
        assert twin.get(SCHEDULE) is not head
        assert twin.get(SCHEDULE).input_weight.data_ptr() == twin.net.input_proj.weight.data_ptr()


def test_what_leaves_the_weights_alone_packs_nothing():
    model = cspd.patch(small_mar(), dtype=torch.bfloat16)
    cache, schedule = patch_of(model.diffloss.net).cache, model.diffloss.gen_diffusion.schedule
    first = cache.get(schedule, torch.bfloat16)
    sample(model)
    model.train().eval().requires_grad_(False).to("cpu").zero_grad()
    model.state_dict(), list(model.named_modules()), copy.deepcopy(model)
    model.diffloss.net(torch.randn(2, 4), torch.tensor([1, 2]), torch.randn(2, 32))
    with cspd.patched(model, dtype=torch.float32):
        sample(model)
    assert cache.get(schedule, torch.bfloat16) is first


@torch.no_grad()
def test_changed_weights_change_the_tokens():
    model, other = small_mar(0), small_mar(7)
    expected = sample(other)
    cspd.patch(model, dtype=torch.float32)
    sample(model)
    model.load_state_dict(other.state_dict())
    assert relative_error(sample(model), expected) < 1e-5
    model.diffloss.net.final_layer.linear.weight.mul_(0.5)
    assert relative_error(sample(model), expected) > 1e-3


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        model = cspd.patch(small_mar())
        first = sample(model)
        model.diffloss.net.final_layer.linear.weight.mul_(0.5)
        assert relative_error(sample(model), first) > 1e-3


@torch.no_grad()
def test_training_under_a_patch_follows_every_step():
    model, plain = cspd.patch(small_mar(schedule="linear")), small_mar(schedule="linear")
    for each in (model, plain):
        optimiser = torch.optim.AdamW(each.parameters(), lr=1e-2)
        for step in range(3):
            sample(each, step)  # seeds both generators
            with torch.enable_grad():
                each(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).backward()
            optimiser.step()
            optimiser.zero_grad()
        tokens = sample(each)
    assert relative_error(sample(model), tokens) < 1e-5
