"""The law of strictly verified tokens is the target's: on linear Gaussian models, whose law is known.

Every run is of thousands of images with fixed seeds. A test of a right run fails at p < 1e-9 of any of some 200
statistics, so at less than 1e-6 in all if the seeds were not fixed; runs that are wrong on purpose must fail the same
tests, with a power above 1 - 1e-6 (``log_p_values``).
"""

from __future__ import annotations

import pytest
import torch
from gaussian_pair import IMPOSSIBLE, LENGTH, draw, log_p_values, pair, runner, whitened
from slow import mostly_slow

from cspd import strict
from cspd.tree import walk

IMAGES = 4_000
ENOUGH = 5.0  # standard deviations beyond the critical value: a power above 1 - 1e-6

CASES = {
    "a step a window": dict(gamma=1),
    "windows of one step": dict(gamma=1, steps=5, verify="window", num_candidates=3),
    "two steps": dict(gamma=2),
    "four, several tokens a step": dict(gamma=4, steps=5),
    "guided, several tokens": dict(gamma=2, steps=5, cfg=2.0, same_sigma=False),
    "two sigmas": dict(gamma=4, same_sigma=False),
    "closed form": dict(gamma=4, steps=5, residual="closed_form"),
    "pre-filled, one window": dict(gamma=20, steps=5, prefill=0.4),
    "three candidates": dict(gamma=2, num_candidates=3),
    "three candidates, two branches": dict(gamma=4, num_candidates=3, branches=2),
    "branches, guided, several tokens": dict(gamma=4, steps=5, cfg=2.0, num_candidates=3, branches=3),
    "candidates in closed form": dict(gamma=2, steps=5, cfg=2.0, num_candidates=2, branches=2, residual="closed_form"),
}

FAST = ("two steps", "three candidates, two branches", "closed form")


def judged(monkeypatch, gamma, steps=LENGTH, cfg=1.0, same_sigma=True, images=IMAGES, **options):
    """(log p, margin) of a run, and its statistics."""
    draft, target = pair(same_sigma)
    made = runner(monkeypatch, draft, target, **options)
    tokens, order = draw(made, images, steps, gamma, cfg)
    return log_p_values(whitened(tokens, order, target, steps, cfg)), made.stats


@pytest.mark.parametrize("name", mostly_slow(CASES, fast=FAST))
def test_all_tokens_have_the_law_of_the_target(monkeypatch, name):
    (log_p, _), stats = judged(monkeypatch, **CASES[name])
    assert log_p > IMPOSSIBLE
    assert 0.3 < stats.acceptance < 0.8  # both ways of getting a token have a part
    assert stats.fallback < 1e-3
    assert sum(stats.candidates) == round(stats.acceptance * stats.drafted)


def keep_all(tree, candidate, valid, live):
    """A walk that undoes nothing behind a rejection."""
    branch, _ = walk(tree, candidate, valid, live)
    return branch, tree.chosen(live, branch).sum(dim=1)


def next_branch(tree, candidate, valid, live):
    """A walk that goes on in another branch."""
    branch, _ = walk(tree, candidate, valid, live)
    branch = (branch + 1) % tree.branches
    good = tree.chosen(((candidate == 0) | ~valid).all(dim=1), branch)
    first = ((candidate[: tree.batch] < tree.branches) & (candidate[: tree.batch] >= 0)).all(dim=1, keepdim=True)
    reached = torch.cat([torch.ones_like(first), first, good[:, 1:-1]], dim=1) & tree.chosen(live, branch)
    return branch, reached.int().cumprod(dim=1).sum(dim=1)


FAULTS = {
    "windows": (dict(gamma=4, verify="window"), None),
    "windows of several candidates": (dict(gamma=4, steps=5, verify="window", num_candidates=3), None),
    "relaxation": (dict(gamma=4, relaxation=3.0), None),
    "nothing is undone": (dict(gamma=4), keep_all),
    "the wrong branch": (dict(gamma=4, num_candidates=3, branches=2), next_branch),
}


@pytest.mark.parametrize("name", mostly_slow(FAULTS, fast=("windows", "the wrong branch")))
def test_what_is_not_exact_is_found(monkeypatch, name):
    options, fault = FAULTS[name]
    if fault is not None:
        monkeypatch.setattr(strict, "walk", fault)
    (log_p, margin), _ = judged(monkeypatch, **options)
    assert log_p < IMPOSSIBLE
    assert margin > ENOUGH


def test_the_path_would_be_found(monkeypatch):
    """By the criterion of the last step the scales of the steps before must not count."""
    candidates = strict.candidates
    monkeypatch.setattr(
        strict,
        "candidates",
        lambda state, plan, chain: candidates(state, plan, chain)._replace(path_log_std=chain.path_log_std[:, None]),
    )
    (log_p, margin), _ = judged(monkeypatch, gamma=2)
    assert log_p < IMPOSSIBLE
    assert margin > ENOUGH


def test_tokens_do_not_depend_on_how_far_is_drafted(monkeypatch):
    """Steps that are undone are drafted from the same noise: windows and branches change what is computed, not what
    comes out."""
    draft, target = pair()
    drawn = []
    for gamma, branches in ((1, 1), (3, 1), (3, 3), (9, 2)):
        made = runner(monkeypatch, draft, target, num_candidates=3, branches=branches)
        drawn.append((draw(made, 500, LENGTH, gamma)[0], made.stats.outcome, made.stats))
    for tokens, outcome, _ in drawn[1:]:
        assert torch.equal(outcome, drawn[0][1])
        assert torch.allclose(tokens, drawn[0][0], rtol=0, atol=1e-4)
    rounds = [stats.steps_per_round for _, _, stats in drawn]
    assert rounds[0] == 1.0 < rounds[1] < rounds[2]  # longer windows and more branches keep more
    assert [stats.target_rows for _, _, stats in drawn[:1]] == [500 * LENGTH]
