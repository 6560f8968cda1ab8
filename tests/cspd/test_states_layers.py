"""Layers that compute more than their weights say, before a patch and after one: hooks, classes, methods, adapters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from small_models import sample
from states import after, before, listening, model_in, rows, served_calls
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import cspd
from cspd.models import GaussianDiffusion
from cspd.models.diffloss import SimpleMLPAdaLN
from cspd_kernels import Schedule
from cspd_kernels.testing import randomize_, relative_error


def layer(model):
    return model.diffloss.net.cond_embed


def subclass(part, **methods):
    part.__class__ = type("Other", (type(part),), methods)


def swapped(t, dim):
    return torch.cat(ORIGINAL_EMBEDDING(t, dim).chunk(2, dim=-1)[::-1], dim=-1)


ORIGINAL_EMBEDDING = type(model_in().diffloss.net.time_embed).timestep_embedding


def twice(part, name):
    """Replace a method by one that returns twice as much."""
    original = getattr(part, name)
    setattr(part, name, lambda *args, **kwargs: original(*args, **kwargs) * 2)


def double(base):
    return lambda self, *args, **kwargs: base.forward(self, *args, **kwargs) * 2


class Adapter(nn.Module):
    """As peft wraps a layer: of the layer's name, with its sizes and its weights."""

    weight, bias = property(lambda self: self.base_layer.weight), property(lambda self: self.base_layer.bias)

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = (
            base_layer,
            base_layer.in_features,
            base_layer.out_features,
        )

    def forward(self, x):
        return self.base_layer(x) * 1.5


