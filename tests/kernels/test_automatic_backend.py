"""The automatic choice of the backend on CUDA devices, and what kernels may refuse; the kernels are not real."""

import logging
import sys
import types

import pytest
import torch

from cspd_kernels import available_backends, backends, cuda_support
from cspd_kernels.backends import implementation
from cspd_kernels.crossover import DEFAULT

OPS = ("denoise", "log_density_ratio", "accept_reject")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fake_kernels(monkeypatch):
    """Kernels of both kinds for every op, "ok" on this machine, which refuse the head "odd", those in Triton "wide",
    too, and the persistent one "long"; what is chosen is not loaded. ``missing`` takes a backend away, ``here`` is what
    CUDA says of a device.
    """
    fake = types.SimpleNamespace(missing={}, here=None)

    def module(*refused):
        return types.SimpleNamespace(why_unsupported=lambda head: f"the head is {head}" if head in refused else None)

    for op in OPS:
        monkeypatch.setitem(sys.modules, backends._module(op, "triton"), module("odd", "wide"))
        monkeypatch.setitem(sys.modules, backends._module(op, "cuda"), module("odd"))
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, op="denoise": fake.missing.get(backend))

    def load(op, backend, name=None):
        if name is None:
            return op, backend
        assert (op, backend, name) == ("denoise", "cuda", "why_not_persistent")
        return lambda head, tokens, guided: f"{head}, {tokens}, {guided}" if head == "long" else None

    monkeypatch.setattr(backends, "_load", load)
    monkeypatch.setattr(backends, "ranked", lambda *_: DEFAULT)
    monkeypatch.setattr(cuda_support, "why_unsupported_here", lambda device: fake.here)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends.log_once.cache_clear()
    return fake


@pytest.fixture
def measured(monkeypatch):
    """``measured(*names)`` sets what is fastest up to 8 tokens on any device."""

    def set_order(*names):
        order = tuple(dict.fromkeys((*names, *DEFAULT)))

        def ranked(op, device, subject, tokens, *_):
            return order if tokens is not None and tokens <= 8 else DEFAULT

        monkeypatch.setattr(backends, "ranked", ranked)

    return set_order


@pytest.mark.parametrize("op", OPS)
def test_automatic_is_triton_on_cuda_devices_and_torch_elsewhere(fake_kernels, op):
    assert implementation(op, None, CUDA, "any") == (op, "triton")
    for device in (None, CPU, torch.device("meta")):
        assert implementation(op, None, device, "any") == (op, "torch")


@pytest.mark.parametrize("op", OPS)
def test_automatic_on_cuda_falls_back_to_torch_with_the_reason_logged_once_per_op(fake_kernels, caplog, op):
    fake_kernels.missing = {"triton": "it is of wood", "cuda": "it is of straw"}
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        for _ in range(3):
            assert implementation(op, None, CUDA) == (op, "torch")
    assert caplog.messages == [f"automatic backend of {op}: torch (triton: it is of wood; cuda: it is of straw)"]
    assert caplog.records[0].levelname == "WARNING"


def test_a_cause_is_one_warning_for_all_ops(fake_kernels, caplog):
    fake_kernels.missing = {"triton": "it is of wood", "cuda": "it is of straw"}
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        for op in OPS:
            implementation(op, None, CUDA)
        fake_kernels.missing["cuda"] = "it is of brick"
        implementation("denoise", None, CUDA)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO", "WARNING"]


@pytest.mark.parametrize("op", OPS)
def test_cuda_serves_where_triton_cannot(fake_kernels, caplog, op):
    fake_kernels.missing["triton"] = "it is not here"
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        for _ in range(2):
            assert implementation(op, None, CUDA, "any") == (op, "cuda")
    assert caplog.messages == [f"automatic backend of {op}: cuda (triton: it is not here)"]
    assert caplog.records[0].levelname == "INFO"  # kernels serve all the same


