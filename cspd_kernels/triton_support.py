"""What the Triton backends of all ops share: where their kernels run, and small device functions."""

from __future__ import annotations

import ctypes
import functools

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .backends import interpreting

_OLDEST_CAPABILITY = (8, 0)
_EARLY_CAPABILITY, _EARLY_DRIVER = (9, 0), 12030  # of launches before the end of the kernel in front, in graphs too


@triton.jit
def expm1(z):
    """exp(z) - 1, float32, to a few rounding errors of itself: a series where exp(z) is near 1."""
    tail = 1.0 / 720.0 + z * (1.0 / 5040.0 + z * (1.0 / 40320.0 + z * (1.0 / 362880.0)))
    tail = 1.0 / 6.0 + z * (1.0 / 24.0 + z * (1.0 / 120.0 + z * tail))
    series = z * (1.0 + z * (1.0 / 2.0 + z * tail))
    return tl.where(tl.abs(z) < 0.5, series, tl.exp(z) - 1.0)


INTERPRETED = not isinstance(expm1, JITFunction)  # decided when the kernels are imported


def why_unsupported_here(device: torch.device) -> str | None:
    """None where the kernels run on tensors of this device, else the reason."""
    if interpreting() != INTERPRETED:
        return "TRITON_INTERPRET was changed after the kernels had been imported: set it before, in a new process"
    return _why_unsupported_device(device)


@functools.cache
def _why_unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        needed, got = (".".join(map(str, c)) for c in (_OLDEST_CAPABILITY, capability))
        return f"its kernels need compute capability {needed}, and this device has {got}"
    return None


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether kernels may start before the one in front of them has ended (programmatic dependent launch).

    A meta tensor has no device to ask: there, what the newest ones do (see ``triton_report``).
    """
    if INTERPRETED or device.type != "cuda":
        return device.type == "meta"
    return torch.cuda.get_device_capability(device) >= _EARLY_CAPABILITY and _driver_version() >= _EARLY_DRIVER


def _driver_version() -> int:
    """The driver's CUDA version, 1000 major + 10 minor; 0 if it is not known."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value
