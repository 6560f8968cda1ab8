"""Context-aware relaxation: its measure by hand, its bounds, what it must not depend on."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from cspd import ContextRelaxation, Window
from cspd.context_relaxation import change_behind

WIDTH = 5


def window_of(z, before, known, branches=None, valid=None):
    others = dict.fromkeys(("positions", "steps", "draft_z", "previous_target_z", "draft_log_std", "target_log_std"))
    ratio = torch.zeros(known.shape, device=known.device)
    return Window(
        **others, log_ratio=ratio, target_z=z, target_before=before, known=known, target_branches=branches, valid=valid
    )


def random_window(counts=(2, 1, 3), batch=4, branches=3, seed=0, size=0.3, room=None):
    """Steps of these numbers of tokens, behind another number of known ones in each row; padded to ``room`` a step."""
    generator = torch.Generator().manual_seed(seed)
    room = max(counts) if room is None else room
    n = room * len(counts)
    z = torch.randn(batch, n, WIDTH, generator=generator)
    before = z + size * torch.randn(z.shape, generator=generator)
    tree = z[:, None] + size * torch.randn(batch, branches, n, WIDTH, generator=generator)
    starts = torch.tensor([sum(counts[:s]) for s in range(len(counts))]).repeat_interleave(room)
    valid = torch.cat([torch.arange(room) < count for count in counts]).expand(batch, -1)
    return window_of(z, before, starts + torch.arange(batch)[:, None], tree if branches else None, valid)


def naive(window):
    """The change, token by token, in Python."""
    batch, n = window.known.shape
    change = torch.full((batch, n), math.nan)
    for row in range(batch):
        tokens = [t for t in range(n) if window.valid is None or window.valid[row, t]]
        z = window.target_z[row].double()
        mean = z[tokens].mean(dim=0)
        spread = sum(float(((z[t] - mean) ** 2).sum()) for t in tokens) / (len(tokens) - 1)
        steps = sorted({int(k) for k in window.known[row]})
        for t in range(n):
            place = steps.index(int(window.known[row, t]))
            following = [u for u in tokens if place + 1 < len(steps) and window.known[row, u] == steps[place + 1]]
            parts = []
            for u in following:
                value = float(((z[u] - window.target_before[row, u].double()) ** 2).sum())
                if window.target_branches is not None:
                    tree = window.target_branches[row, :, u].double()
                    value = (value + float(((tree - tree.mean(dim=0)) ** 2).sum())) / len(tree)
                parts.append(value / spread)
            if parts:
                change[row, t] = sum(parts) / len(parts)
    return change


@pytest.mark.parametrize("branches", [0, 1, 2, 4])
@pytest.mark.parametrize(("counts", "room"), [((1, 1, 1, 1), 1), ((2, 1, 3), 3), ((1, 2, 2), 4), ((3,), 3)])
def test_the_change_against_a_naive_loop(counts, room, branches):
    window = random_window(counts, branches=branches, room=room)
    torch.testing.assert_close(change_behind(window), naive(window), rtol=1e-5, atol=0, equal_nan=True)


def test_values_by_hand():
    """Two steps of one token and one of two: z on a line, V = 4 (of 0, 2, 4, 4 about 2.5: 11 / 3)."""
    z = torch.tensor([[[0.0], [2.0], [4.0], [4.0]]])
    before = torch.tensor([[[9.0], [2.5], [4.0], [5.0]]])
    known = torch.tensor([[3, 4, 5, 5]])
    spread = 11 / 3
    policy = ContextRelaxation(2.0, 8.0, scale=0.5)
    depth = [0.25 / spread, 0.5 / spread]  # of the second step; the mean of 0 and 1
    expected = [2 * math.sqrt(0.5 / depth[0]), 2 * math.sqrt(0.5 / depth[1]), 2.0, 2.0]
    assert policy(window_of(z, before, known))[0].tolist() == pytest.approx(expected, rel=1e-6)
    tree = z[:, None] + torch.tensor([0.0, 3.0]).view(1, 2, 1, 1)  # a variance of 4.5 in every token
    both = [(value + 4.5 / spread) / 2 for value in depth]
    expected = [max(2.0, 2 * math.sqrt(0.5 / change)) for change in both] + [2.0, 2.0]
    assert policy(window_of(z, before, known, tree))[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert policy(window_of(z, z, known))[0].tolist() == [8.0, 8.0, 2.0, 2.0]  # nothing changes: most


@pytest.mark.parametrize(("least", "most"), [(1.0, 42.0), (0.3, 0.7), (3.0, 3.0), (0.1, 1e30)])
def test_bounds(least, most):
    for size in (0.0, 1e-30, 1e-3, 1.0, 1e18):
        relaxation = ContextRelaxation(least, most)(random_window(size=size))
        low, high = torch.tensor([least, most]).unbind()  # as float32 has them
        assert bool(((relaxation >= low) & (relaxation <= high)).all())
        assert relaxation.dtype == torch.float32
    relaxation = ContextRelaxation(least, most)(random_window(size=0.0))
    assert torch.equal(relaxation[:, :6], torch.full((4, 6), most))
    assert torch.equal(relaxation[:, 6:], torch.full((4, 3), least))  # the last step


@pytest.mark.parametrize("measure", ["target_before", "target_branches"])
def test_monotone_in_each_measure(measure):
    """Twice, and ten times, as far from where nothing changes."""
    window = random_window(size=0.05)
    z = window.target_z if measure == "target_before" else window.target_z[:, None]
    values = []
    for factor in (0.0, 1.0, 2.0, 10.0):
        moved = z + factor * (getattr(window, measure) - z)
        values.append(ContextRelaxation(1.0, 1e6)(dataclasses.replace(window, **{measure: moved}))[:, :6])
    assert all(bool((nearer > farther).all()) for nearer, farther in pairwise(values))


def test_a_common_shift_and_a_scale_change_nothing():
    window, policy = random_window(), ContextRelaxation(0.01, 1e4)
    expected = policy(window)
    assert expected[:, :6].unique().numel() > 4
    fields = ("target_z", "target_before", "target_branches")
    for change in (lambda z: z + torch.linspace(-3, 8, WIDTH), lambda z: 64.0 * z, lambda z: -z / 3):
        moved = dataclasses.replace(window, **{name: change(getattr(window, name)) for name in fields})
        torch.testing.assert_close(policy(moved), expected, rtol=1e-4, atol=0)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).Q
    moved = dataclasses.replace(window, **{name: getattr(window, name) @ rotation for name in fields})
    torch.testing.assert_close(policy(moved), expected, rtol=1e-4, atol=0)


def test_what_a_position_adds_is_in_no_difference():
    """A vector of each position's own moves V alone, and so all changes of a row by one factor."""
    window = random_window()
    own = 10 * torch.randn(window.known.shape[1], WIDTH, generator=torch.Generator().manual_seed(2))
    fields = {name: getattr(window, name) + own for name in ("target_z", "target_before", "target_branches")}
    factor = change_behind(dataclasses.replace(window, **fields)) / change_behind(window)
    torch.testing.assert_close(factor[:, :6], factor[:, :1].expand(-1, 6), rtol=1e-3, atol=0)
    assert bool((factor[:, 0] < 0.1).all())


