"""How close generated digits are to the real ones: the Frechet distance of their pixels. And some of the real ones.

The real digits are those of scikit-learn: the test set of "Optical Recognition of Handwritten Digits".
Its authors are E. Alpaydin and C. Kaynak (1998, UCI Machine Learning Repository, doi:10.24432/C50P49).
Its licence is CC BY 4.0. The package holds the statistics of all digits, and forty digits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from ..errors import InvalidInput
from ..frechet import frechet_distance as gaussian_distance
from .pair import DATA


def statistics(images, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean (side^2,) and covariance (side^2, side^2) of images (n, 1, side, side), float64.

    Raises:
        ValueError: another shape, fewer than two images, or a pixel that is not finite.
    """
    pixels = torch.as_tensor(images).detach().cpu().double().numpy()
    if pixels.ndim != 4 or pixels.shape[1:] != (1, side, side):
        raise InvalidInput(f"expected images of shape (n, 1, {side}, {side}), got {tuple(pixels.shape)}")
    if len(pixels) < 2:
        raise InvalidInput(f"expected at least 2 images to take a covariance of, got {len(pixels)}")
    if not np.isfinite(pixels).all():
        raise InvalidInput("expected finite pixels, got NaN or infinity")
    pixels = pixels.reshape(len(pixels), -1)
    return pixels.mean(axis=0), np.cov(pixels, rowvar=False)


@cache
def reference_statistics(path: Path = DATA / "reference.safetensors") -> tuple[np.ndarray, np.ndarray]:
    """Mean (64,) and covariance (64, 64) of all 1,797 real digits in [-1, 1], float64."""
    tensors = _load(path, "statistics")
    return tensors["mean"], tensors["covariance"]


def real_digits(path: Path = DATA / "digits.safetensors") -> tuple[torch.Tensor, torch.Tensor]:
    """Forty real digits, four of each class: images (40, 1, 8, 8) float32 in [-1, 1], labels (40,) int64 0, 1, ... 9.

    The classes take turns: the first ten are one of each.
    """
    tensors = _load(path, "digits")
    images = torch.from_numpy(tensors["images"]).float()[:, None] / 8 - 1
    return images, torch.from_numpy(tensors["labels"]).long()


def _load(path: Path, what: str) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"the demo's real {what} {path} do not exist: reinstall the package, or make them with "
            "`python -m cspd.demo.train`"
        )
    return load_file(path)


def frechet_distance(images) -> float:
    """Squared Frechet distance between the normal fits to ``images`` and to the real digits.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)`` in the 64 pixel dimensions, so in
    squared pixel units. It is biased upwards for few images: 512 real digits have about 0.2.

    Args:
        images: (n, 1, 8, 8), tensor or array, pixels in [-1, 1].
    """
    mean, covariance = statistics(images)
    real_mean, real_covariance = reference_statistics()
    return gaussian_distance(mean, covariance, real_mean, real_covariance)
