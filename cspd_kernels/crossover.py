"""What was measured to be fastest, per device and number of tokens: the one table to fill."""

from __future__ import annotations

import functools
import os

import torch

PERSISTENT_VARIABLE = "CSPD_PERSISTENT_MAX_TOKENS"
PERSISTENT_LIMIT = 16  # tokens; beyond it the layered kernels fill the device

# Device name -> op -> (up to how many tokens, None for any; the fastest), ascending. The fastest is "triton", "cuda" or
# "torch", for denoise also "triton persistent" or "cuda persistent", up to PERSISTENT_LIMIT tokens. Empty, as nothing
# has been measured: run `python benchmarks/kernels.py` on the device, which prints its name and, for every size, what
# serves it side by side, and write the winners here:
#     "NVIDIA H100 80GB HBM3": {"denoise": ((2, "cuda persistent"), (16, "cuda"), (None, "triton"))},
FASTEST: dict[str, dict[str, tuple[tuple[int | None, str], ...]]] = {}


def fastest(op: str, device: torch.device, tokens: int | None) -> str | None:
    """The table's choice for an op on so many tokens; None where nothing was measured or the number is not known."""
    if tokens is None:
        return None
    return next((choice for limit, choice in _measured(op, device) if limit is None or tokens <= limit), None)


def prefers_persistent(backend: str, device: torch.device, tokens: int) -> bool:
    """Whether a backend is to take its persistent kernel for so many tokens: ``CSPD_PERSISTENT_MAX_TOKENS``, else
    where the table names it.

    Raises:
        ValueError: the variable is not a number from 0 to 16.
    """
    if value := os.environ.get(PERSISTENT_VARIABLE):
        if not value.isdecimal() or int(value) > PERSISTENT_LIMIT:
            raise ValueError(f"expected {PERSISTENT_VARIABLE} as a number from 0 to {PERSISTENT_LIMIT}, got {value!r}")
        return tokens <= int(value)
    return fastest("denoise", device, tokens) == f"{backend} persistent"


def _measured(op: str, device: torch.device) -> tuple[tuple[int | None, str], ...]:
    return FASTEST.get(_name(device), {}).get(op, ()) if device.type == "cuda" else ()


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
