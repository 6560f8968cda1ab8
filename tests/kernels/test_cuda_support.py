"""Whether the CUDA extension is there, and which devices it serves; on records and modules that are not real."""

import importlib
import json
import types
from contextlib import nullcontext

import pytest
import torch

from cspd_kernels import cuda_support
from cspd_kernels.cuda_support import build_record, covers, why_unavailable, why_unsupported_here
from cspd_kernels.devices import on

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BUILT = {"built": True, "architectures": [80, 90], "ptx": [90], "nvcc": "13.0.88", "kernels": []}


@pytest.fixture(autouse=True)
def record(monkeypatch, tmp_path):
    """``record(dict)`` writes what the installation left; nothing until then."""
    caches = (cuda_support._loaded, cuda_support._why_unsupported_device, cuda_support._why_too_old)
    for cache in caches:
        cache.cache_clear()
    path = tmp_path / "_build.json"
    monkeypatch.setattr(cuda_support, "RECORD", path)
    monkeypatch.delenv("CSPD_CUDA_EMULATION", raising=False)
    yield lambda content: path.write_text(json.dumps(content))
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def extension(record, monkeypatch):
    """An extension that loads, on a machine with a GPU; what it has, and what the GPU can, may be changed."""
    module = types.SimpleNamespace(EMULATED=False, capability=(9, 0), driver=13000)
    module.driver_version, module.runtime_version = lambda: module.driver, lambda: 13000
    record(BUILT)
    monkeypatch.setattr(importlib, "import_module", {"cspd_kernels._C": module}.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: module.capability)
    return module


@pytest.fixture
def emulation(extension, monkeypatch):
    """The environment names a build for the CPU."""
    monkeypatch.setenv("CSPD_CUDA_EMULATION", "/a/file.so")
    module = types.SimpleNamespace(EMULATED=True)
    monkeypatch.setattr(cuda_support, "_loaded_emulation", {"/a/file.so": module}.__getitem__)
    return module


def test_a_source_tree_says_how_to_build():
    assert build_record() == {"built": False, "reason": why_unavailable()}
    assert (
        why_unavailable()
        == "this is a source tree without the extension: pip install -e . builds it where nvcc is found"
    )
    with pytest.raises(RuntimeError, match="the CUDA extension is not there: this is a source tree"):
        cuda_support.extension()
    assert not cuda_support.emulated()


def test_the_reason_of_the_installation(record):
    record({"built": False, "reason": "nvcc was not found"})
    assert why_unavailable() == "nvcc was not found"


def test_an_extension_that_loads(extension, monkeypatch):
    assert cuda_support.extension() is extension
    assert why_unavailable() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_unavailable() == "no CUDA device: use backend='torch'"
    assert not cuda_support.emulated()


def test_an_extension_that_does_not_load_is_a_reason_and_no_crash(record, monkeypatch):
    def broken(name):
        raise ImportError(f"{name}: undefined symbol: cudaFoo")

    record(BUILT)
    monkeypatch.setattr(importlib, "import_module", broken)
    reason = "cspd_kernels._C cannot be imported (ImportError: cspd_kernels._C: undefined symbol: cudaFoo)"
    assert why_unavailable() == f"{reason}: install cspd-kernels again"
    with pytest.raises(RuntimeError, match="undefined symbol: cudaFoo"):
        cuda_support.extension()


def test_the_extension_is_loaded_once(extension, record, monkeypatch):
    first = cuda_support.extension()
    record({"built": False, "reason": "too late"})
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} is imported again"))
    assert cuda_support.extension() is first


