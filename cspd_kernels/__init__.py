"""Kernels of continuous speculative decoding: the denoising chain of a diffusion head, the Gaussian
density ratio of two chains, and batched acceptance-rejection. It knows heads and tensors, never models.
"""

from .backends import available_backends
from .head import DiffusionHead
from .noise import PhiloxNoise
from .ops.accept_reject import Verdict, accept_reject
from .ops.denoise import Denoised, denoise
from .ops.density_ratio import log_density_ratio
from .schedule import Schedule

__version__ = "0.1.0"
__all__ = [
    "Denoised",
    "DiffusionHead",
    "PhiloxNoise",
    "Schedule",
    "Verdict",
    "accept_reject",
    "available_backends",
    "denoise",
    "log_density_ratio",
]
