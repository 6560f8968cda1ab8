"""Continuous speculative decoding and a drop-in fast sampler for MAR-like image models.

``cspd.patch(model)`` makes an existing model sample through fused denoising, exactly;
:class:`SpecDecodeRunner` pairs a draft with a target model, approximately by construction.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from .origin import warn_of_a_mixture

if TYPE_CHECKING:
    from . import models
    from .checkpoints import load_mar
    from .context_relaxation import ContextRelaxation
    from .description import describe
    from .entropy_draft import EntropyDraft
    from .output import SampleOutput
    from .patching import is_patched, patch, patched, unpatch
    from .policies import AdaptiveDraft, SimilarityRelaxation, Window
    from .progress import Progress
    from .speculative import SpecDecodeRunner
    from .vae import load_vae
    from .whole.sampler import sample_tokens

__all__ = [
    "AdaptiveDraft",
    "ContextRelaxation",
    "EntropyDraft",
    "Progress",
    "SampleOutput",
    "SimilarityRelaxation",
    "SpecDecodeRunner",
    "Window",
    "describe",
    "is_patched",
    "load_mar",
    "load_vae",
    "models",
    "patch",
    "patched",
    "sample_tokens",
    "unpatch",
]

# Looked up on first use: the command `cspd` is at work, and can be interrupted, before torch is imported.
_HOMES = {
    "AdaptiveDraft": "policies",
    "ContextRelaxation": "context_relaxation",
    "EntropyDraft": "entropy_draft",
    "Progress": "progress",
    "SampleOutput": "output",
    "SimilarityRelaxation": "policies",
    "SpecDecodeRunner": "speculative",
    "Window": "policies",
    "describe": "description",
    "is_patched": "patching",
    "load_mar": "checkpoints",
    "load_vae": "vae",
    "patch": "patching",
    "patched": "patching",
    "sample_tokens": "whole.sampler",
    "unpatch": "patching",
}


def __getattr__(name: str):
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_a_mixture(__file__)
