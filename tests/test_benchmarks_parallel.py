"""The benchmarks of the chain in parallel over its steps."""

from __future__ import annotations

import json

import torch
from scripts import run_main

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.ops.denoise import torch_parallel
from cspd_kernels.testing import random_inputs, randomize_


def test_a_fixed_number_of_sweeps_is_timed_beside_the_steps(benchmarks, monkeypatch, tmp_path):
    kernels = benchmarks.kernels
    monkeypatch.setitem(kernels.HEADS, "small", (1, 32, 16))
    monkeypatch.setitem(kernels.in_parallel.CASES, "cpu", [("small", 2, True)])
    monkeypatch.setattr(kernels, "STEPS", 30)
    run_main(kernels, monkeypatch, "--only", "parallel", "--json", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["torch 10 sweeps float32", "torch 10 sweeps bfloat16"]
    assert {row["size"] for row in rows} == {"small N=2 T=30 guided"}
    assert all(row["error"] <= row["bound"] and "settled after" in row["accuracy"] for row in rows)


def test_only_sweeps_are_made_where_they_are_timed(benchmarks, monkeypatch):
    module, network = benchmarks.kernels.in_parallel, torch_parallel.network
    torch.manual_seed(0)
    head, calls = DiffusionHead.from_module(randomize_(DiffLoss(5, 24, 2, 32, "30"), seed=1).eval()), []
    monkeypatch.setattr(torch_parallel, "network", lambda *arguments: calls.append(1) or network(*arguments))
    inputs = random_inputs(head, 3, 0)
    module._sweeps(head, *inputs, backend="torch")
    assert len(calls) == module.SWEEPS
    assert torch.equal(denoise(head, *inputs).mean, denoise(head, *inputs, parallel_tol=None).mean)  # as before
