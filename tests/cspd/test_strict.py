"""Strict verification on small MAR models: rounds against a loop over one image, and runs at their edges."""

from __future__ import annotations

import fake_graphs
import pytest
import torch
from slow import mostly_slow, slow
from strict_loop import gentle, image, near

import cspd
from cspd import strict, window
from cspd.stats import REDRAWN
from cspd_kernels import CandidateVerdict
from cspd_kernels.testing import relative_error

LABELS = torch.tensor([3, 1, 4])


@pytest.fixture(scope="module")
def pair():
    """(draft, target) with one sigma, of which about half the tokens are accepted."""
    target = gentle()
    return near(target, 0.9), target


@pytest.fixture(scope="module")
def learned():
    """The same with variances of their own."""
    target = gentle(learned=True)
    return near(target, 0.9), target


def strictly(models, relaxation=1.0, **options):
    return cspd.SpecDecodeRunner(*models, relaxation, **{"verify": "strict", "prefill": 0.0, **options})


RUNS = {
    "plain": ({}, dict(steps=9, gamma=3)),
    "guided": ({}, dict(steps=5, gamma=2, cfg=2.0, labels=LABELS)),
    "last step": ({"criterion": "last_step"}, dict(steps=7, gamma=4, cfg=2.0, labels=LABELS)),
    "candidates": ({"num_candidates": 3, "criterion": "last_step"}, dict(steps=9, gamma=3)),
    "candidates of their own chains": (
        {"num_candidates": 3, "branches": 3, "target_sigma": True}, dict(steps=12, gamma=4, cfg=2.0, labels=LABELS),
    ),
    "branches, last step": (
        {"num_candidates": 3, "branches": 2, "criterion": "last_step"}, dict(steps=7, gamma=3, labels=LABELS),
    ),
    "relaxed, pre-filled": ({"prefill": 0.3, "criterion": "last_step"}, dict(steps=6, gamma=3, temperature=0.9)),
    "by position": ({"criterion": "last_step"}, dict(steps=9, gamma=3)),
    "closed form": ({"residual": "closed_form", "criterion": "last_step"}, dict(steps=9, gamma=20)),
}  # fmt: skip


def by_image(kept: list, images: int, steps: int) -> list[list[int]]:
    """Steps that each image moved on by, round by round: a round is of those that are not done, in their order."""
    moves = [[] for _ in range(images)]
    for _, counts in kept:
        going = [move for move in moves if sum(move) < steps]
        assert len(going) == len(counts)
        for move, count in zip(going, counts.tolist()):
            move.append(count)
    return moves


@pytest.mark.parametrize("name", mostly_slow(RUNS, fast=("plain", "branches, last step", "relaxed, pre-filled")))
def test_rounds_are_the_loop_over_one_image(pair, learned, name, monkeypatch):
    options, arguments = RUNS[name]
    relaxation = {"relaxed, pre-filled": 2.0, "by position": torch.linspace(1, 3, 16)}.get(name, 1.0)
    runner = strictly(learned if "target_sigma" in options else pair, relaxation, **options)
    kept = []
    walk = strict.walk
    monkeypatch.setattr(strict, "walk", lambda *args: kept.append(walk(*args)) or kept[-1])
    images = pair[1].patchify(runner.run(3, seed=5, **arguments))
    moves = by_image(kept, 3, arguments["steps"] - runner.stats.target_calls + runner.stats.rounds)
    for i in range(3):
        own = {**arguments, **({"labels": arguments["labels"][i : i + 1]} if "labels" in arguments else {})}
        expected, moved = image(runner, i, seed=5, **own)
        assert moves[i] == moved
        assert relative_error(images[i], expected) < 1e-5
    stats = runner.stats
    rounds = [k for _, k in kept]
    assert stats.rounds == len(rounds) <= arguments["steps"]
    assert stats.steps_per_round == pytest.approx(
        float(sum(k.sum() for k in rounds) / sum((k > 0).sum() for k in rounds))
    )
    assert 0.2 < stats.acceptance < 0.9


