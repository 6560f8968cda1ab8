"""Which implementation serves an op: argument, then ``CSPD_BACKEND``, then automatic."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable

BACKENDS = ("torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "CSPD_BACKEND"
_logger = logging.getLogger("cspd_kernels")


def available_backends() -> dict[str, str]:
    """``{"torch": "ok", "triton": "ok" or why not, "cuda": "ok" or why not}``."""
    return {name: why_unavailable(name) or "ok" for name in BACKENDS}


def why_unavailable(backend: str) -> str | None:
    """None when the backend can serve, else the reason."""
    if backend == "torch":
        return None
    if importlib.util.find_spec(f"cspd_kernels.ops.denoise.{backend}") is None:
        return f"this release has no {backend} kernels yet; use backend='torch'"
    return None


def implementation(op: str, backend: str | None) -> Callable:
    """The function that computes ``op``: the attribute of that name in ``ops/<op>/<backend>.py``.

    An explicit choice (argument or environment) that cannot be served raises; the automatic one
    takes the torch backend and logs the reason once.

    Raises:
        ValueError: no such backend. RuntimeError: the backend cannot serve; the message says why.
    """
    source = "backend"
    if backend is None and os.environ.get(ENVIRONMENT_VARIABLE):
        backend, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if backend is None:
        backend = _automatic()
    elif backend not in BACKENDS:
        raise ValueError(f"expected {source} one of {', '.join(BACKENDS)}, got {backend!r}")
    elif reason := why_unavailable(backend):
        raise RuntimeError(f"{source}={backend!r} cannot serve {op}: {reason}")
    return _load(op, backend)


@functools.cache
def _automatic() -> str:
    _logger.info("automatic backend: torch (%s)", why_unavailable("triton"))
    return "torch"


@functools.cache
def _load(op: str, backend: str) -> Callable:
    # A submodule named torch would take the place of the library's name in the op's package.
    module = "torch_backend" if backend == "torch" else backend
    return getattr(importlib.import_module(f"cspd_kernels.ops.{op.removeprefix('log_')}.{module}"), op)