class LoRALinear(nn.Linear):
    """As loralib has it: a subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def lora_subclass(model):
    new = LoRALinear(32, 32)
    new.load_state_dict(layer(model).state_dict())
    model.diffloss.net.cond_embed = new.requires_grad_(False)


def plain_tensor(model):
    weight = layer(model).weight.data * 2
    del layer(model).weight
    layer(model).weight = weight


def grow(model):
    model.diffloss.net.res_blocks[0].mlp.append(nn.SiLU())


def other_eps(model):
    model.diffloss.net.res_blocks[0].in_ln.eps = 0.5


COMPUTES_MORE = {
    "forward hook": lambda m: layer(m).register_forward_hook(lambda module, args, out: out * 2),
    "forward hook without effect": lambda m: layer(m).register_forward_hook(lambda module, args, out: None),
    "pre-hook of a block": lambda m: m.diffloss.net.res_blocks[0].register_forward_pre_hook(lambda module, args: None),
    "hook of the network": lambda m: m.diffloss.net.register_forward_hook(lambda module, args, out: out * 2),
    "weight_norm": lambda m: weight_norm(layer(m)),
    "weight_norm as a parametrization": lambda m: parametrizations.weight_norm(layer(m)),
    "spectral_norm": lambda m: spectral_norm(layer(m)),
    "spectral_norm as a parametrization": lambda m: parametrizations.spectral_norm(layer(m)),
    "pruned": lambda m: prune.l1_unstructured(layer(m), "weight", 0.5),
    "class of a layer": lambda m: subclass(layer(m), forward=double(nn.Linear)),
    "calls of a layer": lambda m: subclass(layer(m), __call__=lambda self, x: nn.Linear.__call__(self, x) * 2),
    "class of an activation": lambda m: subclass(
        m.diffloss.net.res_blocks[0].mlp[1], forward=lambda self, x: nn.functional.gelu(x)
    ),
    "class of a block": lambda m: subclass(
        m.diffloss.net.res_blocks[0], forward=double(type(m.diffloss.net.res_blocks[0]))
    ),
    "method of the time embedding": lambda m: setattr(m.diffloss.net.time_embed, "timestep_embedding", swapped),
    "forward of a layer": lambda m: twice(layer(m), "forward"),
    "forward of the network": lambda m: twice(m.diffloss.net, "forward"),
    "adapter of peft": lambda m: setattr(m.diffloss.net, "input_proj", Adapter(m.diffloss.net.input_proj)),
    "adapter of loralib": lora_subclass,
    "weight as a plain tensor": plain_tensor,
    "one more layer": grow,
    "one other eps": other_eps,
}


@pytest.mark.parametrize("what", COMPUTES_MORE)
def test_what_computes_more_is_refused_before_and_runs_its_own_code_after(what):
    outcome = before(COMPUTES_MORE[what])
    assert outcome.what == "refused"
    assert "diffloss (DiffLoss)" in outcome.told[0]
    assert after(COMPUTES_MORE[what]).what == "own"


def test_an_adapter_around_the_conditions_layer_embeds_the_condition_itself():
    """As any module there does; the kernels go on from what it makes."""
    assert before(lambda m: setattr(m.diffloss.net, "cond_embed", Adapter(layer(m)))).what == "served"


def test_a_network_that_another_description_fits_keeps_its_loop():
    """Sines first: its loop is compared by the likeliest description alone."""
    change = lambda m: subclass(m.diffloss.net.time_embed, timestep_embedding=staticmethod(swapped))  # noqa: E731
    outcome = before(change)
    assert outcome.what == "own"
    assert "differ by" in outcome.told[0]
    assert after(change).what == "own"


SERVED = {
    "hook of the head": lambda m: m.diffloss.register_forward_hook(lambda module, args, out: out * 2),
    "backward hook": lambda m: layer(m).register_full_backward_hook(lambda *_: None),
    "subclass without code": lambda m: subclass(layer(m)),
    "pruned for good": lambda m: prune.remove(prune.l1_unstructured(layer(m), "weight", 0.5), "weight"),
    "class of the head": lambda m: subclass(
        m.diffloss, sample=lambda self, *args, **kwargs: type(self).__mro__[1].sample(self, *args, **kwargs) * 2
    ),
    "other tables": lambda m: setattr(m.diffloss.gen_diffusion, "schedule", Schedule.linear(7)),
}


@pytest.mark.parametrize("when", [before, after])
@pytest.mark.parametrize("what", SERVED)
def test_what_leaves_the_arithmetic_alone_is_served(what, when):
    outcome = when(SERVED[what])
    assert (outcome.what, outcome.told) == ("served", [])


def new_network(model):
    model.diffloss.net = randomize_(SimpleMLPAdaLN(4, 32, 8, 32, 2), 3).requires_grad_(False)


def copied_network(model):
    model.diffloss.net = copy.deepcopy(model.diffloss.net)


def new_diffusion(model):
    model.diffloss.gen_diffusion = GaussianDiffusion(Schedule.linear(7))


def test_parts_that_took_another_ones_place():
    for change in (new_network, copied_network, new_diffusion):
        assert before(change).what == "served"
    outcome = after(new_network)
    assert outcome.what == "own"
    assert "its network was replaced or wrapped" in outcome.told[0]
    assert after(copied_network).what == "served"  # a copy carries its own patch
    outcome = after(new_diffusion)  # the next sample finds it
    assert (outcome.what, outcome.told) == ("served", [])


@pytest.mark.parametrize("change", [new_network, new_diffusion])
def test_patching_again_serves_the_new_part(change):
    model, twin = cspd.patch(model_in()), model_in()
    sample(model)
    torch.manual_seed(7)
    change(model)
    torch.manual_seed(7)
    change(twin)
    expected, messages = sample(twin), []
    cspd.patch(model)
    with served_calls() as served, listening(messages):
        assert relative_error(sample(model), expected) < 1e-5
    assert served
    assert not messages
    cspd.unpatch(model)
    assert "sample" not in vars(model.diffloss)
    assert torch.equal(sample(model), expected)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_global_hooks(register):
    def hook(module, args, out=None):
        if isinstance(module, nn.LayerNorm):
            return out * 2 if out is not None else tuple(arg * 2 for arg in args)
        return None

    model, twin, messages = cspd.patch(model_in()), model_in(), []
    plain = sample(twin)
    handle = register(hook)
    try:
        with listening(messages), served_calls() as served:
            changed = sample(twin)
            assert torch.equal(sample(model), changed)
        assert not served
        assert "global hook" in messages[0]
        with pytest.raises(ValueError, match="global hook"):
            cspd.patch(twin)
        assert not cspd.is_patched(twin)
    finally:
        handle.remove()
    with served_calls() as served:
        assert relative_error(sample(model), plain) < 1e-5
    assert served


CLASSES = {
    "network": lambda m: (type(m.diffloss.net), "forward"),
    "block": lambda m: (type(m.diffloss.net.res_blocks[0]), "forward"),
    "time embedding": lambda m: (type(m.diffloss.net.time_embed), "timestep_embedding"),
    "layer": lambda m: (nn.Linear, "forward"),
    "calls": lambda m: (nn.Module, "__call__"),
    "diffusion": lambda m: (type(m.diffloss.gen_diffusion), "p_sample_loop"),
    "step of the diffusion": lambda m: (type(m.diffloss.gen_diffusion), "_x0"),
}


@pytest.mark.parametrize("what", CLASSES)
def test_a_method_of_a_class_that_changes_after_the_patch(what, monkeypatch):
    model, twin, messages = cspd.patch(model_in()), model_in(), []
    plain = rows(model)
    kind, name = CLASSES[what](model)
    original = getattr(kind, name)

    def other(*args, **kwargs):
        return original(*args, **kwargs) * 1.25

    static = isinstance(vars(kind)[name], staticmethod)
    monkeypatch.setattr(kind, name, staticmethod(other) if static else other)
    with torch.no_grad(), listening(messages), served_calls() as served:
        expected = rows(twin)
        assert relative_error(expected, plain) > 1e-4
        assert torch.equal(rows(model), expected)
        assert torch.equal(rows(model), expected)
    assert not served
    assert len(messages) == 1
    monkeypatch.undo()
    with served_calls() as served:
        assert relative_error(rows(model), plain) < 1e-5
    assert served


def test_two_heads_that_share_a_network_are_both_served():
    pair = nn.ModuleDict({"one": model_in(0), "two": model_in(0)})
    pair["two"].diffloss.net = pair["one"].diffloss.net
    pair["two"].diffloss.gen_diffusion = GaussianDiffusion(Schedule.linear(7))
    expected = [sample(model) for model in pair.values()]
    cspd.patch(pair)
    for model, tokens in zip(pair.values(), expected):
        with served_calls() as served:
            assert relative_error(sample(model), tokens) < 1e-5
        assert served
    cspd.unpatch(pair)
    assert all(torch.equal(sample(model), tokens) for model, tokens in zip(pair.values(), expected))
