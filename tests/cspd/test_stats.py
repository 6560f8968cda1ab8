"""Statistics of a run: what is averaged over what."""

from __future__ import annotations

import math

import pytest
import torch

from cspd.stats import Recorder, window_sums


def test_acceptance_is_weighted_by_tokens_and_the_raw_one_is_a_probability():
    recorder = Recorder(torch.zeros(2, 4, dtype=torch.int8))
    ratios = torch.tensor([5.0, -1.0, -torch.inf])
    first = window_sums(torch.tensor([True, True, False]), ratios, torch.tensor([0, 0, -1], dtype=torch.int32))
    second = window_sums(torch.tensor([False]), torch.tensor([0.0]), torch.tensor([3], dtype=torch.int32))
    recorder.prefill()
    recorder.window(first, 3, 2)
    recorder.window(second, 1, 1)
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
    assert "outcome" not in stats.to_dict()
