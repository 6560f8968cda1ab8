"""The diffusion objects that a model holds: finding them, and reading their tables as they are now."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from cspd_kernels import Schedule

from .errors import UnsupportedModel

_CONTAINERS, _PLAIN = (list, set, tuple, dict), (str, bool, int, float, type(None), Enum)
_STEPS = ("timestep_map", "use_timesteps")  # which timesteps are kept: of as many sorts as there are T
DDIM = "ddim_sample_loop"
LOOPS = ("p_sample_loop", "p_sample_loop_with_noise", DDIM)  # of LTH14/mar; of MarkXCloud/CSpD; of both

NO_DIFFUSION = f"it holds no diffusion object with {LOOPS[0]}"


class NotServedError(UnsupportedModel):
    """The kernels cannot stand in for a module's own code; the message says why."""


def diffusions_of(module: nn.Module) -> dict[str, object]:
    """Every diffusion object that a module tree holds, as an attribute or in lists and dictionaries of one, by path."""
    found = {}
    for prefix, part in module.named_modules():
        for name, value in (("", part), *vars(part).copy().items()):
            for path, candidate in held(".".join(filter(None, (prefix, name))), value):
                if callable(getattr(type(candidate), LOOPS[0], None)) and hasattr(candidate, "__dict__"):
                    found.setdefault(id(candidate), (path, candidate))
    return dict(found.values())


def held(path: str, value, depth: int = 3) -> Iterator[tuple[str, object]]:
    """What an attribute holds, by path: itself, or what is in its lists and dictionaries."""
    if isinstance(value, (list, tuple, dict)):
        if depth:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from held(f"{path}[{key!r}]", item, depth - 1)
    else:
        yield path, value


class Code:
    """The functions of some classes and of their bases, and whether they are still the same.

    Of torch's own classes ``forward`` and ``__call__`` alone.
    """

    def __init__(self, kinds):
        bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base is not object)
        theirs = [base.__module__.partition(".")[0] != "torch" for base in bases]
        self._tables = [vars(base) for base, their in zip(bases, theirs) if their]
        self._torch = [base for base, their in zip(bases, theirs) if not their and hasattr(base, "forward")]
        self._classes = tuple(bases)
        self._values, self.functions = self._look(), self._functions()

    def is_current(self) -> bool:
        values = self._look()
        if len(values) == len(self._values) and all(map(operator.is_, values, self._values)):
            return True
        if self._functions() != self.functions:
            return False
        self._values = values  # a counter, or the like
        return True

    def _look(self) -> list:
        own = chain.from_iterable(map(MappingProxyType.values, self._tables))
        return [*own, *[base.forward for base in self._torch], nn.Module.__call__]

    def _functions(self) -> tuple:
        kinds = (staticmethod, classmethod, property)
        own = (v for table in self._tables for v in table.values() if callable(v) or isinstance(v, kinds))
        return (*self._classes, *own, *[base.forward for base in self._torch], nn.Module.__call__)


class Steps(NamedTuple):
    """How a diffusion object's tables are sampled: its own ancestral steps where nothing is said.

    Attributes:
        eta: of DDIM. clip: limits of x0, (lows, highs) by channel.
    """

    eta: float | None = None
    clip: tuple | None = None

    def of(self, schedule: Schedule) -> Schedule:
        """A schedule sampled in this way."""
        if self.eta is not None:
            schedule = schedule.ddim(self.eta)
        return schedule if self.clip is None else schedule.clipped(*self.clip)


OWN_STEPS = Steps()


class Tables:
    """The schedules of one diffusion object, read again exactly when the object has changed."""

    def __init__(self, diffusion):
        self.diffusion, self._read = diffusion, None

    def __getstate__(self) -> dict:
        return {"diffusion": self.diffusion, "_read": None}

    def schedule(self, steps: Steps = OWN_STEPS) -> Schedule:
        """The tables as they are now, the same object as long as they are.

        Raises:
            NotServedError: its steps are not read, or not to be made in this way.
        """
        made = self._current()[1]
        if steps not in made:
            try:
                made[steps] = steps.of(made[OWN_STEPS])
            except ValueError as error:
                raise NotServedError(str(error)) from None
        return made[steps]

    def sort(self) -> tuple:
        """The object without its tables of a value a step and its number of steps: of a list many are of one sort."""
        return self._current()[2]

    def _current(self) -> tuple:
        state = self._state()
        if self._read is None or not _same(self._read[0], state) or not self._read[3].is_current():
            try:
                schedule = Schedule.from_diffusion(self.diffusion)
            except (TypeError, ValueError) as error:
                raise NotServedError(str(error)) from None
            code = Code([type(self.diffusion)])
            self._read = (state, {OWN_STEPS: schedule}, (code.functions, *self._sort(schedule)), code)
        return self._read

    def _state(self) -> list:
        """What a loop may depend on: every attribute, and the contents of those that can be edited in place."""
        attributes = vars(self.diffusion).copy()  # at once: another thread may patch it meanwhile
        own = [value for name, value in attributes.items() if name not in LOOPS]
        tables = [_values(value) for value in own if isinstance(value, (np.ndarray, torch.Tensor))]
        held = [_contents(value, id) for value in own if isinstance(value, _CONTAINERS)]
        return [type(self.diffusion), *own, (tables, held)]

    def _sort(self, schedule: Schedule) -> tuple:
        told = []
        for name, value in sorted(vars(self.diffusion).copy().items()):
            if name in (*LOOPS, *_STEPS) or isinstance(value, Schedule):
                continue
            if isinstance(value, (np.ndarray, torch.Tensor)):
                if value.ndim != 1 or len(value) != schedule.num_steps:  # limits of x0, or the like
                    told.append((name, _values(value)))
                continue
            if isinstance(value, _CONTAINERS):
                told.append((name, _contents(value, _function)))
                continue
            counts = isinstance(value, int) and not isinstance(value, bool) and "steps" in name
            plain = value if isinstance(value, _PLAIN) else _function(value)
            told.append((name, None if counts else plain))
        return type(self.diffusion), tuple(told)


def _values(table):
    """What tells two states of a table apart; the host does not wait for a device."""
    if isinstance(table, torch.Tensor):
        if table.device.type != "cpu":
            return table.data_ptr(), 0 if table.is_inference() else table._version
        table = table.detach().numpy()
    return table.tobytes()


def _contents(held, other: Callable) -> tuple:
    """What a container holds: plain values, and what ``other`` tells of those that are not."""
    items = (*held, *held.values()) if isinstance(held, dict) else held
    return tuple(item if isinstance(item, _PLAIN) else other(item) for item in items)


def _function(value) -> int | None:
    return id(value) if callable(value) else None


def _same(a: list, b: list) -> bool:
    """Whether two states are the same objects, and their contents equal."""
    return len(a) == len(b) and all(x is y for x, y in zip(a[:-1], b)) and a[-1] == b[-1]
