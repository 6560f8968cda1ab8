"""Acceptance as a policy: what it is shown, what becomes of what it says, and the policies of the package."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import small_mar

import cspd
from cspd import AdaptiveDraft, SimilarityRelaxation, Window
from cspd import window as window_module
from cspd.demo.pair import load_pair
from cspd.order import plan_steps, positions, random_orders
from cspd_kernels import log_density_ratio
from cspd_kernels.testing import relative_error


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


@pytest.fixture(scope="module")
def digits():
    """A pair whose tokens are neither all accepted nor all rejected."""
    target, draft = load_pair()
    return draft, target


@pytest.fixture
def watched(monkeypatch):
    """What goes through denoise and accept_reject, with the results of the op itself."""
    seen = {"denoise": [], "accept_reject": []}

    def watch(name):
        op = getattr(window_module, name)

        def call(*args, **kwargs):
            seen[name].append((args, kwargs, op(*args, **kwargs)))
            return seen[name][-1][2]

        monkeypatch.setattr(window_module, name, call)

    watch("denoise")
    watch("accept_reject")
    return seen


def by_position(window):
    """Another number for every token: a function of its image's first position, its position and its step."""
    return 1.0 + window.positions + 20.0 * window.steps + 0.01 * window.positions[:, :1]


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_every_token_is_judged_at_its_own_relaxation(pair, watched, cfg, gamma):
    runner = cspd.SpecDecodeRunner(*pair, by_position, prefill=0.2)
    images = runner.run(3, 8, gamma, labels=torch.tensor([1, 2, 3]), cfg=cfg, seed=4, first_image=5)
    orders = random_orders(4, torch.arange(5, 8), 16)
    steps = plan_steps(16, 8, cfg, "linear")[2:]
    assert len(watched["accept_reject"]) == math.ceil(len(steps) / gamma)
    for (x, draft, target), options, verdict in watched["accept_reject"]:
        window, steps = steps[:gamma], steps[gamma:]
        where = torch.cat([positions(orders, step.before, step.after) for step in window], dim=1)
        index = torch.tensor([step.index for step in window for _ in range(step.before - step.after)])
        expected = (1.0 + where + 20.0 * index + 0.01 * where[:, :1]).flatten()
        assert torch.equal(options["relaxation"], expected)
        assert torch.equal(options["rows"] % 16, where.flatten())
        assert torch.equal(verdict.log_ratio, log_density_ratio(x, draft, target, relaxation=expected))
        drawn = pair[1].patchify(images).gather(1, where[..., None].expand(-1, -1, 4))
        assert torch.equal(drawn.flatten(0, 1), verdict.token)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_policy_and_a_tensor_by_position_are_one(digits, cfg):
    table = torch.linspace(1, 20, 16)
    images = [
        cspd.SpecDecodeRunner(*digits, relaxation).run(3, 8, 3, cfg=cfg, seed=4)
        for relaxation in (table, lambda window: table[window.positions], lambda window: 1 + 0.0 * window.log_ratio)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("prefill", [0.0, 0.2])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_what_a_policy_is_shown(pair, watched, prefill, cfg):
    windows = []

    def policy(window):
        previous = window.previous_target_z
        windows.append((window, None if previous is None else previous.clone()))
        return torch.full_like(window.log_ratio, 5.0)

    runner = cspd.SpecDecodeRunner(*pair, policy, prefill=prefill)
    runner.run(3, 8, 3, labels=torch.tensor([1, 2, 3]), cfg=cfg, seed=4)
    calls, last = iter(watched["denoise"]), None

    def hidden_states(step):
        """(B, n, Z) of the next call's conditional rows, and its chain."""
        (_, cond, x, _), _, chain = next(calls)
        assert len(cond) == len(x) * (1 if cfg == 1.0 else 2)
        return cond[: len(x)].unflatten(0, (3, -1)), chain

    for _ in range(2 if prefill else 0):
        last = hidden_states("prefill")[0][:, -1]
    for (window, previous), ((x, draft, target), _, _) in zip(windows, watched["accept_reject"], strict=True):
        steps = len(window.steps.unique())
        drafted = torch.cat([hidden_states("draft")[0] for _ in range(steps)], dim=1)
        z, _ = hidden_states("target")
        assert torch.equal(window.draft_z, drafted)
        assert torch.equal(window.target_z, z)
        assert (previous is None) == (last is None)
        assert last is None or torch.equal(previous, last)
        assert torch.equal(window.log_ratio.flatten(), log_density_ratio(x, draft, target))
        assert torch.equal(window.draft_log_std.flatten(0, 1), draft.log_std)
        assert torch.equal(window.target_log_std.flatten(0, 1), target.log_std)
        assert window.draft_z.shape[-1] != window.target_z.shape[-1]
        last = z[:, -1]
    assert next(calls, None) is None


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (lambda w: 3.0, r"one number > 0 per token, a floating tensor \(2, 5\) on cpu, got float"),
        (lambda w: w.log_ratio.flatten(), r"got torch.float32 \(10,\) on cpu"),
        (lambda w: torch.ones_like(w.positions), r"got torch.int64 \(2, 5\) on cpu"),
        (lambda w: w.log_ratio.to("meta"), r"got torch.float32 \(2, 5\) on meta"),
        (lambda w: w.log_ratio * torch.nan, "expected every relaxation finite and > 0"),
        (lambda w: 0 * w.log_ratio, "expected every relaxation finite and > 0"),
    ],
)
def test_what_a_policy_must_not_return(pair, policy, match):
    with pytest.raises(ValueError, match=match):
        cspd.SpecDecodeRunner(*pair, policy, prefill=0.0).run(2, 4, 2, seed=0)


