"""What an adapter says of a head whose ``sample`` is a loop of its own, so that the kernels can replace that loop."""

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
        rows: a draw is (rows, C), repeated down the N tokens. None: N rows.
        first: whose generator draws x_T, ``"cpu"`` or ``"device"``. The steps draw on the device.
        steps: whether the steps draw. last: whether the last step draws, too, although it adds no noise.
        dtype: dtype of the draws. scale: factor of x_T.

    Example:
        >>> from cspd.samplers import Draws
        >>> Draws(first="cpu", scale=0.9)
        Draws(rows=None, first='cpu', steps=True, last=False, dtype=torch.float32, scale=0.9)
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
        schedule: the steps. Return the same object for the same steps, for example by ``functools.lru_cache``.
        cond: (G N, Z), G groups of N rows, the wanted one first.
        scales: G - 1 numbers or one-element tensors: ``out_{G-1} + sum_g scales[g] (out_g - out_{g+1})`` is followed.
        draws: what is drawn. temperature: factor of the noise of the steps.
        copies: how many times the N tokens come back, below each other. dtype: dtype of the result.

    Example:
        >>> import torch
        >>> from cspd.samplers import Reading
        >>> from cspd_kernels import Schedule
        >>> reading = Reading(Schedule.euler([0.0, 0.5, 1.0]), torch.zeros(6, 4), scales=(3.0,))
        >>> reading.groups, len(reading.cond) // reading.groups  # guided, 3 tokens
        (2, 3)
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

    A subclass says how its heads are recognised. For each method of the head that it replaces, it has a method of the
    same name. ``method(head, **arguments)`` takes the head and the call's arguments, under the names of the head's own
    method, and returns a :class:`Reading`. If it raises ValueError, or has no parameter for an argument, the head's own
    method runs. It draws nothing, and does not synchronise unless the head's own method does.

    Attributes:
        source: where the sampler comes from, for people.
        attributes: attributes that a head has, beside ``net``. methods: methods of the head that are replaced.
        records: whether autograd records what the methods compute (they are not under ``torch.no_grad``).

    Example:
        >>> from cspd.samplers import Adapter, Reading
        >>> class Mine(Adapter):
        ...     source = "my project"
        ...     attributes = ("my_solver",)
        ...
        ...     def sample(self, head, z, cfg=1.0):  # the arguments of the head's own method
        ...         return Reading(head.my_schedule, z)
        >>> print(Mine(), Mine.methods)
        my project ('sample',)
    """

    source: str = ""
    attributes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("sample",)
    records: bool = True

    def __str__(self) -> str:
        return self.source or type(self).__name__

    def recognises(self, head: nn.Module) -> bool:
        """Whether a module looks like one of its heads. Whether it samples like one is compared later.

        Example:
            >>> import torch
            >>> from cspd.samplers import Adapter
            >>> Adapter().recognises(torch.nn.Linear(2, 2))  # it has no method sample
            False
        """
        has = all(hasattr(head, name) for name in self.attributes)
        return has and all(callable(getattr(type(head), name, None)) for name in self.methods)

    def trials(self, head: nn.Module, z: Callable[[int], torch.Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (method, its arguments) of small calls, which together show every kind of call to be served.

        Args:
            z: ``z(rows)`` gives conditions (rows, Z).

        Example:
            >>> from cspd.samplers import Adapter
            >>> class Mine(Adapter):
            ...     def trials(self, head, z):
            ...         yield "sample", {"z": z(3)}
            ...         yield "sample", {"z": z(6), "cfg": 2.0}
            >>> [name for name, _ in Mine().trials(None, range)]
            ['sample', 'sample']
        """
        raise NotImplementedError
