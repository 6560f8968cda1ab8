"""``cspd.patch(model, loop="own")``: the loop is the model's own, its network's calls are the kernels'."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle

import pytest
import torch
import torch.nn as nn
from foreign import CHANNELS, COND, STEPS, Head, Net, Spaced, conditions, made, own_messages, run, state, unchanged
from own_loops import FlowHead, SolverHead, Speech, SpeechNet, ready

import cspd
from cspd.loop import patch_of
from cspd_kernels.testing import relative_error

Z = conditions()


MODELS = {
    "a solver": (SolverHead, "net", lambda m: m.sample(Z)),
    "a guided solver": (SolverHead, "net", lambda m: m.sample(Z, 2.5)),
    "a scheduler": (Speech, "model.prediction_head", lambda m: m.sample_speech_tokens(Z[:3], Z[3:])),
    "an ODE": (FlowHead, "net", lambda m: m.sample(Z)),
    "a guided ODE": (FlowHead, "net", lambda m: m.sample(Z, 2.5)),
    "one that could be taken over": (Head, "net", lambda m: m.sample(Z)),
    "the same, guided": (Head, "net", lambda m: m.sample(Z, 0.9, 2.5)),
}


def model_of(name):
    """(model, its network, a call of it)."""
    kind, path, call = MODELS[name]
    model = ready(kind)
    return model, model.get_submodule(path), call


def called(net, call, model, seed=5):
    """(result, state of torch's generator afterwards, calls of the network's own forward)."""
    torch.manual_seed(seed)
    before = net.evaluations
    result = call(model)
    return result, torch.get_rng_state(), net.evaluations - before


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_by_its_own_loop(name, caplog):
    model, net, call = model_of(name)
    expected, rng, evaluations = called(net, call, model)
    before, keys = state(model), list(model.state_dict())
    assert evaluations
    with caplog.at_level(logging.WARNING, "cspd"):
        assert cspd.patch(model, loop="own") is model
        assert cspd.is_patched(model)
        for _ in range(2):
            actual, rng_after, counted = called(net, call, model)
            assert counted == 0
            assert actual.dtype == expected.dtype
            assert relative_error(actual, expected) < 1e-5
            assert torch.equal(rng, rng_after)
    assert not caplog.records
    assert list(model.state_dict()) == keys
    cspd.unpatch(model)
    assert not cspd.is_patched(model)
    assert unchanged(before, state(model))
    assert torch.equal(called(net, call, model)[0], expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "taken over" not in name and "same" not in name])
def test_chosen_where_there_is_no_loop_to_take_over(name, caplog):
    model, net, call = model_of(name)
    expected, _, own = called(net, call, model)
    for options, told, counted in (
        ({}, "runs its own code, unaccelerated", own),
        ({"weights": "frozen"}, "keeps its own loop, its network is accelerated", 0),
        ({"backend": "torch"}, "keeps its own loop, its network is accelerated", 0),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cspd"):
            cspd.patch(model, **options)
        (record,) = caplog.records
        assert f"{told}: it holds no diffusion object" in record.getMessage()
        actual, _, evaluations = called(net, call, model)
        assert evaluations == counted
        assert torch.equal(actual, expected) if counted else relative_error(actual, expected) < 1e-5
        (head,) = cspd.describe(model).heads
        assert head.patched
        assert head.own_loop == "it holds no diffusion object with p_sample_loop"
        assert "patched: its own loop, " in head.line
        assert ("its network by the kernels" in head.line) == (counted == 0)
    with cspd.patched(model, loop="own"):
        assert called(net, call, model)[2] == 0
    assert cspd.is_patched(model)
    cspd.unpatch(model)
    (head,) = cspd.describe(model).heads
    assert (head.patched, bool(head.own_loop)) == (False, True)


class Louder(Net):
    """Not what its layers say."""

    def forward(self, x, t, c):
        return 1.1 * super().forward(x, t, c)


class LouderHead(FlowHead):
    def __init__(self):
        super().__init__()
        self.net = Louder(learned=False)


@pytest.mark.parametrize("loop", [None, "own"])
def test_a_network_that_computes_something_else_is_refused_with_the_figure(loop):
    head = ready(LouderHead)
    before = state(head)
    with pytest.raises(ValueError, match=r"left unpatched: .*its network also differs: .* by 0.091 of the largest"):
        cspd.patch(head, loop=loop)
    assert not cspd.is_patched(head)
    assert unchanged(before, state(head))


class OddStep(Spaced):
    def mean(self, x0, x, i):
        return super().mean(x0, x, i) + 0.01


def test_chosen_where_the_loop_computes_something_else(caplog):
    head = made(Head, OddStep())
    expected = run(head, lambda h: h.sample(Z))
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(head, weights="frozen")
    (record,) = caplog.records
    assert "keeps its own loop, its network is accelerated: its sample" in record.getMessage()
    assert "differ by" in record.getMessage()
    actual = run(head, lambda h: h.sample(Z))
    assert (expected[2], actual[2]) == (STEPS, 0)
    assert relative_error(actual[0], expected[0]) < 1e-5
    assert "p_sample_loop" not in vars(head.gen_diffusion)


def test_a_shared_diffusion_object_serves_the_head_that_wants_it():
    own, other = made(seed=0), made(seed=1)
    other.gen_diffusion = own.gen_diffusion
    expected = [run(head, lambda h: h.sample(Z))[0] for head in (own, other)]
    cspd.patch(own, loop="own")
    cspd.patch(other)
    for head, tokens in zip((own, other), expected):
        actual, _, evaluations = run(head, lambda h: h.sample(Z))
        assert evaluations == 0
        assert relative_error(actual, tokens) < 1e-5
    cspd.unpatch(other)
    assert run(own, lambda h: h.sample(Z))[2] == 0


def test_patching_again_replaces_the_options():
    head = made()
    for loop, hooked in ((None, True), ("own", False), (None, True)):
        cspd.patch(head, loop=loop)
        assert ("p_sample_loop" in vars(head.gen_diffusion)) == hooked
        assert ("forward" in vars(head.net)) != hooked
        assert run(head, lambda h: h.sample(Z))[2] == 0
    with cspd.patched(head, loop="own"):
        assert "forward" in vars(head.net)
        assert "p_sample_loop" in vars(head.gen_diffusion)  # of the patch that is still there
        assert run(head, lambda h: h.sample(Z))[2] == 0
    assert "forward" not in vars(head.net)
    assert run(head, lambda h: h.sample(Z))[2] == 0


def test_instances_are_patched_and_classes_are_not():
    one, two = ready(FlowHead), ready(FlowHead)
    before = dict(vars(Net))
    cspd.patch(one, loop="own")
    assert dict(vars(Net)) == before
    assert (cspd.is_patched(one), cspd.is_patched(two)) == (True, False)
    assert called(two.net, lambda m: m.sample(Z), two)[2] > 0
    assert inspect.signature(one.net.forward) == inspect.signature(two.net.forward)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_carry_a_patch_of_their_own(copied):
    model, net, call = model_of("a scheduler")
    expected = called(net, call, model)[0]
    cspd.patch(model, loop="own")
    assert called(net, call, model)[2] == 0
    twin = copied(model)
    inner = twin.model["prediction_head"]
    with torch.no_grad():
        inner.final_layer.linear.weight.mul_(1.5)
    assert cspd.is_patched(twin)
    other, _, counted = called(inner, call, twin)
    assert counted == 0
    assert relative_error(other, expected) > 1e-2
    cspd.unpatch(twin)
    assert relative_error(called(inner, call, twin)[0], other) < 1e-5
    assert relative_error(called(net, call, model)[0], expected) < 1e-5
    assert cspd.is_patched(model)


def test_weights_change_between_calls():
    model, net, call = model_of("a scheduler")
    cspd.patch(model, loop="own")

    def change(how):
        how()
        actual, _, counted = called(net, call, model)
        assert counted == 0
        with torch.no_grad():
            expected = called(net, call, cspd.unpatch(model))[0]
        cspd.patch(model, loop="own")
        assert relative_error(actual, expected) < 1e-5
        return actual

    layer = net.layers[1].ffn.gate_proj

    def exchanged():
        layer.weight = nn.Parameter(torch.randn_like(layer.weight) / 8, requires_grad=False)

    changes = [lambda: None, lambda: layer.weight.mul_(0.5), lambda: layer.weight.data.mul_(2.5), exchanged]
    changes += [lambda: net.layers[0].norm.weight.data.add_(0.25), lambda: net.t_embedder.mlp[0].weight.data.mul_(1.5)]
    results = [change(how) for how in changes]
    assert len({float(result.sum()) for result in results}) == len(changes)


def test_moves_and_types():
    model, net, call = model_of("a scheduler")
    cspd.patch(model, loop="own")
    expected = called(net, call, model)[0]
    model.to(torch.bfloat16)
    half = called(net, lambda m: m.sample_speech_tokens(Z[:3].bfloat16(), Z[3:].bfloat16()), model)
    assert (half[0].dtype, half[2]) == (torch.bfloat16, 0)
    assert relative_error(half[0], expected) < 0.1
    model.to(torch.float64)
    double = called(net, lambda m: m.sample_speech_tokens(Z[:3].double(), Z[3:].double()), model)
    assert (double[0].dtype, double[2]) == (torch.float64, 0)


def test_every_network_in_the_tree():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.speech = made(Head), Speech()

    model = ready(Two)
    cspd.patch(model)
    assert patch_of(model.image.net).own_loop is None
    assert patch_of(model.speech.model["prediction_head"]).own_loop
    assert run(model.image, lambda h: h.sample(Z))[2] == 0
    cspd.patch(model, loop="own")
    assert "p_sample_loop" not in vars(model.image.gen_diffusion)
    cspd.unpatch(model)
    assert not cspd.is_patched(model)


def test_a_network_by_itself():
    net = ready(SpeechNet)
    arguments = torch.randn(3, CHANNELS), torch.tensor([1.0, 500.0, 999.0]), torch.randn(3, COND)
    expected = net(*arguments)
    cspd.patch(net, loop="own")
    assert relative_error(net(*arguments), expected) < 1e-5
    assert net.evaluations == 1


@pytest.mark.parametrize("options", [{"loop": "other"}, {"loop": "own", "whole": True}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="patch expected loop"):
        cspd.patch(made(), **options)


def test_messages_of_networks_that_are_not_served(caplog):
    head = ready(FlowHead)
    evaluations = called(head.net, lambda m: m.sample(Z), cspd.unpatch(head))[2]
    cspd.patch(head, loop="own")
    handle = head.net.res_blocks[0].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "cspd"):
        for _ in range(2):
            assert called(head.net, lambda m: m.sample(Z), head)[2] == evaluations
    handle.remove()
    assert called(head.net, lambda m: m.sample(Z), head)[2] == 0
    (message,) = own_messages(caplog)
    assert "has a forward hook" in message
    assert "has a forward hook" in cspd.describe(head).heads[0].own_code[0]
