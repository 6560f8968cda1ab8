"""How runs show themselves: where a run is, to a bar and a callback, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .order import Step
from .progress import Progress
from .stats import Recorder

if TYPE_CHECKING:
    from .speculative import SpecDecodeRunner

Callback = Callable[[Progress], object]
REFRESH = 0.5  # seconds between two refreshes of a bar, at least


class Meter:
    """The acceptance of a run so far.

    On a GPU a few launches add up what the windows left there, and a copy to the host's memory follows them. They are
    made when somebody asks, and never before the copy ahead of them has arrived.

    Args:
        recorder: of the run.
    """

    def __init__(self, recorder: Recorder):
        self._recorder, self._seen, self._latest = recorder, 0, (0.0, 0.0)
        self._sums: torch.Tensor | None = None  # (2,) float64 on the device: accepted and judged tokens
        device = recorder.device
        self._flying = False  # a copy to the host
        # Allocated here, before the run's first kernel: that may wait for a device.
        self._room: tuple[torch.Tensor, Any] | None = None
        if device.type == "cuda":
            self._room = _pinned(2), _event()

    def read(self) -> float | None:
        """The acceptance now; the host waits for the device."""
        self._add_up()
        if self._sums is not None:  # latest() may have added up what has not come to the host yet
            self._latest, self._flying = _read(self._sums), False
        return self._acceptance()

    def latest(self) -> float | None:
        """The acceptance as far as it has come to the host, which does not wait. On a CPU it is the acceptance now."""
        if self._room is None:
            return self.read()
        told, event = self._room
        if self._flying and event.query():
            self._latest, self._flying = _read(told), False
        if not self._flying and (sums := self._add_up()) is not None:
            told.copy_(sums, non_blocking=True)
            event.record(torch.cuda.current_stream(self._recorder.device))
            self._flying = True
        return self._acceptance()

    def _add_up(self) -> torch.Tensor | None:
        """The sums, where something was judged since the last time."""
        new, self._seen = self._recorder.judged(self._seen)
        if new is None:
            return None
        self._sums = new if self._sums is None else self._sums + new
        return self._sums

    def _acceptance(self) -> float | None:
        accepted, judged = self._latest
        return accepted / judged if judged else None


class Reporter:
    """Tells a bar and a callback of every part of a run. Without both it does nothing.

    A context manager: the bar ends with it.

    Args:
        what: the bar's first words, such as "speculative".
        steps: of the run's plan. images: how many there are.
        recorder: what counts the acceptance; None where nothing is drafted.
        progress: whether there is a bar. callback: is called with a :class:`cspd.Progress`.
    """

    def __init__(
        self,
        what: str,
        steps: list[Step],
        images: int,
        recorder: Recorder | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ):
        self._steps, self._images, self._callback = steps, images, callback
        self._bar = Bar(f"{what}, {count(images, 'image')}", len(steps)) if progress else None
        self._meter = Meter(recorder) if recorder is not None and self.tells else None

    @property
    def tells(self) -> bool:
        """Whether there is anybody to tell."""
        return self._bar is not None or self._callback is not None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def tell(self, phase: str, step: int) -> None:
        """A part of the run was launched; behind it all images have ``step`` of the plan's steps."""
        if not self.tells:
            return
        length = self._steps[0].before
        known = length - self._steps[step - 1].after if step else 0
        seen = Progress(
            phase, step, len(self._steps), known * self._images, length * self._images, self._images, self._meter
        )
        if self._bar is not None:
            self._bar.show(seen, step)
        if self._callback is not None:
            self._callback(seen)


class Bar:
    """A tqdm bar with description, phase, tokens and acceptance, drawn anew at most every half second.

    Args:
        title: its first words. total: where it ends, counted in ``unit``; it begins at ``initial``.
        shown: False draws nothing at all.
    """

    def __init__(self, title: str, total: int, unit: str = "step", initial: int = 0, shown: bool = True):
        self._bar = tqdm(desc=title, total=total, unit=unit, initial=initial, disable=not shown)
        self._last: Progress | None = None
        self._next = time.monotonic() + REFRESH

    def show(self, seen: Progress, at: int | None = None) -> None:
        """Take what it tells from here, move it to a place if one is given, and draw it if that is due."""
        self._bar.n, self._last = self._bar.n if at is None else at, seen
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH
            self._bar.set_postfix_str(line(seen), refresh=True)

    def move(self, at: int) -> None:
        """Move it to a place, and draw it if it was elsewhere."""
        if at != self._bar.n:
            self._bar.n = at
            self._bar.refresh()

    def close(self) -> None:
        """Draw it for the last time, and leave it there."""
        if self._last is not None:
            self._bar.set_postfix_str(line(self._last), refresh=False)
        self._bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def line(seen: Progress) -> str:
    """A phase, tokens and the acceptance that has come to the host, in one line."""
    acceptance = seen.recent_acceptance
    told = "" if acceptance is None else f", acceptance {100 * acceptance:.1f} %"
    return f"{seen.phase}, {seen.tokens} of {count(seen.total, 'token')}{told}"


def runner_text(runner: SpecDecodeRunner, models: list[str], gamma: object) -> str:
    """A runner for people. ``models``: a line for each. ``gamma``: of its last run, None before the first."""
    dtype = "autocast, or the weights'" if runner.dtype is None else str(runner.dtype).removeprefix("torch.")
    relaxation = "by position" if isinstance(runner.relaxation, torch.Tensor) else repr(runner.relaxation)
    branches = f"{runner.branches} branch{'' if runner.branches == 1 else 'es'}"
    options = [
        f"verify={runner.verify!r}, criterion={runner.criterion!r}, relaxation={relaxation}, prefill={runner.prefill}",
        f"{count(runner.num_candidates, 'candidate')}, {branches}",
        *([] if gamma is None else [f"gamma of the last run: {gamma}"]),
    ]
    device = runner.target_model.fake_latent.device
    lines = [*models, ", ".join(options), f"dtype: {dtype}, backend: {runner.backend or 'the default'}, {device}"]
    return "\n".join(["SpecDecodeRunner(", *(f"  {text}" for text in lines), ")"])


def title_of(alone: bool, verify: str) -> str:
    """A bar's first words. ``alone``: everything is pre-filled. ``verify``: the runner's."""
    return "target alone" if alone else "strict" if verify == "strict" else "speculative"


def count(number: int, name: str) -> str:
    """A number of things: ``1 image``, ``2 images``."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def _pinned(size: int) -> torch.Tensor:
    """Room on the host that a device may write to by itself."""
    return torch.empty(size, dtype=torch.float64, device="cpu", pin_memory=True)


def _event() -> Any:
    event: Any = torch.cuda.Event
    return event()


def _read(told: torch.Tensor) -> tuple[float, float]:
    accepted, judged = told.tolist()
    return accepted, judged
