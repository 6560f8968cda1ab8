"""Choice of the backend, and what importing the packages leaves behind."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cspd_kernels import (
    DiffusionHead,
    accept_reject,
    available_backends,
    backends,
    denoise,
    log_density_ratio,
)
from cspd_kernels.backends import BACKENDS, interpreting, why_unavailable
from cspd_kernels.testing import random_chains, random_inputs

OPS = ("denoise", "log_density_ratio", "accept_reject")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    monkeypatch.setattr(backends, "why_unavailable", lambda name, op="denoise": None if name == "torch" else reason)
    return reason


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


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
    for backend in BACKENDS:
        if reason := why_unavailable(backend, op):
            with pytest.raises(RuntimeError) as error:
                call(op, backend)
            assert str(error.value) == f"backend={backend!r} cannot serve {op}: {reason}"


def test_status_is_that_of_denoise():
    assert available_backends() == {name: why_unavailable(name, "denoise") or "ok" for name in BACKENDS}


@pytest.fixture
def new_triton(monkeypatch):
    """The installed Triton, whatever its version is, is one that serves."""
    monkeypatch.setattr(backends, "_why_not_this_triton", lambda: None)


def test_an_op_without_kernels_of_a_backend_names_both(monkeypatch, new_triton):
    monkeypatch.setattr(backends, "_exists", lambda module: "denoise" in module or module == "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_unavailable("triton", "denoise") is None
    assert "no triton kernels for accept_reject" in why_unavailable("triton", "accept_reject")


def test_triton_needs_itself_and_a_device_or_the_interpreter(monkeypatch, no_interpreter, new_triton):
    monkeypatch.setattr(backends, "_exists", lambda module: module != "triton")
    assert "pip install triton" in why_unavailable("triton")
    monkeypatch.setattr(backends, "_exists", lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in why_unavailable("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_unavailable("triton") is None
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_unavailable("triton") is None


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("ON", True), ("yes", True), ("0", False), ("", False)]
)
def test_interpreting_reads_tritons_own_switch(monkeypatch, no_interpreter, value, on):
    assert not interpreting()
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting() is on


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_triton_on_cpu_tensors_names_the_interpreter(call, no_interpreter, new_triton):
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve denoise: .*TRITON_INTERPRET=1"):
        call("denoise", "triton")


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
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)  # not in a clone
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    loaded = set((tmp_path / "modules").read_text().split())
    assert {"cspd_kernels", "cspd"} <= loaded
    assert not {"triton", "sklearn", "scipy", "PIL", "matplotlib", "_C", "cspd_kernels._C"} & loaded


@pytest.fixture
def this_triton():
    triton = pytest.importorskip("triton")
    backends._why_not_this_triton.cache_clear()
    yield triton
    backends._why_not_this_triton.cache_clear()


def test_an_older_triton_is_not_taken(this_triton, monkeypatch):
    monkeypatch.setattr(this_triton, "__version__", "3.5.1+git")
    assert "Triton 3.5.1+git is older than 3.6" in available_backends()["triton"]


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+cu130", "4.0.0"])
def test_a_newer_triton_is_taken(this_triton, monkeypatch, version):
    monkeypatch.setattr(this_triton, "__version__", version)
    assert "older" not in available_backends()["triton"]


def test_a_triton_that_does_not_import_is_a_reason_and_no_crash(this_triton, monkeypatch):
    def broken(name):
        raise ImportError("libcuda.so.1 is of another age")

    monkeypatch.setattr(importlib, "import_module", broken)
    status = available_backends()["triton"]
    assert status == "Triton cannot be imported (ImportError: libcuda.so.1 is of another age): install it again"


def test_the_installation_is_looked_at_once(this_triton, monkeypatch):
    first = available_backends()
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} is imported again"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(f"{name} is looked for again"))
    assert available_backends() == first


@pytest.fixture
def choices(monkeypatch):
    """What was asked of :func:`backends.implementation`; and tokens that say they are on a device."""
    asked = []

    def implementation(op, backend, device, x, tokens):
        asked.append((op, backend, device.type, *x.shape))
        return len(asked)

    monkeypatch.setattr(backends, "implementation", implementation)
    monkeypatch.setattr(backends, "_remembered", {})
    for name in ("CSPD_BACKEND", "TRITON_INTERPRET", "CSPD_CUDA_EMULATION"):
        monkeypatch.delenv(name, raising=False)
    return asked


def tokens(*shape, device="cuda:0"):
    return SimpleNamespace(shape=torch.Size(shape), device=torch.device(device))


def test_a_choice_is_made_once_for_each_kind_of_call(choices):
    kinds = [("accept_reject", None, tokens(5, 16)), ("log_density_ratio", None, tokens(5, 16))]
    kinds += [("accept_reject", name, tokens(5, 16)) for name in ("torch", "triton", "cuda", "other")]
    kinds += [("accept_reject", None, tokens(*shape)) for shape in ((6, 16), (5, 17))]
    kinds += [("accept_reject", None, tokens(5, 16, device="cuda:1"))]
    for _ in range(2):
        assert [backends.remembered(*kind) for kind in kinds] == list(range(1, len(kinds) + 1))
    assert choices[0] == ("accept_reject", None, "cuda", 5, 16)
    assert len(choices) == len(kinds)


@pytest.mark.parametrize(
    ("backend", "variables"),
    [
        (None, ("CSPD_BACKEND", "TRITON_INTERPRET", "CSPD_CUDA_EMULATION")),
        ("triton", ("TRITON_INTERPRET",)),
        ("cuda", ("CSPD_CUDA_EMULATION",)),
    ],
)
def test_a_changed_environment_is_another_choice(choices, monkeypatch, backend, variables):
    first = backends.remembered("accept_reject", backend, tokens(5, 16))
    for number, name in enumerate(variables, start=2):
        monkeypatch.setenv(name, "1")
        assert backends.remembered("accept_reject", backend, tokens(5, 16)) == number
        monkeypatch.delenv(name)
        assert backends.remembered("accept_reject", backend, tokens(5, 16)) == first


def test_a_chains_choice_is_made_once_for_each_head_and_number_of_rows(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "_remembered", {})
    monkeypatch.setattr(backends, "implementation", lambda *call: asked.append(call) or len(asked))
    heads = [SimpleNamespace(handle=handle, device=torch.device("cuda", 0)) for handle in (1, 2)]
    calls = [
        (None, heads[0], 4, False),
        (None, heads[0], 4, True),
        (None, heads[0], 5, False),
        ("cuda", heads[0], 4, True),
    ]
    calls += [(None, heads[1], 4, False)]
    for _ in range(2):
        assert [backends.remembered_chain(*call) for call in calls] == [1, 2, 3, 4, 5]
    assert asked[1] == ("denoise", None, heads[0].device, heads[0], 4, True, False)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "0")
    assert backends.remembered_chain(*calls[0]) == 6
    on_cpu = SimpleNamespace(handle=3, device=torch.device("cpu"))
    assert [backends.remembered_chain(None, on_cpu, 4, 1) for _ in range(2)] == [7, 8]
    assert backends.remembered_chain(None, heads[0], 4, 1, True) == 9  # in parallel


def test_on_the_cpu_and_for_what_is_no_name_nothing_is_remembered(choices):
    for number in (1, 2):
        assert backends.remembered("accept_reject", "triton", tokens(5, 16, device="cpu")) == number
    for number in (3, 4):
        assert backends.remembered("accept_reject", ["triton"], tokens(5, 16)) == number


def test_an_error_is_raised_again_and_memory_is_bounded(choices, monkeypatch):
    monkeypatch.setattr(backends, "_MOST_REMEMBERED", 3)
    for n in range(10):
        backends.remembered("accept_reject", None, tokens(n, 16))
        assert len(backends._remembered) <= 3

    def refuse(*_):
        raise RuntimeError("cannot serve")

    monkeypatch.setattr(backends, "implementation", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot serve"):
            backends.remembered("accept_reject", None, tokens(99, 16))