def test_the_draft_being_the_target_everything_is_kept(pair):
    target = pair[1]
    for options in ({}, {"criterion": "last_step"}, {"num_candidates": 2, "branches": 2}):
        runner = strictly((target, target), **options)
        images = runner.run(3, 8, 3, labels=LABELS, cfg=2.0, seed=3)
        stats = runner.stats
        assert (stats.acceptance, stats.fallback) == (1.0, 0.0)
        assert stats.steps_per_round == pytest.approx(8 / 3)
        assert stats.gammas == [3, 3, 2]
        assert stats.candidates == [48, 0][: len(stats.candidates)]
        alone = cspd.SpecDecodeRunner(target, target, prefill=1.0, criterion=options.get("criterion", "trajectory"))
        assert relative_error(images, alone.run(3, 8, 1, labels=LABELS, cfg=2.0, seed=3)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"criterion": "last_step", "num_candidates": 2, "branches": 2}])
def test_images_do_not_depend_on_their_batch(pair, options):
    runner = strictly(pair, prefill=0.2, **options)
    arguments = dict(cfg=2.0, seed=8)
    together, outcome = runner.run(5, 9, 3, labels=torch.arange(5), **arguments), runner.stats.outcome
    assert runner.stats.rounds <= 9 - 2
    rounds = set()
    for i in range(5):
        alone = runner.run(1, 9, 3, labels=torch.tensor([i]), first_image=i, **arguments)
        assert torch.equal(runner.stats.outcome[0], outcome[i])
        assert relative_error(alone[0], together[i]) < 1e-5
        rounds.add(runner.stats.rounds)
    assert len(rounds) > 1  # they end at different places


@pytest.mark.slow
def test_the_tokens_do_not_depend_on_the_windows(pair):
    drawn = {
        (gamma, branches): strictly(pair, criterion="last_step", num_candidates=3, branches=branches).run(
            4, 16, gamma, seed=2
        )
        for gamma, branches in ((1, 1), (4, 1), (4, 3), (30, 2))
    }
    for images in drawn.values():
        assert relative_error(images, drawn[1, 1]) < 1e-5


@pytest.mark.slow
def test_nor_on_what_says_how_long_they_are(pair):
    policies = (
        cspd.AdaptiveDraft(0.7),
        cspd.EntropyDraft(5, 1.0),
        lambda windows: 1 + int(1000 * sum(map(sum, windows))) % 5,  # by whatever was drawn
    )
    runner, chosen = strictly(pair, criterion="last_step", num_candidates=2, branches=2), set()
    expected = runner.run(3, 16, 1, seed=2)
    for policy in policies:
        assert relative_error(runner.run(3, 16, policy, seed=2), expected) < 1e-5
        chosen.add((runner.stats.rounds, *runner.stats.gammas))
    assert len(chosen) == len(policies)
    # It is not so where the relaxation is made from the rest of the window.
    runner = strictly(pair, cspd.ContextRelaxation(), criterion="last_step")
    assert relative_error(runner.run(3, 16, policies[0], seed=2), runner.run(3, 16, 1, seed=2)) > 1e-2


def test_tables_of_the_models_blocks_and_their_own_methods_give_the_same(pair, monkeypatch):
    expected = strictly(pair).run(3, 7, 3, labels=LABELS, cfg=2.0, seed=4)
    for name in ("why_not_by_weights", "why_not_by_tables"):
        monkeypatch.setattr(f"cspd.whole.chosen.{name}", lambda *_: "asked for by this test")
        assert relative_error(strictly(pair).run(3, 7, 3, labels=LABELS, cfg=2.0, seed=4), expected) < 1e-5


@pytest.mark.parametrize("criterion", [slow("trajectory"), "last_step"])
def test_temperature_zero_is_the_target_alone(pair, criterion):
    runner = strictly(pair, criterion=criterion, num_candidates=2)
    images = runner.run(2, 6, 3, temperature=0.0, seed=4)
    alone = cspd.SpecDecodeRunner(pair[1], pair[1], prefill=1.0)
    assert relative_error(images, alone.run(2, 6, 1, temperature=0.0, seed=4)) < 1e-5
    assert (runner.stats.acceptance, runner.stats.steps_per_round, runner.stats.rounds) == (0.0, 1.0, 6)


def test_prefilled_alone_and_one_image(pair):
    runner = strictly(pair, prefill=1.0, criterion="last_step")
    images = runner.run(1, 6, 3, seed=4)
    stats = runner.stats
    assert torch.isfinite(images).all()
    assert (stats.rounds, stats.drafted, stats.prefilled, stats.target_calls) == (0, 0, 16, 6)
    assert (stats.steps_per_round, stats.acceptance, stats.target_rows, stats.gammas) == (None, None, 0, [])
    # The last step's noise is in it.
    assert relative_error(images, strictly(pair, prefill=1.0).run(1, 6, 3, seed=4)) > 1e-2


