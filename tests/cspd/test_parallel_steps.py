"""``parallel_tol`` of ``patch`` and the speculative runner: the sequential tokens, from fewer calls of the network."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from foreign import Head, conditions, made, run, state, unchanged
from slow import slow
from small_models import CSpDDiffLoss, sample, small_mar

import cspd
from cspd import made_calls, window
from cspd.candidates import Drafted
from cspd.demo.pair import load_pair
from cspd.loop import patch_of
from cspd.window import run_window
from cspd_kernels import Denoised, DenoisedInParallel, DiffusionHead
from cspd_kernels.noise import uniforms
from cspd_kernels.ops import denoise as denoise_op
from cspd_kernels.ops.denoise import parallel
from cspd_kernels.testing import randomize_, relative_error

BAD = [0, 1, -1e-3, 1e9, float("nan"), True, "always", "1e-3", [1e-3], torch.tensor(1e-3)]
STEPS = 40


@pytest.fixture
def chains(monkeypatch):
    """What every call of ``denoise`` by a patch or a runner was asked for and gave, in turn."""
    seen = []

    def watched(function):
        def denoise(head, cond, x_T, *args, **options):  # noqa: N803
            out = function(head, cond, x_T, *args, **options)
            asked = {name: options.get(name) for name in ("parallel_tol", "guess")}
            seen.append(SimpleNamespace(**asked, sweeps=out.sweeps, trajectory=out.trajectory, head=head))
            return out

        return denoise

    for module in (made_calls, window):
        monkeypatch.setattr(module, "denoise", watched(module.denoise))
    return seen


def mean_sweeps(chains) -> float:
    return float(torch.cat([chain.sweeps for chain in chains]).double().mean())


@pytest.mark.parametrize("noise", ["upstream", "philox"])
@pytest.mark.parametrize("options", [{}, {"cfg": 3.0}, {"temperature": 0.0}, {"cfg": 3.0, "temperature": 0.0}], ids=str)
@pytest.mark.parametrize("schedule", [slow("cosine"), "linear"])
def test_a_patched_model_draws_the_sequential_tokens(schedule, options, noise, chains):
    model = small_mar(schedule=schedule, num_sampling_steps=str(STEPS))
    with cspd.patched(model, noise=noise, parallel_tol=None):
        expected = sample(model, **options)
    # Measured here: 1.5e-6 and 4e-4. The transformer in front of later tokens sees those of before.
    for tolerance, bound in ((1e-6, 1e-5), (1e-3, 2e-3)):
        with cspd.patched(model, noise=noise, parallel_tol=tolerance):
            chains.clear()
            actual = sample(model, **options)
        assert relative_error(actual, expected) < bound
        assert {chain.parallel_tol for chain in chains} == {tolerance}
        assert mean_sweeps(chains) < 0.6 * STEPS
    assert relative_error(actual, expected) > 1e-6  # 1e-3 is not all of it


def test_its_own_code_agrees_too():
    """Not the patched sequential chain but the model's own loop, every step by its own network."""
    model = small_mar(schedule="linear", num_sampling_steps=str(STEPS))
    expected = sample(model, cfg=2.0)
    cspd.patch(model, parallel_tol=1e-6)
    assert relative_error(sample(model, cfg=2.0), expected) < 1e-5


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("given", [True, False])
def test_the_manager_of_cspd(cfg, given):
    torch.manual_seed(0)
    head = randomize_(CSpDDiffLoss(4, 32, 2, 32, "12"), 1)
    z, noise, inner = torch.randn(6, 32), torch.randn(3, 4).repeat(2, 1), torch.randn(12, 3, 4).repeat(1, 2, 1)
    kept, found = slice(3) if cfg != 1.0 else slice(None), []
    for patched in (False, True):
        if patched:
            cspd.patch(head, parallel_tol=1e-6)
            patch_of(head.net).tell = pytest.fail
        torch.manual_seed(1)
        tokens = head.sample_with_inter_noise(z, noise, inner if given else None, 0.7, cfg)
        manager = head.gen_diffusion.manager
        path = manager.log_var.sum(-1)
        found.append([v[kept] for v in (tokens, manager.sample, manager.mean, manager.variance, path)])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_the_comparison_before_is_of_the_steps(chains):
    """A tolerance of the user's takes no part in it: it would hide a difference, or be taken for one."""
    head = made(Head)
    cspd.patch(head, parallel_tol=0.5)
    assert chains
    assert {chain.parallel_tol for chain in chains} == {None}
    chains.clear()
    run(head, lambda h: h.sample(conditions()))
    assert [chain.parallel_tol for chain in chains] == [0.5]


