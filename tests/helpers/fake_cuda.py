"""A CUDA device that only writes down what it is told: streams, events and graphs."""

from __future__ import annotations

import contextlib
import ctypes


class FakeCuda:
    """Streams, events and graphs that leave a line in ``log`` for everything they do."""

    def __init__(self):
        self.log: list[str] = []
        names = ("main", "other", "side", "body")
        self.main, self.other, self.side, self.body = (FakeStream(self, name) for name in names)
        self.current = self.main
        self.capturing: FakeGraph | None = None
        self.captured_by_caller = self.refuses_capture = False

    def launch(self, name, function=lambda: None):
        """Run a function, or write it into the graph that is being captured."""
        if self.capturing is None:
            self.log.append(f"{self.current}: {name}")
            function()
        elif self.refuses_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        else:
            self.capturing.launches.append((name, function))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def told(self) -> list[str]:
        """The log since the last call."""
        log, self.log = self.log, []
        return log


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def __str__(self):
        return self.name

    @property
    def cuda_stream(self):
        return self.name

    def wait_stream(self, stream):
        self.cuda.log.append(f"{self} waits for {stream}")

    def wait_event(self, event):
        self.cuda.log.append(f"{self} waits for the event of {event.stream}")


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.stream = cuda, None

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        self.cuda.log.append(f"the host waits for the event of {self.stream}")


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.launches = cuda, []

    def capture_begin(self, capture_error_mode, pool=None):
        assert capture_error_mode == "thread_local"
        self.cuda.capturing, self.of = self, pool
        self.cuda.log.append(f"{self.cuda.current}: capture")

    def pool(self):
        return self.of or self

    def capture_end(self):
        self.cuda.capturing = None

    def replay(self):
        for name, function in self.launches:
            self.cuda.log.append(f"{self.cuda.current}: {name} replayed")
            function()


class FakeExtension:
    """What the CUDA extension has for conditional nodes, on the flags and counts of CPU tensors, by address.

    What is launched between the two ends of a node must be launched on the stream that was told.
    """

    CONDITIONAL_NODES = True

    def __init__(self, cuda):
        self.cuda, self.open, self.handles, self.prepared = cuda, [], [], 0

    def driver_version(self):
        return 12040

    def prepare_conditional(self):
        assert self.cuda.capturing is None
        self.prepared += 1
        return "body"

    def begin_conditional(self, loop, flag, stream, body):
        assert (stream, body) == ("side", "body")
        node, graph = Node(loop), FakeGraph(self.cuda)
        self.handles.append(node)
        self._set_condition(node, flag)
        self.open.append((node, self.cuda.capturing))
        node.body, self.cuda.capturing = graph, graph
        return len(self.handles) - 1

    def end_conditional(self, loop, flag, handle, body):
        node, outer = self.open.pop()
        assert (node, loop, body) == (self.handles[handle], node.loop, "body")
        if loop:
            self._set_condition(node, flag)
        self.cuda.capturing = outer
        outer.launches.append(("loop" if loop else "branch", node.run))

    def _set_condition(self, node, flag):
        self.cuda.launch("condition", lambda: node.set(number(flag).value))

    def count(self, count, until, flag, stream):
        assert stream == ("body" if self.open else self.cuda.current.name)

        def kernel():
            number(count).value += 1
            number(flag).value = number(count).value < until

        self.cuda.launch("count", kernel)


class Node:
    """A conditional node: its body, and the condition, which kernels set."""

    def __init__(self, loop):
        self.loop, self.condition, self.body = loop, 0, None

    def set(self, condition):
        self.condition = condition

    def run(self):
        while self.condition:
            self.body.replay()
            if not self.loop:
                return


def number(address):
    """The int32 at an address."""
    return ctypes.c_int32.from_address(address)
