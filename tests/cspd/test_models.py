"""The own MAR: names and shapes of the released weights, the training loss, the eager loop."""

from __future__ import annotations

import hashlib
import inspect
import math
from itertools import pairwise

import pytest
import torch
from foreign import Spaced
from small_models import sample, small_mar

from cspd.models import GaussianDiffusion, mar, mar_base, mar_huge, mar_large
from cspd.order import guidance_scale, mask_lengths
from cspd_kernels import Schedule
from cspd_kernels.testing import relative_error

# SHA-256 of the sorted (name, shape) list of LTH14/mar's state dicts with the published heads.
RELEASED = {
    mar_base: ("60352f117199adf3", 207_924_768),
    mar_large: ("4f0bd68a9d561524", 478_326_304),
    mar_huge: ("b6de9729d1a3d5ba", 942_403_104),
}


@pytest.mark.parametrize("build", RELEASED, ids=lambda build: build.__name__)
def test_state_dict_has_the_released_names_and_shapes(build):
    with torch.device("meta"):
        state = build().state_dict()
    names = repr(sorted((name, tuple(value.shape)) for name, value in state.items()))
    digest, count = RELEASED[build]
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == digest
    assert sum(value.numel() for value in state.values()) == count


def test_patchify_round_trip_and_layout():
    model = small_mar()
    images = torch.arange(128.0).view(2, 1, 8, 8)
    tokens = model.patchify(images)
    assert tokens.shape == (2, 16, 4)
    assert tokens[0, 1].tolist() == [2.0, 3.0, 10.0, 11.0]  # second patch of the first row
    assert torch.equal(model.unpatchify(tokens), images)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_loss_reaches_every_parameter(checkpointing):
    model = small_mar(grad_checkpointing=checkpointing, label_drop_prob=0.5).train()
    torch.manual_seed(0)
    model(torch.randn(6, 1, 8, 8), torch.arange(6)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_an_exact_estimate_has_no_loss_and_a_wrong_one_has(prediction):
    diffusion = GaussianDiffusion(Schedule.linear(50, prediction=prediction))
    x0 = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    t = torch.arange(200) % 49 + 1  # not the last reverse step, whose term is a density and not a divergence
    acp = torch.tensor(diffusion.schedule.alphas_cumprod, dtype=torch.float32)[t, None]

    def exact(x_t, _):  # the posterior's own variance is v = -1
        eps = (x_t - acp.sqrt() * x0) / (1 - acp).sqrt()
        estimate = {"epsilon": eps, "x0": x0, "v": acp.sqrt() * eps - (1 - acp).sqrt() * x0}[prediction]
        return torch.cat([estimate, -torch.ones_like(x0)], 1)

    torch.manual_seed(0)
    assert diffusion.training_losses(exact, x0, t).abs().max() < 1e-3
    wider = diffusion.training_losses(lambda x, _: exact(x, _) + torch.tensor([0, 0, 0, 0, 1, 1, 1, 1.0]), x0, t)
    assert (wider[t < 40] > 0).all()  # later the posterior's variance and beta are the same number
    wrong = diffusion.training_losses(lambda x, _: exact(x, _) * torch.tensor([0, 0, 0, 0, 1, 1, 1, 1.0]), x0, t)
    assert wrong.mean() > 1.0


def net(x, t, c=0.0):
    """A network by hand: (eps, v), each of which depends on x, t and a condition."""
    return torch.cat([(0.3 * x + 0.01 * t[:, None] + c).sin(), 0.4 * x.tanh()], dim=1)


LOOPS = {
    "plain": {"clip_denoised": False},
    "as by default": {},
    "x0 through a function": {"denoised_fn": lambda x0: 0.5 * x0, "clip_denoised": False},
    "x0 through a function, then clipped": {"denoised_fn": lambda x0: 3 * x0},
    "conditioned": {"model_kwargs": {"c": 0.3}, "clip_denoised": False},
    "colder": {"temperature": 0.5, "clip_denoised": False},
    "drawn": {"noise": None, "device": "cpu"},
}


@pytest.mark.parametrize("how", LOOPS)
def test_the_loop_is_the_released_one(how):
    foreign = Spaced()  # written down separately
    own = GaussianDiffusion(Schedule.from_diffusion(foreign))
    options = {"noise": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), **LOOPS[how]}
    results = []
    for diffusion in (own, foreign):
        torch.manual_seed(2)
        results.append(diffusion.p_sample_loop(net, (5, 4), **options))
        results.append(torch.get_rng_state())
    assert relative_error(results[0], results[2]) < 1e-5
    assert torch.equal(results[1], results[3])


