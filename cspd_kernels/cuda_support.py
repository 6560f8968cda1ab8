"""The CUDA extension ``cspd_kernels._C``: whether it is there, and where its kernels run."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Iterable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from .errors import BackendUnavailable

RECORD = Path(__file__).with_name("_build.json")  # written by setup.py
# Names a build of the kernels for the CPU, made by `python csrc/compile.py --emulated`: slow, for tests.
EMULATION_VARIABLE = "CSPD_CUDA_EMULATION"
# What current_stream() makes an object of; code that torch.compile writes calls it, too.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_OLDEST_CAPABILITY = (8, 0)  # background copies, tensor cores for bfloat16


def extension() -> ModuleType:
    """``cspd_kernels._C``, or the module that ``CSPD_CUDA_EMULATION`` names.

    Raises:
        BackendUnavailable: it was not built or does not load. The message says why.
    """
    loaded = _loaded(os.environ.get(EMULATION_VARIABLE, ""))
    if isinstance(loaded, str):
        raise BackendUnavailable(f"the CUDA extension is not there: {loaded}")
    return loaded


def emulated() -> bool:
    """Whether the kernels run on the CPU: they were built without CUDA, for tests."""
    loaded = _loaded(os.environ.get(EMULATION_VARIABLE, ""))
    return not isinstance(loaded, str) and loaded.EMULATED


def why_unavailable() -> str | None:
    """None when the kernels can run on some device of this machine, else the reason."""
    loaded = _loaded(os.environ.get(EMULATION_VARIABLE, ""))
    if isinstance(loaded, str):
        return loaded
    if loaded.EMULATED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device: use backend='torch'"
    if reason := _why_too_old(compiling=False):
        return reason
    reasons = [_why_unsupported_device(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return reasons[0] if reasons and None not in reasons else None


def build_record() -> dict:
    """What setup.py wrote: ``{"built": True, "architectures", "ptx", "nvcc", "kernels", ...}``, or
    ``{"built": False, "reason"}``.
    """
    try:
        return json.loads(RECORD.read_text())
    except FileNotFoundError:
        return {
            "built": False,
            "reason": "this is a source tree without the extension: pip install -e . builds it where nvcc is found",
        }


@functools.cache
def _loaded(emulation: str) -> ModuleType | str:
    """The module, or why there is none."""
    if emulation:
        return _loaded_emulation(emulation)
    record = build_record()
    if not record["built"]:
        return record["reason"]
    try:
        return importlib.import_module("cspd_kernels._C")
    except Exception as error:  # noqa: BLE001  (whatever a broken installation raises)
        return f"cspd_kernels._C cannot be imported ({type(error).__name__}: {error}): install cspd-kernels again"


def _loaded_emulation(path: str) -> ModuleType | str:
    try:
        loader = ExtensionFileLoader("_C", path)  # named after the function that initialises it
        module = module_from_spec(spec_from_file_location("_C", path, loader=loader))
        loader.exec_module(module)
    except Exception as error:  # noqa: BLE001
        return (
            f"{EMULATION_VARIABLE}={path!r} does not load ({type(error).__name__}: {error}): "
            "unset it, or build that file by python csrc/compile.py --emulated"
        )
    return module


def why_unsupported_here(device: torch.device) -> str | None:
    """None where the kernels run on tensors of this device, else the reason."""
    if emulated():
        if device.type == "cpu":
            return None
        return (
            f"{EMULATION_VARIABLE} is set, so the kernels run on CPU tensors, and these are on {device}: unset it, "
            "or move them"
        )
    return _why_unsupported_device(device)


@functools.cache
def _why_unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels run on CUDA tensors, and these are on {device}: move them, or use backend='torch'"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA devices: use backend='torch'"
    return why_not_covered(build_record(), torch.cuda.get_device_capability(device))


def why_not_covered(record: dict, capability: tuple[int, int]) -> str | None:
    """None where what an installation has built runs on devices of this compute capability, else the reason."""
    if capability < _OLDEST_CAPABILITY:
        needed, got = _dotted(_OLDEST_CAPABILITY), _dotted(capability)
        return f"its kernels need compute capability {needed}, and this device has {got}: use backend='torch'"
    if covers(record["architectures"], (), capability):
        return None
    if covers((), record["ptx"], capability):
        return _why_too_old(compiling=True)
    return (
        f"its kernels were compiled for {compiled_for(record)}, and this device has compute capability "
        f"{_dotted(capability)}: install again with CSPD_CUDA_ARCHS={_dotted(capability)}"
    )


@functools.cache
def _why_too_old(compiling: bool) -> str | None:
    """None where the driver runs what the extension's toolkit has built (13000 is CUDA 13.0), else the reason. Any
    driver of the same major version does, but to compile PTX it must be as new as the toolkit.
    """
    driver, toolkit = extension().driver_version(), extension().runtime_version()
    if driver >= toolkit or (not compiling and driver // 1000 == toolkit // 1000):
        return None
    has, built = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, toolkit))
    return (
        f"its kernels were built by CUDA {built}, and the driver is for CUDA {has}: update the driver, or install "
        f"again with an nvcc of CUDA {has}"
    )


def covers(architectures: Iterable[int], ptx: Iterable[int], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures (80 is 8.0) runs on a device.

    A binary runs on devices of its major version, from its minor version on. PTX runs on every device from its own
    version on.
    """
    binary = any(a // 10 == capability[0] and a % 10 <= capability[1] for a in architectures)
    return binary or any(divmod(a, 10) <= capability for a in ptx)


def compiled_for(record: dict) -> str:
    """What a record of a built extension says it runs on, for people."""
    ptx = [f"PTX {_dotted(divmod(a, 10))}" for a in record["ptx"]]
    return ", ".join([_dotted(divmod(a, 10)) for a in record["architectures"]] + ptx)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def launch_stream(device: torch.device) -> int:
    """The handle of the current stream of the device; 0 where the kernels run on the CPU."""
    if device.type != "cuda":
        return 0
    if _raw_stream is not None and device.index is not None:
        return _raw_stream(device.index)
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; a few where the kernels are emulated."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