@pytest.mark.parametrize("garbage", [1e30, -7.0, math.inf, math.nan])
def test_what_fills_up_does_not_show(garbage):
    window, policy = random_window((2, 1, 3), room=4), ContextRelaxation(0.1, 1e3)
    valid, fields = window.valid, {}
    assert not valid.all()
    for name in ("target_z", "target_before"):
        fields[name] = getattr(window, name).masked_fill(~valid[..., None], garbage)
    fields["target_branches"] = window.target_branches.masked_fill(~valid[:, None, :, None], garbage)
    assert torch.equal(policy(dataclasses.replace(window, **fields))[valid], policy(window)[valid])
    dense = random_window((2, 1, 3), room=4)
    columns = valid[0].nonzero().flatten()
    fields = {name: getattr(dense, name)[:, columns] for name in ("target_z", "target_before", "known", "log_ratio")}
    fields["target_branches"] = dense.target_branches[:, :, columns]
    packed = policy(dataclasses.replace(dense, **fields, valid=None))
    torch.testing.assert_close(packed, policy(window)[:, columns], rtol=1e-5, atol=0)


def test_steps_behind_the_last_of_an_image():
    """A step of pads alone: the one before it is the last, and knows nothing of what follows."""
    relaxation = ContextRelaxation(1.5, 1e3)(random_window((1, 2, 0), room=2))
    assert bool((relaxation[:, 0] > 1.5).all())
    assert torch.equal(relaxation[:, 2:], torch.full((4, 4), 1.5))


