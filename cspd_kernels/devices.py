"""What devices have, for plans and reports of all backends."""

from __future__ import annotations

import contextlib
import functools
import threading

import torch

SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory one block may have
_HERE = contextlib.nullcontext()
_LEAST_SHARED = 99 << 10  # of every architecture from 8.0 on


def one_a_device(make):
    """The one result of ``make(device)`` for every device, also where threads ask at the same time."""
    made: dict[torch.device, object] = {}
    lock = threading.Lock()

    @functools.wraps(make)
    def get(device: torch.device):
        with lock:
            if device not in made:
                made[device] = make(device)
            return made[device]

    get.cache_clear = made.clear
    return get


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may opt in to; where kernels are emulated, the most that any device has."""
    if device.type != "cuda":
        return max(SHARED_LIMITS.values())
    properties = torch.cuda.get_device_properties(device)
    by_architecture = SHARED_LIMITS.get(10 * properties.major + properties.minor, _LEAST_SHARED)
    return getattr(properties, "shared_memory_per_block_optin", by_architecture)  # not in every supported PyTorch


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which kernels are launched on this device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _HERE
    return torch.cuda.device(device)


def read(value: torch.Tensor) -> bool:
    """Read a value of a device. It does not use ``item``, so a caller's debug mode does not report this known wait."""
    if not value.is_cuda:
        return bool(value)
    answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    answer.copy_(value, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    return bool(answer)
