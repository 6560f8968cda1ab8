"""``cspd.describe``: what is found in a model, as fields and as a page."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn as nn
from foreign import CHANNELS, COND, DEPTH, WIDTH, Head, Mean, Spaced, Var, conditions, made, run, state, unchanged
from small_models import small_mar

import cspd

Z = conditions()


def test_fields_of_a_head():
    head = made()
    (found,) = cspd.describe(head).heads
    assert (found.channels, found.width, found.depth, found.cond_channels) == (CHANNELS, WIDTH, DEPTH, COND)
    assert found.name == "the model itself (Head)"
    assert found.samplers == {"gen_diffusion": "12 steps"}
    assert (found.dtype, found.weights, found.device) == (torch.float32, torch.float32, torch.device("cpu"))
    assert found.backend == "torch"
    assert (found.patched, found.own_code) == (False, ())
    assert found.untouched == ()


def test_the_page():
    model = small_mar(schedule="linear")
    page = str(cspd.describe(model))
    assert page.splitlines() == [
        "diffloss (DiffLoss): C=4 W=32 D=2 Z=32, float32 on cpu, backend torch, not patched",
        "  train_diffusion: 1000 steps",
        "  gen_diffusion: 12 steps",
    ]
    assert repr(cspd.describe(model)) == page
    cspd.patch(model, dtype=torch.bfloat16, backend="torch")
    page = str(cspd.describe(model)).splitlines()
    sizes = "C=4 W=32 D=2 Z=32, bfloat16 of float32 on cpu"
    assert page[0] == f"diffloss (DiffLoss): {sizes}, backend torch, patched, parallel_tol=auto"
    cspd.unpatch(model)
    assert "float32 on cpu, backend torch, not patched" in str(cspd.describe(model))


def test_nothing_is_changed_and_nothing_runs():
    head = made()
    head.sample = lambda *_: pytest.fail("its code ran")
    before, rng = state(head), torch.get_rng_state()
    cspd.describe(head)
    assert unchanged(before, state(head))
    assert torch.equal(rng, torch.get_rng_state())
    assert head.net.evaluations == 0


def test_what_ran_its_own_code_is_listed():
    class Optional(Head):
        def sample(self, z, temperature=1.0, function=None):
            args, options = self.call(z)
            return self.gen_diffusion.p_sample_loop(*args, **options, denoised_fn=function)

        def sample_again(self, z):
            return self.sample(z)

    head = cspd.patch(made(Optional))
    assert cspd.describe(head).heads[0].own_code == ()
    for _ in range(2):
        run(head, lambda h: h.sample(Z, function=torch.tanh))
    assert cspd.describe(head).heads[0].own_code == ("x0 goes through a denoised_fn (denoised_fn)",)
    assert "  ran its own code: x0 goes through a denoised_fn (denoised_fn)" in str(cspd.describe(head)).splitlines()
    assert "  not taken over: sample_again" in str(cspd.describe(head)).splitlines()
    cspd.unpatch(head)
    assert cspd.describe(head).heads[0].own_code == ()


def test_the_operand_type_follows_autocast_and_the_weights():
    head = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cspd.describe(head).heads[0].dtype == torch.bfloat16
    head.half()
    (found,) = cspd.describe(head).heads
    assert (found.dtype, found.weights) == (torch.float16, torch.float16)
    assert "float16 on cpu" in found.line


def test_several_samplers_and_one_that_cannot_be_served():
    head = made(Head, [Spaced(5), Spaced(7), Spaced(7, mean=Mean.PREVIOUS_X)])
    head.slow = {"one": Spaced(20, var=Var.FIXED_SMALL)}
    (found,) = cspd.describe(head).heads
    assert list(found.samplers) == ["gen_diffusion", "slow"]
    assert found.samplers["slow"] == "20 steps"
    five, seven, other = found.samplers["gen_diffusion"].split(", ", 2)
    assert (five, seven) == ("5 steps", "7 steps")
    assert other.startswith("own code: ")
    assert "got PREVIOUS_X" in other


def test_no_sampler_that_can_be_served():
    (found,) = cspd.describe(made(Head, Spaced(mean=Mean.PREVIOUS_X))).heads
    assert "got PREVIOUS_X" in found.own_loop
    assert found.backend == "torch"  # of its network's calls


def test_two_heads_of_which_one_cannot_be_served():
    pair = nn.ModuleDict({"good": small_mar(0), "odd": small_mar(1)})
    pair["odd"].diffloss.net.res_blocks[0].mlp[1] = nn.GELU()
    described = cspd.describe(pair)
    assert [head.name for head in described.heads] == ["good.diffloss (DiffLoss)"]
    reason = "net.res_blocks[0].mlp is not Linear, SiLU, Linear"
    assert described.others == {"odd.diffloss (DiffLoss)": reason}
    assert str(described).splitlines()[-1] == f"odd.diffloss (DiffLoss): not served: {reason}"
    cspd.patch(pair)
    assert [head.patched for head in cspd.describe(pair).heads] == [True]


NEAR = {
    "a hook": (lambda head: head.net.cond_embed.register_forward_hook(print), r"has a forward hook (print)"),
    "a layer": (lambda head: setattr(head.net, "input_proj", nn.Identity()), "net.input_proj is torch.nn.modules"),
}


@pytest.mark.parametrize("how", NEAR)
def test_near_misses_are_explained(how):
    change, reason = NEAR[how]
    head = made()
    change(head)
    described = cspd.describe(head)
    assert described.heads == []
    assert list(described.others) == ["the model itself (Head)"]
    assert reason in described.others["the model itself (Head)"]
    assert reason in str(described)


def test_no_head():
    described = cspd.describe(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert (described.heads, described.others) == ([], {})
    assert str(described) == "no diffusion head found"
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module .*, got int"):
        cspd.describe(3)


def test_a_head_on_the_meta_device():
    with torch.device("meta"):
        head = Head()
    (found,) = cspd.describe(head).heads
    assert found.backend == "none: its weights are on the meta device"
    assert found.device.type == "meta"


def test_a_head_of_no_backend(monkeypatch):
    def none(*_):
        raise RuntimeError("made of wood")

    monkeypatch.setattr(sys.modules["cspd.description"], "implementation", none)
    assert cspd.describe(made()).heads[0].backend == "none: made of wood"