def test_copies_and_pickles_take_the_option_along(chains):
    model = cspd.patch(small_mar(), parallel_tol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        chains.clear()
        twin.diffloss.sample(torch.randn(3, 32))
        assert chains[-1].parallel_tol == 1e-4  # before it a pickle's copy is compared, step by step
    cspd.patch(model)
    chains.clear()
    model.diffloss.sample(torch.randn(3, 32))
    assert [(chain.parallel_tol, chain.trajectory) for chain in chains] == [("auto", None)]


@pytest.mark.parametrize("number", [np.float32(1e-3), np.float64(1e-3), Fraction(1, 1000)])
def test_numbers_of_other_kinds(number, chains):
    model = cspd.patch(small_mar(), parallel_tol=number)
    chains.clear()
    model.diffloss.sample(torch.randn(3, 32))
    assert chains[0].trajectory.shape == (3, 12, 4)


@pytest.mark.parametrize("value", BAD, ids=str)
def test_what_is_no_tolerance(value):
    text = r"expected parallel_tol None, 'auto' or a number in \(0, 1\), got "
    head, model = made(Head), small_mar()
    before = state(head)
    with pytest.raises(ValueError, match=f"^patch {text}"):
        cspd.patch(head, parallel_tol=value)
    with pytest.raises(ValueError, match=f"^patch {text}"), cspd.patched(head, parallel_tol=value):
        pass
    assert unchanged(before, state(head))
    with pytest.raises(ValueError, match=f"^SpecDecodeRunner {text}"):
        cspd.SpecDecodeRunner(model, model, parallel_tol=value)
    with pytest.raises(ValueError, match=f"^denoise {text}"):
        parallel.check_tolerance("denoise", value)


def test_describe_tells_it():
    model = small_mar()
    assert cspd.describe(model).heads[0].parallel_tol == "auto"
    for value, text in ((None, "None"), (1e-3, "0.001"), ("auto", "auto")):
        cspd.patch(model, parallel_tol=value)
        (found,) = cspd.describe(model).heads
        assert found.parallel_tol == value
        assert found.line.endswith(f"backend torch, patched, parallel_tol={text}")
    cspd.unpatch(model)
    assert cspd.describe(model).heads[0].line.endswith("not patched")


@pytest.fixture(scope="module")
def digits():
    """(draft, target)."""
    target, draft = load_pair()
    return draft, target


def one_window(pair, tolerance, relaxation=8.0, **options):
    """All steps drafted and judged at once, so that a decision has no part in any other: state, window, verdict."""
    runner = cspd.SpecDecodeRunner(*pair, relaxation, prefill=0.0, parallel_tol=tolerance)
    run_state = runner.begin(16, 16, labels=torch.arange(16) % 10, seed=0, **options)
    plan = run_state.plan.window(0, len(run_state.plan.steps))
    return run_state, plan, run_window(run_state, plan)


@pytest.mark.parametrize("cfg", [1.0, slow(2.0)])
def test_a_runner_gives_the_same_tokens_up_to_rounding(digits, cfg):
    expected, plan, before = one_window(digits, None, cfg=cfg)
    actual, _, verdict = one_window(digits, 1e-6, cfg=cfg)
    # Accepted where log u <= log r. log r is a difference of sums of (x - mean)^2 / var, with var of the last step near
    # 1e-4: the tokens' 1e-6 come back as some 1e-3 of it.
    change = (verdict.log_ratio - before.log_ratio).abs() / before.log_ratio.abs().clamp(min=1)
    assert change.max() < 1e-3
    margin = (torch.log(uniforms(0, plan.whole.rows, 0)).view_as(before.log_ratio) - before.log_ratio).abs()
    in_doubt = margin < 1e-3 * before.log_ratio.abs().clamp(min=1)
    assert in_doubt.sum() <= 4  # of 256: about one in a thousand is
    flipped = (expected.outcome != actual.outcome).gather(1, plan.whole.where)
    assert not flipped[~in_doubt].any()
    same = expected.outcome == actual.outcome
    assert 20 < int((actual.outcome == 1).sum()) < 236  # not one kind of decision alone
    assert relative_error(actual.tokens[same], expected.tokens[same]) < 1e-5


def test_temperature_zero(digits):
    """Nothing is decided by chance."""
    images = [
        cspd.SpecDecodeRunner(*digits, parallel_tol=tolerance).run(4, 16, 4, temperature=0.0, seed=0)
        for tolerance in (None, 1e-6, 1e-3)
    ]
    assert relative_error(images[1], images[0]) < 1e-5
    assert relative_error(images[2], images[0]) < 5e-3


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_the_trajectories_of_the_draft_save_sweeps(digits, cfg, chains):
    runner, images, means = cspd.SpecDecodeRunner(*digits, parallel_tol=1e-3), [], []
    given = window._draw
    for draw in (given, lambda state, model, plan, _=None: given(state, model, plan)):
        chains.clear()
        with mock.patch.object(window, "_draw", draw):
            images.append(runner.run(4, 16, 4, cfg=cfg, seed=0))
        verifying = [c for c in chains if c.head.depth == 3 and c.sweeps.numel() > 4]  # not pre-filling, of one step
        assert {c.guess is not None for c in verifying} == {draw is given}
        means.append(mean_sweeps(verifying))
    assert relative_error(images[1], images[0]) < 5e-3
    # Measured here: 4.1 against 6.2 sweeps of 40 steps.
    assert means[0] < means[1] - 1
    drafting = [c for c in chains if c.head.depth == 2]
    assert drafting
    assert all(c.guess is None for c in drafting)


def test_the_guess_is_the_draft_at_the_same_places(digits, chains):
    """The draft being the target and a window one step long, a guess is right: a first sweep finds nothing to do."""
    target = digits[1]
    runner = cspd.SpecDecodeRunner(target, target, prefill=0.0, parallel_tol=1e-3)
    state = runner.begin(3, 8, seed=0)
    chains.clear()
    run_window(state, state.plan.window(0, 1))
    drafting, verifying = chains
    assert torch.equal(verifying.guess, drafting.trajectory)
    assert verifying.sweeps.max() == 2  # the second tells that nothing changed
    chains.clear()
    run_window(state, state.plan.window(1, 4))
    *drafting, verifying = chains
    joined = torch.cat([c.trajectory.view(3, -1, STEPS, 4) for c in drafting], dim=1)
    assert torch.equal(verifying.guess, joined.flatten(0, 1))


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_automatic_in_the_runner(digits, cfg, chains, monkeypatch):
    """Where sweeps were measured to be faster for a draw, it is made in sweeps to rounding; a guess needs both."""

    def few(backend, head, tokens, groups):
        assert (backend, groups) == ("torch", 1 if cfg == 1.0 else 2)
        return tokens <= limit

    monkeypatch.setattr(denoise_op, "prefers_parallel", few)
    runner = cspd.SpecDecodeRunner(*digits, prefill=0.0, backend="torch")
    asked = {}
    for limit in (0, 16, 48, 1000):
        chains.clear()
        state = runner.begin(16, 16, seed=0, cfg=cfg)
        run_window(state, state.plan.window(0, 3))
        assert all((c.parallel_tol is None) == (c.sweeps is None) for c in chains)
        asked[limit] = [(c.parallel_tol, c.guess is not None) for c in chains]
    tokens = [len(step.rows) for step in state.plan.window(0, 3).drafts]
    assert max(tokens) == 16 < sum(tokens) <= 48
    assert asked[0] == [(None, False)] * 4
    assert asked[16] == [(1e-6, False)] * 3 + [(None, False)]
    assert asked[48] == asked[1000] == [(1e-6, False)] * 3 + [(1e-6, True)]
    monkeypatch.setenv("CSPD_PARALLEL", "0")
    chains.clear()
    runner.run(2, 16, 4, seed=0)
    assert {c.parallel_tol for c in chains} == {None}


def test_a_trajectory_that_ran_away_does_no_harm(digits):
    """As that of a draft's token may that did not settle; the target's is its own all the same."""
    state = cspd.SpecDecodeRunner(*digits, prefill=0.0, parallel_tol=1e-4).begin(16, 16, seed=0)
    step = state.plan.step(0)
    expected = window._draw(state, state.target, step).chain
    odd = expected.trajectory.double()  # as of a draft of float64
    odd[0], odd[1], odd[2] = torch.nan, torch.inf, 1e38
    actual = window._draw(state, state.target, step, odd).chain
    assert relative_error(actual.sample, expected.sample) < 1e-3
    assert actual.sweeps[3:].max() == 2


def test_what_the_draft_drew_is_kept_in_the_order_of_drawing(digits):
    head = DiffusionHead.from_module(digits[0].diffloss)
    kept = Drafted(2, 6, head, head.num_steps, 3)

    def drawn(value, rows, sweeps):
        own = [value + torch.arange(rows * 4.0).view(rows, 4)] * 3 + [value + torch.arange(float(rows))]
        more = () if sweeps is None else (sweeps, torch.full((rows, head.num_steps, 4), value))
        chain = (DenoisedInParallel if more else Denoised)(*own, *more)
        return window.Drawn(chain, torch.full((2, rows // 2, 3), value))

    one, two = drawn(100.0, 2, torch.tensor([1, 2])), drawn(200.0, 4, torch.tensor([3, 4, 5, 6]))
    kept.write(torch.tensor([2]), one)
    kept.write(torch.tensor([3, 4]), two)
    chain, trajectory, z = kept.read(torch.tensor([2, 3, 4]))
    assert chain.path_log_std.tolist() == [100, 200, 201, 101, 202, 203]  # image by image
    assert chain.sample is chain.mean
    assert trajectory[:, 0, 0].tolist() == z[..., 0].flatten().tolist() == [100, 200, 200] * 2
    kept.write(torch.tensor([3, 4]), drawn(300.0, 4, None))  # made step by step: zeros are as good a guess as any
    assert kept.read(torch.tensor([2, 3, 4]))[1][:, 0, 0].tolist() == [100, 0, 0] * 2
