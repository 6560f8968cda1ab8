"""Statistics of a run: what is averaged over what."""

from __future__ import annotations

import math

import pytest
import torch

from cspd.stats import Recorder, window_sums
from cspd.window import probability_of
from cspd_kernels import CandidateVerdict


def verdict(tries):
    """Of tokens with one candidate each."""
    tries = torch.tensor(tries, dtype=torch.int32)
    return CandidateVerdict(tries, tries == 0, torch.where(tries == 0, 0, -1).int(), tries, torch.zeros(len(tries), 1))


def test_acceptance_is_weighted_by_tokens_and_the_raw_one_is_a_probability():
    recorder = Recorder(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 4))
    first = window_sums(verdict([0, 0, -1]), probability_of(torch.tensor([5.0, -1.0, -torch.inf])))
    second = window_sums(verdict([3]), torch.ones(1))
    recorder.prefill()
    recorder.window(first, 3, 2, 2)
    recorder.window(second, 1, 1, 2)
    recorder.stop()
    with torch.device("meta"):  # a default device of the caller's
        stats = recorder.finish()
    assert stats.acceptance_per_window == pytest.approx([2 / 3, 0.0])
    assert stats.raw_acceptance_per_window == pytest.approx([(1 + math.exp(-1)) / 3, 1.0])
    assert stats.acceptance == pytest.approx(2 / 4)
    assert stats.raw_acceptance == pytest.approx((2 + math.exp(-1)) / 4)
    assert stats.fallback == pytest.approx(1 / 4)
    assert (stats.drafted, stats.prefilled) == (4, 4)
    assert (stats.gammas, stats.target_calls, stats.draft_calls) == ([2, 1], 3, 3)
    assert (stats.verify, stats.rounds, stats.steps_per_round) == ("window", 2, 1.5)
    assert (stats.target_rows, stats.candidates) == (4, [2])
    assert not {"outcome", "probability"} & set(stats.to_dict())
