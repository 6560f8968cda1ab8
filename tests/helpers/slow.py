"""Cases of a test that only ``--slow`` runs."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def slow(*values, **options):
    """A case of ``pytest.mark.parametrize``."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def mostly_slow(values: Iterable, fast: Iterable) -> list:
    """All cases, of which only the ``fast`` ones run without ``--slow``; they must be among them."""
    values, fast = list(values), list(fast)
    if missing := [value for value in fast if value not in values]:
        raise ValueError(f"expected fast cases among the others, got {missing}")
    return [value if value in fast else slow(*(value if isinstance(value, tuple) else (value,))) for value in values]


# Of a test that takes long in Triton's interpreter, and shows the same emulated.
slowly_interpreted = pytest.mark.parametrize("backend", [slow("triton"), "cuda"], indirect=True)
