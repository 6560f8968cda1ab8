"""Kernels of continuous speculative decoding: the denoising chain of a diffusion head, the Gaussian
density ratio of two chains, and batched acceptance-rejection. It knows heads and tensors, never models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .logs import set_up as _set_up_logs

if TYPE_CHECKING:
    from . import errors
    from .backends import available_backends
    from .errors import BackendUnavailable, CspdError, InvalidInput, UnsupportedModel, WrongDtype
    from .head import DiffusionHead
    from .noise import PhiloxNoise
    from .ops.accept_reject import CandidateVerdict, Verdict, accept_reject
    from .ops.denoise import Denoised, DenoisedInParallel, denoise
    from .ops.density_ratio import log_density_ratio
    from .ops.evaluate import evaluate
    from .schedule import Schedule

__version__ = "0.1.0"

# Looked up on first use, so that `python -m cspd_kernels.info` can report a torch that does not import.
_HOMES = {
    "BackendUnavailable": "errors",
    "CandidateVerdict": "ops.accept_reject",
    "CspdError": "errors",
    "Denoised": "ops.denoise",
    "DenoisedInParallel": "ops.denoise",
    "DiffusionHead": "head",
    "InvalidInput": "errors",
    "PhiloxNoise": "noise",
    "Schedule": "schedule",
    "UnsupportedModel": "errors",
    "Verdict": "ops.accept_reject",
    "WrongDtype": "errors",
    "accept_reject": "ops.accept_reject",
    "available_backends": "backends",
    "denoise": "ops.denoise",
    "evaluate": "ops.evaluate",
    "log_density_ratio": "ops.density_ratio",
}

__all__ = [
    "BackendUnavailable",
    "CandidateVerdict",
    "CspdError",
    "Denoised",
    "DenoisedInParallel",
    "DiffusionHead",
    "InvalidInput",
    "PhiloxNoise",
    "Schedule",
    "UnsupportedModel",
    "Verdict",
    "WrongDtype",
    "accept_reject",
    "available_backends",
    "denoise",
    "errors",
    "evaluate",
    "log_density_ratio",
]


if not TYPE_CHECKING:  # which knows the names, and no others

    def __getattr__(name: str) -> Any:
        if name == "errors":
            return importlib.import_module(f"{__name__}.errors")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__})


_set_up_logs()
