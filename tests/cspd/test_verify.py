"""The comparison on small copies: every kind of difference is found, and nothing of the caller's state is touched."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from foreign import CHANNELS, COND, STEPS, WIDTH, Head, Net, Spaced, conditions, made, run, state, unchanged
from slow import mostly_slow, slow
from small_models import small_mar

import cspd
from cspd import twin
from cspd.diffusions import LOOPS
from cspd.heads import find_heads
from cspd.loop import patch_of
from cspd.models import GaussianDiffusion
from cspd.verify import DiffersError, check_loop, check_sample, plain_call
from cspd_kernels.testing import relative_error

Z = conditions()


def scaled(self, *args):
    return 0.99 * Spaced.p_sample(self, *args)


def shifted(self, x0, x, i):
    return Spaced.mean(self, x0, x, i) + 0.01


def shifted_at_one_step(self, x0, x, i):
    return Spaced.mean(self, x0, x, i) + 0.05 * (i == 4)


def shifted_at_the_first_step(self, x0, x, i):
    return Spaced.mean(self, x0, x, i) + 0.5 * (i == STEPS - 1)


def other_draws(self, model, x, i, *rest):
    *rest, temperature = rest
    _, mean, log_variance = self.estimate(model, x, i, *rest)
    return mean + (i > 0) * torch.exp(0.5 * log_variance) * (2 * 3**0.5 * (torch.rand_like(x) - 0.5)) * temperature


def colder(self, *args):
    *args, temperature = args
    return Spaced.p_sample(self, *args, 0.95 * temperature)


def more_numpy(self, *args):
    np.random.rand()
    return Spaced.p_sample(self, *args) * np.random.uniform(0.9, 1.1)


def noted(self, *args):
    self.seen = getattr(self, "seen", 0) + 1
    return Spaced.p_sample(self, *args)


def loop(change):
    def p_sample_loop(self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, temperature=1.0):
        options = {"clip_denoised": clip_denoised, "model_kwargs": model_kwargs, "temperature": temperature}
        return change(Spaced.p_sample_loop(self, model, shape, noise, **options))

    return p_sample_loop


DIFFERENCES = {
    "scaled": ({"p_sample": scaled}, "differ by .* of the largest value"),
    "shifted": ({"mean": shifted}, "differ by .* of the largest value"),
    "shifted at one step": ({"mean": shifted_at_one_step}, "differ by .* of the largest value"),
    "shifted at the first step": ({"mean": shifted_at_the_first_step}, "differ by .* of the largest value"),
    "other draws": ({"p_sample": other_draws}, "differ by .* of the largest value"),
    "another temperature": ({"p_sample": colder}, "differ by .* of the largest value"),
    "another generator": ({"p_sample": more_numpy}, "differ by .* of the largest value"),
    "more draws at the end": (
        {"p_sample_loop": loop(lambda x: (x, torch.rand(1))[0])},
        "generators in a different state",
    ),
    "another type": (
        {"p_sample_loop": loop(lambda x: x.double())},
        r"returns torch.float64 .*it returns torch.float32",
    ),
    "another shape": ({"p_sample_loop": loop(lambda x: x[None])}, r"returns torch.float32 \(1, 4, 4\), with"),
    "no tensor": ({"p_sample_loop": loop(lambda x: x.tolist())}, "returns list, not tensors"),
    "two tensors": ({"p_sample_loop": loop(lambda x: (x, x))}, "returns tuple, not tensors"),
    "an attribute": ({"p_sample": noted}, "also sets seen of its diffusion object"),
}


@pytest.mark.parametrize("how", [*DIFFERENCES, "none"])
@pytest.mark.parametrize("method", [slow("forward"), "forward_with_cfg"])
def test_differences_of_every_kind_are_found_in_the_loop(how, method):
    methods, match = DIFFERENCES.get(how, ({}, None))
    head = made(Head, type("Own", (Spaced,), methods)())
    before = state(head)
    call = plain_call(head.net, LOOPS[0], method)
    if match is None:
        assert check_loop(call, head.gen_diffusion).draw == "cpu"
    else:
        with pytest.raises(DiffersError, match=match):
            check_loop(call, head.gen_diffusion)
    assert unchanged(before, state(head))


@pytest.mark.parametrize("how", mostly_slow(DIFFERENCES, fast=[*DIFFERENCES][:3]))
def test_differences_of_every_kind_are_found_in_sample(how):
    methods, match = DIFFERENCES[how]
    head = made(Head, type("Own", (Spaced,), methods)())
    before = state(head)
    with pytest.raises(DiffersError, match=match):
        check_sample(find_heads(head).heads[0])
    assert re.search(match, patch_of(cspd.patch(head).net).own_loop)
    cspd.unpatch(head)
    assert unchanged(before, state(head))


def test_a_difference_at_the_end_is_not_hidden_by_what_grows_before():
    class Late(GaussianDiffusion):
        def _mean(self, out, x0, x, i):
            mean, log_variance = super()._mean(out, x0, x, i)
            return mean + 0.05 * (i == 0), log_variance

    head = small_mar(num_sampling_steps="100").diffloss  # cosine: x grows by thousands
    cspd.patch(head)
    cspd.unpatch(head)
    head.gen_diffusion = Late(head.gen_diffusion.schedule)
    assert "differ by" in patch_of(cspd.patch(head).net).own_loop


@pytest.mark.slow
def test_weights_that_are_not_known_are_not_taken_for_what_they_are_now():
    class WithShift(Head):
        class net_class(Head.net_class):  # noqa: N801
            def __init__(self):
                super().__init__()
                self.shift = nn.Parameter(torch.zeros(WIDTH))

            def forward(self, x, t, c):
                return super().forward(x, t, c) + (self.shift @ torch.ones(WIDTH))

    head = made(WithShift)
    nn.init.zeros_(head.net.shift)
    with pytest.raises(ValueError, match="samples differently"):
        cspd.patch(head)


def test_an_outcome_tells_whether_there_is_one_loop_and_nothing_more():
    class Scaled(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            return super().sample(z, temperature, cfg) * (0.6 if cfg == 1.0 else 1.0)

    class Twice(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            super().sample(z, temperature, cfg)
            return super().sample(z, temperature, cfg)

    for kind, plain in (
        (Head, {1.0: True, 2.5: True}),
        (Scaled, {1.0: False, 2.5: True}),
        (Twice, {1.0: False, 2.5: False}),
    ):
        outcome = check_sample(find_heads(made(kind)).heads[0])
        assert (outcome.plain, len(outcome.kinds), outcome.own) == (plain, 2, [])


ODD = {"right": Head, "wrong": lambda: Head(type("Own", (Spaced,), {"p_sample": scaled})())}


def takes_over(head):
    """Whether ``patch`` takes the loop over."""
    return patch_of(cspd.patch(head).net).own_loop is None


@pytest.mark.parametrize("how", ODD)
def test_the_callers_random_numbers_and_default_type_stay(how):
    head = made(ODD[how])
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert takes_over(head) == (how == "right")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1]))
    assert random.getstate() == before[2]
    cspd.unpatch(head)
    torch.set_default_dtype(torch.float64)
    try:
        assert takes_over(head) == (how == "right")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_heads_with_parts_of_full_width_are_not_cut(monkeypatch):
    class WithPart(Head):
        class net_class(Head.net_class):  # noqa: N801
            def __init__(self):
                super(Head.net_class, self).__init__(CHANNELS, 48, 2 * CHANNELS, COND, 1)
                self.register_buffer("zeros", torch.zeros(48))

            def forward(self, x, t, c):
                return super().forward(x, t, c) + (self.zeros * self.input_proj.weight[:, 0]).sum()

    head = cspd.patch(made(WithPart))
    assert run(head, lambda h: h.sample(Z))[2] == 0


def test_a_head_that_is_patched_already_is_compared_with_its_own_code():
    class Later(Spaced):
        pass

    head = made(Head, Later())
    expected = run(head, lambda h: h.sample(Z))[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        cspd.patch(head, dtype=dtype)
    actual, _, evaluations = run(head, lambda h: h.sample(Z))
    assert evaluations == 0
    assert relative_error(actual, expected) < 1e-5
    Later.mean = shifted
    assert "differ by" in patch_of(cspd.patch(head).net).own_loop
    actual = run(head, lambda h: h.sample(Z))[0]
    assert relative_error(actual, run(cspd.unpatch(head), lambda h: h.sample(Z))[0]) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(training):
    class Dropping(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            return nn.functional.dropout(super().sample(z, temperature, cfg), 0.5, self.training)

    head = made(Dropping).train(training)
    head.net.res_blocks[1].train(not training)
    modes = [module.training for module in head.modules()]
    cspd.patch(head)
    assert [module.training for module in head.modules()] == modes
    assert run(head, lambda h: h.sample(Z))[2] == 0


@pytest.mark.parametrize("context", ["inference", "no_grad", "autocast", "grad"])
def test_contexts_of_the_caller(context):
    plain, head = made(), made()
    expected = run(plain, lambda h: h.sample(Z, 0.9, 2.0))[0]
    contexts = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "grad": torch.enable_grad(),
    }
    with contexts[context]:
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        cspd.patch(head)
        wrong = made(ODD["wrong"])
        assert not takes_over(wrong)
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert before == after
        inside, _, evaluations = run(head, lambda h: h.sample(Z, 0.9, 2.0))
        assert evaluations == 0
        assert relative_error(inside[:3], expected[:3]) < (5e-2 if context == "autocast" else 1e-5)
    outside, _, evaluations = run(head, lambda h: h.sample(Z, 0.9, 2.0))
    assert evaluations == 0
    assert relative_error(outside[:3], expected[:3]) < 1e-5
    assert not any(parameter.grad is not None for parameter in head.parameters())


def test_a_sample_that_raises_is_no_difference():
    class Raising(Head):
        def sample(self, z, temperature=1.0, cfg=1.0):
            raise RuntimeError("not today\nnor tomorrow")

    with pytest.raises(twin.CannotRunError, match=r"^RuntimeError: not today$"):
        check_sample(find_heads(made(Raising)).heads[0])
    head = cspd.patch(made(Raising))  # its loop was compared
    args, options = head.call(Z)
    run(head, lambda h: h.gen_diffusion.p_sample_loop(*args, **options))
    assert head.net.evaluations == 0
    assert head.gen_diffusion.num_timesteps == STEPS


class Bounded(Net):
    """Right at most scales of guidance."""

    least = 1.2

    def forward_with_cfg(self, x, t, c, cfg_scale):
        return super().forward_with_cfg(x, t, c, max(cfg_scale, self.least))


@pytest.mark.parametrize("least", [1.2, 0.8])
def test_a_method_is_compared_at_more_than_one_scale(least):
    head = made(type("Odd", (Head,), {"net_class": type("Net", (Bounded,), {"least": least})}))
    call = plain_call(head.net, "p_sample_loop", "forward_with_cfg")
    with pytest.raises(DiffersError, match="differ by"):
        check_loop(call, head.gen_diffusion)
    if least > 1.0:
        cspd.patch(head)
        assert patch_of(head.net).own_loop is not None
