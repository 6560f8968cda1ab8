"""Continuous speculative decoding and a drop-in fast sampler for MAR-like image models.

``cspd.patch(model)`` makes an existing model sample through fused denoising, exactly;
:class:`SpecDecodeRunner` pairs a draft with a target model, approximately by construction.
"""

from . import models
from .describe import describe
from .patching import is_patched, patch, patched, unpatch
from .policies import AdaptiveDraft, SimilarityRelaxation, Window
from .speculative import SpecDecodeRunner

__all__ = [
    "AdaptiveDraft",
    "SimilarityRelaxation",
    "SpecDecodeRunner",
    "Window",
    "describe",
    "is_patched",
    "models",
    "patch",
    "patched",
    "unpatch",
]