def test_statistics(pair):
    runner = strictly(pair, criterion="last_step", num_candidates=2, branches=2, prefill=0.2)
    runner.run(3, 9, 3, seed=8)
    stats, outcome = runner.stats, runner.stats.outcome
    assert (stats.verify, stats.prefilled, stats.drafted) == (
        "strict",
        int((outcome == 0).sum()),
        int((outcome > 0).sum()),
    )
    assert sum(stats.candidates) == int((outcome == 1).sum()) == round(stats.acceptance * stats.drafted)
    assert stats.candidates[1] > 0
    assert stats.fallback == pytest.approx(int((outcome == 3).sum()) / stats.drafted)
    assert (outcome == REDRAWN).any()
    assert (stats.probability[outcome == 0] == 1).all()
    assert float(stats.probability[outcome > 0].mean()) == pytest.approx(stats.raw_acceptance, rel=1e-5)
    assert len(stats.acceptance_per_window) == len(stats.gammas) == stats.rounds
    assert stats.draft_calls == sum(stats.gammas)
    assert stats.target_calls == 2 + stats.rounds
    of_one = [1 + 2 * (gamma - 1) for gamma in stats.gammas]  # of an image that is not done
    assert max(of_one) * 3 < stats.target_rows < 3 * sum(of_one)
    going = 3 * (9 - 2) / stats.steps_per_round  # images of all rounds together
    assert going == pytest.approx(round(going))
    assert stats.target_rows >= min(of_one) * going
    assert set(stats.seconds) == {"draft", "target", "verify", "total"}
    assert stats.seconds["draft"] + stats.seconds["target"] + stats.seconds["verify"] <= stats.seconds["total"]


def test_progress_bar_counts_steps(pair, capsys):
    strictly(pair, prefill=0.3).run(2, 6, 3, progress=True, seed=0)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("criterion", ["trajectory", "last_step"])
def test_windows_keep_the_candidate_that_was_accepted(learned, criterion, monkeypatch):
    runner = cspd.SpecDecodeRunner(*learned, 1.0, prefill=0.2, num_candidates=3, criterion=criterion, target_sigma=True)
    seen, decide = [], window.decide

    def watched(state, plan, draft, target, relaxation):
        verdict = decide(state, plan, draft, target, relaxation)
        seen.append((plan.where, draft.sample, target, verdict))
        return verdict

    monkeypatch.setattr(window, "decide", watched)
    tokens = learned[1].patchify(runner.run(40, 8, 3, seed=5, cfg=2.0))
    for where, x, target, verdict in seen:
        assert isinstance(verdict, CandidateVerdict)
        assert x.shape[1] == 3
        assert not torch.equal(x[:, 0], x[:, 1])
        assert target.mean.shape[1] == (3 if criterion == "trajectory" else 1)
        kept = tokens.gather(1, where[..., None].expand(-1, -1, 4)).flatten(0, 1)
        rows = verdict.candidate >= 0
        assert torch.equal(kept[rows], x[rows, verdict.candidate[rows].long()].float())
        assert not (kept[~rows, None] == x[~rows]).all(-1).any()
    counts = torch.stack([(v.candidate[:, None] == torch.arange(3)).sum(0) for *_, v in seen]).sum(0)
    assert runner.stats.candidates == counts.tolist()
    assert counts[1] > 0


def test_the_first_candidate_is_the_one_of_a_run_without_others(pair):
    """And a window's context goes on with it: where all of them were accepted, nothing has changed."""
    for criterion in ("trajectory", "last_step"):
        one, three = (
            cspd.SpecDecodeRunner(pair[1], pair[1], 1e3, num_candidates=k, criterion=criterion) for k in (1, 3)
        )
        assert torch.equal(one.run(3, 6, 3, seed=1), three.run(3, 6, 3, seed=1))
        assert one.stats.drafted == one.stats.candidates[0]
        assert three.stats.candidates == [one.stats.drafted, 0, 0]


