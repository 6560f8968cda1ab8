"""``log_density_ratio`` in torch: its definition is already a handful of passes over (N, C)."""

from .reference import log_density_ratio

__all__ = ["log_density_ratio"]
