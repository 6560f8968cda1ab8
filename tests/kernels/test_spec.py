"""The description of a network: every form is found, packed and computed as its own forward does."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from networks import KINDS, C, D, Gated, Network, Times, W, Z, inputs

from cspd_kernels import DiffusionHead, Schedule, denoise, evaluate
from cspd_kernels.live import LiveWeights
from cspd_kernels.ops.denoise import reference as chains
from cspd_kernels.ops.evaluate import reference
from cspd_kernels.spec import TimeSpec, spec_of, specs_of
from cspd_kernels.testing import random_inputs, relative_error

SCHEDULE = Schedule.linear(4, train_steps=20)


def difference(net, spec, rows=6):
    """Of the packed network and of its own forward, in float64; infinite where they return other shapes."""
    net = net.double()
    x, t, c = inputs(net, rows)
    with torch.no_grad():
        expected = net(x.double(), t, c.double())
    head = DiffusionHead.from_network(net, None, spec=spec)
    actual = reference.evaluate(head, x, t, c, dtype=torch.float64)
    net.float()
    return relative_error(actual, expected) if actual.shape == expected.shape else float("inf")


@functools.cache
def agreeing(kind):
    """Which description of a kind of network agrees."""
    net = Network(**KINDS[kind])
    agree = [i for i, spec in enumerate(specs_of(net)) if difference(net, spec) <= 1e-10]
    assert len(agree) == 1, agree
    return agree[0]


def found(kind, net):
    """The one description that agrees, of such a network."""
    return specs_of(net)[agreeing(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_one_description_agrees(kind):
    net = Network(**KINDS[kind])
    spec, options = found(kind, net), KINDS[kind]
    assert spec.mlp == ("silu" if options.get("mlp", "silu") == "silu" else "swiglu")
    assert spec.norm == ("rms" if "rms" in options.get("norm", "layer") else "layer")
    assert spec.modulation == options.get("order", ("shift", "scale", "gate"))
    assert (spec.channels, spec.width, spec.depth, spec.cond_channels) == (C, W, D, Z)
    assert spec.hidden == options.get("hidden", W)
    assert spec.outputs == (options.get("kept") or options.get("outputs", 2 * C))
    assert len(set(spec.modulation_of)) == (options.get("groups") or D)
    assert len(spec.times) == options.get("count", 1)
    head = DiffusionHead.from_network(net, None, spec=spec)
    assert (head.hidden, head.outputs, head.norm, head.mlp) == (spec.hidden, spec.outputs, spec.norm, spec.mlp)
    assert head.modulation_of == spec.modulation_of
    assert head.shared_modulation == spec.shared_modulation == ("groups" in options)
    assert (head.schedule, head.time_embedding, head.num_steps, head.learned_variance) == (None, None, 0, False)


LIKELIEST = ["plain", "root mean square", "averaged times", "norms of its own", "gate and up in one", "shared"]


@pytest.mark.parametrize("kind", LIKELIEST)
def test_what_is_known_of_code_bases_comes_first(kind):
    net = Network(**KINDS[kind])
    assert spec_of(net) == found(kind, net)
    if kind == "shared":
        assert spec_of(net).times == (TimeSpec(16, 1000.0),)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluated_and_denoised_as_by_the_reference(kind, dtype, bound):
    net = Network(**KINDS[kind])
    head = DiffusionHead.from_network(net, SCHEDULE, dtype=dtype, spec=found(kind, net))
    x, t, c = inputs(net, 7)
    expected = reference.evaluate(head, x, t, c, dtype=torch.float64)
    assert relative_error(evaluate(head, x, t, c), expected) <= bound
    cond, x_T, noise = random_inputs(head, 7, 1, guided=True)  # noqa: N806
    expected = chains.denoise(head, cond, x_T, noise, 0.9, (1.5,), dtype=torch.float64)
    for tolerance in (None, "auto"):
        out = denoise(head, cond, x_T, noise, temperature=0.9, cfg_scale=1.5, parallel_tol=tolerance)
        for actual, right in zip(out[:4], expected):
            assert relative_error(actual, right) <= bound


# Every form of packing, converted and, where that copies, too, not converted.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.bfloat16) for kind in ("hidden width", "root mean square", "shared", "averaged times")]
    + [(kind, torch.float32) for kind in ("gated with biases", "up and gate in one", "gate first", "shared")],
)
def test_every_weight_is_followed(kind, dtype):
    net = Network(**KINDS[kind])
    spec = found(kind, net)
    head = DiffusionHead.from_network(net, SCHEDULE, dtype=dtype, spec=spec)
    alone = DiffusionHead.from_network(net, None, dtype=dtype, spec=spec)
    live, also = LiveWeights(head), LiveWeights(alone)
    for name, parameter in net.named_parameters():
        if any(f"res_blocks.{block}." in name for block in range(1, D - 1)):
            continue
        for place in (0, -1, len(parameter) // 2):
            parameter.data[place] += 0.5  # no version counter moves
        live.refresh([head])
        also.refresh([alone])
        expected = DiffusionHead.from_network(net, SCHEDULE, dtype=dtype, spec=spec)
        pairs = zip((head, alone, *head.blocks, *head.time), (expected, expected, *expected.blocks, *expected.time))
        for a, b in pairs:
            for field, value in vars(a).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, getattr(b, field)), (name, field)


def test_what_needs_no_change_is_shared():
    assert DiffusionHead.from_network(Network(), SCHEDULE).copies == ()
    net = Network(groups=2)
    packed_order = replace(spec_of(net), modulation=("shift", "scale", "gate"))
    head = DiffusionHead.from_network(net, SCHEDULE, spec=packed_order)
    assert head.copies == ()
    assert head.blocks[0].mod_weight is head.blocks[1].mod_weight is not head.blocks[2].mod_weight
    assert head.to(torch.bfloat16).modulation_of == head.modulation_of == (0, 0, 1, 1)


def test_a_condition_that_its_own_module_embeds():
    net = Network()
    embedded = net.cond_embed(inputs(net, 6)[2]).detach()
    for spec in (spec_of(net).given(), spec_of(with_condition(net))):
        assert (spec.condition, spec.cond_channels) == ("given", W)
        head = DiffusionHead.from_network(net, SCHEDULE, spec=spec)
        assert (head.cond_weight, head.cond_bias, head.cond_channels) == (None, None, W)
        plain = DiffusionHead.from_network(Network(), SCHEDULE)
        x, t, c = inputs(net, 6)
        assert relative_error(evaluate(head, x, t, embedded), evaluate(plain, x, t, c)) <= 1e-6
        _, x_T, noise = random_inputs(head, 6, 0)  # noqa: N806
        assert relative_error(denoise(head, embedded, x_T, noise)[0], denoise(plain, c, x_T, noise)[0]) <= 1e-5
        net.cond_embed.weight.data = net.cond_embed.weight.data[: W - 16]


def with_condition(net):
    """Where a part of the width comes from elsewhere, as a level's index."""
    other = Network()
    other.cond_embed = nn.Linear(Z, W - 16)
    return other


