"""Passes whose rows stand at different places: each row is as in a pass by itself."""

from __future__ import annotations

import dataclasses

import fake_graphs
import pytest
import torch
from dispatch_modes import NoHostRead, no_wait_for_cuda
from ragged import BOUNDS, IMAGES, alone, inputs, made, model, places, spoilt
from small_models import small_mar

import cspd
from cspd import order
from cspd.order import Plan
from cspd.whole import passes, steps
from cspd.whole.noise import PhiloxSource
from cspd.whole.transformers import ByMasks, ByTables, ByWeights
from cspd.whole.weights import Weights
from cspd_kernels import PhiloxNoise
from cspd_kernels.ops.add_norm import norm_backend
from cspd_kernels.testing import relative_error


@pytest.mark.parametrize(("guided", "schedule"), [(False, "linear"), (True, "linear"), (True, "constant")])
@pytest.mark.parametrize(("num_iter", "span"), [(6, 1), (6, 3), (16, 4), (1, 2), (40, 1)])
def test_the_tables_are_those_of_each_rows_steps(num_iter, span, guided, schedule):
    plan = made(num_iter, guided, schedule)
    count = len(plan.steps)
    assert plan.starts.tolist() == [16 - s.before for s in plan.steps] + [16] * (17 - count)
    assert plan.most == max(s.before - s.after for s in plan.steps)
    at, image = torch.tensor([0, count - 1, count, count // 2, 0, count + 3]), torch.tensor([2, 0, 1, 1, 0, 2])
    taken = plan.ragged(at, image, 16, span)
    n = span * plan.most
    assert taken.counts == (plan.most,) * span
    scales = torch.as_tensor(taken.cfg_scale).expand(6 * n).view(6, n)
    for row in range(6):
        steps_of = [plan.steps[i] for i in range(at[row], min(int(at[row]) + span, count))]
        shown, valid = slice(row, row + 1), taken.valid[row].view(span, plan.most)
        assert valid.sum(1).tolist() == [s.before - s.after for s in steps_of] + [0] * (span - len(steps_of))
        assert torch.equal(valid, valid.sort(dim=1, descending=True).values)  # a step's own ones come first
        known, rank, where, columns = alone(plan, row, at, image, span)
        valid = valid.flatten()
        assert taken.count[row] == known.shape[1]
        assert torch.equal(taken.known[shown, : known.shape[1]], known)
        assert torch.equal(taken.rank[shown], rank)
        assert torch.equal(taken.where[shown, valid], where)
        assert torch.equal(taken.columns[row, valid], columns)
        assert torch.equal(taken.rows.view(6, n)[row, valid], IMAGES[image[row]] * 16 + where[0])
        each = [s for s in steps_of for _ in range(s.before - s.after)]
        assert taken.steps[row, valid].tolist() == [s.index for s in each]
        assert torch.allclose(scales[row, valid], torch.tensor([s.cfg for s in each]))
        # What fills up is a token of the image, too: the last one of its step.
        assert torch.equal(taken.where[row], plan.drawing[image[row], taken.columns[row]])
        for step, own in enumerate(taken.columns[row].view(span, -1)):
            ended = steps_of[step].after if step < len(steps_of) else 0
            assert (own <= 15 - ended).all() and own[-1] == 15 - ended
    mask = (taken.rank >= taken.count[:, None]).float()
    assert torch.equal(taken.mask, mask.repeat(taken.doubled, 1))
    assert mask.sum(1).tolist() == [16 - float(count) for count in taken.count]


def test_the_room_must_hold_what_is_known():
    plan = made()
    at, image = places(plan)
    most = int(plan.ragged(at, image, 16).count.max())
    plan.ragged(at, image, most)
    with pytest.raises(ValueError, match=f"expected room for the {most} known tokens, got {most - 1}"):
        plan.ragged(at, image, most - 1)


def test_noise_is_the_tokens_own_in_every_row():
    plan, head = made(), None  # which is not looked at
    source = PhiloxSource(9, plan.rows, 4)
    taken = plan.ragged(*places(plan), 16, 2)
    x_T, noise = source.of(taken, head)  # noqa: N806
    assert torch.equal(x_T, PhiloxNoise(9, taken.rows).x_T(4))
    assert torch.equal(noise.rows, taken.rows)
    shared = plan.window(1, 3).whole
    assert torch.equal(source.of(shared, head)[0], PhiloxNoise(9, shared.rows).x_T(4))
    table = torch.arange(3 * 16).view(3, 16)
    assert torch.equal(taken.take(table), taken.image[:, None] * 16 + taken.columns)


@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("num_iter", "span", "room"), [(6, 1, 16), (6, 3, 12), (16, 1, 15), (16, 3, 16), (1, 2, 0)])
def test_a_row_is_as_in_a_pass_by_itself(num_iter, span, room, guided, spoil):
    plan, mar = made(num_iter, guided), model()
    at, image = places(plan) if num_iter > 1 else (torch.zeros(3, dtype=torch.int64), torch.tensor([2, 0, 1]))
    taken = plan.ragged(at, image, room, span)
    rows = len(at)
    tokens, embedding = inputs(rows, taken.doubled)
    exact = Weights(mar, torch.float64)
    for dtype, bound in BOUNDS:
        weights = Weights(mar, dtype)
        whole = ByWeights(weights, "torch").conditions(spoilt(tokens, taken, spoil), taken, embedding)
        assert whole.dtype == weights.stream
        assert whole.isfinite().all()
        for row in range(rows):
            known, rank, where, _ = alone(plan, row, at, image, span)
            both = torch.arange(row, taken.doubled * rows, rows)
            found = whole[both][:, taken.valid[row]]
            # Half types are as near to float64 as the row by itself is; the others as near to that.
            own = weights if bound < 1e-3 else exact
            expected = passes.conditions(own, tokens[row : row + 1], known, rank, where, embedding[both])
            assert relative_error(found, expected) < bound


def test_tokens_of_other_rows_and_known_tokens_matter():
    """What the test above could not see if rows were mixed up or nothing were looked at."""
    plan, weights = made(), Weights(model(), torch.float32)
    taken = plan.ragged(*places(plan), 16)
    tokens, embedding = inputs(6, 2)
    before = passes.conditions(
        weights, tokens, taken.known, taken.rank, taken.where, embedding, taken.count, backend="torch"
    )
    tokens[1, plan.drawing[0, 3]] += 1.0  # known in rows 1 and 4 of image 0, changed in row 1 alone
    after = ByWeights(weights, "torch").conditions(tokens, taken, embedding)
    changed = [relative_error(after[[r, r + 6]], before[[r, r + 6]]) > 1e-3 for r in range(6)]
    assert changed == [False, True, False, False, False, False]
    for shift in (-1, 1):  # one token more or fewer known shows in a row that has any
        other = dataclasses.replace(taken, count=(taken.count + shift).clamp(min=0, max=16))
        moved = ByWeights(weights, "torch").conditions(tokens, other, embedding)
        assert all(relative_error(moved[r], after[r]) > 1e-4 for r in range(1, 6))


@pytest.mark.parametrize("guided", [False, True])
def test_rows_behind_the_last_step_are_harmless(guided):
    plan, weights = made(guided=guided), Weights(model(), torch.float32)
    at, image = places(plan)
    done = torch.tensor([6, 9])
    several = plan.ragged(torch.cat([at, done]), torch.cat([image, torch.tensor([0, 1])]), 16, 3)
    tokens, embedding = inputs(8, several.doubled)
    with_them, entropy = ByWeights(weights, "torch").conditions(tokens, several, embedding, attention=True)
    assert not several.valid[6:].any()
    assert several.count.tolist()[6:] == [16, 16]
    assert with_them.isfinite().all() and entropy.isfinite().all()
    keep = torch.arange(len(embedding)).view(-1, 8)[:, :6].flatten()
    without = ByWeights(weights, "torch").conditions(tokens[:6], plan.ragged(at, image, 16, 3), embedding[keep])
    assert relative_error(with_them[keep], without) < 1e-5


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("num_iter", "span"), [(6, 2), (16, 1)])
def test_own_blocks_and_own_methods_give_the_same(num_iter, span, guided):
    plan, mar, called = made(num_iter, guided), model(), []
    at, image = places(plan)
    taken = plan.ragged(at, image, 16, span)
    tokens, embedding = inputs(6, taken.doubled)
    expected = ByWeights(Weights(mar, torch.float32), "torch").conditions(tokens, taken, embedding)
    mar.decoder_blocks[0].register_forward_hook(lambda *_: called.append(1))
    unknown = spoilt(tokens, taken, torch.nan)
    with torch.no_grad():
        for kind, what in ((ByTables, "blocks"), (ByMasks, "methods")):
            called.clear()
            own = kind(mar, None)
            assert relative_error(own.conditions(unknown, taken, embedding), expected) < 1e-5
            assert len(called) == 5  # the numbers of known tokens, of which two rows share one
            assert not own.shows_attention
            with pytest.raises(ValueError, match=f"that shows its attention, .* own {what}"):
                own.conditions(unknown, taken, embedding, attention=True)
            # A pass that counts on the host is one call, as before.
            called.clear()
            step = plan.step(2)
            own.conditions(tokens[:3], step, embedding[: 3 * step.doubled])
            assert len(called) == 1