# --- the policies of the package ---


def window_of(target_z, previous=None, **fields):
    batch, n, _ = target_z.shape
    values = dict.fromkeys(("positions", "steps", "draft_z", "draft_log_std", "target_log_std"), None)
    values["log_ratio"] = torch.linspace(-3, 1, batch * n).view(batch, n)
    return Window(**{**values, "target_z": target_z, "previous_target_z": previous, **fields})


def directions(*degrees):
    """(len, 2) vectors of different lengths."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    lengths = torch.arange(1, len(degrees) + 1)[:, None]
    return (lengths * torch.stack([angle.cos(), angle.sin()], dim=-1)).float()


def test_similarity_sets_the_relaxation():
    z = torch.stack([directions(0, 60, 60, 240), directions(10, 10, 100, 55)])
    previous = directions(90, 10)
    similarity = torch.tensor([[0.0, 0.5, 1.0, -1.0], [1.0, 1.0, 0.0, math.sqrt(0.5)]])
    policy = SimilarityRelaxation(2.0, 32.0)
    relaxation = policy(window_of(z, previous))
    assert torch.allclose(relaxation, 2.0 * 16.0 ** similarity.clamp(min=0), rtol=1e-5)
    none = policy(window_of(z))
    assert none[:, 0].tolist() == [2.0, 2.0]
    assert torch.equal(none[:, 1:], relaxation[:, 1:])
    narrow = SimilarityRelaxation(2.0, 32.0, low=0.25, high=0.75)(window_of(z, previous))
    assert torch.allclose(narrow[0], torch.tensor([2.0, 8.0, 32.0, 2.0]), rtol=1e-5)
    assert policy(window_of(z.bfloat16(), previous.bfloat16())).dtype == torch.float32
    assert SimilarityRelaxation(3.0, 3.0)(window_of(z, previous)).unique().tolist() == [3.0]


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0.0, 3.0), {}, "expected 0 < least <= most, both finite, got 0.0 and 3.0"),
        ((4.0, 3.0), {}, "0 < least <= most"),
        ((1.0, math.inf), {}, "both finite"),
        ((), {"low": 0.5, "high": 0.5}, "expected -1 <= low < high <= 1, got 0.5 and 0.5"),
        ((), {"high": 1.5}, "low < high <= 1"),
    ],
)
def test_bad_similarity_bounds(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        SimilarityRelaxation(*arguments, **options)


def by_entropy(window):
    entropy = window.target_log_std.mean(dim=-1)  # of a Gaussian, but for a constant; (B, n)
    return 1.0 + 41.0 * torch.sigmoid(2.0 * (entropy + 3.0))


@pytest.mark.parametrize("policy", [by_entropy, SimilarityRelaxation()], ids=["entropy", "similarity"])
def test_policies_relax_some_tokens_more_than_others(pair, watched, policy):
    runner = cspd.SpecDecodeRunner(*pair, policy)
    images = runner.run(3, 8, 3, labels=torch.tensor([1, 2, 3]), cfg=2.0, seed=4)
    relaxation = torch.cat([options["relaxation"] for _, options, _ in watched["accept_reject"]])
    assert 1 <= relaxation.min() < relaxation.max() <= 42.0001
    assert relaxation.unique().numel() > 5
    assert torch.equal(images, runner.run(3, 8, 3, labels=torch.tensor([1, 2, 3]), cfg=2.0, seed=4))
    alone = runner.run(1, 8, 3, labels=torch.tensor([2]), cfg=2.0, seed=4, first_image=1)
    assert relative_error(alone, images[1:2]) < 1e-4


# --- the length of a window ---


def test_expected_acceptance_ends_the_window():
    policy = AdaptiveDraft(0.8, 16, 0.5, first=3)
    assert policy([]) == 3
    assert AdaptiveDraft(0.8, 2, first=3)([]) == 2
    assert policy([[0.9, 0.9, 0.7]]) == 2  # before the third step
    assert policy([[0.9, 0.5, 0.9]]) == 1
    assert policy([[0.1, 0.9, 0.9]]) == 1  # never none
    assert policy([[0.9, 0.8, 0.8]]) == 6  # nothing fails: twice the longest
    assert AdaptiveDraft(0.8, 5, 0.5)([[0.9, 0.9, 0.9]]) == 5
    assert policy([[0.9, 0.9, 0.9], [0.9, 0.9]]) == 6  # a short window does not shrink what was reached
    assert policy([[1.0, 1.0, 0.9], [1.0, 1.0, 0.6]]) == 2  # 0.75
    assert AdaptiveDraft(0.8, 16, 0.9)([[1.0, 1.0, 0.9], [1.0, 1.0, 0.6]]) == 6  # 0.87: a longer memory
    assert AdaptiveDraft(0.8, 16, 0.0)([[1.0, 0.1, 0.9], [1.0, 0.9, 0.9]]) == 6


def test_what_has_failed_is_tried_again():
    policy, windows = AdaptiveDraft(0.9, 16, 0.5), [[1.0, 1.0, 0.2, 0.2]]
    lengths = []
    for _ in range(4):  # the third step's expectation: 0.2, 0.6, 0.8, 0.9
        lengths.append(policy(windows))
        windows.append([1.0] * lengths[-1])
    assert lengths == [2, 2, 2, 8]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bound": 0.0}, r"expected bound in \(0, 1\], got 0.0"),
        ({"bound": math.nan}, "expected bound"),
        ({"memory": 1.0}, r"expected memory in \[0, 1\), got 1.0"),
        ({"most": 0}, "expected most as an int >= 1, got 0"),
        ({"first": 2.0}, "expected first as an int >= 1, got 2.0"),
    ],
)
def test_bad_lengths(options, match):
    with pytest.raises(ValueError, match=match):
        AdaptiveDraft(**options)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_length_policy_sees_the_acceptance_of_every_step(digits, watched, cfg):
    asked, wanted = [], [2, 3, 1, 100]

    def policy(windows):
        asked.append([list(window) for window in windows])
        return wanted[len(windows)]

    runner = cspd.SpecDecodeRunner(*digits, 8.0, prefill=0.2)
    images = runner.run(3, 10, policy, labels=torch.tensor([1, 2, 3]), cfg=cfg, seed=4)
    steps = plan_steps(16, 10, cfg, "linear")
    assert runner.stats.gammas == [2, 3, 1, len(steps) - 2 - 6]
    assert [len(windows) for windows in asked] == [0, 1, 2, 3]
    rest, expected = steps[2:], []
    for (_, options, verdict), gamma in zip(watched["accept_reject"][:3], wanted):
        window, rest = rest[:gamma], rest[gamma:]
        probability = verdict.log_ratio.double().clamp(max=0).exp().view(3, -1)
        parts = probability.split([step.before - step.after for step in window], dim=1)
        expected.append(pytest.approx([float(part.mean()) for part in parts], abs=1e-6))
        assert options["relaxation"] == 8.0
    assert asked[-1] == expected
    assert len({round(a, 3) for window in asked[-1] for a in window}) > 2
    assert bool((runner.stats.outcome > 0).sum() == runner.stats.drafted)
    assert runner.stats.drafted + runner.stats.prefilled == 48
    assert torch.equal(images, runner.run(3, 10, policy, labels=torch.tensor([1, 2, 3]), cfg=cfg, seed=4))


def test_windows_follow_the_acceptance(pair, monkeypatch):
    """The tokens of steps 0..5 are accepted for certain, later ones hardly."""
    op = window_module.accept_reject
    step_of = {p: step.index for step in plan_steps(16, 16, 1.0, "linear") for p in range(step.after, step.before)}

    def accept_reject(*args, rows, **kwargs):
        steps = torch.tensor([step_of[int(row) % 16] for row in rows])
        verdict = op(*args, rows=rows, **kwargs)
        return verdict._replace(log_ratio=torch.where(steps <= 5, 0.5, math.log(0.2)))

    monkeypatch.setattr(window_module, "accept_reject", accept_reject)
    runner, policy = cspd.SpecDecodeRunner(*pair, prefill=0.0), AdaptiveDraft(0.7, 16, 0.5, first=2)
    for _ in range(2):  # nothing is kept from one run to the next
        runner.run(2, 16, policy, orders=torch.arange(16).expand(2, -1), seed=0)
        gammas = runner.stats.gammas
        assert gammas == [2, 4, 8, 1, 1]  # steps 0-1, 2-5, 6-13, 14, 15
        assert runner.stats.target_calls == 5
        assert runner.stats.draft_calls == 16


@pytest.mark.parametrize("length", [0, 2.0, True, None, "3"])
def test_what_a_length_policy_must_not_return(pair, length):
    runner = cspd.SpecDecodeRunner(*pair)
    with pytest.raises(ValueError, match=r"expected the gamma policy to return an int >= 1, got"):
        runner.run(1, 4, lambda windows: length, seed=0)