SCHEDULES = {
    "DDIM": Schedule.linear(6).ddim(),
    "DDIM with noise": Schedule.linear(6).ddim(0.7).clipped(-0.5, [0.1, 0.2, 0.3, 0.4]),
    "Euler": Schedule.euler([0.0, 0.2, 0.5, 1.0]),
    "Euler-Maruyama": Schedule.euler_maruyama([0.0, 0.2, 0.5, 1.0]).clipped(-0.5, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loop_follows_any_schedule(name):
    schedule, x = SCHEDULES[name], torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    got = GaussianDiffusion(schedule).p_sample_loop(net, x.shape, x, clip_denoised=False, temperature=0.9)
    torch.manual_seed(2)
    x = x.double()
    for i in reversed(range(schedule.num_steps)):
        out = net(x, torch.full((5,), schedule.timesteps[i]))[:, :4]
        x0 = schedule.x0_x[i] * x + schedule.x0_out[i] * out
        if schedule.clip is not None:
            x0 = x0.clamp(*torch.tensor(schedule.clip))
        x = schedule.mean_x0[i] * x0 + schedule.mean_x[i] * x
        drawn = torch.randn(5, 4)
        if i and not schedule.deterministic:
            x = x + 0.9 * math.exp(schedule.log_std_lower[i]) * drawn
    assert relative_error(got, x) < 1e-5


def test_the_loop_has_the_released_signature_and_moves_the_mean(capsys):
    own = GaussianDiffusion(Schedule.linear(6))
    names = [
        "model", "shape", "noise", "clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "device", "progress",
        "temperature",
    ]  # fmt: skip
    parameters = inspect.signature(own.p_sample_loop).parameters
    assert list(parameters) == names
    defaults = [None, True, None, None, None, None, False, 1.0]
    assert [parameter.default for parameter in parameters.values()][2:] == defaults
    start, seen, results = torch.randn(5, 4), [], []

    def gradient(x, t, c):
        seen.append((x.shape, t.shape, c))
        return 100.0 * torch.ones_like(x)

    for function in (None, gradient):
        torch.manual_seed(0)
        results.append(own.p_sample_loop(net, (5, 4), start, cond_fn=function, model_kwargs={"c": 0.1}, progress=True))
    assert seen == [((5, 4), (5,), 0.1)] * 6
    assert "6/6" in capsys.readouterr().err
    assert (results[1] > results[0]).all()


def test_masking_keeps_to_its_ratio():
    model = small_mar()
    torch.manual_seed(0)
    x = torch.zeros(4, 16, 4)
    counts = [int(model.random_masking(x, model.sample_orders(4))[0].sum()) for _ in range(300)]
    assert min(counts) >= 12  # ceil(0.7 * 16)
    assert max(counts) == 16


def test_sampling_follows_its_seeds_and_its_labels():
    model = small_mar(schedule="linear")
    first = sample(model)
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, sample(model))
    assert not torch.equal(first, sample(model, labels=torch.tensor([1, 4, 8])))


def test_labels_are_dropped_in_training_mode_only():
    model = small_mar(schedule="linear", label_drop_prob=1.0, attn_dropout=0.0, proj_dropout=0.0)
    torch.manual_seed(1)
    tokens, mask = torch.randn(2, 16, 4), torch.ones(2, 16)
    mask[:, 5:9] = 0
    embedding, none = model.class_emb(torch.tensor([1, 2])), model.fake_latent.repeat(2, 1)
    for training in (True, False):
        model.train(training)
        assert torch.equal(sample(model), sample(model, labels=None)) == training
        with torch.no_grad():
            encoded = [model.forward_mae_encoder(tokens, mask, v) for v in (embedding, none)]
        assert torch.equal(*encoded) == training


def test_encoder_ignores_the_content_of_masked_tokens():
    model = small_mar()
    tokens, mask = torch.randn(2, 16, 4), torch.zeros(2, 16)
    mask[:, 5:] = 1
    other = tokens + mask[..., None] * 7.0
    embedding = model.class_emb(torch.tensor([1, 2]))
    with torch.no_grad():
        a, b = (model.forward_mae_decoder(model.forward_mae_encoder(x, mask, embedding), mask) for x in (tokens, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_every_token_is_drawn_from_the_condition_of_its_own_place(monkeypatch, cfg):
    model = small_mar()
    halves = 1 if cfg == 1.0 else 2

    def conditions(model, tokens, known, embedding, where):
        z = torch.zeros(*where.shape, 32)
        z[..., 0], z[..., 1] = where, torch.arange(len(where))[:, None]
        z[..., 2] = 16 - known.shape[1]
        return z

    def draw(z, temperature, scale):
        conditional, rest = z[: len(z) // halves], z[len(z) // halves :]
        assert (conditional[:, 1] < 3).all()
        if halves == 2:  # the same places of the unconditional half
            assert torch.equal(rest[:, 0], conditional[:, 0])
            assert torch.equal(rest[:, 1], conditional[:, 1] + 3)
        assert scale == pytest.approx(guidance_scale(cfg, "linear", max(after[int(z[0, 2])], 1), 16))
        return z[:, :4]

    lengths = mask_lengths(16, 6)
    after = dict(pairwise(lengths))
    monkeypatch.setattr(mar, "conditions", conditions)
    monkeypatch.setattr(model.diffloss, "sample", draw)
    tokens = model.patchify(sample(model, cfg=cfg))
    assert torch.equal(tokens[..., 0], torch.arange(16.0).expand(3, -1))
    assert torch.equal(tokens[..., 1], torch.arange(3.0)[:, None].expand(-1, 16))
    for image in tokens[..., 2]:
        assert sorted(image.tolist(), reverse=True) == [float(b) for b, a in pairwise(lengths) for _ in range(b - a)]