def test_nothing_is_read_on_the_host(monkeypatch):
    monkeypatch.setattr(order, "check_room", lambda *_: None)  # done on the CPU alone
    plan, weights = made(), Weights(model(), torch.float32)
    at, image = places(plan)
    tokens, embedding = inputs(6, 2)
    source = PhiloxSource(9, plan.rows, 4)
    with NoHostRead():
        taken = plan.ragged(at, image, 16, 2)
        ByWeights(weights, "torch").conditions(tokens, taken, embedding, attention=True)
        source.of(taken, None)


def test_graphs_of_one_run_find_the_places_of_another(monkeypatch):
    fake_graphs.use(monkeypatch)
    runner = cspd.SpecDecodeRunner(small_mar(1, width=16), model(), ratio=0.2)
    first, other = (runner.begin(3, n, cfg=2.0, seed=n) for n in (6, 9))
    for state in (first, other):
        state.noise.seed_on_device()
    assert steps.signature(first) == steps.signature(other)  # the number of steps is no size
    kept = steps.Steps(first)
    starts, at = first.plan.starts, torch.tensor([0, 3, 5, 2])
    expected = other.plan.ragged(at, torch.tensor([0, 1, 2, 1]), 16, 2)
    assert not torch.equal(starts, other.plan.starts)
    with kept.of(other):
        assert first.plan.starts is starts and starts.data_ptr() == first.plan.starts.data_ptr()
        found = kept.state.plan.ragged(at, torch.tensor([0, 1, 2, 1]), 16, 2)
        for name in ("known", "count", "rank", "where", "rows", "columns", "steps", "cfg_scale", "valid"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_serves_all_places(dtype):
    """Where the rows stand is a value on the device; a replay is as the CPU's pass, and the host waits for neither."""
    mar, plan = small_mar(width=64, encoder_depth=2, decoder_depth=2), made()
    cuda = torch.device("cuda")
    other = Plan(
        plan.drawing.flip(1).to(cuda), IMAGES.to(cuda), plan.steps, True, (plan.numbers.to(cuda), plan.scale.to(cuda))
    )
    assert torch.equal(other.drawing.cpu(), plan.drawing)
    tokens, embedding = torch.randn(6, 16, 4), torch.randn(12, 64)
    exact = ByWeights(Weights(mar, torch.float64), "torch")
    at, image = places(plan)
    cases = [(at, image), (at.flip(0), image), (at, image.flip(0))]
    expected = [exact.conditions(tokens, plan.ragged(a, i, 16, 2), embedding, attention=True) for a, i in cases]
    ours = ByWeights(Weights(mar.to(cuda), dtype), norm_backend(None, cuda))
    at, image, tokens, embedding = (value.to(cuda, copy=True) for value in (at, image, tokens, embedding))

    def launch():
        return ours.conditions(tokens, other.ragged(at, image, 16, 2), embedding, attention=True)

    launch()
    with no_wait_for_cuda():
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, entropy = launch()
    for (a, i), (wanted, spread) in zip(cases, expected, strict=True):
        at.copy_(a)
        image.copy_(i)
        graph.replay()
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert relative_error(z.cpu(), wanted) < bound
        assert relative_error(entropy.cpu(), spread) < bound
