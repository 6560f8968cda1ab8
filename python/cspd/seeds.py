"""Where a run's random numbers come from: the global generators, a seed, or a generator of the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from cspd_kernels.errors import CspdError, InvalidInput, WrongType
from cspd_kernels.noise import check_seed


@contextlib.contextmanager
def drawn_seed(who: str, seed: int | None, generator: torch.Generator | None) -> Iterator[int | None]:
    """The seed that a call means: ``seed``, or one that is drawn from ``generator``. None if neither is given.

    From a generator comes ``torch.randint(2**63 - 1, (), generator=generator)``, on the generator's device. That moves
    the generator on, so that the next call with it gets another seed. For a generator on a GPU the host waits here,
    before the run has launched anything. A call that is refused leaves the generator as it was.

    Raises:
        InvalidInput: both are given, or the seed is out of range. WrongType: ``generator`` is no generator.
    """
    if generator is None:
        if seed is not None:
            check_seed(seed)
        yield seed
        return
    if seed is not None:
        raise InvalidInput(f"{who} expected seed or generator, got both")
    if not isinstance(generator, torch.Generator):
        raise WrongType(f"{who} expected generator as a torch.Generator, got {type(generator).__name__}")
    before = generator.get_state()
    try:
        yield int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    except CspdError:
        generator.set_state(before)
        raise


class Shuffles(Protocol):
    """numpy's global generator, or one like it."""

    def shuffle(self, x: np.ndarray) -> None: ...


class Generators(NamedTuple):
    """What the released sampling loop draws its numbers from; None stands for torch's global generator."""

    orders: Shuffles = np.random
    cpu: torch.Generator | None = None
    device: torch.Generator | None = None

    @staticmethod
    def seeded(seed: int | None, device: torch.device) -> Generators:
        """Generators of a call's own, in the state that ``torch.manual_seed(seed)`` and ``numpy.random.seed(seed)``
        give the global ones. numpy takes the seed's lower 32 bits. None: the global ones.
        """
        if seed is None:
            return GLOBAL
        cpu = torch.Generator("cpu").manual_seed(seed)
        own = cpu if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
        return Generators(np.random.RandomState(seed % 2**32), cpu, own)

    def on(self, device: torch.device | str) -> torch.Generator | None:
        """The one that draws there."""
        return self.cpu if torch.device(device).type == "cpu" else self.device


GLOBAL = Generators()
