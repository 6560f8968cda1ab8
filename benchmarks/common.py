"""What the benchmarks share: timing, and replays of CUDA graphs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch


def measure(
    contenders: dict[str, Callable],
    inputs: list,
    runs: int,
    device: torch.device,
    warm_up: bool = True,
    failed: Callable[[str, Exception], None] | None = None,
    queued: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every run of every contender; they take turns, so that drift of the machine hits all alike.

    Every contender is called with ``inputs[run % len(inputs)]`` and, unless the caller has seen to it,
    warmed up on each of them once.

    Args:
        failed: told of a contender that raises, which has no part in the result. None: its error goes to the caller.
        queued: on a GPU, begin when all of the call is queued: what the device does, without what the host does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def attempt(name: str, run: Callable) -> None:
        try:
            run()
        except Exception as error:
            if failed is None:
                raise
            del seconds[name]
            failed(name, error)

    def warm(function: Callable) -> None:
        for arguments in inputs:
            function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an error of the device is this contender's

    for name, function in contenders.items() if warm_up else ():
        attempt(name, functools.partial(warm, function))
    for run in range(runs):
        for name in list(seconds):
            arguments = inputs[run % len(inputs)]
            attempt(name, lambda: seconds[name].append(_time(contenders[name], arguments, device, queued)))  # noqa: B023
    return seconds


def _time(function: Callable, arguments: tuple, device: torch.device, queued: bool = False) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    # Between two calls of a head a whole transformer passes through the cache. Read, not written: nothing is left to
    # write back; and waited for, or a launch would hide behind it.
    _l2_flush(device).sum()
    torch.cuda.synchronize(device)
    if queued:
        torch.cuda._sleep(1_000_000)  # cycles, about half a millisecond
    start.record(stream)
    function(*arguments)
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Replay:
    """A CUDA graph of a function: called, it copies its arguments into the static ones and replays.

    A graph holds no reference to what it was captured with, and reads and writes that memory at every replay. So
    the function with all that it refers to, its static arguments and its results live as long as this object. What it
    allocated in between lies in the graph's own pool.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, function: Callable, static: Sequence[torch.Tensor], results):
        self.graph, self.function, self.static, self.results = graph, function, tuple(static), results

    def __call__(self, *arguments):
        if self.static:
            for to, value in zip(self.static, arguments, strict=True):
                to.copy_(value)
        self.graph.replay()
        return self.results


def captured(function: Callable, device: torch.device, arguments: Sequence[torch.Tensor] = ()) -> Replay:
    """A CUDA graph of ``function(*arguments)``: what the device does, without the gaps between launches.

    Without arguments the replay takes any and ignores them: the function's own are fixed.
    """
    static = [value.clone() for value in arguments]
    with torch.cuda.device(device):
        function(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # PyTorch keeps one workspace of cuBLAS for each stream. Without these lines a graph would write to that of an
        # earlier one, and be left with freed memory when that one has gone and somebody clears workspaces, as
        # torch.compile does when it captures. So each graph has one in its own pool.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph):
            results = function(*static)
        torch._C._cuda_clearCublasWorkspaces()
    return Replay(graph, function, static, results)


@functools.cache
def _l2_flush(device: torch.device) -> torch.Tensor:
    """Larger than any L2."""
    return torch.zeros(64 << 20, dtype=torch.int32, device=device)


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """(median, p20, p80)."""
    return tuple(float(value) for value in np.percentile(seconds, (50, 20, 80)))