def test_cuda_is_neither_asked_nor_named_where_triton_serves(fake_kernels, caplog):
    fake_kernels.missing["cuda"] = "it is not here"
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert implementation("denoise", None, CUDA, "any", 3) == ("denoise", "triton")
    assert caplog.messages == []


@pytest.mark.parametrize("choice", ["cuda", "cuda persistent", "triton", "torch"])
def test_what_was_measured_to_be_fastest_goes_first(fake_kernels, measured, caplog, choice):
    measured(choice)
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert implementation("denoise", None, CUDA, "any", 8) == ("denoise", choice.split()[0])
        assert implementation("denoise", None, CUDA, "any", 9) == ("denoise", "triton")
        assert implementation("denoise", None, CUDA, "any") == ("denoise", "triton")
        assert implementation("denoise", None, CPU, "any", 8) == ("denoise", "torch")
    assert caplog.messages == []
    assert implementation("denoise", "triton", CUDA, "any", 8) == ("denoise", "triton")


def test_the_fastest_may_not_serve(fake_kernels, measured, caplog):
    measured("cuda persistent")
    fake_kernels.here = "this device is too old"
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert implementation("denoise", None, CUDA, "any", 8) == ("denoise", "triton")
        assert implementation("denoise", None, CUDA, "wide", 8) == ("denoise", "torch")
    assert caplog.messages == [
        "automatic backend of denoise: triton (cuda: this device is too old)",
        "automatic backend of denoise: torch (cuda: this device is too old; triton: the head is wide)",
    ]


def test_the_persistent_kernel_may_not_cover_the_size(fake_kernels, measured, caplog):
    measured("cuda persistent", "triton", "cuda")
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert implementation("denoise", None, CUDA, "any", 8, 2) == ("denoise", "cuda")
        assert implementation("denoise", None, CUDA, "long", 8, 2) == ("denoise", "triton")
    assert caplog.messages == ["automatic backend of denoise: triton (cuda persistent: long, 8, 2)"]
    assert backends.choice("denoise", CUDA, "any", 8) == ("cuda persistent", {})
    assert backends.choice("denoise", CUDA, "long", 8) == ("triton", {"cuda persistent": "long, 8, 1"})


def test_a_head_that_kernels_refuse(fake_kernels, caplog):
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert implementation("denoise", None, CUDA, "odd") == ("denoise", "torch")
        assert implementation("denoise", None, CUDA, "wide") == ("denoise", "cuda")
    assert caplog.messages == [
        "automatic backend of denoise: torch (triton: the head is odd; cuda: the head is odd)",
        "automatic backend of denoise: cuda (triton: the head is wide)",
    ]
    for backend in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve denoise: the head is odd"):
            implementation("denoise", backend, CUDA, "odd")
        assert implementation("denoise", backend) == ("denoise", backend)  # asked before there is a head


def test_the_cuda_kernels_say_where_they_run(fake_kernels):
    fake_kernels.here = "these are on cpu: move them"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve denoise: these are on cpu: move them"):
        implementation("denoise", "cuda", CPU, "any")
    fake_kernels.here = None  # emulated
    assert implementation("denoise", "cuda", CPU, "any") == ("denoise", "cuda")


def test_cuda_is_as_available_as_its_extension(monkeypatch):
    monkeypatch.setattr(backends, "_exists", lambda module: True)
    monkeypatch.setattr(cuda_support, "why_unavailable", lambda: "nobody built it")
    assert available_backends()["cuda"] == "nobody built it"
    monkeypatch.setattr(cuda_support, "why_unavailable", lambda: None)
    assert available_backends()["cuda"] == "ok"


def test_kernels_and_tensors_must_be_on_one_side(fake_kernels, monkeypatch):
    with pytest.raises(RuntimeError, match=r"these are on cpu: .*or set TRITON_INTERPRET=1"):
        implementation("denoise", "triton", CPU, "any")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert implementation("denoise", "triton", CPU, "any") == ("denoise", "triton")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET is set, .*these are on cuda"):
        implementation("denoise", "triton", CUDA, "any")
