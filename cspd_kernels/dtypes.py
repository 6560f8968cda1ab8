"""Types of a head's arithmetic, and autocast."""

from __future__ import annotations

import contextlib

import torch

OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the residual stream, the norms and the update of x, for a GEMM operand type.

    Modulations and the activations between two GEMMs are of the operand type.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def call_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """Operand type when none is asked for: autocast's where it is on for this device, else the weights'."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weights


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which the caller's autocast is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
