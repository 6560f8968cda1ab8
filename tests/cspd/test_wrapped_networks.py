"""Networks inside of ``torch.compile`` and DataParallel, and heads of which only methods are compiled."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from foreign import Head, conditions, made, run

import cspd
from cspd.heads import find_heads
from cspd_kernels.testing import relative_error

Z = conditions()


class Inner(Head):
    """Counts the evaluations of the network inside of its wrapper."""

    def sample(self, z, temperature=1.0, cfg=1.0):
        noise = torch.randn(len(z), self.in_channels)
        return self.gen_diffusion.p_sample_loop(
            self.net, noise.shape, noise, clip_denoised=False, model_kwargs={"c": z}, temperature=temperature
        )


WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "parallel": nn.DataParallel,
    "compiled and parallel": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_wrapped_network(how):
    if how != "compiled" and torch.cuda.is_available():
        pytest.skip("DataParallel moves its module where there are devices")
    torch._dynamo.reset()
    head = made(Inner)
    net = head.net
    expected, rng, _ = run(head, lambda h: h.sample(Z))
    head.net = WRAPPERS[how](net)
    assert find_heads(head).heads[0].net is net
    before = net.evaluations
    cspd.patch(head)
    torch.manual_seed(5)
    actual = head.sample(Z)
    assert net.evaluations == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert relative_error(actual, expected) < 1e-5
    with torch.no_grad():
        net.final_layer.linear.weight.mul_(0.5)
    torch.manual_seed(5)
    assert relative_error(head.sample(Z), actual) > 1e-2
    cspd.unpatch(head)
    assert not cspd.is_patched(head)


def test_a_forward_that_is_compiled_in_place():
    torch._dynamo.reset()
    head = made()
    expected = run(head, lambda h: h.sample(Z))[0]
    cspd.patch(head)
    head.net.forward = torch.compile(head.net.forward, backend="eager")
    actual, _, evaluations = run(head, lambda h: h.sample(Z))
    assert evaluations == 0
    assert relative_error(actual, expected) < 1e-5


def test_a_compiled_copy_of_a_patched_head():
    torch._dynamo.reset()
    head = cspd.patch(made())
    expected = run(head, lambda h: h.sample(Z))[0]
    twin = copy.deepcopy(head)
    twin.net = torch.compile(twin.net, backend="eager")
    torch.manual_seed(5)
    assert torch.equal(twin.sample(Z), expected)
