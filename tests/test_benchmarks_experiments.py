"""The experiments under benchmarks/: that they run, and that what they compare is what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from scripts import run_main
from slow import slow

from cspd_kernels.ops.denoise import reference

FOLDER = Path(__file__).parent.parent / "benchmarks" / "experiments"
MODULES = ("anderson", "step_speculation", "subjects", "rows")


@pytest.fixture
def experiment(monkeypatch):
    """``f(name) -> module`` of the folder of experiments."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def random_head(experiment):
    """(head, chain, cond, x_T, noise) of 20 steps with random weights."""
    (_, _, _), (_, head, cond) = experiment("subjects").heads(quick=True)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(len(cond), 4, generator=generator)  # noqa: N806
    return head, experiment("subjects").Chain(head, cond), cond, x_T, torch.randn(20, len(cond), 4, generator=generator)


@pytest.mark.parametrize("name", ["anderson", slow("step_speculation")])
def test_an_experiment_runs_and_keeps_the_others_rows(experiment, monkeypatch, tmp_path, name):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rows": [{"experiment": "another"}], "settings": {"another": {}}}))
    assert run_main(experiment(name), monkeypatch, "--quick", "--json", path) is None
    written = json.loads(path.read_text())
    assert {row["experiment"] for row in written["rows"]} == {"another", name.replace("_", " ")}
    assert set(written["settings"]) == {"another", name.replace("_", " ")}


@pytest.mark.parametrize("frozen", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, slow(3), slow(20)])
def test_the_sequential_chain_is_the_fixed_point_of_every_order(experiment, random_head, frozen, order):
    head, chain, cond, x_T, noise = random_head  # noqa: N806
    anderson = experiment("anderson")
    exact = reference.denoise(head, cond, x_T, noise, 1.0, None)[0]
    U = anderson.inputs_of_nothing(chain, x_T, noise)  # noqa: N806
    for _ in range(chain.steps):
        U[:-1] = anderson.fixed_point(chain, U, noise, order, frozen)
    assert (U[0] - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_without_memory_it_is_picard_iteration(experiment, random_head):
    head, chain, cond, x_T, noise = random_head  # noqa: N806
    anderson = experiment("anderson")
    plain = anderson.anderson(chain, x_T, noise, 20, 0, 1e-6)
    picard = anderson.shipped(head, cond, x_T, noise, slopes=False)
    for _, ours, theirs in zip(range(8), plain, picard):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("memory", [2, 5])
def test_anderson_ends_after_as_many_sweeps_as_steps(experiment, random_head, memory):
    head, chain, cond, x_T, noise = random_head  # noqa: N806
    anderson = experiment("anderson")
    exact = reference.denoise(head, cond, x_T, noise, 1.0, None)[0]
    *_, last = zip(range(chain.steps), anderson.anderson(chain, x_T, noise, 20, memory, 1e-6))
    assert (last[1] - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_sweeps_needed_are_counted_until_they_stay(experiment):
    needed, exact = experiment("anderson").needed, torch.ones(2, 1)
    errors = [1, 5e-3, 5e-2, 5e-3, 1e-6, 1e-6, 1e-6, 1]
    assert needed((exact + e for e in errors), exact, 20) == [4, 5, 5, 5]
    assert needed((exact + e for e in errors), exact, 4) == [4, None, None, None]


@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.parametrize("guess", ["frozen", slow("linear"), "reused"])
@pytest.mark.parametrize("length", [8, slow(20)])
def test_speculation_is_lossless(experiment, varies, guess, length):
    """Kolmogorov-Smirnov at 10,000 tokens, seeded: p below 1e-3 says otherwise. Next test: what p a lossy one has."""
    p, made = experiment("step_speculation").lossless(10_000, varies, length, guess)
    assert p > 1e-3
    assert made.rounds.double().mean() < 10  # of 20 steps: guesses are accepted


@pytest.mark.parametrize("varies", [False, True])
def test_a_lossy_coupling_is_found_out(experiment, monkeypatch, varies):
    module = experiment("step_speculation")
    monkeypatch.setattr(module, "couple", lambda x, *_: (x, torch.ones(len(x), dtype=torch.bool)))
    assert module.lossless(10_000, varies, 8, "frozen")[0] < 1e-6


@pytest.mark.slow
def test_speculated_tokens_of_a_head_are_found_out_where_they_have_another_law(experiment, random_head, monkeypatch):
    module, (head, _, cond, *_) = experiment("step_speculation"), random_head
    assert module.two_samples(head, cond, 500, 20) > 1e-3
    monkeypatch.setattr(module, "couple", lambda x, *_: (x, torch.ones(len(x), dtype=torch.bool)))
    assert module.two_samples(head, cond, 500, 20) < 1e-6


@pytest.mark.parametrize("apart", [0.3, 2.0])
@pytest.mark.parametrize("widths", [(0.5, 0.5), (0.5, 0.7), (0.5, 0.3)])
def test_a_coupling_has_the_true_law_and_accepts_as_often_as_can_be(experiment, apart, widths):
    couple, generator, n = experiment("step_speculation").couple, torch.Generator().manual_seed(0), 10_000
    (std, guess_std), centre = widths, torch.tensor([0.2, -0.1])
    mean, guess = centre.expand(n, 2), (centre + apart * torch.tensor([0.6, 0.8]) * 0.5).expand(n, 2)
    logs = [torch.full((n, 2), s).log() for s in (std, guess_std)]
    x = guess + guess_std * torch.randn(n, 2, generator=generator)
    made, accepted = couple(x, mean, logs[0], guess, logs[1], generator)
    assert torch.equal(made[accepted], x[accepted])
    z = (made - mean) / std
    for direction in (torch.tensor([0.6, 0.8]), torch.tensor([0.8, -0.6])):
        assert stats.kstest((z @ direction).numpy(), "norm").pvalue > 1e-3
    if std == guess_std:  # overlap of two normals that far apart: 2 Phi(-distance / 2)
        overlap = 2 * stats.norm.cdf(-apart * 0.5 / std / 2)
        assert abs(float(accepted.double().mean()) - overlap) < 0.02