def test_another_schedule_of_averaged_times():
    net = Network(**KINDS["averaged times"])
    head = DiffusionHead.from_network(net, SCHEDULE, spec=found("averaged times", net))
    longer = Schedule.linear(6, train_steps=20, variance="fixed_small")
    again = head.with_schedule(longer)
    expected = DiffusionHead.from_network(net, longer, spec=spec_of(net)).time_embedding
    assert torch.equal(again.time_embedding, expected)
    assert again.cond_weight is head.cond_weight
    assert head.to(torch.float64).time[0].weight0.dtype == torch.float64


def test_a_head_without_a_schedule_is_not_sampled():
    head = DiffusionHead.from_network(Network(), None)
    with pytest.raises(ValueError, match="denoise expected a head with a schedule, got one without"):
        denoise(head, torch.zeros(1, Z), torch.zeros(1, C), torch.zeros(4, 1, C))


def other_hidden(net):
    net.res_blocks[2].mlp = nn.Sequential(nn.Linear(W, 32), nn.SiLU(), nn.Linear(32, W))


REFUSED = {
    "no such module": (lambda net: nn.Linear(2, 2), "it lacks net.input_proj, net.cond_embed, net.res_blocks"),
    "another hidden width": (other_hidden, r"net.res_blocks\[2\].mlp\[0\] is 48 -> 32, expected 48 -> 48"),
    "another kind of MLP": (
        lambda net: (delattr(net.res_blocks[1], "mlp"), setattr(net.res_blocks[1], "ffn", Gated(W, True))) and net,
        "its blocks hold MLPs of several forms",
    ),
    "another kind of norm": (
        lambda net: setattr(net.res_blocks[1], "in_ln", nn.Identity()),
        r"\[1\].in_ln is Identity\(\), not a LayerNorm of width 48 or an RMSNorm, the same in every block",
    ),
    "a norm of groups": (
        lambda net: [setattr(block, "in_ln", nn.GroupNorm(4, W, eps=1e-6)) for block in net.res_blocks] and net,
        r"\[0\].in_ln is GroupNorm.*, not a LayerNorm",
    ),
    "another width": (lambda net: setattr(net.res_blocks[1], "in_ln", nn.LayerNorm(W + 1)), "not a LayerNorm of width"),
    "a norm at the end that is trained": (
        lambda net: setattr(net.final_layer, "norm_final", nn.LayerNorm(W, eps=1e-6)), "has affine parameters",
    ),
    "gelu": (lambda net: net.res_blocks[1].mlp.__setitem__(1, nn.GELU()), "mlp is not Linear, SiLU, Linear"),
    "gelu of a time": (lambda net: net.time_embed.mlp.__setitem__(1, nn.GELU()), "time_embed.mlp is not Linear, SiLU"),
    "a modulation without its SiLU": (
        lambda net: setattr(net.res_blocks[0], "adaLN_modulation", nn.Linear(W, 3 * W)), "not torch.nn.Linear",
    ),
    "too many outputs": (lambda net: setattr(net.final_layer, "linear", nn.Linear(W, 3 * C)), "puts out 15 channels"),
    "times of two kinds": (
        lambda net: setattr(net, "time_embed", nn.ModuleList([Times(), Times(norm=True)])),
        "some of its time embeddings end in a norm and some do not",
    ),
    "times of two sizes": (
        lambda net: setattr(net, "time_embed", nn.ModuleList([Times(), Times(size=8)])),
        r"time_embed\[1\].mlp\[0\] is 8 -> 48, expected 16 -> 48",
    ),
    "a time that ends in a LayerNorm": (
        lambda net: net.time_embed.mlp.append(nn.LayerNorm(W)) and None,
        r"mlp\[3\] is .*LayerNorm, not a norm without an offset",
    ),
    "blocks that are no list": (
        lambda net: setattr(net, "res_blocks", nn.Linear(2, 2)), "net.res_blocks is Linear, not a list of modules",
    ),
    "modulations for other blocks": (
        lambda net: setattr(net, "ada_ln_blocks", nn.ModuleList(nn.Linear(W, 3 * W) for _ in range(3))),
        "ada_ln_blocks has 3 modules, which 4 blocks cannot share evenly",
    ),
    "no time": (lambda net: setattr(net, "time_embed", nn.ModuleList()), "it lacks net.time_embed"),
    "modulations that do not divide the blocks": (
        lambda net: setattr(net, "ada_ln_blocks", nn.ModuleList()), "ada_ln_blocks has 0 modules, which",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_named_in_one_sentence(kind):
    change, message = REFUSED[kind]
    net = Network()
    changed = change(net)
    net = changed if isinstance(changed, nn.Module) else net
    with pytest.raises(TypeError, match=message) as raised:
        DiffusionHead.from_network(net, SCHEDULE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_schedule_has_a_column_of_timesteps_for_each_embedding(columns):
    net = Network(**KINDS["averaged times"])
    with pytest.raises(ValueError, match=rf"shape \(T,\) or \(T, 2\), got \(2, {columns}\)"):
        DiffusionHead.from_network(net, Schedule([[0.0] * columns] * 2, *[[1.0, 1.0]] * 5))


def test_the_norms_of_times_have_an_epsilon_each():
    net = Network(**KINDS["averaged times"])
    net.time_embed[1].mlp[3].eps = 0.5
    assert [time.norm_eps for time in spec_of(net).times] == [1e-5, 0.5]
    assert difference(net, spec_of(net)) <= 1e-10
