"""``cspd.patch`` on loops of other code: what they draw, keep and are given, and loops that do not run here."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from foreign import CHANNELS, STEPS, Head, Spaced, conditions, made, own_messages, run
from patch_checks import assert_accelerated, assert_own_code, assert_own_loop
from slow import slow
from small_models import CSpDDiffLoss

import cspd
from cspd.models.diffloss import SimpleMLPAdaLN
from cspd_kernels.testing import randomize_, relative_error

Z = conditions()


def spaced(**methods):
    """A diffusion object whose class has these methods of its own."""
    return type("Own", (Spaced,), methods)()


def test_a_closure_given_to_the_loop(caplog):
    class Wrapped(Head):
        def sample(self, z, temperature=1.0, wrap=False):
            (network, *rest), options = self.call(z)
            network = (lambda x, t, c: 1.5 * self.net(x, t, c)) if wrap else network
            return self.gen_diffusion.p_sample_loop(network, *rest, **options, temperature=temperature)

    head = made(Wrapped)
    assert_accelerated(head, lambda h: h.sample(Z), caplog)
    reason = "<lambda>, not the network's forward or forward_with_cfg"
    assert_own_code(head, lambda h: h.sample(Z, wrap=True), caplog, reason)

    class AlwaysWrapped(Wrapped):
        def sample(self, z, temperature=1.0):
            return super().sample(z, temperature, wrap=True)

    assert_own_loop(made(AlwaysWrapped), lambda h: h.sample(Z), caplog, f".*{reason}")


def test_the_network_itself_is_given_to_the_loop(caplog):
    class Called(Head):
        def sample(self, z, temperature=1.0):
            (_, *rest), options = self.call(z)
            return self.gen_diffusion.p_sample_loop(self.net, *rest, **options, temperature=temperature)

    assert_accelerated(made(Called), lambda h: h.sample(Z), caplog)


@pytest.mark.parametrize("given", ["in sample", "in the loop"])
def test_the_first_noise_is_drawn_on_the_device(given, caplog):
    class OnDevice(Head):
        def sample(self, z, temperature=1.0):
            noise = torch.randn(len(z), CHANNELS, device=z.device) if given == "in sample" else None
            return self.gen_diffusion.p_sample_loop(
                self.net.forward, (len(z), CHANNELS), noise, clip_denoised=False, model_kwargs={"c": z},
                device=z.device, temperature=temperature,
            )  # fmt: skip

    assert_accelerated(made(OnDevice), lambda h: h.sample(Z, 0.9), caplog)


def all_at_once(self, model, shape, noise, clip_denoised=True, model_kwargs=None, temperature=1.0):
    x, drawn = noise, torch.randn(self.num_timesteps, *shape)
    for i in reversed(range(self.num_timesteps)):
        _, mean, log_variance = self.estimate(model, x, i, False, None, model_kwargs)
        x = (mean + (i > 0) * torch.exp(0.5 * log_variance) * drawn[i] * temperature).detach()
    return x


def test_a_loop_that_draws_in_another_order(caplog):
    head = made(Head, spaced(p_sample_loop=all_at_once))
    assert_own_loop(head, lambda h: h.sample(Z), caplog, "its sample at .* differ by")


def draws_once_more(self, *args, **options):
    torch.rand(1)
    return Spaced.p_sample(self, *args, **options)


def no_last_draw(self, model, x, i, *rest):
    if i > 0:
        return Spaced.p_sample(self, model, x, i, *rest)
    clip, function, kwargs, _ = rest
    return self.estimate(model, x, i, clip, function, kwargs)[1]


def draws_after(self, *args, **options):
    out = Spaced.p_sample_loop(self, *args, **options)
    torch.rand(3)
    return out


def signature_of_the_loop(
    self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, device=None,
    progress=False, temperature=1.0,
):  # fmt: skip
    return draws_after(self, model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress,
                       temperature)  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ({"p_sample": draws_once_more}, "differ by|another state"),
        ({"p_sample": no_last_draw}, "leaves the random number generators in a different state"),
        ({"p_sample_loop": signature_of_the_loop}, "leaves the random number generators in a different state"),
    ],
    ids=["more at every step", "none at the last", "more afterwards"],
)
def test_loops_that_draw_more_or_less(methods, match, caplog):
    assert_own_loop(made(Head, spaced(**methods)), lambda h: h.sample(Z), caplog, f".*({match})")


def keeps(self, model, x, *rest):
    self.last = Spaced.p_sample(self, model, x, *rest)
    return self.last


def keeps_in_a_part(self, model, x, *rest):
    self.notes.last = Spaced.p_sample(self, model, x, *rest)
    return self.notes.last


class Notes:
    last = None


@pytest.mark.parametrize(("method", "name"), [(keeps, "last"), (keeps_in_a_part, "notes.last")])
def test_a_loop_that_keeps_something_on_its_diffusion_object(method, name, caplog):
    diffusion = spaced(p_sample=method)
    diffusion.notes = Notes()
    match = f"its sample .* also sets {name} of its diffusion object, which the kernels do not"
    assert_own_loop(made(Head, diffusion), lambda h: h.sample(Z), caplog, match)


def cspd_head() -> CSpDDiffLoss:
    torch.manual_seed(0)
    head = randomize_(CSpDDiffLoss(4, 32, 2, 32, "12", schedule="linear"), 1)
    head.net.__class__ = Counting
    return head


class Counting(SimpleMLPAdaLN):
    """A network that counts its evaluations."""

    evaluations = 0

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        return super().forward(x, t, c)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("given", ["all noise", slow("first noise"), slow("no noise")])
def test_methods_of_cspd_and_their_manager(cfg, given):
    head, rows = cspd_head(), 5 if cfg == 1.0 else 10
    z, noise, inter = torch.randn(rows, 32), torch.randn(5, 4), torch.randn(12, 5, 4)
    if cfg != 1.0:
        noise, inter = torch.cat([noise, noise]), torch.cat([inter, inter], dim=1)
    results, states = [], []
    for _ in range(2):
        torch.manual_seed(3)
        manager = head.gen_diffusion.manager
        manager.mean = manager.variance = manager.log_var = manager.sample = None
        if given == "all noise":
            tokens = head.sample_with_inter_noise(z, noise, inter, 0.8, cfg)
        elif given == "first noise":
            tokens = head.sample_with_noise(z, noise, 0.8, cfg)
        else:
            tokens = head.sample(z, 0.8, cfg)
        states.append(torch.get_rng_state())
        fields = [tokens, manager.sample, manager.mean, manager.variance]
        if given == "all noise":
            fields.append(manager.log_var.sum(1, keepdim=True))
        else:
            assert manager.log_var is None
        assert all(field.shape[0] == rows for field in fields)
        results.append([field[:5] for field in fields])
        cspd.patch(head)
    assert torch.equal(*states)
    assert head.net.evaluations == 12  # of the first time
    for expected, actual in zip(*results):
        assert relative_error(actual, expected) < 1e-5


class CudaInSample(Head):
    def sample(self, z, temperature=1.0, cfg=1.0):
        z = z.cuda()
        return super().sample(z, temperature, cfg)


def cuda_in_loop(
    self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, temperature=1.0
):  # fmt: skip
    return Spaced.p_sample_loop(
        self, model, shape, noise.cuda(), clip_denoised, model_kwargs=model_kwargs, temperature=temperature
    )


@pytest.fixture
def without_cuda():
    if torch.cuda.is_available():
        pytest.skip("for machines without a CUDA device")


def own_then_patched(head, cfg, monkeypatch):
    """(tokens, generator) of its own code where ``.cuda()`` works; patched again where it does not, which then ends."""
    cspd.unpatch(head)
    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "cuda", lambda self: self)
        expected, rng, _ = run(head, lambda h: h.sample(Z, 0.9, cfg))
    cspd.patch(head)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    return expected, rng


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_a_sample_that_does_not_run_here_has_its_loop_compared(without_cuda, cfg, caplog, monkeypatch):
    head = made(CudaInSample)
    with caplog.at_level(logging.INFO, "cspd"):
        cspd.patch(head)
    assert "its sample did not run on a copy" in caplog.text
    assert "its loop was compared" in caplog.text
    expected, rng = own_then_patched(head, cfg, monkeypatch)
    actual, rng_after, evaluations = run(head, lambda h: h.sample(Z, 0.9, cfg))
    assert (evaluations, own_messages(caplog)) == (0, [])
    assert torch.equal(rng, rng_after)
    assert relative_error(actual[:3], expected[:3]) < 1e-5
    odd = made(CudaInSample, spaced(mean=lambda self, x0, x, i: 1.01 * Spaced.mean(self, x0, x, i)))
    monkeypatch.undo()
    cspd.patch(odd)
    assert re.search("unaccelerated: its sampling loop and .* differ by", caplog.text)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_a_loop_that_does_not_run_here_is_compared_at_its_first_call(without_cuda, right, cfg, caplog, monkeypatch):
    methods = {} if right else {"mean": lambda self, x0, x, i: 1.01 * Spaced.mean(self, x0, x, i)}
    head = made(Head, spaced(p_sample_loop=cuda_in_loop, **methods))
    with caplog.at_level(logging.INFO, "cspd"):
        cspd.patch(head)
        assert "its own code does not run here, so it is compared at its first call" in caplog.text
        assert cspd.is_patched(head)
        expected, rng = own_then_patched(head, cfg, monkeypatch)
        for _ in range(2):
            actual, rng_after, evaluations = run(head, lambda h: h.sample(Z, 0.9, cfg))
            assert torch.equal(rng, rng_after)
            assert relative_error(actual[:3], expected[:3]) < 1e-5
            assert evaluations == (0 if right else STEPS)
    assert len(own_messages(caplog)) == (0 if right else 1)


def test_a_loop_that_never_runs_raises_its_own_error(without_cuda, caplog):
    head = cspd.patch(made(Head, spaced(p_sample_loop=cuda_in_loop)))
    with caplog.at_level(logging.WARNING, "cspd"), pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        head.sample(Z)
    assert "its own loop does not run on a copy, so it cannot be compared" in own_messages(caplog)[0]


@pytest.mark.parametrize("steps", [10, 13])
def test_noise_of_another_number_of_steps_is_the_loops_own_matter(steps, caplog):
    head, z, noise, inter = cspd_head(), torch.randn(5, 32), torch.randn(5, 4), torch.randn(steps, 5, 4)
    cspd.patch(head)
    with caplog.at_level(logging.WARNING, "cspd"):
        if steps < 12:
            with pytest.raises(IndexError):
                head.sample_with_inter_noise(z, noise, inter)
        else:
            tokens = head.sample_with_inter_noise(z, noise, inter)
            assert torch.equal(tokens, cspd.unpatch(head).sample_with_inter_noise(z, noise, inter))
    assert f"the noise is of {steps} steps, the head has 12" in own_messages(caplog)[0]
