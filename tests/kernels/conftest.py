"""Fixtures for what has both shapes of the chain, and for a device that only writes down what it is told."""

import functools

import pytest
import torch
from chains import counted, kernels_of
from fake_cuda import FakeCuda, FakeEvent, FakeGraph

from cspd_kernels import graphs
from cspd_kernels.backends import log_once, why_unavailable

SHAPES = [("triton", "layered"), ("cuda", "layered"), ("cuda", "persistent")]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """A test that asks for ``shape``, and does not say which, runs with each one of every backend."""
    said = any("shape" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "shape" in metafunc.fixturenames and not said:
        metafunc.definition.add_marker(pytest.mark.parametrize(("backend", "shape"), SHAPES, indirect=True))


@pytest.fixture
def multiprocessors(monkeypatch, backend, kernel_device):
    """``multiprocessors(n)``: without a device a persistent chain takes n programs, all of which the emulation runs
    together."""

    def use(count):
        if kernel_device.type == "cpu" and kernels_of(backend).persistent:
            monkeypatch.setattr(f"cspd_kernels.ops.denoise.{backend}_persistent.multiprocessors", lambda device: count)

    return use


@pytest.fixture
def used(monkeypatch, backend):
    """The chains that run, in order and once for every chunk of steps."""
    kernels, chains = kernels_of(backend), []
    for kind in filter(None, (kernels.layered, kernels.persistent)):
        monkeypatch.setattr(kind, "run_steps", counted(kind.run_steps, chains))
    return chains


@pytest.fixture
def shape(request, monkeypatch, backend, multiprocessors, used):
    """Run a test with a shape of the chain, and see to it that this one was taken."""
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "0" if request.param == "layered" else "16")
    if request.param != "layered":
        multiprocessors(3)
    yield request.param
    assert {type(chain) for chain in used} == {getattr(kernels_of(backend), request.param)}


@pytest.fixture
def persistent(monkeypatch, backend, multiprocessors, used):
    """``persistent(n)``: the persistent kernel is switched on, with n programs, and it must be taken."""

    def switch_on(count):
        monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
        multiprocessors(count)

    yield switch_on
    assert {type(chain) for chain in used} == {kernels_of(backend).persistent}


@pytest.fixture
def available(request, device_of):
    """A test whose backend does not run here is skipped with the reason, though it asks for no device."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") is not None:
        device_of(request.getfixturevalue("backend"))


@pytest.fixture
def kernel_backends():
    """The backends with kernels that run on a device here."""
    found = [name for name in ("triton", "cuda") if why_unavailable(name) is None]
    if not found:
        pytest.skip("; ".join(f"{name}: {why_unavailable(name)}" for name in ("triton", "cuda")))
    return found


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch.empty hands out holds NaN, so that what nobody has written shows."""
    empty = torch.empty

    def poison(*arguments, **options):
        value = empty(*arguments, **options)
        return value.fill_(float("nan")) if value.is_floating_point() else value

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def cuda(monkeypatch):
    """A device whose ``log`` tells what it was asked for."""
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Event", functools.partial(FakeEvent, cuda))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", functools.partial(FakeGraph, cuda))
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: cuda.current)
    capturing = lambda: cuda.captured_by_caller or cuda.capturing is not None  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: cuda.side)
    log_once.cache_clear()
    for shared in (graphs._turn, graphs._captures):
        shared.cache_clear()
    yield cuda
    for shared in (graphs._turn, graphs._captures):
        shared.cache_clear()
