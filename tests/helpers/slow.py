"""Cases of a test that only ``--slow`` runs."""

import pytest


def slow(*values, **options):
    """A case of ``pytest.mark.parametrize``."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


# Of a test that takes long in Triton's interpreter, and shows the same emulated.
slowly_interpreted = pytest.mark.parametrize("backend", [slow("triton"), "cuda"], indirect=True)
