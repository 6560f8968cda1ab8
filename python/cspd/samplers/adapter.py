"""What is to be said of a head whose ``sample`` is a loop of its own, for the kernels to stand in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from cspd_kernels import Schedule


@dataclass(frozen=True)
class Draws:
    """What a sampler draws for N tokens of C channels: x_T, then once for each step that adds noise, in their order.

    Attributes:
        rows: (rows, C) of a draw, repeated down the N tokens; None: N.
        first: whose generator x_T comes from, ``"cpu"`` or ``"device"``. The steps draw on the device.
        steps: whether the steps draw. last: whether the last one does, too, and adds nothing of it.
        dtype: of the draws. scale: of x_T.
    """

    rows: int | None = None
    first: str = "device"
    steps: bool = True
    last: bool = False
    dtype: torch.dtype = torch.float32
    scale: float = 1.0


@dataclass(frozen=True)
class Reading:
    """What one call of a sampler means.

    Attributes:
        schedule: the steps; the same object for the same ones, as ``functools.lru_cache`` gives it.
        cond: (G N, Z), G groups of N rows, the wanted one first.
        scales: G - 1 numbers or one-element tensors: ``out_{G-1} + sum_g scales[g] (out_g - out_{g+1})`` is followed.
        draws: what is drawn. temperature: of the noise of the steps.
        copies: how many times the N tokens come back, below each other. dtype: of what comes back.
    """

    schedule: Schedule
    cond: torch.Tensor
    scales: tuple[float | torch.Tensor, ...] = ()
    draws: Draws = Draws()
    temperature: float | torch.Tensor = 1.0
    copies: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def groups(self) -> int:
        """G."""
        return 1 + len(self.scales)


class Adapter:
    """One code base's sampler.

    A subclass says how its heads are recognised, and for each method that is stood in for it has a method of the same
    name: ``method(head, **arguments)`` takes the head and the call's arguments by the names that the head's own method
    has for them, and returns a :class:`Reading`. Where it raises ValueError, and for arguments it has no parameter
    for, the head's own method runs. It draws nothing and waits for no device where the method itself does not.

    Attributes:
        source: of the sampler, for people.
        attributes: that a head has, beside ``net``. methods: that are stood in for.
        records: whether autograd records what the methods compute (they are not under ``torch.no_grad``).
    """

    source: str = ""
    attributes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("sample",)
    records: bool = True

    def __str__(self) -> str:
        return self.source or type(self).__name__

    def recognises(self, head: nn.Module) -> bool:
        """Whether a module looks like one of its heads; whether it samples like one is compared."""
        has = all(hasattr(head, name) for name in self.attributes)
        return has and all(callable(getattr(type(head), name, None)) for name in self.methods)

    def trials(self, head: nn.Module, z: Callable[[int], torch.Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(method, its arguments) of small calls, which between them show every kind that is to be served.

        Args:
            z: ``z(rows)`` gives conditions (rows, Z).
        """
        raise NotImplementedError
