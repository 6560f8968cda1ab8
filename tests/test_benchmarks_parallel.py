"""The benchmarks of the chain in parallel over its steps."""

from __future__ import annotations

import json

import torch
from scripts import run_main, shrink

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.ops.denoise import reference, torch_parallel
from cspd_kernels.testing import random_inputs, randomize_


def test_a_fixed_number_of_sweeps_is_timed_beside_the_steps(benchmarks, monkeypatch, tmp_path):
    registry = benchmarks.registry
    kinds = dict.fromkeys(("float32", "bfloat16"), registry.STEP_BY_STEP)
    plan = registry.Plan("denoise in parallel", "cpu", (("small", 2),), kinds, ("torch",), 7, ("guided",))
    shrink(benchmarks, monkeypatch, plan, steps=30)
    run_main(benchmarks.kernels, monkeypatch, "--only", "parallel", "--json", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["torch 10 sweeps float32", "torch 10 sweeps bfloat16"]
    assert [row["baseline"] for row in rows] == ["torch float32", "torch bfloat16"]
    assert {row["size"] for row in rows} == {"small N=2 T=30 guided"}
    assert all(row["error"] <= row["bound"] and "settled after" in row["accuracy"] for row in rows)


def test_kernels_have_a_row_for_a_slow_token_under_guidance(benchmarks, monkeypatch, device_of):
    registry, device, report = benchmarks.registry, device_of("cuda"), benchmarks.rows.Report()
    monkeypatch.setattr(benchmarks.in_parallel, "diffloss_of", lambda *_: module)
    torch.manual_seed(0)
    module = randomize_(DiffLoss(5, 24, 1, 16, "3"), seed=1).eval().to(device)
    for guided in ("", "guided"):
        case = registry.Case(
            "denoise in parallel", "small", 2, "float32", "cuda", registry.STEP_BY_STEP, 1, "cuda", guided
        )
        group = benchmarks.in_parallel.group([case], device, None)
        benchmarks.groups.measure_group(group, 1, device, report)
    assert [row.backend for row in report.rows] == ["cuda 10 sweeps float32"] * 2 + ["cuda 27 sweeps float32"]
    assert {row.baseline for row in report.rows} <= {"cuda float32", "cuda persistent float32"}
    assert all(row.correct for row in report.rows)


def test_only_sweeps_are_made_where_they_are_timed(benchmarks, monkeypatch):
    module, network = benchmarks.in_parallel, torch_parallel.network
    torch.manual_seed(0)
    head, calls = DiffusionHead.from_module(randomize_(DiffLoss(5, 24, 2, 32, "30"), seed=1).eval()), []
    monkeypatch.setattr(torch_parallel, "network", lambda *arguments: calls.append(1) or network(*arguments))
    inputs = random_inputs(head, 3, 0)
    for count in (module.SWEEPS, 3):
        calls.clear()
        module._sweeps(head, *inputs, count=count, backend="torch")
        assert len(calls) == count
    assert torch.equal(denoise(head, *inputs).mean, denoise(head, *inputs, parallel_tol=None).mean)  # as before


def test_sweeps_of_trained_heads_are_counted(benchmarks, monkeypatch, tmp_path):
    run_main(benchmarks.parallel, monkeypatch, "--quick", "--json", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["secant", "plain", "bfloat16"] * 2
    for secant, plain, rounded in (rows[:3], rows[3:]):
        for row in (secant, plain):
            assert row["largest"][0] > 1e-2
            assert row["largest"][-1] <= 2e-6
            assert len(row["largest"]) == len(row["median"]) <= row["steps"]
            reached = list(row["reached"].values())
            assert reached == sorted(reached)
            assert [row["largest"][k - 1] <= d for k, d in zip(reached, (1e-2, 1e-3, 1e-4, 1e-5))] == [True] * 4
            assert all(s["open"] == 0 and s["largest"] <= 10 * s["tolerance"] for s in row["settled"])
            assert row["float64"]["parallel"] <= 3e-6
        assert secant["reached"]["1e-03"] <= plain["reached"]["1e-03"]
        assert rounded["apart"][0] < 2e-2
        assert rounded["parallel, float64"][0] < 2e-2


def test_tokens_that_settle_stay_as_they_were(benchmarks):
    def sweep(value, change):
        row = torch.tensor([[value], [value]])
        return reference.Sweep(row[None], row, row, row[:, 0], torch.tensor(change), torch.ones(2))

    settled = benchmarks.parallel.Settled(0.1, 2)
    for count, args in enumerate([(1.0, [0.0, 0.0]), (2.0, [0.05, 0.5]), (3.0, [0.5, 0.05])], start=1):
        assert not settled.all
        settled.see(sweep(*args)._replace(x=torch.zeros(9, 2, 1)), count)
    assert settled.all
    assert settled.sweeps.tolist() == [2, 3]
    assert settled.mean.tolist() == [[2.0], [3.0]]
