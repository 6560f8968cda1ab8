"""Cases of one op and size in turns on the same inputs: contenders, baselines, and the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from common import measure, spread
from floors import Rates, Work
from rows import Report, Row

Function = Callable[..., object]


@dataclass
class Contender:
    """What is measured of a case, and how its result is checked."""

    name: str  # as its rows show it
    make: Callable[[], Function | None]  # the function to time; None where it does not exist here
    baselines: tuple[str, ...]
    error: Callable[[Function], tuple[float, str]]  # (error, what it is of) of the function
    bound: float
    work: Work


@dataclass
class Group:
    """Contenders and baselines on the same inputs."""

    op: str
    size: str
    inputs: list[tuple]
    contenders: list[Contender]
    baselines: dict[str, Callable[[], Function | None]]  # name -> what makes the function
    check: Callable[[object], None] = field(default=lambda result: None)  # raises where a baseline is wrong
    calls: int = 1  # in one run; the seconds are those of one call
    queued: bool = False  # as `measure` takes it


def measure_group(group: Group, runs: int, device: torch.device, report: Report, rates: Rates | None = None) -> None:
    """A row for every contender and baseline. What raises is reported by its name, and the others go on."""
    trying = partial(report.trying, group.op, group.size)
    makers, functions = group.baselines | {own.name: own.make for own in group.contenders}, {}
    for name, make in makers.items():
        with trying(name):
            functions[name] = make()
    functions = {name: function for name, function in functions.items() if function is not None}
    failed = partial(report.failed, group.op, group.size)
    seconds = measure(functions, group.inputs, runs, device, failed=failed, queued=group.queued)
    seconds = {name: [value / group.calls for value in values] for name, values in seconds.items()}
    right = []
    for name in (name for name in group.baselines if name in seconds):
        with trying(name):
            group.check(functions[name](*group.inputs[0]))
            right.append(name)
    for own in (own for own in group.contenders if own.name in seconds):
        with trying(own.name):
            error, accuracy = own.error(functions[own.name])
            floor = rates and rates.floor(own.work)
            limit = {"floor_seconds": floor.seconds, "floor_of": floor.of} if floor else {}
            for baseline in (name for name in own.baselines if name in right):
                timed = (*spread(seconds[own.name]), *spread(seconds[baseline]))
                report.add(
                    Row(group.op, group.size, own.name, baseline, *timed, runs, error, own.bound, accuracy, **limit)
                )
