"""Where the time of images goes: runs in turns, transformer and head apart, launches and the device's idle share."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch

from cspd.models import mar

from images import Case, Contender

LEAST_STEPS, MOST_RUNS = 4, 9
# How the names begin of what a host calls, in the runtime or in the driver.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
COPIES = ("cudaMemcpy", "cuMemcpy", "cudaMemset", "cuMemset")


class Clock:
    """Seconds by name: on a GPU between marks in its stream, which the host does not wait for."""

    def __init__(self, device: torch.device):
        self.device, self.spans = device, {}

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def within(self, name: str, function: Callable) -> Callable:
        """The function, its time added to a name."""

        @functools.wraps(function)
        def call(*arguments, **options):
            start = self.mark()
            result = function(*arguments, **options)
            self.spans.setdefault(name, []).append((start, self.mark()))
            return result

        return call

    def seconds(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {name: math.fsum(end - start for start, end in spans) for name, spans in self.spans.items()}
        torch.cuda.synchronize(self.device)
        return {
            name: math.fsum(start.elapsed_time(end) for start, end in spans) / 1e3 for name, spans in self.spans.items()
        }


def seconds_of(contender: Contender, case: Case, every: int = 1, seed: int = 0) -> float:
    """From the call to the image on the device, with what the host does."""
    device = contender.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    contender(case, seed, every)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def prepare(contender: Contender, case: Case, seconds: float) -> tuple[int, float]:
    """Warm up, and choose how many steps of an image can be measured in so many seconds.

    Returns:
        (n, first): every n-th step; seconds of the first call, which compiles and captures.
    """
    if not contender.skips:
        if not contender.warm_ups:
            return 1, seconds_of(contender, replace(case, steps=2))
        first = 0.0
        for _ in range(1 + contender.warm_ups):
            first += seconds_of(contender, case)
            if first > 3 * seconds:  # all of the graphs are there before, or none is made for images of that size
                break
        return 1, first
    few = max(1, case.steps // 2)
    first = seconds_of(contender, case, few)
    each = seconds_of(contender, case, few) / 2
    wanted = min(case.steps, max(LEAST_STEPS, int(seconds / max(each, 1e-9))))
    every = max(1, case.steps // wanted)
    return every, first + sum(seconds_of(contender, case, every) for _ in range(contender.warm_ups))


def in_turns(
    contenders: list[Contender], every: dict[str, int], case: Case, seconds: float, failed: Callable
) -> dict[str, list[float]]:
    """Seconds of each run of each contender, of the steps that it is measured on; as many as fit, two at least
    where one does."""
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for run in range(MOST_RUNS):
        for contender in contenders:
            own = taken.get(contender.name)
            if own is None or (run >= 1 and sum(own) + own[-1] > seconds and (run >= 2 or own[-1] > seconds)):
                continue
            try:
                own.append(seconds_of(contender, case, every[contender.name], seed=run))
            except Exception as error:  # noqa: BLE001  (of whatever kind: the others go on)
                failed(contender.name, error)
                del taken[contender.name]
    return taken


def split(contender: Contender, case: Case, every: int) -> dict[str, float]:
    """Seconds of transformer, head and rest where Python calls one after the other, in a run of its own."""
    clock, diffloss = Clock(contender.device), contender.model.diffloss
    with (
        mock.patch.object(mar, "conditions", clock.within("transformer", mar.conditions)),
        mock.patch.object(diffloss, "sample", clock.within("head", diffloss.sample)),
    ):
        clock.within("total", contender)(case, 0, every)
    spent = clock.seconds()
    return spent | {"rest": spent["total"] - spent["transformer"] - spent["head"]}


def split_by_head(seconds: float, shorter: float, steps: int, short_steps: int) -> dict[str, float]:
    """The same from images with two lengths of the head: what a denoising step adds, times their number."""
    head = (seconds - shorter) * steps / (steps - short_steps)
    return {"total": seconds, "head": head, "transformer and rest": seconds - head}


def on_the_device(contender: Contender, case: Case, every: int, steps: int) -> dict[str, float]:
    """The host's launches and copies for each of ``steps`` steps, and the seconds in which the device does anything."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        contender(case, 0, every)
        torch.cuda.synchronize(contender.device)
    # Not profile.events(), which takes a minute to link all of them.
    events = profile.profiler.kineto_results.events()
    return called(events, steps) | {"busy": union(spans_of(events)) / 1e9}


def called(events: list, steps: int) -> dict[str, float]:
    names = [event.name() for event in events if event.device_type() == torch.autograd.DeviceType.CPU]
    launches = sum(name.startswith(LAUNCHES) for name in names)
    return {"launches": launches / steps, "copies": sum(name.startswith(COPIES) for name in names) / steps}


def spans_of(events: list) -> list[tuple[int, int]]:
    """(start, end) in ns of what ran on the device."""
    own = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    return [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in own]


def union(spans: list[tuple[int, int]]) -> int:
    """How much is covered by spans (start, end) that may overlap."""
    covered, reached = 0, 0
    for start, end in sorted(spans):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered
