"""``cspd.patch`` on calls whose meaning is in code: of a few known ones that which agrees is taken, or its own runs."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn
from field.diffusion_networks import FarNet
from foreign import CHANNELS, COND, WIDTH, Head, Mean, Net, Spaced, Var, conditions, made, own_messages, run
from patch_checks import assert_accelerated, assert_own_code, assert_own_loop
from slow import mostly_slow, slow

import cspd
from cspd.calls import _temperature
from cspd.loop import patch_of
from cspd.meanings import Meaning, guidances
from cspd_kernels.testing import relative_error

Z = conditions()
LOWS, HIGHS = torch.tensor([-3.0, 0.0, -0.1, -0.7]), torch.tensor([3.0, 0.9, 0.1, 0.5])


class Chosen(Head):
    """Anything may be given to the loop."""

    def sample(self, z, temperature=1.0, cfg=1.0, loop="p_sample_loop", clip=False, **more):
        args, options = self.call(z, cfg)
        more = more if loop == "ddim_sample_loop" else {"temperature": temperature, **more}
        return getattr(self.gen_diffusion, loop)(*args, **{**options, "clip_denoised": clip}, **more)


class Limited(Spaced):
    """Limits of each channel, as CoderChen01/towards-seamless-interaction has them in its code."""

    def limited(self, x0):
        x0 = torch.stack([c.clamp(low, high) for c, low, high in zip(x0.unbind(-1), LOWS, HIGHS)], dim=-1)
        norm = x0[..., 1:].norm(dim=-1, keepdim=True)
        return torch.where(norm > 2.0, x0 * (2.0 / norm), x0)  # which is never so

    def p_mean_variance(self, model, x, t, clip_denoised=True):
        x0, mean, log_variance = self.estimate(lambda x, _: model(x, t), x, int(t[0]), clip_denoised, None, {})
        return {"mean": mean, "log_variance": log_variance, "pred_xstart": x0}


class Unread(Limited):
    """The same, not to be asked what x0 becomes."""

    p_mean_variance = None


class Widening(Limited):
    """Limits that depend on the step."""

    def estimate(self, model, x, i, *rest):
        self.factor = 1.0 + i
        try:
            return super().estimate(model, x, i, *rest)
        finally:
            del self.factor

    def limited(self, x0):
        return self.factor * super().limited(x0 / self.factor)


LIMITS = [
    (Spaced, Mean.EPSILON, "p_sample_loop", 2.5),
    (Spaced, Mean.START_X, "p_sample_loop", 1.0),
    (Limited, Mean.EPSILON, "p_sample_loop", 1.0),
    (Limited, Mean.START_X, "p_sample_loop", 2.5),
    (Spaced, Mean.EPSILON, "ddim_sample_loop", 1.0),
    (Limited, Mean.START_X, "ddim_sample_loop", 2.5),
]


@pytest.mark.parametrize(("limits", "mean", "loop", "cfg"), mostly_slow(LIMITS, fast=(LIMITS[0], LIMITS[2], LIMITS[5])))
def test_limits_of_x0(limits, mean, loop, cfg, caplog):
    head = made(Chosen, limits(mean=mean))
    clipped, plain = (run(head, lambda h, clip=clip: h.sample(Z, 0.9, cfg, loop, clip))[0] for clip in (True, False))
    assert relative_error(clipped[:3], plain[:3]) > 1e-2
    assert_accelerated(head, lambda h: h.sample(Z, 0.9, cfg, loop, clip=True)[:3], caplog)


@pytest.mark.parametrize("limits", [Unread, Widening])
def test_limits_that_are_not_read(limits, caplog):
    head = made(Chosen, limits())
    assert_own_code(head, lambda h: h.sample(Z, clip=True), caplog, "its sampling loop and the kernels' differ by")


@pytest.mark.parametrize(
    ("eta", "var", "cfg"),
    [
        (0.0, Var.LEARNED_RANGE, 1.0),
        (0.0, Var.FIXED_SMALL, 2.5),
        (0.5, Var.LEARNED_RANGE, 2.5),
        (1.0, Var.FIXED_LARGE, 1),
    ],
)
def test_ddim(eta, var, cfg, caplog):
    head = made(Chosen, Spaced(var=var), learned=var is Var.LEARNED_RANGE)
    assert_accelerated(head, lambda h: h.sample(Z, 1.0, cfg, "ddim_sample_loop", eta=eta)[:3], caplog)


def test_ddim_that_draws_nothing(caplog):
    class Quiet(Spaced):
        def ddim_sample_loop(self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, temperature=1.0):
            x = noise
            for i in reversed(range(self.num_timesteps)):
                with torch.no_grad():
                    x0, *_ = self.estimate(model, x, i, clip_denoised, None, model_kwargs)
                acp, before = float(self.alphas_cumprod[i]), float(self.alphas_cumprod_prev[i])
                x = before**0.5 * x0 + ((1 - before) / (1 - acp)) ** 0.5 * (x - acp**0.5 * x0)
            return x

    head = made(Chosen, Quiet())
    assert_accelerated(head, lambda h: h.sample(Z, loop="ddim_sample_loop"), caplog)
    assert sorted(m.each_step for m in patch_of(head.net).verdicts.values() if isinstance(m, Meaning))[0] is False


def test_ddim_of_another_kind(caplog):
    class Other(Spaced):
        def ddim_sample_loop(self, *args, eta=0.0, **options):
            return super().ddim_sample_loop(*args, eta=eta, **options) * 1.01

    head = made(Chosen, Other())
    reason = "its sampling loop and the kernels' differ by"
    assert_own_code(head, lambda h: h.sample(Z, loop="ddim_sample_loop"), caplog, "has no arguments named model")
    Other.ddim_sample_loop = lambda self, model, shape, noise, clip_denoised=True, model_kwargs=None: (
        1.01 * Spaced.ddim_sample_loop(self, model, shape, noise, clip_denoised, model_kwargs=model_kwargs)
    )
    assert_own_code(head, lambda h: h.sample(Z, loop="ddim_sample_loop"), caplog, reason)


MIXES = {
    "c + s (c - u)": lambda c, u, s: (1 + s) * c - s * u,
    "u first": lambda u, c, s: u + s * (c - u),
    "u first, c + s (c - u)": lambda u, c, s: (1 + s) * c - s * u,
}


def mixing(mix, learned=True):
    """A head whose network mixes in another way."""

    class Mixing(Head):
        class net_class(Net):  # noqa: N801
            def forward_with_cfg(self, x, t, c, cfg_scale):
                half = x[: len(x) // 2]
                out = self.forward(torch.cat([half, half]), t, c)
                mixed = mix(*out[:, :CHANNELS].chunk(2), cfg_scale)
                return torch.cat([torch.cat([mixed, mixed]), out[:, CHANNELS:]], dim=1)

    return made(Mixing, Spaced(var=Var.LEARNED_RANGE if learned else Var.FIXED_SMALL), learned=learned)


@pytest.mark.parametrize("how", mostly_slow(MIXES, fast=("c + s (c - u)",)))
def test_guidance_of_another_form(how, caplog):
    head, scales = mixing(MIXES[how]), (2.5, 0.0, torch.tensor([1.7]))
    assert_accelerated(head, lambda h: h.sample(Z, 0.9, scales[0])[:3], caplog)
    for scale in scales[1:]:
        actual, _, evaluations = run(cspd.patch(head), lambda h, scale=scale: h.sample(Z, 0.9, scale))
        expected = run(cspd.unpatch(head), lambda h, scale=scale: h.sample(Z, 0.9, scale))[0]
        assert relative_error(actual[:3], expected[:3]) < 1e-5
        assert evaluations == 0


def test_guidance_of_no_known_form(caplog):
    head = mixing(lambda c, u, s: u + s**0.5 * (c - u))
    assert_own_loop(
        head, lambda h: h.sample(Z, 0.9, 2.5)[:3], caplog, "its sample .* differ by .* of the largest value"
    )


class Three(Head):
    """Three groups of rows, and two scales."""

    order = (0, 1, 2)

    class net_class(Net):  # noqa: N801
        def forward_in_three(self, x, t, c, text_scale, image_scale):
            third = x[: len(x) // 3]
            out = self.forward(third.repeat(3, 1), t, c)
            c, m, u = (out[:, :CHANNELS].chunk(3)[i] for i in self.order)
            mixed = u + image_scale * (m - u) + text_scale * (c - m)
            return torch.cat([mixed.repeat(3, 1), out[:, CHANNELS:]], dim=1)

    def sample(self, z, temperature=1.0, text=3.0, image=1.5):
        self.net.order = self.order
        noise = torch.randn(len(z) // 3, CHANNELS).repeat(3, 1)
        kwargs = {"c": z, "text_scale": text, "image_scale": image}
        return self.gen_diffusion.p_sample_loop(
            self.net.forward_in_three, noise.shape, noise, clip_denoised=False, model_kwargs=kwargs,
            temperature=temperature,
        )  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_guidance_in_three_parts(order, caplog):
    head = made(type("Ordered", (Three,), {"order": order}))
    assert_accelerated(head, lambda h: h.sample(Z, 0.9)[:2], caplog)
    assert_accelerated(head, lambda h: h.sample(Z, 0.9, torch.tensor([2.0]), 0.5)[:2], caplog)


@pytest.mark.parametrize("scales", [1, 2])
def test_weights_of_groups_add_up(scales):
    given = [2.5, 1.7][:scales]
    for weights in guidances(scales):
        values = [sum(a * b for a, b in zip(group, [1.0, *given])) for group in weights]
        assert sum(values) == pytest.approx(1.0)
        outs = torch.randn(1 + scales, 5)
        expected = sum(value * out for value, out in zip(values, outs))
        actual = outs[-1] + sum(
            s * (outs[g] - outs[g + 1]) for g, s in enumerate(Meaning(weights=weights).scales(given))
        )
        assert torch.allclose(actual, expected, atol=1e-5)


class Indexed(Head):
    """A number for each row, embedded beside t and c, as yuhuUSTC/FAR and 4DVLab/Freqpolicy have it."""

    class net_class(FarNet):  # noqa: N801
        how = "add"

        def __init__(self, how="add"):
            super().__init__()
            self.how, further = how, WIDTH if how == "add" else WIDTH // 2
            self.index_cond_embed = nn.Linear(1, further)
            self.cond_embed = nn.Linear(COND, WIDTH if how == "add" else WIDTH - further)

        def forward(self, x, t, c, index=None):
            self.evaluations = self.evaluations + 1
            x, t, c = self.input_proj(x), self.time_embed(t), self.cond_embed(c)
            if index is not None:
                index = self.index_cond_embed(index)
                c = c + index if self.how == "add" else torch.cat([c, index], dim=-1)
            y = t + c
            for block in self.res_blocks:
                x = block(x, y)
            return self.final_layer(x, y)

    def sample(self, z, temperature=1.0, cfg=1.0, index=None):
        args, options = self.call(z, cfg, index=index)
        return self.gen_diffusion.p_sample_loop(*args, **options, temperature=temperature)


@pytest.mark.parametrize("cfg", [slow(1.0), 2.5])
@pytest.mark.parametrize("how", ["add", "concatenate"])
def test_an_index_beside_the_condition(how, cfg, caplog):
    head = made(Indexed, how=how)
    index = torch.arange(6.0)[:, None]
    assert_accelerated(head, lambda h: h.sample(Z, 0.9, cfg, index)[:3], caplog)
    expected = run(head, lambda h: h.sample(Z, 1.0, cfg, index))[0]
    with torch.no_grad():
        head.net.index_cond_embed.weight.mul_(2)  # its own module makes it, at every call
    actual, _, evaluations = run(head, lambda h: h.sample(Z, 1.0, cfg, index))
    assert evaluations == 0
    assert relative_error(actual, expected) > 1e-2
    assert relative_error(actual[:3], run(cspd.unpatch(head), lambda h: h.sample(Z, 1.0, cfg, index))[0][:3]) < 1e-5


def test_an_index_of_zero_tells_nothing_of_what_is_done_with_it(caplog):
    class Squared(Indexed):
        class net_class(Indexed.net_class):  # noqa: N801
            def forward(self, x, t, c, index=None):
                return super().forward(x, t, c, index if index is None else index**2)

    reason = "its sampling loop and the kernels' differ by"
    assert_own_code(made(Squared), lambda h: h.sample(Z, index=torch.zeros(6, 1)), caplog, reason)


def test_without_its_index(caplog):
    assert_accelerated(made(Indexed), lambda h: h.sample(Z, 0.9), caplog)


class Pooled(Head):
    """Tokens (N, S, C) of conditions that attention makes of several vectors, as OpenMotionLab/MotionGPT3 has them."""

    tokens = 1

    class net_class(Net):  # noqa: N801
        def __init__(self, tokens=1):
            super().__init__(learned=False)
            self.cond_embed = Pooling(tokens)

        def forward(self, x, t, c):
            self.evaluations = self.evaluations + 1
            x, y = self.input_proj(x), self.time_embed(t).unsqueeze(1) + self.cond_embed(c)
            for block in self.res_blocks:
                x = block(x, y)
            return self.final_layer(x, y)

        def forward_with_cfg(self, x, t, c, cfg_scale):
            half = x[: len(x) // 2]
            conditional, plain = self.forward(torch.cat([half, half]), t, c).chunk(2)
            mixed = plain + cfg_scale * (conditional - plain)
            return torch.cat([mixed, mixed])

    def sample(self, z, temperature=1.0, cfg=1.0):
        rows = len(z) if cfg == 1.0 else len(z) // 2
        noise, kwargs, network = torch.randn(rows, self.tokens, CHANNELS), {"c": z}, self.net.forward
        if cfg != 1.0:
            noise, kwargs, network = torch.cat([noise, noise]), {"c": z, "cfg_scale": cfg}, self.net.forward_with_cfg
        return self.gen_diffusion.p_sample_loop(
            network, noise.shape, noise, clip_denoised=False, model_kwargs=kwargs, temperature=temperature
        )


class Pooling(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(tokens, COND))
        self.layer = nn.TransformerEncoderLayer(COND, 2, 4 * COND, 0.0, activation="gelu", batch_first=True)
        self.cond_proj = nn.Linear(COND, WIDTH)

    def forward(self, z):
        queries = self.queries.expand(len(z), *self.queries.shape)
        return self.cond_proj(self.layer(torch.cat([queries, z], dim=1))[:, : self.queries.shape[0]])


@pytest.mark.parametrize(("tokens", "cfg"), [(1, 2.5), (3, 1.0)])
def test_conditions_that_attention_makes(cfg, tokens, caplog):
    head = made(type("Several", (Pooled,), {"tokens": tokens}), Spaced(var=Var.FIXED_SMALL), tokens=tokens)
    z = torch.randn(6, 4, COND, generator=torch.Generator().manual_seed(1))
    assert_accelerated(head, lambda h: h.sample(z, 0.9, cfg)[:3], caplog)
    assert run(head, lambda h: h.sample(z, 0.9, cfg))[0].shape == (6, tokens, CHANNELS)


def test_nothing_of_a_meaning_is_taken_for_another_kind_of_call(caplog):
    """Each is compared by itself, at its first call."""
    head = cspd.patch(made(Chosen, Limited()))
    with caplog.at_level(logging.WARNING, "cspd"):
        head.sample(Z, clip=True)
        head.sample(Z, cfg=2.0, loop="ddim_sample_loop", eta=0.5)
    assert own_messages(caplog) == []
    clips = [m.clip for m in patch_of(head.net).verdicts.values()]
    assert (tuple(LOWS.tolist()), tuple(HIGHS.tolist())) in clips
    assert head.net.evaluations == 0


def test_a_temperature_on_a_device_stays_there():
    value = torch.ones(1, dtype=torch.int64, device="meta")
    assert _temperature(value).dtype == torch.float32  # a value that is read would raise
    assert _temperature(torch.tensor([0.5])) == 0.5


@pytest.mark.parametrize("name", ["temperature", "cfg"])
def test_a_float64_tensor_that_makes_all_of_the_loop_float64(name, caplog):
    options = {"temperature": 0.8, "cfg": 2.0}
    value = torch.tensor([options[name]], dtype=torch.float64)
    reason = "is a float64 tensor of shape (1,): it makes all of x float64"
    assert_own_code(made(), lambda h: h.sample(Z, **{**options, name: value}), caplog, reason)
    # A scalar tensor does not.
    assert_accelerated(made(), lambda h: h.sample(Z, **{**options, name: value.squeeze()})[:3], caplog)


def test_conditions_that_are_whole_numbers_are_its_own_matter():
    class Converting(Net):
        def forward(self, x, t, c):
            return super().forward(x, t, c.to(x.dtype))

    head = made(type("Converted", (Head,), {"net_class": Converting}))
    expected, rng, _ = run(head, lambda h: h.sample(Z.round().long()))
    cspd.patch(head)
    actual, rng_after, _ = run(head, lambda h: h.sample(Z.round().long()))
    assert torch.equal(actual, expected)
    assert torch.equal(rng_after, rng)
