"""What policies are shown in strict runs, and windows that end where a policy says."""

from __future__ import annotations

import fake_graphs
import pytest
import torch
from gaussian_pair import IMPOSSIBLE, LENGTH, Linear, draw, log_p_values, pair, runner, whitened
from slow import mostly_slow
from strict_loop import gentle, near

import cspd
from cspd import strict
from cspd.order import plan_steps
from cspd_kernels.testing import relative_error

LABELS = torch.tensor([3, 1, 4])


@pytest.fixture(scope="module")
def models():
    """(draft, target)."""
    target = gentle()
    return near(target, 0.9), target


class Watch:
    """A policy that keeps what it is shown."""

    def __init__(self, policy=None, looks_ahead=True):
        self.policy, self.windows, self.looks_ahead = policy, [], looks_ahead

    def __call__(self, window):
        self.windows.append(window)
        return self.policy(window) if self.policy else torch.full_like(window.log_ratio, 1.5)


def strictly(models, relaxation, **options):
    options = {"verify": "strict", "prefill": 0.2, "criterion": "last_step", **options}
    return cspd.SpecDecodeRunner(*models, relaxation, **options)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_policy_is_shown_a_window_of_every_branch(models, cfg):
    policy = Watch()
    made = strictly(models, policy, num_candidates=2, branches=2)
    state = made.begin(3, 7, seed=1, cfg=cfg, labels=LABELS)
    tokens = models[1].patchify(made.run(3, 7, 3, seed=1, cfg=cfg, labels=LABELS))
    steps = plan_steps(16, 7, cfg, "linear")
    most = max(step.before - step.after for step in steps)
    assert len(policy.windows) == made.stats.rounds
    for window, gamma in zip(policy.windows, made.stats.gammas):
        w = 2 if gamma > 1 else 1
        images = len(window.positions) // w  # of those that are not done
        rows, n = images * w, gamma * most
        for name, rest in (
            ("positions", ()), ("steps", ()), ("target_z", (32,)), ("draft_z", (32,)), ("log_ratio", ()), ("valid", ()),
            ("draft_log_std", (4,)), ("target_log_std", (4,)), ("known", ()), ("target_before", (32,)),
        ):  # fmt: skip
            assert getattr(window, name).shape == (rows, n, *rest), name
        assert window.draft_entropy is None
        assert (window.target_branches is None) == (w == 1)
        if w == 2:
            assert window.target_branches.shape == (rows, 2, n, 32)
            branches = window.target_branches.view(images, 2, 2, n, 32)
            assert torch.equal(branches[:, 0], branches[:, 1])
            assert torch.equal(branches[:, 0], window.target_z.view(images, 2, n, 32))
            first = window.target_z.view(images, 2, gamma, most, 32)
            assert torch.equal(first[:, 0, 0], first[:, 1, 0])
            inner = window.valid.view(images, 2, n)[:, 0, most]
            assert not torch.equal(first[inner, 0, 1], first[inner, 1, 1])  # other candidates are known there
        before = window.target_before.view(rows, gamma, most, 32)
        assert before[:, 0].isnan().all()
        assert before[:, 1:].isfinite().all()
        assert window.previous_target_z.shape == (rows, 32)
        for row in range(rows):
            at = [k for k, step in enumerate(steps) if 16 - step.before == int(window.known[row, 0])]
            for d in range(gamma):
                columns = slice(d * most, (d + 1) * most)
                if not window.valid[row, columns].any():  # behind the last step
                    assert not at or at[0] + d >= len(steps)
                    continue
                step = steps[at[0] + d]
                assert (window.known[row, columns] == 16 - step.before).all()
                assert int(window.valid[row, columns].sum()) == step.before - step.after
                assert (window.steps[row, columns] == step.index).all()
                if images == 3:
                    own = state.plan.drawing[row // w, 16 - step.before : 16 - step.after]
                    assert torch.equal(window.positions[row, columns][window.valid[row, columns]], own)
    assert torch.isfinite(tokens).all()


def test_what_the_target_made_of_a_token_a_step_earlier(models):
    """Each in the window is what a pass by itself computes, from the same tokens without those of the step before."""
    policy = Watch(lambda window: torch.full_like(window.log_ratio, 1e4))  # everything is accepted: one window
    made = strictly(models, policy, prefill=0.0)
    tokens = models[1].patchify(made.run(2, 6, 6, seed=1, cfg=2.0))
    state = made.begin(2, 6, seed=1, cfg=2.0)
    (window,) = policy.windows
    most = window.positions.shape[1] // 6
    for i in range(6):
        step = state.plan.step(i)
        n = step.where.shape[1]
        own = window.target_z[:, i * most : i * most + n]
        z = state.target.transformer.conditions(tokens, step, state.target.embedding)[:2]
        assert relative_error(own, z) < 1e-5
        if i:
            both = state.plan.window(i - 1, i + 1).whole
            z = state.target.transformer.conditions(tokens, both, state.target.embedding)[:2, -n:]
            assert relative_error(window.target_before[:, i * most : i * most + n], z) < 1e-5


def test_the_hidden_state_before_is_the_one_of_the_last_token_that_was_kept(models):
    policy = Watch(looks_ahead=False)
    made = strictly(models, policy)
    made.run(3, 9, 3, seed=2)
    assert policy.windows[0].target_before is None
    state, kept = made.begin(3, 9, seed=2), {}
    whole = [window for window in policy.windows if len(window.positions) == 3]  # then one of them is done
    assert len(whole) > 2
    for window in whole:
        for b in range(3):
            known = int(window.known[b, 0])
            if known == 16:
                continue
            if known in kept.get(b, {}):
                assert relative_error(window.previous_target_z[b], kept[b][known]) < 1e-5
            kept[b] = {}
            for t in range(window.positions.shape[1]):
                if window.valid[b, t]:
                    # Of the last token of a step, what a window behind it must be shown.
                    rank = int((state.plan.drawing[b] == window.positions[b, t]).nonzero())
                    kept[b][rank + 1] = window.target_z[b, t]


@pytest.mark.parametrize("branches", [1, 2])
def test_each_token_gets_the_relaxation_of_its_own(models, branches):
    """By position, as a policy and as a tensor."""
    table = torch.linspace(1, 5, 16)
    options = dict(num_candidates=2, branches=branches)
    expected = strictly(models, table, **options)
    images = expected.run(3, 9, 3, seed=2)
    made = strictly(models, lambda window: table[window.positions], **options)
    assert torch.equal(made.run(3, 9, 3, seed=2), images)
    assert torch.equal(made.stats.outcome, expected.stats.outcome)


def test_each_token_gets_the_relaxation_of_its_branch(models, monkeypatch):
    """What branches share gets that of the first one."""
    seen, decide = [], strict.decide

    def watched(state, plan, draft, target, relaxation):
        seen.append((plan, relaxation))
        return decide(state, plan, draft, target, relaxation)

    def numbered(window):
        numbers = torch.arange(window.log_ratio.numel()).view(window.log_ratio.shape)
        return 1.0 + numbers

    monkeypatch.setattr(strict, "decide", watched)
    made = strictly(models, numbered, num_candidates=3, branches=3)
    made.run(2, 9, 3, seed=2)
    for (plan, relaxation), gamma in zip(seen, made.stats.gammas):
        m = plan.where.shape[1]
        w = 3 if gamma > 1 else 1
        places = [(b, 0, 0) for b in range(2)]
        places += [(b, k, d) for d in range(1, gamma) for b in range(2) for k in range(w)]
        expected = [1 + ((b * w + k) * gamma + d) * m + t for b, k, d in places for t in range(m)]
        expected = [number if valid else 1 for number, valid in zip(expected, plan.valid.flatten().tolist())]
        assert relaxation.tolist() == expected
        assert plan.image.tolist() == [b for b, _, _ in places]


POLICIES = {
    "similarity": (cspd.SimilarityRelaxation(), 3),
    "context": (cspd.ContextRelaxation(), 3),
    "entropy": (1.0, cspd.EntropyDraft(4, 0.97)),
    "both": (cspd.ContextRelaxation(), cspd.EntropyDraft(3, 0.97)),
}


@pytest.mark.parametrize("name", mostly_slow(POLICIES, fast=("similarity", "entropy")))
def test_policies_in_strict_runs(models, name, monkeypatch):
    relaxation, gamma = POLICIES[name]
    options = dict(num_candidates=2, branches=2)
    images = {}
    for graphs in (False, True):
        if graphs:
            fake_graphs.use(monkeypatch)
        made = strictly(models, relaxation, **options)
        for seed in (2, 3, 2):
            images[graphs, seed] = made.run(3, 9, gamma, seed=seed, cfg=2.0, labels=LABELS)
            stats = made.stats
            assert stats.drafted + stats.prefilled == 48
        assert relative_error(images[graphs, 3], images[graphs, 2]) > 1e-2
        outcome = stats.outcome
        for i in range(3):  # an image does not depend on its batch
            alone = made.run(1, 9, gamma, seed=2, cfg=2.0, labels=LABELS[i : i + 1], first_image=i)
            assert relative_error(alone[0], images[graphs, 2][i]) < 1e-5
            assert torch.equal(made.stats.outcome[0], outcome[i])
    assert relative_error(images[True, 2], images[False, 2]) < 1e-5


class Attentive(Linear):
    """With an entropy that is a function of what is known."""

    shows_attention = True

    def conditions(self, tokens, plan, embedding, attention=False):
        z = super().conditions(tokens, plan, embedding)
        if not attention:
            return z
        return z, 0.5 + 0.5 * torch.tanh(z[: len(plan.where), :, 0])


@pytest.mark.slow
def test_windows_that_end_by_entropy_keep_the_law(monkeypatch):
    """Whether a step belongs to a window depends on what is known before it, and not on its own noise."""
    draft, target = pair()
    draft.__class__ = Attentive
    made = runner(monkeypatch, draft, target, num_candidates=2, branches=2)
    tokens, order = draw(made, 4000, LENGTH, cspd.EntropyDraft(4, 0.9))
    assert log_p_values(whitened(tokens, order, target, LENGTH))[0] > IMPOSSIBLE
    ended = made.stats.steps_per_round
    same, _ = draw(made, 4000, LENGTH, 4)
    assert torch.allclose(same, tokens, atol=1e-4)
    assert 1.05 < ended < made.stats.steps_per_round - 0.05


def test_the_state_of_an_undone_step_is_forgotten(monkeypatch):
    """The running mean is that of the steps that were kept, however many were drafted."""
    draft, target = pair()
    draft.__class__ = Attentive
    means = []

    class Told(cspd.EntropyDraft):
        def step(self, state, entropy):
            behind, goes_on = super().step(state, entropy)
            return behind, torch.ones_like(goes_on)

    for most in (1, 4):
        made = runner(monkeypatch, draft, target)
        begin = made.begin
        states = []
        monkeypatch.setattr(
            made, "begin", lambda *a, begin=begin, states=states, **k: states.append(begin(*a, **k)) or states[-1]
        )
        draw(made, 50, LENGTH, Told(most))
        means.append(states[0].entropy)
    assert means[0].isfinite().all()
    assert torch.allclose(*means, atol=1e-5)


def test_windows_end_by_the_mean_entropy_of_the_batch(models, monkeypatch):
    ends = cspd.EntropyDraft(4, 0.98)
    made = cspd.SpecDecodeRunner(*models, 2.0, prefill=0.2)
    images = made.run(3, 12, ends, seed=2)
    gammas = made.stats.gammas
    assert sum(gammas) == 9
    assert len(gammas) > 1
    assert max(gammas) <= 4
    assert len(set(gammas)) > 1
    # The same windows, told in advance, give the same images: a step that ended a window left no trace.
    told = iter(gammas)
    assert torch.equal(made.run(3, 12, lambda windows: next(told), seed=2), images)
    fake_graphs.use(monkeypatch)
    made = cspd.SpecDecodeRunner(*models, 2.0, prefill=0.2)
    assert relative_error(made.run(3, 12, ends, seed=2), images) < 1e-5
    assert made.stats.gammas == gammas


def test_a_draft_that_does_not_show_its_attention(models, monkeypatch):
    monkeypatch.setattr("cspd.whole.chosen.why_not_by_weights", lambda *_: "asked for by this test")
    for verify in ("window", "strict"):
        with pytest.raises(ValueError, match="a draft that shows its attention"):
            cspd.SpecDecodeRunner(*models, verify=verify).run(1, 6, cspd.EntropyDraft())


def test_a_length_policy_is_told_of_what_was_judged(models):
    made, told = strictly(models, 1.0), []

    def lengths(windows):
        told.append([list(window) for window in windows])
        return 1 + len(windows) % 3

    images = made.run(3, 12, lengths, seed=2)
    stats = made.stats
    assert stats.gammas[:3] == [1, 2, 3]
    assert [len(windows) for windows in told] == list(range(stats.rounds))
    assert all(1 <= len(window) <= gamma for window, gamma in zip(told[-1], stats.gammas))
    assert all(0 <= value <= 1 for window in told[-1] for value in window)
    assert relative_error(made.run(3, 12, 3, seed=2), images) < 1e-5
    assert torch.isfinite(made.run(2, 12, cspd.AdaptiveDraft(), seed=2)).all()
