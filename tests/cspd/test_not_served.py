"""Networks that compute more than their weights say: their packed form is refused, and their own code runs."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.nn as nn
from foreign import STEPS, conditions, made, own_messages, run

import cspd
from cspd.diffusions import NotServedError
from cspd.heads import HeadCache
from cspd_kernels import Schedule
from cspd_kernels.testing import relative_error

SCHEDULE, Z = Schedule.linear(7), conditions()


def parametrize(net):
    nn.utils.parametrize.register_parametrization(net.get_submodule("res_blocks.0.mlp.0"), "bias", nn.Hardtanh(-1, 0.5))


def replace_forward(net):
    net.cond_embed.forward = lambda c: 2 * nn.functional.linear(c, net.cond_embed.weight)


def replace_forward_of_the_network(net):
    net.forward = lambda x, t, c: torch.zeros(len(x), 8)


def subclass(net):
    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net.input_proj.__class__ = Adapted


def to_meta(net):
    net.to("meta")


NOT_SERVED = {
    "a parametrization": (parametrize, "has parametrizations, which compute its weights at every call"),
    "a forward hook": (lambda net: net.cond_embed.register_forward_hook(print), r"has a forward hook \(print\)"),
    "a forward pre-hook": (lambda net: net.register_forward_pre_hook(print), r"net has a forward pre-hook \(print\)"),
    "a replaced forward": (replace_forward, r"net.cond_embed had its forward replaced"),
    "the network's forward": (replace_forward_of_the_network, "net had its forward replaced"),
    "a class of its own": (subclass, "net.input_proj is .*Adapted, whose forward is its own"),
    "another activation": (
        lambda net: net.res_blocks[0].mlp.__setitem__(1, nn.GELU()),
        r"net.res_blocks\[0\].mlp is not Linear, SiLU, Linear",
    ),
    "no weights": (to_meta, "its weights are on the meta device"),
}


@pytest.mark.parametrize("how", NOT_SERVED)
@torch.no_grad()
def test_a_network_that_computes_more_than_its_weights_say_is_not_served(how):
    net, (change, match) = made().net, NOT_SERVED[how]
    cache = HeadCache(net)
    cache.get(SCHEDULE)
    change(net)
    for _ in range(2):
        with pytest.raises(NotServedError, match=match):
            cache.get(SCHEDULE)


@torch.no_grad()
def test_a_hook_that_goes_again():
    net = made().net
    cache = HeadCache(net)
    cache.get(SCHEDULE)
    handle = net.cond_embed.register_forward_hook(lambda *_: None)
    with pytest.raises(NotServedError):
        cache.get(SCHEDULE)
    handle.remove()
    assert cache.get(SCHEDULE).num_steps == 7


@pytest.mark.parametrize("how", [how for how in NOT_SERVED if how != "no weights"])
def test_a_patched_model_runs_its_own_code_then(how, caplog):
    change, match = NOT_SERVED[how]
    head, plain = made(), made()
    cspd.patch(head)
    assert run(head, lambda h: h.sample(Z))[2] == 0
    change(head.net)
    change(plain.net)
    expected, rng, _ = run(plain, lambda h: h.sample(Z))
    with caplog.at_level(logging.WARNING, "cspd"):
        for _ in range(2):
            actual, rng_after, _ = run(head, lambda h: h.sample(Z))
            assert torch.equal(actual, expected)
            assert torch.equal(rng_after, rng)
    (message,) = own_messages(caplog)
    assert re.search(f"{match}|the loop is given replace_forward", message)


@pytest.mark.parametrize("how", [how for how in NOT_SERVED if how != "no weights"])
def test_such_a_model_is_not_patched_at_all(how):
    change, match = NOT_SERVED[how]
    head = made()
    change(head.net)
    with pytest.raises(ValueError, match=f"no diffusion head found in Head that can be served(.|\\n)*{match}"):
        cspd.patch(head)
    assert not cspd.is_patched(head)


def test_a_hook_that_goes_again_leaves_the_model_accelerated():
    head = cspd.patch(made())
    expected = run(head, lambda h: h.sample(Z))[0]
    calls = []
    handle = head.net.res_blocks[1].register_forward_hook(lambda *_: calls.append(1))
    assert relative_error(run(head, lambda h: h.sample(Z))[0], expected) < 1e-5
    assert len(calls) == STEPS
    handle.remove()
    actual, _, evaluations = run(head, lambda h: h.sample(Z))
    assert evaluations == 0
    assert torch.equal(actual, expected)


def test_a_replaced_method_of_the_network(caplog):
    head = cspd.patch(made())
    net = head.net
    net.forward_with_cfg = lambda x, t, c, cfg_scale: type(net).forward_with_cfg(net, x, t, c, 2 * cfg_scale)
    with caplog.at_level(logging.WARNING, "cspd"):
        assert run(head, lambda h: h.sample(Z, 1.0, 2.0))[2] == STEPS
        assert run(head, lambda h: h.sample(Z))[2] == STEPS
    assert len(own_messages(caplog)) == 2  # of the loop, and of the network


def test_a_method_of_the_networks_class_that_is_replaced_later(monkeypatch):
    head = cspd.patch(made())
    assert run(head, lambda h: h.sample(Z, 1.0, 2.0))[2] == 0
    guided = type(head.net).forward_with_cfg
    monkeypatch.setattr(type(head.net), "forward_with_cfg", lambda self, x, t, c, cfg_scale: guided(self, x, t, c, 1.0))
    actual, _, evaluations = run(head, lambda h: h.sample(Z, 1.0, 2.0))
    assert evaluations == STEPS
    assert torch.equal(actual, run(cspd.unpatch(head), lambda h: h.sample(Z, 1.0, 2.0))[0])
