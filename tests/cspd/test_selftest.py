"""``cspd selftest``: what it says, and that it sees a backend that computes something else."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from cspd import selftest
from cspd.cli import main
from cspd_kernels import backends
from cspd_kernels.ops.accept_reject import torch_backend as verdicts
from cspd_kernels.ops.denoise import torch_backend as chains
from cspd_kernels.ops.evaluate import torch_backend as networks
from cspd_kernels.selftest import places

OPS = ["denoise step by step", "denoise in parallel", "evaluate", "log_density_ratio", "accept_reject", "candidates"]
MODELS = ["patch, same seed, same image", "speculative decoding"]


@pytest.fixture
def only_torch(monkeypatch):
    """The others take long without a GPU."""
    there = [("torch", torch.device("cpu"), ""), ("triton", None, "it is said to be missing")]
    for module in ("cspd_kernels.selftest", "cspd.selftest"):
        monkeypatch.setattr(f"{module}.places", lambda: iter(there))
    backends._load.cache_clear()  # of functions that a test has replaced, or is about to
    yield
    backends._load.cache_clear()


def lines(capsys) -> dict[str, str]:
    """Status and what follows, by the check's name."""
    *found, last = capsys.readouterr().out.splitlines()
    parts = [line.split("  ", 1) for line in found]
    return {name: rest.strip() for name, rest in parts} | {"summary": last}


def test_every_op_in_every_type_then_models_a_line_each(only_torch, capsys):
    assert main(["selftest"]) == 0
    said = lines(capsys)
    types = ("float32", "bfloat16", "float16")
    wanted = [f"torch: {op}, {dtype}" for dtype in types for op in OPS]
    assert list(said) == [*wanted, "triton", *(f"torch: {name}" for name in MODELS), "summary"]
    for name, rest in said.items():
        if name.startswith("torch"):
            assert rest.startswith("ok ") and "error" in rest and "bound" in rest and rest.endswith(" s"), name
    assert said["triton"] == "not here  it is said to be missing"
    assert said["summary"] == "20 ok, 0 failed, 1 not here (not tested)"


def test_quick_and_json(only_torch, capsys):
    assert main(["selftest", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in report["checks"]]
    assert names == [*(f"torch: {op}, float32" for op in OPS), "triton", f"torch: {MODELS[0]}"]
    assert report["passed"] is True
    for check in report["checks"]:
        if check["name"] == "triton":
            assert (check["status"], check["error"]) == ("not here", None)
        else:
            assert check["status"] == "ok" and 0 < check["error"] <= check["bound"] == 1e-5 and check["seconds"] > 0


def broken(function, change):
    """A backend whose result is changed."""
    return lambda *arguments, **options: change(function(*arguments, **options))


def scaled(out, by=1 + 1e-4):
    return (out[0], out[1] * by, *out[2:]) if isinstance(out, tuple) else out * by


def turned(verdict):
    """The last row's decision is turned."""
    accepted = verdict[1].clone()
    accepted[-1] = ~accepted[-1]
    return (verdict[0], accepted, *verdict[2:])


@pytest.mark.parametrize(
    ("module", "op", "change", "failed"),
    [
        (networks, "evaluate", scaled, ["evaluate, float32"]),
        (networks, "evaluate", lambda out: out * float("nan"), ["evaluate, float32"]),
        (verdicts, "accept_reject", turned, ["accept_reject, float32", "candidates, float32"]),
        (
            chains, "denoise", lambda out: (out[0], out[1] * 1.0001, *out[2:]),
            ["denoise step by step, float32", "denoise in parallel, float32", MODELS[0]],
        ),
    ],
    ids=["a little off", "NaN", "another decision", "tokens"],
)  # fmt: skip
def test_a_backend_that_computes_something_else_fails(only_torch, monkeypatch, capsys, module, op, change, failed):
    monkeypatch.setattr(module, op, broken(getattr(module, op), change))
    assert main(["selftest", "--quick"]) == 1
    said = lines(capsys)
    assert [name for name, rest in said.items() if rest.startswith("FAILED")] == [f"torch: {name}" for name in failed]
    assert said["summary"] == f"{7 - len(failed)} ok, {len(failed)} failed, 1 not here (not tested)"


def test_a_backend_that_raises_fails_and_the_others_are_still_checked(only_torch, monkeypatch, capsys):
    def no_memory(*arguments):
        raise MemoryError("so much\nfor that")

    monkeypatch.setattr(networks, "evaluate", no_memory)
    assert main(["selftest", "--quick"]) == 1
    said = lines(capsys)
    assert "MemoryError: so much for that" in said["torch: evaluate, float32"]
    assert said["torch: accept_reject, float32"].startswith("ok")


def test_a_runner_that_decides_otherwise_fails(only_torch, monkeypatch, capsys):
    """Every second token of a draft that equals its target is refused."""

    def refused(verdict):
        accepted = torch.arange(len(verdict[1])) % 2 == 0
        return (verdict[0], accepted, torch.where(accepted, 0, -1).int(), *verdict[3:])

    monkeypatch.setattr(verdicts, "accept_reject", broken(verdicts.accept_reject, refused))
    assert main(["selftest"]) == 1
    assert "of a draft that equals its target" in lines(capsys)[f"torch: {MODELS[1]}"]


def test_nothing_is_left_behind(only_torch, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # so that the number of threads is changed, for a while

    def state():
        numpy_state = np.random.get_state()
        generators = torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2:]
        return generators, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)

    torch.set_num_threads(2)
    try:
        before = state()
        for _ in selftest.run(quick=True):
            assert state() == before
        assert state() == before
    finally:
        torch.set_num_threads(1)


def test_backends_that_are_here_are_told_with_their_device(monkeypatch):
    monkeypatch.setattr("cspd_kernels.selftest.why_unavailable", lambda backend: {"cuda": "no compiler"}.get(backend))
    monkeypatch.setattr("cspd_kernels.selftest.interpreting", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = torch.device("cpu")
    assert list(places()) == [
        ("torch", cpu, ""),
        ("triton", cpu, "interpreted on the CPU"),
        ("cuda", None, "no compiler"),
    ]


@pytest.mark.slow
def test_every_backend_that_is_here(capsys):
    assert main(["selftest"]) == 0
    assert "0 failed" in lines(capsys)["summary"]
