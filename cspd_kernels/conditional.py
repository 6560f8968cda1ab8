"""Launches that depend on a flag in a device's memory, for which the host does not wait.

- On the CPU the host reads the flag.
- In a CUDA graph of our own they are conditional nodes. A kernel hands the flag over, and the device launches the body
  as often as the flag says. This needs the extension, which adds such nodes, and a proof on the device beforehand.
- Elsewhere they are all launched, as often as they may be: the kernels then leave everything as it is. So it is where
  no graph is made, and in a caller's graph, of whose memory and streams we know nothing.

A body is captured on a stream of its own. There a library would ask PyTorch for a workspace, which the graph's pool
does not hold: bodies with library calls are launched plainly.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch

from . import cuda_support
from .devices import on, read
from .graphs import capture_once, captures_ours
from .logs import log_once

_OLDEST_DRIVER = 12040

_lock = threading.Lock()
_local = threading.local()  # ``wanted``: whether this thread launches a node's body
_proved: dict[torch.device, Nodes | None] = {}


def run_while(flag: torch.Tensor, body: Callable[[], None], at_most: int, *, own: bool = False) -> None:
    """Repeat launches while ``flag`` (1,) int32 is not 0, which they change: after ``at_most`` times at the latest.

    Args:
        own: whether all that ``body`` launches, on the current stream, are kernels that allocate nothing: none of a
            library. It has no conditional launches of its own.
    """
    _run(flag, body, at_most, own, loop=True)


def run_if(flag: torch.Tensor, body: Callable[[], None], *, own: bool = False) -> None:
    """Launch if ``flag`` is not 0, or if it cannot be seen; arguments as of :func:`run_while`."""
    _run(flag, body, 1, own, loop=False)


def _run(flag: torch.Tensor, body: Callable[[], None], at_most: int, own: bool, loop: bool) -> None:
    nodes = _nodes(flag.device) if own and flag.device.type == "cuda" else None
    if nodes is not None:
        nodes.add(flag, body, loop)
        return
    for _ in range(at_most):
        if flag.device.type == "cpu" and not flag.item():
            return
        body()


def surely_wanted() -> bool:
    """Whether what is launched now is a node's body, which runs only where it is wanted: its kernels need not look."""
    return getattr(_local, "wanted", False)


class Nodes:
    """Conditional nodes in what is being captured from the current stream of a device."""

    def __init__(self, device: torch.device):
        # Not one of PyTorch's, which it hands out in turn: it must not be the one that is being captured.
        self.stream = torch.cuda.ExternalStream(cuda_support.extension().prepare_conditional(), device)

    def add(self, flag: torch.Tensor, body: Callable[[], None], loop: bool) -> None:
        """A node that runs what ``body`` launches; ``flag`` stays where it is as long as the graph is used."""
        kernels, at, stream = cuda_support.extension(), flag.data_ptr(), self.stream.cuda_stream
        handle = kernels.begin_conditional(loop, at, cuda_support.launch_stream(flag.device), stream)
        _local.wanted = True
        try:
            with torch.cuda.stream(self.stream):
                body()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what the body raised says more
                kernels.end_conditional(loop, at, handle, stream)
            raise
        finally:
            _local.wanted = False
        kernels.end_conditional(loop, at, handle, stream)


def _nodes(device: torch.device) -> Nodes | None:
    """What adds nodes to a graph of our own, where one is being captured now and nodes are known to work."""
    if torch.cuda.is_current_stream_capturing():
        return _proved.get(device) if captures_ours() else None
    _prove(device)  # a plain launch, which comes before any capture
    return None


# --- the proof ---


def _prove(device: torch.device) -> None:
    """Find out once a device whether nodes work there. The host waits for the device."""
    if device in _proved:
        return
    with _lock:  # who captures a graph does not ask for it
        if device in _proved:
            return
        nodes, reason = None, _why_not(device)
        if reason is None:
            try:
                with on(device):
                    nodes = Nodes(device)
                    reason = _difference(nodes, device)
            except torch.cuda.OutOfMemoryError:  # no room; a later call may have it
                return
            except Exception as error:  # noqa: BLE001  (whatever a driver raises; plain launches serve)
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            log_once(
                f"graphs on {device} hold every launch that may be needed, not loops: {reason}",
                slow_on=device,
                cause=reason,
            )
        _proved[device] = nodes if reason is None else None


def _why_not(device: torch.device) -> str | None:
    if reason := cuda_support.why_unavailable() or cuda_support.why_unsupported_here(device):
        return reason
    kernels = cuda_support.extension()
    if not kernels.CONDITIONAL_NODES:
        return "the CUDA extension was built by a toolkit before CUDA 12.4"
    if kernels.driver_version() < _OLDEST_DRIVER:
        return "the driver is older than CUDA 12.4"
    return None


def _difference(nodes: Nodes, device: torch.device) -> str | None:
    """None where a loop of three rounds, a launch that is wanted and one that is not count as they should, at two
    replays, else what is wrong. The kernels start early, also as the first of a body and right behind a node."""
    kernels = cuda_support.extension()
    flags, counts = torch.zeros(2, 3, dtype=torch.int32, device=device).unbind()

    def count(i: int, until: int = 0) -> None:
        stream = cuda_support.launch_stream(device)
        kernels.count(counts[i].data_ptr(), until, flags[i].data_ptr(), stream)

    def twice() -> None:
        count(0, until=6)
        count(0, until=6)

    def launch() -> None:
        nodes.add(flags[0], twice, loop=True)
        count(0)
        for i in (1, 2):
            nodes.add(flags[i], lambda i=i: count(i), loop=False)
            count(i)

    count(0)  # what a first launch loads
    graph, equal = capture_once(device, launch), []
    for _ in range(2):
        counts.zero_()
        flags.zero_()
        flags[:2].fill_(1)
        graph.replay()
        equal.append((counts[0] == 7) & (counts[1] == 2) & (counts[2] == 1))
    return None if read(torch.stack(equal).all()) else "a test graph with loops and branches gave a wrong count"
