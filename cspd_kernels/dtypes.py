"""Types of a head's arithmetic, their names, and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from . import dtype_names

OPERAND_DTYPES = tuple(getattr(torch, name) for name in dtype_names.SHORT)


def as_dtype(
    dtype: torch.dtype | str, who: str = "dtype", accepted: Sequence[torch.dtype] = OPERAND_DTYPES
) -> torch.dtype:
    """A dtype from itself or from its name, such as "bfloat16", "torch.bfloat16" or "bf16".

    Args:
        who: what takes it, for the message, such as ``"patch"``.
        accepted: the dtypes that this place accepts.

    Raises:
        WrongDtype: it is no dtype, or not an accepted one. The message lists the accepted ones.
    """
    names = [str(known).removeprefix("torch.") for known in accepted]
    if isinstance(dtype, str):
        return accepted[names.index(dtype_names.full_name(dtype, who, names))]
    if dtype not in accepted:
        raise dtype_names.wrong(dtype, who, names)
    return dtype


def as_dtype_or_none(
    dtype: torch.dtype | str | None, who: str = "dtype", accepted: Sequence[torch.dtype] = OPERAND_DTYPES
) -> torch.dtype | None:
    """:func:`as_dtype`, where None stands for the autocast dtype, or the dtype of the weights."""
    return None if dtype is None else as_dtype(dtype, who, accepted)


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


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which the caller's autocast is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
