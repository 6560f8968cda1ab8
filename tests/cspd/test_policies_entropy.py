"""Windows that end by the draft's entropy, against a loop over numbers."""

from __future__ import annotations

import math

import pytest
import torch

from cspd import EntropyDraft


def naive(policy, entropies):
    """(running means behind every step, whether each step goes on) of one image."""
    mean, means, going = None, [], []
    for a in entropies:
        if mean is None:
            going.append(True)
            mean = a
        else:
            bound = policy.factor * mean
            going.append(not (a < bound if policy.ends == "below" else a > bound))
            mean = policy.memory * mean + (1 - policy.memory) * a
        means.append(mean)
    return means, going


@pytest.mark.parametrize(("factor", "ends"), [(0.9, "below"), (1.1, "above"), (1.0, "below"), (1.0, "above")])
@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_against_a_naive_loop(memory, factor, ends):
    policy = EntropyDraft(8, factor, memory, ends=ends)
    entropies = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    state, means, going = policy.start(5), [], []
    for step in entropies.unbind(dim=1):
        state, go_on = policy.step(state, step)
        assert (go_on.dtype, go_on.shape) == (torch.bool, (5,))
        means.append(state)
        going.append(go_on)
    means, going = torch.stack(means, dim=1), torch.stack(going, dim=1)
    assert 0.2 < going.float().mean() < 0.8
    for row in range(5):
        expected, go_on = naive(policy, entropies[row].tolist())
        assert means[row].tolist() == pytest.approx(expected, rel=1e-5)
        assert going[row].tolist() == go_on


def test_values_by_hand():
    policy = EntropyDraft(factor=0.75, memory=0.5)
    state, go_on = policy.step(policy.start(3), torch.tensor([0.5, 0.5, 0.25]))
    assert (state.tolist(), go_on.tolist()) == ([0.5, 0.5, 0.25], [True, True, True])  # the first ends nothing
    state, go_on = policy.step(state, torch.tensor([0.375, 0.25, 0.75]))  # at the bound it goes on
    assert (state.tolist(), go_on.tolist()) == ([0.4375, 0.375, 0.5], [True, False, True])
    policy = EntropyDraft(factor=1.5, memory=0.5, ends="above")
    _, go_on = policy.step(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.75, 0.875, 0.0]))
    assert go_on.tolist() == [True, False, True]


def test_the_state_is_an_images_own_and_never_written():
    policy = EntropyDraft()
    state = torch.tensor([0.5, math.nan, 0.75])
    kept, entropy = state.clone(), torch.tensor([0.1, 0.2, 0.9])
    together, go_on = policy.step(state, entropy)
    assert torch.equal(state.nan_to_num(-1), kept.nan_to_num(-1))
    for row in range(3):
        alone, goes = policy.step(state[row : row + 1], entropy[row : row + 1])
        assert torch.equal(alone, together[row : row + 1])
        assert torch.equal(goes, go_on[row : row + 1])


def test_an_entropy_that_is_none():
    state = torch.tensor([0.5, math.nan])
    for ends in ("below", "above"):
        after, go_on = EntropyDraft(ends=ends).step(state, torch.full((2,), math.nan))
        assert go_on.tolist() == [True, True]
        assert torch.equal(after.nan_to_num(-1), state.nan_to_num(-1))


def test_types_and_devices():
    policy = EntropyDraft()
    state, _ = policy.step(policy.start(2), torch.tensor([0.5, 0.7], dtype=torch.bfloat16))
    assert state.dtype == torch.float32
    assert state.tolist() == torch.tensor([0.5, 0.7]).bfloat16().tolist()
    state, go_on = policy.step(policy.start(2, "meta"), torch.empty(2, device="meta"))  # no value is read
    assert (state.device.type, go_on.device.type) == ("meta", "meta")
    assert policy.start(0).shape == (0,)
    assert policy.step(policy.start(0), torch.empty(0))[1].shape == (0,)


@pytest.mark.parametrize(
    ("entropy", "match"),
    [
        (torch.zeros(3), r"expected entropies as a floating tensor \(2,\) on cpu, got torch.float32 \(3,\) on cpu"),
        (torch.zeros(2, 1), r"got torch.float32 \(2, 1\) on cpu"),
        (torch.zeros(2, dtype=torch.int64), r"got torch.int64 \(2,\) on cpu"),
        (torch.zeros(2, device="meta"), r"got torch.float32 \(2,\) on meta"),
    ],
)
def test_bad_entropies(entropy, match):
    policy = EntropyDraft()
    with pytest.raises(ValueError, match=match):
        policy.step(policy.start(2), entropy)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"most": 0}, "expected most as an int >= 1, got 0"),
        ({"most": True}, "expected most as an int >= 1, got True"),
        ({"most": 2.0}, "expected most as an int >= 1, got 2.0"),
        ({"factor": 0.0}, "expected a finite factor > 0, got 0.0"),
        ({"factor": math.inf}, "expected a finite factor > 0, got inf"),
        ({"factor": math.nan}, "expected a finite factor"),
        ({"factor": "1"}, "expected a finite factor"),
        ({"memory": 1.0}, r"expected memory in \[0, 1\), got 1.0"),
        ({"memory": -0.1}, r"expected memory in \[0, 1\)"),
        ({"ends": "beside"}, "expected ends as 'below' or 'above', got 'beside'"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        EntropyDraft(**options)


def test_what_a_run_asks_of_it():
    policy = EntropyDraft(3, 1.2, 0.5, ends="above")
    assert (policy.most, policy.wants_entropy) == (3, True)
    assert repr(policy) == "EntropyDraft(3, 1.2, 0.5, ends='above')"


def test_one_of_the_same_numbers_is_the_same():
    """Graphs of a run are found by it: made anew for every run it is the same one, and changed it is another."""
    policy, kept = EntropyDraft(3, 0.5), {EntropyDraft(3, 0.5): 1}
    assert policy in kept
    assert EntropyDraft(3, 0.6) not in kept
    assert EntropyDraft(3, 0.5, ends="above") != policy
    assert type("Other", (EntropyDraft,), {})(3, 0.5) != policy
    policy.factor = 0.6
    assert policy not in kept
