"""What :func:`cspd.patch` was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cspd_kernels.backends import implementation
from cspd_kernels.ops.denoise.parallel import AUTO, check_tolerance

from .errors import InvalidInput
from .sampling import OWN, Sampling

_NOISES, _WEIGHTS, _LOOPS = ("upstream", "philox"), ("live", "frozen"), (None, "own")


@dataclass(frozen=True)
class Options:
    """What :func:`patch` was asked for."""

    backend: str | None = None
    dtype: torch.dtype | None = None
    noise: str = "upstream"
    weights: str = "live"
    parallel_tol: float | str | None = AUTO
    whole: bool = False
    compile: bool = False
    loop: str | None = None
    sampling: Sampling = OWN

    @property
    def watches(self) -> bool:
        """Whether the model around the head is needed."""
        return self.whole or self.sampling.anneals

    def check(self) -> None:
        if self.noise not in _NOISES:
            raise InvalidInput(f"patch expected noise one of {_NOISES}, got {self.noise!r}")
        if self.weights not in _WEIGHTS:
            raise InvalidInput(f"patch expected weights one of {_WEIGHTS}, got {self.weights!r}")
        if self.compile and not self.whole:
            raise InvalidInput(
                "patch expected whole=True together with compile=True: it compiles the transformer, and heads have "
                "kernels"
            )
        if self.loop not in _LOOPS:
            raise InvalidInput(f"patch expected loop one of {_LOOPS}, got {self.loop!r}")
        if self.loop == "own" and self.whole:
            raise InvalidInput("patch expected loop='own' or whole=True, not both: whole=True replaces the loop")
        check_tolerance("patch", self.parallel_tol)
        self.sampling.check("patch")
        implementation("denoise", self.backend)