def test_what_is_not_known_is_not_relaxed():
    one = random_window((1,), branches=0)
    assert ContextRelaxation(1.5, 9.0)(one).unique().tolist() == [1.5]
    same = random_window((1, 1, 1), branches=0)  # equal hidden states: no V to measure by
    flat = torch.zeros_like(same.target_z)
    still = dataclasses.replace(same, target_z=flat, target_before=flat)
    assert ContextRelaxation(1.5, 9.0)(still).unique().tolist() == [1.5]
    # The first step's hidden states of a step earlier are nobody's business.
    window = random_window()
    before = window.target_before.clone()
    before[:, :3] = math.nan
    policy = ContextRelaxation()
    assert torch.equal(policy(dataclasses.replace(window, target_before=before)), policy(window))


def test_a_row_does_not_depend_on_its_batch():
    window, policy = random_window(batch=6), ContextRelaxation()
    rows = {f.name: getattr(window, f.name) for f in dataclasses.fields(window)}
    rows = {name: None if value is None else value[2:3] for name, value in rows.items()}
    assert torch.equal(policy(Window(**rows)), policy(window)[2:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    window, policy = random_window(), ContextRelaxation()
    fields = {name: getattr(window, name).to(dtype) for name in ("target_z", "target_before", "target_branches")}
    rounded = {name: value.float() for name, value in fields.items()}
    relaxation = policy(dataclasses.replace(window, **fields))
    assert relaxation.dtype == torch.float32
    assert torch.equal(relaxation, policy(dataclasses.replace(window, **rounded)))


def test_no_value_is_read():
    """Tensors on the meta device have none."""
    z = torch.empty(3, 6, WIDTH, device="meta")
    known = torch.empty(3, 6, dtype=torch.int64, device="meta")
    valid = torch.empty(3, 6, dtype=torch.bool, device="meta")
    relaxation = ContextRelaxation()(window_of(z, z, known, torch.empty(3, 2, 6, WIDTH, device="meta"), valid))
    assert (relaxation.shape, relaxation.device.type, relaxation.dtype) == ((3, 6), "meta", torch.float32)


def test_the_window_must_look_ahead():
    window = random_window()
    assert ContextRelaxation.looks_ahead is True
    for name in ("target_before", "known"):
        with pytest.raises(ValueError, match='as verify="strict" computes it, got one without target_before'):
            ContextRelaxation()(dataclasses.replace(window, **{name: None}))


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0.0, 3.0), {}, "expected 0 < least <= most, both finite, got 0.0 and 3.0"),
        ((4.0, 3.0), {}, "0 < least <= most"),
        ((1.0, math.inf), {}, "both finite"),
        ((math.nan, 2.0), {}, "0 < least <= most"),
        ((), {"scale": 0.0}, "expected a finite scale > 0, got 0.0"),
        ((), {"scale": math.inf}, "finite scale"),
        ((), {"scale": math.nan}, "finite scale"),
    ],
)
def test_bad_arguments(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        ContextRelaxation(*arguments, **options)


def test_repr():
    assert repr(ContextRelaxation(2, 3, scale=0.5)) == "ContextRelaxation(2.0, 3.0, scale=0.5)"
