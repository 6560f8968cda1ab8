"""A CUDA device that only writes down what it is told: streams, events and graphs."""

from __future__ import annotations

import contextlib


class FakeCuda:
    """Streams, events and graphs that leave a line in ``log`` for everything they do."""

    def __init__(self):
        self.log: list[str] = []
        self.main, self.other, self.side = (FakeStream(self, name) for name in ("main", "other", "side"))
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
