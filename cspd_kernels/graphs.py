"""CUDA graphs of repeated launch sequences: captured on second use, bounded in memory, freed with their owner."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from .devices import one_a_device
from .logs import log_once

_capturing = threading.Lock()  # one at a time, of all devices: the garbage collector is off meanwhile
_ours = threading.local()
CALLER_CAPTURES = "the caller is capturing a graph of its own"


def why_not_here(device: torch.device) -> str | None:
    """None where a graph of our own can be captured and replayed now, else the reason."""
    if device.type != "cuda":
        return f"no CUDA graphs on {device.type}"
    if torch.cuda.is_current_stream_capturing():
        return CALLER_CAPTURES
    return None


def captures_ours() -> bool:
    """Whether a graph of our own is being captured by this thread."""
    return getattr(_ours, "captured", False)


class _Captures:
    """What all captures on a device share: a side stream, as the default one cannot be captured, and a pool of memory.

    PyTorch keeps a workspace of cuBLAS for every stream, and frees all of them whenever ``torch.compile`` captures a
    graph: replays of ours would write to memory that has gone. So we run nothing on this stream, though
    somebody else may: PyTorch hands out 32 of them in turn. All that is allocated in a capture lies in one pool. A
    first capture, which is never replayed, keeps that pool for good. Plans take turns, and need nothing that another
    one left there.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.keeper: torch.cuda.CUDAGraph | None = None
        self.retired: list[torch.cuda.CUDAGraph] = []

    def capture(self, launch: Callable[[], None], warm_up: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self.stream):
            if self.keeper is None:
                self.keeper = _captured(warm_up)
            try:
                return _captured(launch, pool=self.keeper.pool())
            except BaseException:
                # PyTorch may go on taking this pool for one that is being captured to, and refuse it. Kept all the
                # same: workspaces that later graphs use may lie there.
                self.retired.append(self.keeper)
                self.keeper = None
                raise


@one_a_device
def _captures(device: torch.device) -> _Captures:
    return _Captures(device)


def _captured(launch: Callable[[], None], **options) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local", **options)  # other threads may allocate meanwhile
    _ours.captured = True
    try:
        launch()
    finally:
        _ours.captured = False
        graph.capture_end()
    return graph


@contextlib.contextmanager
def _undisturbed():
    with _capturing:
        collecting = gc.isenabled()
        gc.disable()  # what a collection would free may wait for the device, which ends a capture
        try:
            yield
        finally:
            if collecting:
                gc.enable()


def capture_once(device: torch.device, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of launches that allocate nothing, and have all been launched before."""
    with _undisturbed(), torch.cuda.stream(_captures(device).stream):
        return _captured(launch)


class CudaGraph:
    """Launches that a CUDA graph stands in for: plain the first time, captured the second, replayed from then on.

    One-off sizes never pay for a capture, and whatever the first call compiles or loads is done
    before one starts. Capturing neither waits for the device nor empties the allocator's cache. The
    launches must use the same pointers every time and allocate nothing that outlives them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.uses = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, launch: Callable[[], None], warm_up: Callable[[], None]) -> None:
        """``warm_up``: the part of ``launch`` that uses library workspaces."""
        self.uses += 1
        if self.uses == 2:
            try:
                self.graph = self._capture(launch, warm_up)
            except Exception as error:  # noqa: BLE001  (of a driver or a compiler; plain launches serve)
                log_once(
                    f"kernels are launched one by one, because their CUDA graph could not be captured: {error}",
                    slow_on=self.device,
                )
            except BaseException:  # interrupted: the next use captures
                self.uses = 1
                raise
        if self.graph is not None:
            self.graph.replay()
        else:
            launch()

    def _capture(self, launch: Callable[[], None], warm_up: Callable[[], None]) -> torch.cuda.CUDAGraph:
        warm_up()  # what a library makes once for a thread cannot be made in a capture
        with _undisturbed():
            return _captures(self.device).capture(launch, warm_up)


class _Turn:
    """Which stream ran a plan of a device last. All of its graphs have one pool of memory, with the workspaces of
    libraries: two of them, of two heads even, must not run at a time."""

    def __init__(self):
        self.lock = threading.RLock()
        self.done = torch.cuda.Event()
        self.stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def taken(self):
        """The current stream waits for the last one that ran a plan of this device; the host does not."""
        with self.lock:
            stream = torch.cuda.current_stream()
            if self.stream is not None and self.stream != stream:
                stream.wait_event(self.done)
            self.stream = stream
            try:
                yield
            finally:
                self.done.record(stream)


def in_turn(device: torch.device) -> contextlib.AbstractContextManager:
    """A context for work with buffers that plans of a device read. It waits for the last plan; the
    next plan waits for it."""
    return _turn(device).taken() if device.type == "cuda" else contextlib.nullcontext()


@one_a_device
def _turn(device: torch.device) -> _Turn:
    return _Turn()


class Plan:
    """What one key of a :class:`PlanCache` holds: buffers and their graph."""

    def __init__(self, value, buffers: list[torch.Tensor], device: torch.device):
        self.value = value
        self.buffers = buffers
        self.graph = CudaGraph(device)
        self.turn = _turn(device)
        self.used = False

    @property
    def bytes(self) -> int:
        storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in self.buffers}
        return sum(storages.values())

    @contextlib.contextmanager
    def in_turn(self):
        """The current stream waits for the last one that ran a plan of this device; the host does not."""
        with self.turn.taken():
            self.used = True
            yield

    def close(self) -> None:
        """Wait until the device no longer uses the buffers or the graph."""
        if self.used:
            self.turn.done.synchronize()
            self.used = False

    def __del__(self):
        with contextlib.suppress(Exception):  # the driver may already be shutting down
            self.close()


class PlanCache:
    """Plans by key, the least recently used dropped where there are more than ``most``, or where their buffers exceed
    ``max_bytes`` together."""

    def __init__(self, max_bytes: int, most: int | None = None):
        self.max_bytes, self.most = max_bytes, most
        self.lock = threading.RLock()
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def bytes(self) -> int:
        return sum(plan.bytes for plan in self._plans.values())

    def get(self, key: Hashable, make: Callable[[], tuple], device: torch.device) -> Plan:
        """The plan of a key; ``make`` returns what it is to hold and the buffers of that."""
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        # Buffers outlive the call: they must not be inference tensors, which later calls could not write to.
        with torch.inference_mode(False), torch.no_grad():
            value, buffers = make()
        plan = self._plans[key] = Plan(value, buffers, device)
        while len(self._plans) > 1 and (self.bytes > self.max_bytes or len(self) > (self.most or len(self))):
            self._plans.popitem(last=False)[1].close()
        return plan
