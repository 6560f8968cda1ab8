"""The Frechet distance of two normal distributions."""

from __future__ import annotations

import numpy as np


def frechet_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S2^1/2 S1 S2^1/2)^1/2)``, squared, of means (d,) and covariances (d, d)."""
    # The trace of a matrix square root is the sum of the roots of the eigenvalues. The symmetric
    # product has the eigenvalues of S1 S2; rounding makes some of the zeros slightly negative.
    values, vectors = np.linalg.eigh(covariance2)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance1 @ root).clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * cross)
