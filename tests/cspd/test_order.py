"""Generation order and step tables."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from cspd.order import (
    Plan,
    by_token,
    guidance_scale,
    known_of,
    mask_lengths,
    mask_of,
    plan_steps,
    positions,
    random_orders,
)


@pytest.mark.parametrize(("seq_len", "steps"), [(256, 64), (256, 256), (16, 16), (16, 5), (16, 1), (16, 40), (1, 3)])
def test_mask_lengths_follow_the_cosine_and_end_empty(seq_len, steps):
    lengths = mask_lengths(seq_len, steps)
    assert lengths[0] == seq_len
    assert lengths[-1] == 0
    assert len(lengths) == steps + 1
    for step, (before, after) in enumerate(pairwise(lengths[:-1])):
        wanted = math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / steps))
        assert after == max(1, min(before - 1, wanted))


def test_steps_draw_every_token_once_and_skip_empty_ones():
    steps = plan_steps(16, 40, 3.0, "linear")
    assert sum(step.before - step.after for step in steps) == 16
    assert all(step.before > step.after for step in steps)
    assert len(steps) < 40
    assert steps[-1].index == 39


def test_guidance_grows_linearly_or_stays():
    steps = plan_steps(16, 8, 3.0, "linear")
    assert [step.cfg for step in steps] == [1 + 2.0 * (16 - max(step.after, 1)) / 16 for step in steps]
    assert {step.cfg for step in plan_steps(16, 8, 3.0, "constant")} == {3.0}
    with pytest.raises(ValueError, match="expected cfg_schedule 'linear' or 'constant', got 'cubic'"):
        guidance_scale(3.0, "cubic", 4, 16)


def test_orders_belong_to_the_image_not_to_the_batch():
    all_orders = random_orders(5, torch.arange(50), 16)
    assert torch.equal(all_orders[7:9], random_orders(5, torch.tensor([7, 8]), 16))
    assert torch.equal(all_orders.sort(1).values, torch.arange(16).expand(50, -1))
    assert not torch.equal(all_orders, random_orders(6, torch.arange(50), 16))
    first = torch.bincount(random_orders(0, torch.arange(16000), 16)[:, 0], minlength=16).double()
    chi2 = float(((first - 1000) ** 2 / 1000).sum())
    assert chi2 < 44.3  # 15 degrees of freedom, p = 1e-4


def test_masks_and_positions_partition_the_sequence():
    orders = random_orders(1, torch.arange(4), 16)
    mask = mask_of(orders, 10)
    assert mask.sum(1).tolist() == [10.0] * 4
    drawn = positions(orders, 10, 6)
    assert mask.gather(1, drawn).min() == 1
    assert mask_of(orders, 6).gather(1, drawn).max() == 0
    assert torch.equal(drawn, drawn.sort(1).values)
    known = known_of(orders, 10)
    assert torch.equal(known, torch.stack([(row == 0).nonzero()[:, 0] for row in mask]))  # as a mask selects them


@pytest.mark.parametrize(("guided", "schedule"), [(False, "linear"), (True, "linear"), (True, "constant")])
@pytest.mark.parametrize(("first", "stop"), [(0, 1), (0, 4), (3, 5), (2, 6)])
def test_a_window_is_its_steps_one_after_the_other(guided, schedule, first, stop):
    steps = plan_steps(16, 6, 3.0 if guided else 1.0, schedule)
    images = torch.tensor([7, 2**40])
    orders, double = random_orders(1, images, 16), 2 if guided else 1
    plan = Plan(orders, images, steps, guided, by_token(steps, orders.device))
    window, taken = plan.window(first, stop), steps[first:stop]
    whole = window.whole
    fields = ("known", "where", "rows", "columns", "steps")
    for draft, i in zip(window.drafts, range(first, stop), strict=True):
        assert all(torch.equal(getattr(draft, name), getattr(plan.step(i), name)) for name in fields)
    assert whole.counts == tuple(step.before - step.after for step in taken)
    expected = torch.cat([positions(orders, step.before, step.after) for step in taken], dim=1)
    assert torch.equal(whole.where, expected)
    assert torch.equal(whole.wanted, expected.repeat(double, 1))
    known = known_of(orders, taken[0].before)
    assert torch.equal(whole.known.sort(1).values, known)
    assert torch.equal(whole.mask, mask_of(orders, taken[0].before).repeat(double, 1))
    assert torch.equal(whole.rows.view(2, -1), images[:, None] * 16 + expected)
    index = [step.index for step in taken for _ in range(step.before - step.after)]
    assert whole.steps.tolist() == index
    scales = [step.cfg for step in taken for _ in range(step.before - step.after)]
    assert torch.allclose(torch.as_tensor(whole.cfg_scale).expand(2 * len(scales)), torch.tensor(scales * 2))
    assert isinstance(whole.cfg_scale, float) == (len(set(scales)) == 1)
    # The same where the number of known tokens is a value on the device, with room for more.
    moving = plan.moving(torch.tensor([known.shape[1]]), whole.counts, min(16, known.shape[1] + 5))
    assert all(
        torch.equal(getattr(moving, name), getattr(whole, name)) for name in ("where", "rows", "columns", "steps")
    )
    assert torch.equal(moving.mask, whole.mask)
    assert torch.equal(moving.known[:, : known.shape[1]], whole.known)
    assert torch.allclose(torch.as_tensor(moving.cfg_scale).expand(2 * len(scales)), torch.tensor(scales * 2))