def test_learned_variances(learned):
    with pytest.raises(ValueError, match=r"fixed variance for num_candidates=2, got a learned one .*target_sigma=True"):
        strictly(learned, num_candidates=2)
    for options in ({"criterion": "last_step"}, {"num_candidates": 2, "branches": 2, "target_sigma": True}):
        assert torch.isfinite(strictly(learned, **options).run(3, 6, 3, seed=1, cfg=2.0, labels=LABELS)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    runner = strictly(pair, dtype=dtype, criterion="last_step", num_candidates=2, branches=2)
    images = runner.run(2, 6, 3, seed=0, cfg=2.0)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    "options",
    [{}, slow({"criterion": "last_step"}), slow({"num_candidates": 3, "branches": 2, "criterion": "last_step"})],
)
def test_rounds_as_graphs(pair, options, monkeypatch):
    """Replayed, a round finds its step, its tokens, its seed and its tables where they were when it was captured."""
    calls = (
        dict(steps=9, gamma=3, seed=1, labels=LABELS, cfg=2.0),
        dict(steps=9, gamma=3, seed=2, labels=LABELS.flip(0), cfg=2.5, first_image=7),
        dict(steps=5, gamma=3, seed=2, labels=LABELS, cfg=2.0),
        dict(steps=9, gamma=4, seed=2**64 - 1, labels=LABELS, cfg=2.0),
        dict(steps=9, gamma=3, seed=1, labels=LABELS, cfg=2.0),
    )
    expected, outcomes = [], []
    runner = strictly(pair, **options)
    for call in calls:
        expected.append(runner.run(3, **call))
        outcomes.append(runner.stats.outcome)
    fake_graphs.use(monkeypatch)
    # A number of the host's would stay that of the capture, which the graphs here do not show.
    accept_reject, denoise = window.accept_reject, window.denoise

    def judged(*args, seed, **options):
        assert isinstance(seed, torch.Tensor)
        return accept_reject(*args, seed=seed, **options)

    def denoised(head, cond, x_T, noise, **options):  # noqa: N803
        assert isinstance(noise.seed, torch.Tensor)
        return denoise(head, cond, x_T, noise, **options)

    monkeypatch.setattr(window, "accept_reject", judged)
    monkeypatch.setattr(window, "denoise", denoised)
    runner = strictly(pair, **options)
    for call, images, outcome in zip(calls, expected, outcomes):
        assert relative_error(runner.run(3, **call), images) < 1e-5
        stats = runner.stats
        assert torch.equal(stats.outcome, outcome)
        assert stats.seconds["round"] > 0
        assert stats.drafted == 48
    assert len(runner._steps) == 1


def test_sweeps_start_from_the_drafts_trajectories(pair, monkeypatch):
    expected = strictly(pair, 1e3, parallel_tol=None).run(3, 7, 3, seed=4)
    guesses, denoise = [], window.denoise
    monkeypatch.setattr(window, "denoise", lambda *a, **k: guesses.append(k["guess"]) or denoise(*a, **k))
    images = strictly(pair, 1e3, parallel_tol=1e-6).run(3, 7, 3, seed=4)
    assert relative_error(images, expected) < 1e-5
    assert [guess is not None for guess in guesses] == [False, False, False, True] * 2 + [False, True]


def test_candidates_of_no_use_are_named(pair, learned, caplog):
    """With one variance no later one is ever accepted: the log says so, and so it is."""
    runner = strictly(pair, num_candidates=3)
    assert "num_candidates=3 is of no use with criterion='trajectory'" in caplog.text
    runner.run(20, 9, 3, seed=1)
    assert runner.stats.candidates[1:] == [0, 0]
    assert 0 < runner.stats.candidates[0] < runner.stats.drafted
    caplog.clear()
    strictly(pair, num_candidates=3, criterion="last_step")
    strictly(learned, num_candidates=3, target_sigma=True)
    strictly(pair)
    assert "of no use" not in caplog.text


BAD = [
    ({"verify": "loose"}, r"verify one of \('window', 'strict'\), got 'loose'"),
    ({"criterion": "first_step"}, r"criterion one of \('trajectory', 'last_step'\), got 'first_step'"),
    ({"num_candidates": 0}, "num_candidates as an int in 1..16, got 0"),
    ({"num_candidates": 17}, "num_candidates as an int in 1..16, got 17"),
    ({"num_candidates": True}, "num_candidates as an int in 1..16, got True"),
    ({"branches": 0}, "branches as an int in 1..16, got 0"),
    ({"branches": 2, "verify": "strict"}, "at most as many branches as candidates.*branches=2 with num_candidates=1"),
    ({"branches": 2, "num_candidates": 2}, "verify='strict' for branches=2, got verify='window'"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_bad_options(pair, options, match):
    with pytest.raises(ValueError, match=match):
        cspd.SpecDecodeRunner(*pair, **options)
