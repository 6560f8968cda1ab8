"""Whether ``cspd`` and ``cspd_kernels`` come from one place."""

from __future__ import annotations

import warnings
from pathlib import Path

import cspd_kernels


def warn_of_a_mixture(cspd_file: str, kernels_file: str = cspd_kernels.__file__) -> None:
    """Python that runs inside a clone finds the clone's ``cspd_kernels``, and elsewhere the installed ``cspd``."""

    def one_place(cspd: Path, kernels: Path) -> bool:
        return cspd.parents[1] in (kernels.parents[1], kernels.parents[1] / "python")  # installed, or one source tree

    files = Path(cspd_file), Path(kernels_file)
    if one_place(*files) or one_place(*(file.resolve() for file in files)):
        return
    cspd, kernels = (file.parent for file in files)
    warnings.warn(
        f"cspd is loaded from {cspd}, but cspd_kernels from {kernels}: two installations are mixed, and compiled "
        "kernels may be missing. Run Python from another folder, or with `python -P` (3.11 or later), or install "
        "the clone by `pip install -e .`",
        stacklevel=3,
    )
