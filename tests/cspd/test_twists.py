"""``cspd.patch`` on heads of other code, one twist each: accelerated, or its own code, or refused."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn
from foreign import COND, STEPS, WIDTH, Head, Mean, Net, Spaced, Var, conditions, made, own_messages, run
from patch_checks import assert_accelerated, assert_own_code, assert_own_loop
from slow import slow

import cspd
from cspd_kernels.testing import relative_error

Z = conditions()


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_without_a_twist(cfg, caplog):
    assert_accelerated(made(), lambda head: head.sample(Z, 0.9, cfg)[:3], caplog)


class Clipped(Head):
    def sample(self, z, temperature=1.0, cfg=1.0, clip=True):
        args, options = self.call(z, cfg)
        return self.gen_diffusion.p_sample_loop(*args, **{**options, "clip_denoised": clip}, temperature=temperature)


@pytest.mark.parametrize("cfg", [slow(1.0), 2.5])
def test_x0_is_always_clipped(cfg, caplog):
    assert_accelerated(made(Clipped), lambda h: h.sample(Z, 1.0, cfg)[:3], caplog)


class ClippedOnRequest(Clipped):
    def sample(self, z, temperature=1.0, cfg=1.0, clip=False):
        return super().sample(z, temperature, cfg, clip)


def test_x0_is_clipped_on_request(caplog):
    head = made(ClippedOnRequest)
    clipped, plain = (run(head, lambda h, clip=clip: h.sample(Z, clip=clip))[0] for clip in (True, False))
    assert relative_error(clipped, plain) > 1e-2
    assert_accelerated(head, lambda h: h.sample(Z), caplog)
    assert_accelerated(head, lambda h: h.sample(Z, clip=True), caplog)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("denoised_fn", "x0 goes through a denoised_fn"), ("cond_fn", "the mean is moved by a cond_fn")],
)
def test_functions_given_to_the_loop(name, reason, caplog):
    class Moved(Head):
        def sample(self, z, temperature=1.0, function=None):
            args, options = self.call(z)
            return self.gen_diffusion.p_sample_loop(*args, **options, **{name: function}, temperature=temperature)

    head = made(Moved)
    assert_accelerated(head, lambda h: h.sample(Z), caplog)
    assert_own_code(head, lambda h: h.sample(Z, function=torch.tanh), caplog, f"{reason} ({name})")


@pytest.mark.parametrize("cfg", [slow(1.0), 2.5])
def test_the_result_is_scaled(cfg, caplog):
    class Scaled(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            return 0.6 * super().sample(z, temperature, cfg)

    head = made(Scaled)
    assert_accelerated(head, lambda h: h.sample(Z, cfg=cfg)[:3], caplog)
    assert relative_error(run(head, lambda h: h.sample(Z))[0], run(made(), lambda h: h.sample(Z))[0]) > 0.1


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_guidance_is_of_another_form_in_sample(cfg, caplog):
    class Shifted(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            return super().sample(z, temperature, cfg if cfg == 1.0 else 1 + cfg)

    assert_accelerated(made(Shifted), lambda h: h.sample(Z, cfg=cfg)[:3], caplog)


@pytest.mark.parametrize("cfg", [1.0, slow(2.5), slow(0.0)])
def test_always_guided(cfg, caplog):
    class AlwaysGuided(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            noise = torch.randn(len(z) // 2, self.in_channels).repeat(2, 1)
            kwargs = {"c": z, "cfg_scale": cfg}
            return self.gen_diffusion.p_sample_loop(
                self.net.forward_with_cfg, noise.shape, noise, clip_denoised=False, model_kwargs=kwargs,
                temperature=temperature,
            )[: len(z) // 2]  # fmt: skip

    assert_accelerated(made(AlwaysGuided), lambda h: h.sample(Z, 0.9, cfg), caplog)


class ByDDIM(Head):
    def __init__(self, ddim=False):
        super().__init__()
        self.ddim = ddim

    def sample(self, z, temperature=1.0, cfg=1.0):
        if not self.ddim:
            return super().sample(z, temperature, cfg)
        args, options = self.call(z, cfg)
        return self.gen_diffusion.ddim_sample_loop(*args, **options)


def test_another_loop_by_an_option_of_the_constructor(caplog):
    assert_accelerated(made(ByDDIM), lambda h: h.sample(Z), caplog)
    assert_accelerated(made(ByDDIM, ddim=True), lambda h: h.sample(Z), caplog)


def test_another_loop_is_chosen_after_patching(caplog):
    head = made(ByDDIM)
    head.ddim = True
    expected = run(head, lambda h: h.sample(Z))
    head.ddim = False
    cspd.patch(head)
    head.ddim = True
    with caplog.at_level(logging.WARNING, "cspd"):
        for _ in range(2):
            actual = run(head, lambda h: h.sample(Z))
            assert relative_error(actual[0], expected[0]) < 1e-5
            assert torch.equal(actual[1], expected[1])
            assert actual[2] == 0
    assert not own_messages(caplog)


def test_a_solver_of_its_own_by_an_option_of_the_call(caplog):
    class Solver(Head):
        def sample(self, z, temperature=1.0, cfg=1.0, solver="ancestral"):
            if solver == "ancestral":
                return super().sample(z, temperature, cfg)
            x = torch.randn(len(z), self.in_channels)
            with torch.no_grad():
                for i in reversed(range(STEPS)):
                    x = x - 0.05 * self.net(x, torch.full((len(z),), 3 * i), z)[:, : self.in_channels]
            return x

    head = made(Solver)
    assert_accelerated(head, lambda h: h.sample(Z), caplog)
    reason = "its sample does not call p_sample_loop: it has a sampler of its own"
    assert_own_code(head, lambda h: h.sample(Z, solver="second order"), caplog, reason)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 1)])
def test_conditions_of_more_dimensions(shape, caplog):
    class Flattening(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            return super().sample(z.reshape(-1, COND), temperature, cfg).reshape(*z.shape[:-1], self.in_channels)

    assert_accelerated(made(Flattening), lambda h: h.sample(Z.reshape(*shape, COND)), caplog)


@pytest.mark.parametrize("rank", [3, 4])
def test_conditions_of_one_rank_only(rank, caplog):
    class Strict(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            assert z.dim() == rank
            return super().sample(z.reshape(-1, COND), temperature, cfg)

    shape = (2, 3, COND) if rank == 3 else (2, 1, 3, COND)
    assert_accelerated(made(Strict), lambda h: h.sample(Z.reshape(shape)), caplog)


class MoreArguments(Head):
    """Arguments that are passed on, or ignored."""

    class net_class(Net):  # noqa: N801
        def forward(self, x, t, c, text_latents=None):
            out = super().forward(x, t, c)
            return out if text_latents is None else out + text_latents

        def forward_with_cfg(self, x, t, c, cfg_scale, text_latents=None):
            return super().forward_with_cfg(x, t, c, cfg_scale)

    def sample(self, z, temperature=1.0, cfg=1.0, step=None, text_latents=None, device=None):
        args, options = self.call(z, cfg, text_latents=text_latents)
        return self.gen_diffusion.p_sample_loop(*args, **options, device=device, temperature=temperature)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize(
    "more", [{}, {"device": "cpu"}, {"step": 3}, {"text_latents": None, "device": torch.device("cpu")}]
)
def test_further_arguments(more, cfg, caplog):
    assert_accelerated(made(MoreArguments), lambda h: h.sample(Z, 0.9, cfg, **more)[:3], caplog)


def test_a_further_argument_of_the_network(caplog):
    head = made(MoreArguments)
    assert_own_code(
        head, lambda h: h.sample(Z, text_latents=torch.ones(8)), caplog, "the network is also given text_latents"
    )


class Strong(Spaced):
    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, temperature=1.0, strength=1.0
    ):
        return strength * super().p_sample_loop(
            model, shape, noise, clip_denoised, model_kwargs=model_kwargs, temperature=temperature
        )


class AnyArguments(Spaced):
    def p_sample_loop(self, model, shape, *args, **kwargs):
        return super().p_sample_loop(model, shape, *args, **kwargs)


class Chosen(Head):
    def sample(self, z, **more):
        args, options = self.call(z)
        return self.gen_diffusion.p_sample_loop(*args, **options, **more)


def test_a_further_argument_of_the_loop(caplog):
    head = made(Chosen, Strong())
    assert_accelerated(head, lambda h: h.sample(Z), caplog)
    reason = "the loop is called with strength, which the kernels do not know"
    assert_own_code(head, lambda h: h.sample(Z, strength=0.5), caplog, reason)


def test_a_loop_of_any_arguments(caplog):
    reason = "the loop is called with args, which the kernels do not know"
    assert_own_loop(made(Chosen, AnyArguments()), lambda h: h.sample(Z), caplog, reason)


class Indexed(Head):
    """An embedding of an index beside those of t and c."""

    class net_class(Net):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.index_embed = nn.Embedding(4, WIDTH)

        def forward(self, x, t, c, index=None):
            self.evaluations = self.evaluations + 1
            x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
            if index is not None:
                y = y + self.index_embed(index)
            for block in self.res_blocks:
                x = block(x, y)
            return self.final_layer(x, y)

    def sample(self, z, temperature=1.0, index=None):
        args, options = self.call(z, index=index)
        return self.gen_diffusion.p_sample_loop(*args, **options, temperature=temperature)


def test_an_index_in_the_network(caplog):
    head, index = made(Indexed), torch.tensor([0, 1, 2, 3, 0, 1])
    assert_accelerated(head, lambda h: h.sample(Z), caplog)
    assert_accelerated(head, lambda h: h.sample(Z, index=index), caplog)
    zeros = torch.zeros(6, dtype=torch.int64)
    reason = "index is 0 in all rows, so the comparison cannot show what the network does with it"
    assert_own_code(head, lambda h: h.sample(Z, index=zeros), caplog, reason)
    cspd.patch(head)
    for given, evaluations in ((zeros, STEPS), (index, 0), (zeros, 0)):
        assert run(head, lambda h, index=given: h.sample(Z, index=index))[2] == evaluations


@pytest.mark.parametrize("cfg", [slow(1.0), 2.5])
def test_a_network_that_predicts_x0(cfg, caplog):
    assert_accelerated(made(Head, Spaced(mean=Mean.START_X)), lambda h: h.sample(Z, 0.9, cfg)[:3], caplog)


def test_a_network_that_predicts_x_before(caplog):
    head = made(Head, Spaced(mean=Mean.PREVIOUS_X))
    assert_own_loop(head, lambda h: h.sample(Z), caplog, ".*PREVIOUS_X")


@pytest.mark.parametrize("var", [Var.FIXED_SMALL, Var.FIXED_LARGE])
@pytest.mark.parametrize("cfg", [slow(1.0), 2.5])
def test_fixed_variance(var, cfg, caplog):
    head = made(Head, Spaced(var=var), learned=False)
    assert_accelerated(head, lambda h: h.sample(Z, 0.9, cfg)[:3], caplog)
