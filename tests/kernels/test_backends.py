"""Choice of the backend, and what importing the packages leaves behind."""

import subprocess
import sys

import pytest
import torch

from cspd_kernels import DiffusionHead, accept_reject, available_backends, backends, denoise, log_density_ratio
from cspd_kernels.testing import random_chains, random_inputs

OPS = ("denoise", "log_density_ratio", "accept_reject")


@pytest.fixture
def call(make_diffloss):
    """``call(op, backend)`` runs an op on a few rows and returns its first tensor."""
    head, chains = DiffusionHead.from_module(make_diffloss()), random_chains(4, 3, 0)

    def call(op, backend=None):
        if op == "denoise":
            return denoise(head, *random_inputs(head, 4, 0), backend=backend).sample
        if op == "accept_reject":
            return accept_reject(*chains, seed=0, backend=backend).token
        return log_density_ratio(*chains, backend=backend)

    return call


@pytest.fixture
def nothing_but_torch(monkeypatch):
    reason = "this machine is made of wood"
    monkeypatch.setattr(backends, "why_unavailable", lambda name: None if name == "torch" else reason)
    return reason


def test_every_backend_has_a_status():
    status = available_backends()
    assert list(status) == ["torch", "triton", "cuda"]
    assert status["torch"] == "ok"
    assert all(isinstance(text, str) and text for text in status.values())


def test_status_gives_the_reason(nothing_but_torch):
    assert available_backends() == {"torch": "ok", "triton": nothing_but_torch, "cuda": nothing_but_torch}


@pytest.mark.parametrize("op", OPS)
def test_automatic_equals_torch_on_the_cpu(call, op):
    assert torch.equal(call(op), call(op, "torch"))


@pytest.mark.parametrize("op", OPS)
def test_unknown_names_are_refused(call, monkeypatch, op):
    with pytest.raises(ValueError, match="expected backend one of torch, triton, cuda, got 'Torch'"):
        call(op, "Torch")
    monkeypatch.setenv("CSPD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="expected CSPD_BACKEND one of torch, triton, cuda, got 'gpu'"):
        call(op)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_chosen_backend_that_cannot_serve_raises_the_reason(call, monkeypatch, nothing_but_torch, op, backend):
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve {op}: {nothing_but_torch}"):
        call(op, backend)
    monkeypatch.setenv("CSPD_BACKEND", backend)
    with pytest.raises(RuntimeError, match=f"CSPD_BACKEND='{backend}' cannot serve {op}: {nothing_but_torch}"):
        call(op)


@pytest.mark.parametrize("op", OPS)
def test_backends_reported_unavailable_here_raise_what_was_reported(call, op):
    for backend, status in available_backends().items():
        if status != "ok":
            with pytest.raises(RuntimeError) as error:
                call(op, backend)
            assert status in str(error.value)


@pytest.mark.parametrize("op", OPS)
def test_the_argument_goes_before_the_environment(call, monkeypatch, nothing_but_torch, op):
    expected = call(op, "torch")
    monkeypatch.setenv("CSPD_BACKEND", "triton")
    assert torch.equal(call(op, "torch"), expected)
    for value in ("torch", ""):  # empty counts as not set
        monkeypatch.setenv("CSPD_BACKEND", value)
        assert torch.equal(call(op), expected)


@pytest.mark.parametrize("op", OPS)
def test_the_op_runs_what_the_backend_offers(call, monkeypatch, op):
    module = f"cspd_kernels.ops.{op.removeprefix('log_')}.torch_backend"
    backends._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{op}", lambda *_: (_ for _ in ()).throw(NotImplementedError(op)))
        with pytest.raises(NotImplementedError, match=op):
            call(op)
    backends._load.cache_clear()
    assert torch.isfinite(call(op)).all()


def test_import_is_quiet_and_light(tmp_path):
    code = "import pathlib, sys, cspd_kernels, cspd; pathlib.Path(sys.argv[1]).write_text(' '.join(sys.modules))"
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "modules")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    loaded = set((tmp_path / "modules").read_text().split())
    assert {"cspd_kernels", "cspd"} <= loaded
    assert not {"triton", "sklearn", "scipy", "PIL", "matplotlib"} & loaded
