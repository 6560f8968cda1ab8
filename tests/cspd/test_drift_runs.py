"""Runs whose draft, or only model, has a head of one step: its first noise, its token, and the law of what is kept."""

from __future__ import annotations

import math

import fake_graphs
import gaussian_pair
import pytest
import torch
from gaussian_pair import IMPOSSIBLE, LENGTH, Linear, draw, log_p_values, whitened
from strict_loop import gentle, near

import cspd
from cspd import strict, window
from cspd.models.drift import DriftLoss
from cspd_kernels import PhiloxNoise
from cspd_kernels.testing import randomize_, relative_error

LABELS = torch.tensor([3, 1, 4])
STD = 0.5


def one_step(model, **options):
    """The model with a head of one step."""
    options = {"std": STD, "entropies": (0.91, 0.98), "least": 0.3, **options}
    torch.manual_seed(0)
    channels = model.token_embed_dim
    head = DriftLoss(channels, model.diffloss.net.cond_embed.in_features, 1, 32, **options)
    randomize_(head.net, 3)
    model.diffloss = head.eval()
    return model


@pytest.fixture(scope="module")
def pair():
    target = gentle()
    return one_step(near(target, 0.3)), target


def runner(models, relaxation=4.0, **options):
    options = {"verify": "strict", "criterion": "last_step", "prefill": 0.0, **options}
    return cspd.SpecDecodeRunner(*models, relaxation, **options)


