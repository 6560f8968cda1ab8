"""The errors that a caller may catch: those of :mod:`cspd_kernels.errors`."""

from __future__ import annotations

from cspd_kernels.errors import (
    BackendUnavailable,
    CallError,
    CheckpointError,
    CspdError,
    InvalidInput,
    MissingPackage,
    NotAModel,
    UnsupportedModel,
    WrongDtype,
    WrongType,
)

__all__ = [
    "BackendUnavailable",
    "CallError",
    "CheckpointError",
    "CspdError",
    "InvalidInput",
    "MissingPackage",
    "NotAModel",
    "UnsupportedModel",
    "WrongDtype",
    "WrongType",
]