def test_the_emulation_needs_no_device(emulation, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_support.extension() is emulation
    assert cuda_support.emulated()
    assert why_unavailable() is None
    assert why_unsupported_here(CPU) is None
    assert why_unsupported_here(CUDA) == (
        "CSPD_CUDA_EMULATION is set, so the kernels run on CPU tensors, and these are on cuda:0: unset it, or move them"
    )
    assert cuda_support.launch_stream(CPU) == 0


def test_the_emulation_ends_with_its_variable(emulation, extension, monkeypatch):
    assert cuda_support.emulated()
    monkeypatch.delenv("CSPD_CUDA_EMULATION")
    assert cuda_support.extension() is extension
    assert "these are on cpu" in why_unsupported_here(CPU)


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_an_emulation_that_does_not_load_is_a_reason(monkeypatch, tmp_path, content):
    path = tmp_path / "_C.so"
    if content:
        path.write_bytes(content)
    monkeypatch.setenv("CSPD_CUDA_EMULATION", str(path))
    reason = why_unavailable()
    assert reason.startswith(f"CSPD_CUDA_EMULATION='{path}' does not load (ImportError: ")
    assert reason.endswith("unset it, or build that file by python csrc/compile.py --emulated")
    assert not cuda_support.emulated()


@pytest.mark.parametrize(
    ("architectures", "ptx", "yes", "no"),
    [
        ([80], [], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ([86], [], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ([90], [90], [(9, 0), (10, 0), (12, 1)], [(8, 0), (8, 9)]),
        ([80, 90, 100], [100], [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)], [(7, 5)]),
        ([80, 103], [103], [(8, 0), (10, 3), (11, 0)], [(9, 0), (10, 0)]),
        ([], [90], [(9, 0), (10, 0)], [(8, 9)]),
        ([], [], [], [(8, 0)]),
    ],
)
def test_coverage(architectures, ptx, yes, no):
    assert [c for c in yes + no if covers(architectures, ptx, c)] == yes


def test_devices_that_are_not_covered(extension, record):
    assert why_unsupported_here(CUDA) is None
    record(BUILT | {"ptx": []})
    extension.capability = (10, 0)
    assert why_unsupported_here(CUDA) is None  # a device does not change
    assert why_unsupported_here(torch.device("cuda", 1)) == (
        "its kernels were compiled for 8.0, 9.0, and this device has compute capability 10.0: "
        "install again with CSPD_CUDA_ARCHS=10.0"
    )
    extension.capability = (7, 5)
    needed = "its kernels need compute capability 8.0, and this device has 7.5: use backend='torch'"
    assert why_unsupported_here(torch.device("cuda", 2)) == needed
    extension.capability = (8, 0)
    assert why_unsupported_here(torch.device("cuda", 3)) is None


@pytest.mark.parametrize("second", [(9, 0), (7, 5)])
def test_a_machine_is_served_where_one_of_its_devices_is(extension, monkeypatch, second):
    capabilities = [(7, 5), second]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    reason = "its kernels need compute capability 8.0, and this device has 7.5: use backend='torch'"
    assert why_unavailable() == (None if second == (9, 0) else reason)


@pytest.mark.parametrize(("driver", "why"), [(13000, None), (13010, None), (12080, "12.8"), (0, "0.0")])
def test_a_driver_older_than_the_toolkit(extension, driver, why):
    extension.driver = driver
    assert why_unavailable() == (
        why
        and f"its kernels were built by CUDA 13.0, and the driver is for CUDA {why}: update the driver, or install "
        f"again with an nvcc of CUDA {why}"
    )


@pytest.mark.parametrize(("capability", "served"), [((9, 0), True), ((10, 0), False)])
def test_ptx_needs_a_driver_as_new_as_the_toolkit(extension, capability, served):
    extension.capability, extension.driver = capability, 13000
    extension.runtime_version = lambda: 13010
    reason = why_unsupported_here(CUDA)
    assert why_unavailable() == reason
    assert (reason is None) is served
    assert served or "built by CUDA 13.1, and the driver is for CUDA 13.0" in reason


def test_other_devices(extension, monkeypatch):
    reason = "its kernels run on CUDA tensors, and these are on cpu: move them, or use backend='torch'"
    assert why_unsupported_here(CPU) == reason
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert why_unsupported_here(CUDA) == "its kernels are written for NVIDIA devices: use backend='torch'"


@pytest.mark.parametrize("raw", [None, lambda index: 7 if index == 0 else pytest.fail("another device")])
def test_launches_go_to_the_current_stream(extension, monkeypatch, raw):
    streams = {CUDA: types.SimpleNamespace(cuda_stream=7)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__ if raw is None else None)
    monkeypatch.setattr(cuda_support, "_raw_stream", raw)
    assert cuda_support.launch_stream(CUDA) == 7


@pytest.mark.gpu
def test_the_handle_is_that_of_the_current_stream():
    stream = torch.cuda.Stream()
    for current in (torch.cuda.default_stream(), stream):
        with torch.cuda.stream(current):
            assert cuda_support.launch_stream(stream.device) == current.cuda_stream


def test_only_another_device_is_made_the_current_one(monkeypatch):
    current, made = [0], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or nullcontext())
    for device in (CPU, torch.device("cuda", 0)):
        with on(device):
            assert made == []
    with on(torch.device("cuda", 1)):
        assert made == [torch.device("cuda", 1)]
    current[0] = 1
    with on(torch.device("cuda", 0)), on(torch.device("cuda", 1)):
        assert made[1:] == [torch.device("cuda", 0)]
