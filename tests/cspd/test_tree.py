"""The walk along a round's verdicts, by hand, and where it puts what is kept."""

from __future__ import annotations

import pytest
import torch

from cspd.order import Plan, by_token, plan_steps
from cspd.tree import Tree, placed, walk


def walked(tree, candidates, valid=None, live=None):
    """(branch, kept) of the first image; candidates: rows of tokens, in the order of the tree's rows."""
    candidates = torch.tensor(candidates, dtype=torch.int32)
    valid = torch.ones_like(candidates, dtype=torch.bool) if valid is None else torch.tensor(valid)
    live = torch.ones(len(candidates), dtype=torch.bool) if live is None else torch.tensor(live)
    branch, kept = walk(tree, candidates, valid, live)
    return int(branch[0]), int(kept[0])


CHAINS = [
    ([[0], [0], [0]], 3),
    ([[0], [-1], [0]], 2),
    ([[0], [1], [0]], 2),  # accepted, but the step behind was drafted from another
    ([[-1], [0], [0]], 1),
    ([[1], [0], [0]], 1),
    ([[0], [0], [-1]], 3),  # a redrawn token is kept
]


@pytest.mark.parametrize(("candidates", "kept"), CHAINS)
def test_a_chain(candidates, kept):
    assert walked(Tree(1, 3), candidates) == (0, kept)


BRANCHES = [
    ([[0], [0], [-1], [-1], [-1]], (0, 3)),
    ([[0], [-1], [0], [0], [0]], (0, 2)),
    ([[1], [-1], [0], [-1], [0]], (1, 3)),
    ([[1], [0], [-1], [0], [0]], (1, 2)),
    ([[1], [0], [1], [0], [0]], (1, 2)),
    ([[2], [0], [0], [0], [0]], (0, 1)),  # a candidate that no branch goes on with
    ([[-1], [0], [0], [0], [0]], (0, 1)),
]


@pytest.mark.parametrize(("candidates", "expected"), BRANCHES)
def test_two_branches_of_three_steps(candidates, expected):
    assert walked(Tree(1, 3, 2), candidates) == expected


def test_a_branch_needs_all_tokens_of_the_step():
    tree = Tree(1, 2, 2)
    assert walked(tree, [[1, 1], [0, 0], [0, 0]]) == (1, 2)
    assert walked(tree, [[0, 1], [0, 0], [0, 0]]) == (0, 1)
    assert walked(tree, [[1, -1], [0, 0], [0, 0]], [[True, False], [True, True], [True, True]]) == (1, 2)
    assert walked(Tree(1, 3), [[0, 0], [0, -1], [0, 0]], [[True, True], [True, False], [True, True]]) == (0, 3)


def test_steps_that_are_none():
    assert walked(Tree(1, 3), [[0], [0], [0]], live=[True, True, False]) == (0, 2)
    assert walked(Tree(1, 3), [[0], [0], [0]], live=[True, False, True]) == (0, 1)
    assert walked(Tree(1, 3), [[0], [0], [0]], live=[False, False, False]) == (0, 0)
    assert walked(Tree(1, 1), [[-1]]) == (0, 1)


def test_rows_and_branches():
    tree = Tree(2, 3, 2)
    steps, images = tree.prefixes(torch.tensor([4, 7]))
    assert tree.rows == len(steps) == 10
    assert images.tolist() == [0, 1] + [0, 0, 1, 1] * 2
    assert steps.tolist() == [4, 7, 5, 5, 8, 8, 6, 6, 9, 9]
    assert [steps[tree.rows_of(d)].tolist() for d in range(3)] == [[4, 7], [5, 5, 8, 8], [6, 6, 9, 9]]
    value = torch.arange(10.0)[:, None]
    branches = tree.by_branch(value)[..., 0]
    assert branches.tolist() == [[[0, 2, 6], [0, 3, 7]], [[1, 4, 8], [1, 5, 9]]]
    assert torch.equal(tree.by_row(tree.by_branch(value)), value)
    assert tree.chosen(value, torch.tensor([1, 0]))[..., 0].tolist() == [[0, 3, 7], [1, 4, 8]]


def test_what_is_kept_is_placed_and_nothing_else():
    length, orders = 9, torch.stack([torch.randperm(9), torch.randperm(9)])
    steps = plan_steps(length, 4, 1.0, "linear")
    plan = Plan(orders, torch.arange(2), steps, False, by_token(steps, torch.device("cpu")))
    counts, m = [step.before - step.after for step in steps], plan.most
    assert len(set(counts)) > 1
    value, number = torch.randn(2, 3, m, 2), torch.randn(2, 3, m)
    into, numbers = torch.randn(2, length, 2), torch.zeros(2, length, dtype=torch.float64)
    for at, kept in (([0, 1], [3, 2]), ([2, 1], [2, 0]), ([4, 3], [0, 1])):
        new = placed(plan, torch.tensor(at), torch.tensor(kept), [(into, value), (numbers, number)])
        expected = [into.clone(), numbers.clone()]
        for b in range(2):
            for j in range(kept[b]):
                start = length - steps[at[b] + j].before
                for t in range(counts[at[b] + j]):
                    for mine, drawn in zip(expected, (value, number)):
                        mine[b, plan.drawing[b, start + t]] = drawn[b, j, t]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(new, expected, strict=True))
