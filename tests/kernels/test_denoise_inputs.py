"""denoise: every bad argument raises one clear error before anything is computed."""

import math

import pytest
import torch
import torch.nn as nn

from cspd_kernels import PhiloxNoise, denoise
from cspd_kernels.testing import random_inputs

N = 4
NAN, INF = math.nan, math.inf

C, Z = 5, 7  # of make_diffloss


def spoiled(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


BAD = {
    "head": (lambda a: {"head": nn.Linear(1, 1)}, TypeError, "expected a DiffusionHead, got Linear"),
    "x_T type": (lambda a: {"x_T": [1.0]}, TypeError, rf"expected x_T as a tensor \(N, {C}\), got list"),
    "x_T channels": (lambda a: {"x_T": torch.ones(N, C + 1)}, ValueError, rf"x_T of shape \(N, {C}\), got \({N}, 6\)"),
    "x_T dims": (lambda a: {"x_T": torch.ones(C)}, ValueError, rf"x_T of shape \(N, {C}\), got \({C},\)"),
    "x_T integer": (lambda a: {"x_T": torch.ones(N, C).long()}, ValueError, "x_T in a floating dtype.*got torch.int64"),
    "x_T wide": (lambda a: {"x_T": a["x_T"].double()}, ValueError, "x_T in a floating.*float32, got torch.float64"),
    "x_T device": (lambda a: {"x_T": a["x_T"].to("meta")}, ValueError, "x_T on the head's device cpu, got meta"),
    "x_T NaN": (lambda a: {"x_T": spoiled(a["x_T"], NAN)}, ValueError, "expected finite values in x_T, got NaN"),
    "x_T infinite": (lambda a: {"x_T": spoiled(a["x_T"], INF)}, ValueError, "expected finite values in x_T, got"),
    "cond type": (lambda a: {"cond": None}, TypeError, "expected cond as a tensor.*got NoneType"),
    "cond width": (lambda a: {"cond": torch.ones(N, Z - 1)}, ValueError, r"shape \(N, 2N or 3N, 7\), got \(4, 6\)"),
    "cond rows": (lambda a: {"cond": torch.ones(N + 1, Z)}, ValueError, "expected cond to have 4 .*got 5"),
    "cond unguided": (lambda a: {"cond": torch.ones(2 * N, Z)}, ValueError, "expected cond to have 4 .*got 8"),
    "cond guided": (lambda a: {"cfg_scale": 2.0}, ValueError, "expected cond to have 8 .*got 4"),
    "cond scale tensor": (
        lambda a: {"cfg_scale": torch.tensor(2.0), "cond": torch.ones(3 * N, Z)}, ValueError,
        "expected cond to have 4 or 8 .*got 12",
    ),
    "cond NaN": (lambda a: {"cond": spoiled(a["cond"], NAN)}, ValueError, "expected finite values in cond"),
    "noise type": (lambda a: {"noise": None}, TypeError, "expected noise as a tensor.*got NoneType"),
    "noise steps": (lambda a: {"noise": a["noise"][1:]}, ValueError, r"shape \(12, 4, 5\), got \(11, 4, 5\)"),
    "noise rows": (lambda a: {"noise": a["noise"][:, 1:]}, ValueError, r"shape \(12, 4, 5\), got \(12, 3, 5\)"),
    "noise NaN": (lambda a: {"noise": spoiled(a["noise"], NAN)}, ValueError, "expected finite values in noise"),
    "noise addresses": (
        lambda a: {"noise": PhiloxNoise(0, torch.arange(3))}, ValueError, "PhiloxNoise of 4 rows on cpu, got 3 on cpu",
    ),
    "noise device": (
        lambda a: {"noise": PhiloxNoise(0, torch.arange(4, device="meta"))}, ValueError, "4 rows on cpu, got 4 on meta",
    ),
    "noise seed": (
        lambda a: {"noise": PhiloxNoise(torch.zeros(2, dtype=torch.int64), torch.arange(4))}, ValueError,
        "a seed tensor to be of one int64 element on cpu, got torch.int64",
    ),
    "temperature negative": (lambda a: {"temperature": -0.1}, ValueError, "finite temperature >= 0, got -0.1"),
    "temperature NaN": (lambda a: {"temperature": NAN}, ValueError, "finite temperature >= 0, got nan"),
    "temperature infinite": (lambda a: {"temperature": INF}, ValueError, "finite temperature >= 0, got inf"),
    "temperature tensor": (lambda a: {"temperature": torch.ones(2)}, ValueError, "tensor of 1 element on cpu or"),
    "cfg_scale NaN": (lambda a: {"cfg_scale": NAN}, ValueError, "finite cfg_scale, got nan"),
    "cfg_scale type": (lambda a: {"cfg_scale": "3"}, ValueError, "finite cfg_scale, got '3'"),
    "cfg_scale size": (lambda a: {"cfg_scale": torch.ones(3)}, ValueError, r"1 or 4 elements on cpu, got .*\(3,\)"),
    "cfg_scale integer": (lambda a: {"cfg_scale": torch.tensor(2)}, ValueError, "floating.*got torch.int64"),
    "cfg_scale device": (lambda a: {"cfg_scale": torch.ones(1, device="meta")}, ValueError, "on cpu, got .*on meta"),
    "workspace": (lambda a: {"workspace_bytes": 0}, ValueError, "expected workspace_bytes.* > 0, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise_before_anything_is_computed(head, monkeypatch, case):
    change, error, message = BAD[case]
    monkeypatch.setattr(
        "cspd_kernels.ops.denoise.remembered_chain", lambda *_, **__: lambda *_: pytest.fail("it was computed")
    )
    arguments = {"head": head, **dict(zip(("cond", "x_T", "noise"), random_inputs(head, N, 0), strict=True))}
    with pytest.raises(error, match=message):
        denoise(**(arguments | change(arguments)))


@pytest.mark.parametrize("size", [1e6, None, 0, -5])
def test_workspace_is_a_positive_int(head, size):
    with pytest.raises(ValueError, match="expected workspace_bytes as an int > 0"):
        denoise(head, *random_inputs(head, 2, 0), workspace_bytes=size)


def test_non_finite_scale_tensor_raises_on_the_cpu(head):
    with pytest.raises(ValueError, match="finite values in cfg_scale"):
        denoise(head, *random_inputs(head, 2, 0, guided=True), cfg_scale=torch.tensor([float("nan"), 1.0]))
