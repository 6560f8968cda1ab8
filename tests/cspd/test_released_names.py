"""The released code's names of arguments: accepted as keywords, with the same meaning; both at once are refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from small_models import small_mar

import cspd
from cspd.released_names import released_names


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


def test_released_names_make_the_same_images(pair):
    runner = cspd.SpecDecodeRunner(*pair, relaxation=3.0, prefill=0.4)
    images = runner.run(2, steps=8, gamma=3, seed=5)
    windows = runner.stats.gammas
    assert windows[0] == 3
    assert runner.stats.prefilled
    for released in (
        cspd.SpecDecodeRunner(*pair, inner_temperature=3.0, ratio=0.4),
        cspd.SpecDecodeRunner(*pair, 3.0, ratio=0.4),
        cspd.SpecDecodeRunner(*pair, 3.0, 0.4),
    ):
        assert (released.relaxation, released.prefill) == (3.0, 0.4)
        assert torch.equal(released.run(2, num_iter=8, num_draft=3, seed=5), images)
        assert released.stats.gammas == windows
        assert torch.equal(released.run(2, 8, num_draft=3, seed=5), images)
        assert torch.equal(released.run(2, 8, 3, seed=5), images)
    assert not torch.equal(cspd.SpecDecodeRunner(*pair, 3.0, ratio=0.0).run(2, 8, 3, seed=5), images)
    assert not torch.equal(released.run(2, num_iter=9, num_draft=3, seed=5), images)
    assert not torch.equal(released.run(2, num_iter=8, num_draft=2, seed=5), images)


def test_a_state_by_the_released_name(pair):
    runner = cspd.SpecDecodeRunner(*pair)
    plans = [state.plan.steps for state in (runner.begin(2, num_iter=8), runner.begin(2, steps=8), runner.begin(2, 8))]
    assert plans[0] == plans[1] == plans[2]
    assert len(plans[0]) == 8


@pytest.mark.parametrize(
    ("arguments", "options", "both"),
    [
        ((), {"relaxation": 1.0, "inner_temperature": 1.0}, "relaxation or inner_temperature"),
        ((1.0,), {"inner_temperature": 1.0}, "relaxation or inner_temperature"),
        ((), {"prefill": 0.1, "ratio": 0.1}, "prefill or ratio"),
        ((1.0, 0.1), {"ratio": 0.1}, "prefill or ratio"),
    ],
)
def test_both_names_of_a_runners_option(pair, arguments, options, both):
    with pytest.raises(TypeError, match=f"expected {both}, its name in the released code, got both"):
        cspd.SpecDecodeRunner(*pair, *arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "both"),
    [
        ((), {"steps": 8, "num_iter": 8}, "steps or num_iter"),
        ((8,), {"num_iter": 8}, "steps or num_iter"),
        ((), {"gamma": 3, "num_draft": 3}, "gamma or num_draft"),
        ((8, 3), {"num_draft": 3}, "gamma or num_draft"),
    ],
)
def test_both_names_of_a_runs_argument(pair, arguments, options, both):
    with pytest.raises(TypeError, match=f"expected {both}, its name in the released code, got both"):
        cspd.SpecDecodeRunner(*pair).run(2, *arguments, **options)


def test_released_attributes_can_be_read_only(pair):
    runner = cspd.SpecDecodeRunner(*pair, 3.0, 0.4)
    assert (runner.inner_temperature, runner.ratio) == (3.0, 0.4)
    runner.relaxation, runner.prefill = 5.0, 0.5
    assert (runner.inner_temperature, runner.ratio) == (5.0, 0.5)
    for name in ("inner_temperature", "ratio"):
        with pytest.raises(AttributeError):
            setattr(runner, name, 1.0)


def test_signatures_show_our_names_only():
    runner, run = (list(inspect.signature(f).parameters) for f in (cspd.SpecDecodeRunner, cspd.SpecDecodeRunner.run))
    assert runner[:4] == ["draft_model", "target_model", "relaxation", "prefill"]
    assert run[1:4] == ["bsz", "steps", "gamma"]
    assert not {"inner_temperature", "ratio", "num_iter", "num_draft"} & {*runner, *run}


def test_other_keywords_pass_as_they_are():
    @released_names(old="new")
    def function(new=1, **others):
        return new, others

    assert function() == (1, {})
    assert function(old=2, other=3) == (2, {"other": 3})
    assert function(2, other=3) == (2, {"other": 3})
