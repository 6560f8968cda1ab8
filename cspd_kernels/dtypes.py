"""Types of a head's arithmetic, their names, and autocast."""

from __future__ import annotations

import contextlib

import torch

from .errors import WrongDtype

OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHORT_NAMES = {  # beside PyTorch's own, with or without "torch."
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "double": torch.float64,
}
_BY_NAME = SHORT_NAMES | {str(dtype).removeprefix("torch."): dtype for dtype in OPERAND_DTYPES}


def as_dtype(
    dtype: torch.dtype | str, who: str = "dtype", accepted: tuple[torch.dtype, ...] = OPERAND_DTYPES
) -> torch.dtype:
    """A dtype from itself or its name: "bfloat16", "torch.bfloat16", "bf16", in upper or lower case.

    Args:
        who: what takes it, for the message, such as ``"patch"``.
        accepted: the types that this place accepts.

    Raises:
        WrongDtype: it is no such type, or one that this place does not accept. The message lists those that it does.
    """
    found = _BY_NAME.get(dtype.strip().lower().removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found in accepted:
        return found
    names = ", ".join(str(known).removeprefix("torch.") for known in accepted)
    short = ", ".join(name for name, known in SHORT_NAMES.items() if known in accepted)
    raise WrongDtype(f"{who} expected a dtype out of {names} (or as {short}), got {dtype!r}")


def as_dtype_or_none(
    dtype: torch.dtype | str | None, who: str = "dtype", accepted: tuple[torch.dtype, ...] = OPERAND_DTYPES
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


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which the caller's autocast is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