def by_hand(state, diffloss, tokens, step, seed, scaled=True):
    """(N, C): the draft's tokens of a step, as the method has them."""
    model = state.draft
    z, entropy = model.transformer.conditions(tokens, step, model.embedding, attention=True)
    noise = PhiloxNoise(seed, step.rows)
    x, rows = noise.x_T(4), len(step.rows)
    if scaled:
        scale = diffloss.initial_scale(entropy)
        assert scale.std() > 1e-2  # of different entropies
        x = x * scale.flatten()[:, None]
    z = z.flatten(0, 1)
    out = diffloss.net(x.repeat(len(z) // rows, 1), torch.zeros(len(z), dtype=torch.int64), z)
    if step.guided:
        out = out[rows:] + step.cfg_scale * (out[:rows] - out[rows:])
    return out + diffloss.std * noise.step(0, 4)


@pytest.mark.parametrize("options", [{}, {"cfg": 2.0, "cfg_schedule": "constant", "labels": LABELS}])
@pytest.mark.parametrize("verify", ["window", "strict"])
@torch.no_grad()
def test_the_drafts_tokens_by_hand(pair, monkeypatch, verify, options):
    """And the path has no part in what is judged."""
    made, seen = runner(pair, verify=verify), []
    place = strict if verify == "strict" else window
    decide = place.decide

    def watched(state, plan, draft, target, relaxation):
        seen.append((draft, target))
        return decide(state, plan, draft, target, relaxation)

    monkeypatch.setattr(place, "decide", watched)
    made.run(3, 16, 1, seed=7, **options)  # a token a step
    state = made.begin(3, 16, seed=7, **options)
    step = state.plan.step(0)
    (draft, target), diffloss = seen[0], pair[0].diffloss
    got = draft.sample[: len(step.rows), 0]
    expected = by_hand(state, diffloss, state.tokens, step, 7)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, by_hand(state, diffloss, state.tokens, step, 7, scaled=False)) > 1e-2
    assert relative_error(draft.log_std, torch.full_like(draft.log_std, math.log(STD))) < 1e-6
    assert not draft.path_log_std.any()
    assert not target.path_log_std.any()


@torch.no_grad()
def test_alone_it_draws_whole_images(pair):
    draft = pair[0]
    made = runner((draft, draft), prefill=1.0)
    tokens = draft.patchify(made.run(3, 5, 1, seed=7, labels=LABELS))
    state = made.begin(3, 5, seed=7, labels=LABELS)
    for i in range(5):
        step = state.plan.step(i)
        state.write(step, by_hand(state, draft.diffloss, state.tokens, step, 7))
    assert relative_error(tokens, state.tokens) < 1e-5
    # Judged by itself it keeps everything, and its looks scale x_T, too.
    for verify in ("window", "strict"):
        made = runner((draft, draft), 1.0, verify=verify)
        made.run(3, 9, 1, seed=7, labels=LABELS)
        assert made.stats.acceptance == 1.0
        assert made.stats.raw_acceptance == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("verify", ["window", "strict"])
def test_images_do_not_depend_on_their_batch(pair, verify):
    made = runner(pair, verify=verify, prefill=0.2)
    together = made.run(4, 9, 3, labels=torch.arange(4), cfg=2.0, seed=8)
    assert 0.1 < made.stats.acceptance < 0.95
    for i in range(4):
        alone = made.run(1, 9, 3, labels=torch.tensor([i]), cfg=2.0, seed=8, first_image=i)
        assert relative_error(alone[0], together[i]) < 1e-5


@pytest.mark.parametrize("verify", ["window", "strict"])
def test_as_graphs(pair, verify, monkeypatch):
    calls = (dict(seed=1, cfg=2.0), dict(seed=2, cfg=2.5, first_image=7), dict(seed=1, cfg=2.0))
    made = runner(pair, verify=verify)
    expected = [made.run(3, 8, 3, labels=LABELS, **call) for call in calls]
    fake_graphs.use(monkeypatch)
    made = runner(pair, verify=verify)
    for call, images in zip(calls, expected):
        assert relative_error(made.run(3, 8, 3, labels=LABELS, **call), images) < 1e-5
    assert len(made._steps) == 1


def test_other_numbers_of_a_head_are_found(monkeypatch):
    """In a graph they would be those of its capture."""
    fake_graphs.use(monkeypatch)
    target = gentle()
    draft = one_step(near(target, 0.3))
    made, drawn = runner((draft, draft), prefill=1.0), []
    for state in ((STD, 0.91, 0.98, 0.3), (STD, 0.2, 0.3, 0.3), (1.0, 0.91, 0.98, 0.3), (STD, 0.91, 0.98, 0.3)):
        draft.diffloss.set_extra_state(state)
        drawn.append([made.run(3, 5, seed=1) for _ in range(3)][-1])
    assert torch.equal(drawn[0], drawn[3])
    assert relative_error(drawn[1], drawn[0]) > 1e-2
    assert relative_error(drawn[2], drawn[0]) > 1e-2


def test_windows_end_by_its_entropy_and_policies_see_it(pair):
    for verify in ("window", "strict"):
        made = runner(pair, verify=verify)
        images = made.run(3, 9, cspd.EntropyDraft(4), seed=3)
        assert images.isfinite().all()
    seen = []

    def policy(given):
        seen.append(given.draft_entropy)
        return torch.ones_like(given.log_ratio)

    policy.looks_ahead = True
    assert runner(pair, policy).run(3, 9, 3, seed=3).isfinite().all()
    assert all(entropy is None for entropy in seen)  # nothing ends windows by it


def test_several_candidates_and_half_types(pair):
    made = runner(pair, num_candidates=3, branches=2, target_sigma=True)
    assert made.run(3, 9, 3, seed=3, cfg=2.0).isfinite().all()
    for dtype in (torch.bfloat16, torch.float16):
        images = runner(pair, dtype=dtype).run(2, 6, 3, seed=0, cfg=2.0)
        assert images.dtype == torch.float32
        assert images.isfinite().all()


def test_what_does_not_fit(pair):
    with pytest.raises(
        ValueError, match="criterion='last_step', got 'trajectory': the draft has one denoising step and the target 5"
    ):
        cspd.SpecDecodeRunner(*pair)
    with pytest.raises(ValueError, match=r"the same number of denoising steps.*got 5 and 1"):
        runner(pair[::-1])
    for options in ({"num_candidates": 2}, {"residual": "closed_form"}):
        with pytest.raises(ValueError, match=r"one sigma for .*, got 0.5 and 0.2\d+: pass target_sigma=True"):
            runner(pair, **options)
        runner(pair, target_sigma=True, **options)
        runner((pair[0], pair[0]), **options)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_transformer_that_does_not_show_its_attention(pair, monkeypatch, missing):
    for name in ("why_not_by_weights", "why_not_by_tables")[:missing]:
        monkeypatch.setattr(f"cspd.whole.chosen.{name}", lambda *_: "asked for by this test")
    with pytest.raises(ValueError, match="expected a draft that shows its attention, because its head scales"):
        runner(pair).run(2, 4)
    with pytest.raises(ValueError, match="expected a draft that shows"):
        runner((pair[0], pair[0]), prefill=1.0).run(2, 4)


class Shown(Linear):
    """A draft of one step whose attention is the wider spread the larger its known tokens are."""

    shows_attention = True

    def conditions(self, tokens, plan, embedding, attention=False):
        z = super().conditions(tokens, plan, embedding)
        entropy = z[: len(plan.where), :, :2].mean(dim=2).sigmoid()
        return (z, entropy) if attention else z


def judged(monkeypatch, gamma, steps=LENGTH, images=4_000, **options):
    target = Linear(1, sigma=0.8)
    draft = Shown(2, near=target, sigma=1.0, shared=0.6)
    made = gaussian_pair.runner(monkeypatch, draft, target, **options)
    made._pair.models["draft"] = one_step(made.draft_model, std=1.0, entropies=(0.2, 0.8))
    assert made.begin(1, 4).draft.head.num_steps == 1
    scales = []
    scale = made.draft_model.diffloss.initial_scale
    monkeypatch.setattr(made.draft_model.diffloss, "initial_scale", lambda e: scales.append(scale(e)) or scales[-1])
    tokens, order = draw(made, images, steps, gamma)
    assert torch.cat([value.flatten() for value in scales]).std() > 0.1
    return log_p_values(whitened(tokens, order, target, steps)), made.stats


@pytest.mark.parametrize("options", [dict(gamma=3), dict(gamma=4, steps=5)], ids=str)
def test_all_tokens_have_the_law_of_the_target(monkeypatch, options):
    """p < 1e-9 of the least of some 200 statistics."""
    (log_p, _), stats = judged(monkeypatch, **options)
    assert log_p > IMPOSSIBLE
    assert 0.3 < stats.acceptance < 0.8
    assert stats.fallback < 1e-3


def test_a_width_that_is_not_that_of_the_tokens_would_be_found(monkeypatch):
    """The negative control: tokens half again as wide as their density says. Beyond p = 1e-9 by more than five standard
    deviations: a power above 1 - 1e-6."""
    candidates = strict.candidates

    def wider(state, plan, chain, x=None):
        proposed = candidates(state, plan, chain, x)
        if abs(float(chain.log_std.flatten()[0])) > 0.1:  # the target's
            return proposed
        return proposed._replace(sample=proposed.mean + 1.5 * (proposed.sample - proposed.mean))

    monkeypatch.setattr(strict, "candidates", wider)
    (log_p, margin), _ = judged(monkeypatch, gamma=3)
    assert log_p < IMPOSSIBLE
    assert margin > 5.0
