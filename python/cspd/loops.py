"""The loops of a speculative run on the host: which steps are drawn when, and what is recorded of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .checks import check_attention, wants_entropy
from .policies import draft_length
from .reporting import Callback, Reporter, title_of
from .run_state import RunState
from .stats import Recorder
from .tree import Tree
from .whole.steps import PlainSteps, Steps
from .window import Phase


def end_by(state: RunState, gamma) -> None:
    """Let a gamma that looks at the draft's attention end the windows of a run."""
    if wants_entropy(gamma):
        check_attention(state.draft)
        state.ends = gamma
        state.entropy = None if state.at is None else gamma.start(len(state.tokens), state.tokens.device)


def run_windows(steps: Steps | PlainSteps, gamma, progress: bool = False, callback: Callback | None = None) -> Recorder:
    """Pre-filling, then windows of ``gamma`` steps, or of as many as a policy says, until every token is drawn."""
    state, windows = steps.state, []
    plan, recorder = state.plan, Recorder(state.outcome, state.probability, "window", state.candidates)
    first, stop = state.prefilled, len(plan.steps)
    ends = None if state.ends is None else state.ends.start(1, state.tokens.device)
    with _reporter("window", steps, recorder, progress, callback) as report:
        _prefill(steps, recorder, report)
        while first < stop:
            state.go_to(first)
            if state.ends is None:
                last = min(first + _length(gamma, windows), stop)
                for i in range(first, last):
                    steps.draft(i, i + 1, recorder.phase)
                    report.tell("draft", i + 1)
            else:
                last, ends = _draft_while(steps, ends, first, min(first + gamma.most, stop), recorder.phase, report)
            judged = steps.judge(first, last, recorder.phase)
            recorder.window(judged.sums, judged.log_ratio.numel(), last - first, len(state.tokens))
            report.tell("verify", last)
            counts = [step.before - step.after for step in plan.steps[first:last]]
            windows.append(functools.partial(_acceptance, judged.log_ratio, counts))
            first = last
    return recorder


def _draft_while(
    steps: Steps | PlainSteps, ends: torch.Tensor, first: int, stop: int, phase: Phase, report: Reporter
) -> tuple[int, torch.Tensor]:
    """Draft steps as long as the window goes on, by the mean entropy of the batch: (the one behind it, the state then).

    The host waits for every step but the first. The one that ends a window has been drawn, and is drawn again.
    """
    for i in range(first, stop):
        entropy = steps.draft(i, i + 1, phase)
        behind, goes_on = steps.state.ends.step(ends, entropy.to(ends.dtype))
        if i > first and not bool(goes_on):
            steps.undo(i)
            return i, ends
        ends = behind
        report.tell("draft", i + 1)
    return stop, ends


def _acceptance(log_ratio: torch.Tensor, counts: list[int]) -> list[float]:
    """The mean of min(1, r) over the tokens of each step of a window; the host waits."""
    steps = log_ratio.clamp(max=0).exp().split(counts, dim=1)
    return torch.stack([step.mean() for step in steps]).tolist()


def _acceptance_of_round(sums: torch.Tensor, gamma: int) -> list[float]:
    """The same of a round, up to the last step that was judged in any image."""
    ratio, count = sums[-2 * gamma :].view(2, gamma).tolist()
    return [r / c for r, c in zip(ratio, count) if c]


def _length(gamma, windows: list[Callable[[], list[float]] | list[float]]) -> int:
    """Steps of the next window. A policy is told of those before: the host waits for the last of them."""
    if not callable(gamma):
        return gamma
    windows[-1:] = [window() for window in windows[-1:]]
    return draft_length(gamma, windows)


def run_rounds(
    steps: Steps | PlainSteps, gamma, branches: int, progress: bool = False, callback: Callback | None = None
) -> Recorder:
    """Pre-filling, then rounds of strict verification (:mod:`cspd.strict`), at most one for every other step.

    Images end at different rounds. On a CPU the host looks where they are, and images that are done take no part in
    later rounds. A GPU writes where they are to the host's memory. The host launches the next round before it reads
    that, so it waits only for the round before the one in flight, and the GPU always has work. A round that is launched
    after the last one changes nothing.
    """
    state = steps.state
    plan, recorder = state.plan, Recorder(state.outcome, state.probability, "strict", state.candidates)
    stop, most = len(plan.steps), state.prefilled  # most: steps that an image may have drawn
    windows, fixed = [], gamma.most if state.ends is not None else gamma
    places = Places(state.at.device, most)
    starts = [state.tokens.shape[1] - step.before for step in plan.steps] + [state.tokens.shape[1]]
    with _reporter("strict", steps, recorder, progress, callback) as report:
        _prefill(steps, recorder, report)
        for before_last in reversed(range(stop - state.prefilled)):
            left = stop - (places.least if steps.exact else state.prefilled)
            length = min(_length(fixed, windows), left)
            images = places.count(state.at, stop) if steps.exact else len(state.tokens)
            tree = Tree(images, length, branches if length > 1 else 1)
            known = starts[min(most + length - 1, stop)]
            sums = steps.round(tree, known, recorder.phase)
            recorder.round(sums, length, tree.rows)
            windows.append(functools.partial(_acceptance_of_round, sums, length))
            places.tell(state.at)
            report.tell("round", places.least if before_last else stop)
            if places.least >= stop:
                break
            most = min(stop, places.most + length * places.unseen)
    return recorder


def _reporter(
    verify: str, steps: Steps | PlainSteps, recorder: Recorder, progress: bool, callback: Callback | None
) -> Reporter:
    planned, images = steps.state.plan.steps, len(steps.state.tokens)
    title = title_of(steps.state.prefilled == len(planned), verify)
    return Reporter(title, planned, images, recorder, progress, callback)


def _prefill(steps: Steps | PlainSteps, recorder: Recorder, report: Reporter) -> None:
    for i in range(steps.state.prefilled):
        steps.state.go_to(i)
        with recorder.phase("target"):
            steps.target(i)
        recorder.prefill()
        report.tell("prefill", i + 1)


class Places:
    """Where the images of a run are, as far as the host knows.

    Args:
        device: the models'. first: steps that every image has drawn.

    Attributes:
        least, most: steps that one of the images has drawn. unseen: rounds since that was so.
    """

    def __init__(self, device: torch.device, first: int):
        self._device, self.least, self.most = device, first, first
        self._flight: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        # Of the round in flight, and of the one before it. Allocated here: that may wait for a device.
        self._room = [(_pinned(2), torch.cuda.Event()) for _ in range(2)] if device.type == "cuda" else []

    @property
    def unseen(self) -> int:
        return len(self._flight)

    def count(self, at: torch.Tensor, stop: int) -> int:
        """How many of the images (B,) a round is for: on a CPU those that are not done, on a device all."""
        return len(at) if self._device.type != "cpu" else int((at < stop).sum())

    def tell(self, at: torch.Tensor) -> None:
        """After a round the images are at (B,). On a device they are read when the next round has been launched."""
        ends = torch.stack(at.aminmax())
        if self._device.type != "cuda":
            self.least, self.most = ends.tolist()
            return
        told, event = self._room.pop(0)
        told.copy_(ends, non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._flight.append((told, event))
        if len(self._flight) > 1:
            told, event = self._flight.pop(0)
            event.synchronize()
            self.least, self.most = _read(told)
            self._room.append((told, event))


def _pinned(size: int) -> torch.Tensor:
    """Room on the host that a device may write to by itself."""
    return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)


def _read(told: torch.Tensor) -> list[int]:
    return told.tolist()
