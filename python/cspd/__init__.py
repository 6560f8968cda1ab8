"""Continuous speculative decoding and a drop-in fast sampler for MAR-like image models.

``cspd.patch(model)`` makes an existing model sample through fused denoising, exactly;
:class:`SpecDecodeRunner` pairs a draft with a target model, approximately by construction.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from cspd_kernels import __version__ as __version__

from .origin import warn_of_a_mixture

if TYPE_CHECKING:
    from . import errors, models, samplers
    from .checkpoints import load_mar
    from .context_relaxation import ContextRelaxation
    from .description import describe
    from .entropy_draft import EntropyDraft
    from .errors import BackendUnavailable, CheckpointError, CspdError, InvalidInput, UnsupportedModel, WrongDtype
    from .output import SampleOutput
    from .patching import is_patched, patch, patched, unpatch
    from .policies import AdaptiveDraft, SimilarityRelaxation, Window
    from .progress import Progress
    from .speculative import SpecDecodeRunner
    from .stats import RunStats
    from .vae import load_vae
    from .whole.sampler import sample_tokens

# Looked up on first use: the command `cspd` is at work, and can be interrupted, before torch is imported.
_HOMES = {
    "AdaptiveDraft": "policies",
    "BackendUnavailable": "errors",
    "CheckpointError": "errors",
    "ContextRelaxation": "context_relaxation",
    "CspdError": "errors",
    "EntropyDraft": "entropy_draft",
    "InvalidInput": "errors",
    "Progress": "progress",
    "RunStats": "stats",
    "SampleOutput": "output",
    "SimilarityRelaxation": "policies",
    "SpecDecodeRunner": "speculative",
    "UnsupportedModel": "errors",
    "Window": "policies",
    "WrongDtype": "errors",
    "describe": "description",
    "is_patched": "patching",
    "load_mar": "checkpoints",
    "load_vae": "vae",
    "patch": "patching",
    "patched": "patching",
    "sample_tokens": "whole.sampler",
    "unpatch": "patching",
}

__all__ = [
    "AdaptiveDraft",
    "BackendUnavailable",
    "CheckpointError",
    "ContextRelaxation",
    "CspdError",
    "EntropyDraft",
    "InvalidInput",
    "Progress",
    "RunStats",
    "SampleOutput",
    "SimilarityRelaxation",
    "SpecDecodeRunner",
    "UnsupportedModel",
    "Window",
    "WrongDtype",
    "describe",
    "errors",
    "is_patched",
    "load_mar",
    "load_vae",
    "models",
    "patch",
    "patched",
    "sample_tokens",
    "samplers",
    "unpatch",
]


if not TYPE_CHECKING:  # which knows the names, and no others

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__})


warn_of_a_mixture(__file__)
