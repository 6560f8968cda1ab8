"""Kernels of continuous speculative decoding: the denoising chain of a diffusion head, the Gaussian
density ratio of two chains, and batched acceptance-rejection. It knows heads and tensors, never models.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Looked up on first use, so that `python -m cspd_kernels.info` can report a torch that does not import.
_EXPORTS = {
    "CandidateVerdict": ".ops.accept_reject",
    "Denoised": ".ops.denoise",
    "DenoisedInParallel": ".ops.denoise",
    "DiffusionHead": ".head",
    "PhiloxNoise": ".noise",
    "Schedule": ".schedule",
    "Verdict": ".ops.accept_reject",
    "accept_reject": ".ops.accept_reject",
    "available_backends": ".backends",
    "denoise": ".ops.denoise",
    "evaluate": ".ops.evaluate",
    "log_density_ratio": ".ops.density_ratio",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
