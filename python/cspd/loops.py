"""The loops of a speculative run on the host: which steps are drawn when, and what is recorded of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from .policies import draft_length
from .stats import Recorder
from .tree import Tree
from .whole.steps import PlainSteps, Steps
from .window import Judged, RunState


def run_windows(steps: Steps | PlainSteps, gamma, progress: bool = False) -> Recorder:
    """Pre-filling, then windows of ``gamma`` steps, or of as many as a policy says, until every token is drawn."""
    state, judged = steps.state, []
    plan, recorder = state.plan, Recorder(state.outcome, "window", state.candidates)
    with tqdm(total=len(plan.steps), disable=not progress) as bar:
        _prefill(steps, recorder, bar)
        for first, last in _windows(state, gamma, judged):
            counts = tuple(step.before - step.after for step in plan.steps[first:last])
            judged.append((counts, steps.window(first, last, _phases(recorder, bar))))
            verdict = judged[-1][1]
            recorder.window(verdict.sums, verdict.log_ratio.numel(), last - first, len(state.tokens))
    return recorder


def run_rounds(steps: Steps | PlainSteps, gamma: int, branches: int, progress: bool = False) -> Recorder:
    """Pre-filling, then rounds of strict verification (:mod:`cspd.strict`), at most one for every other step.

    Images end at different rounds. On a CPU the host looks where they are. On a device it lets each round tell that in
    memory of the host, without waiting, and launches the next one before it reads: it waits for the round
    before the one in flight alone, so that the device has work all the time. A round behind the last changes nothing.
    """
    state = steps.state
    plan, recorder = state.plan, Recorder(state.outcome, "strict", state.candidates)
    stop, most = len(plan.steps), state.prefilled  # most: steps that an image may have drawn
    places = Places(state.at.device, most)
    starts = [state.tokens.shape[1] - step.before for step in plan.steps] + [state.tokens.shape[1]]
    with tqdm(total=stop, disable=not progress) as bar:
        _prefill(steps, recorder, bar)
        for _ in range(stop - state.prefilled):
            left = stop - (places.least if steps.exact else state.prefilled)
            tree = Tree(len(state.tokens), min(gamma, left), branches if min(gamma, left) > 1 else 1)
            known = starts[min(most + tree.gamma - 1, stop)]
            recorder.round(steps.round(tree, known, recorder.phase), tree.gamma, tree.rows)
            places.tell(state.at)
            bar.update(places.least - bar.n)
            if places.least >= stop:
                break
            most = min(stop, places.most + gamma * places.unseen)
        bar.update(stop - bar.n)
    return recorder


def _prefill(steps: Steps | PlainSteps, recorder: Recorder, bar: tqdm) -> None:
    for i in range(steps.state.prefilled):
        with recorder.phase("target"):
            steps.target(i)
        recorder.prefill()
        bar.update()


def _phases(recorder: Recorder, bar: tqdm) -> Callable[[str], contextlib.AbstractContextManager]:
    """To time the phases of a window; every step that was drafted moves the bar."""

    @contextlib.contextmanager
    def phase(name: str):
        with recorder.phase(name):
            yield
        bar.update(name == "draft")

    return phase


def _windows(state: RunState, gamma, judged: list[tuple[tuple[int, ...], Judged]]) -> Iterator[tuple[int, int]]:
    """First step of every window and the one behind it. A policy is told of those in ``judged``: the host waits."""
    acceptance, first, stop = [], state.prefilled, len(state.plan.steps)
    while first < stop:
        length = gamma
        if callable(gamma):
            for counts, verdict in judged[len(acceptance) :]:
                steps = verdict.log_ratio.clamp(max=0).exp().split(counts, dim=1)
                acceptance.append(torch.stack([step.mean() for step in steps]).tolist())
            length = draft_length(gamma, acceptance)
        last = min(first + length, stop)
        yield first, last
        first = last


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

    @property
    def unseen(self) -> int:
        return len(self._flight)

    def tell(self, at: torch.Tensor) -> None:
        """Behind a round the images are at (B,). A device's are read when the round behind it has been launched."""
        ends = torch.stack(at.aminmax())
        if self._device.type != "cuda":
            self.least, self.most = ends.tolist()
            return
        told, event = torch.empty(2, dtype=torch.int64, device="cpu", pin_memory=True), torch.cuda.Event()
        told.copy_(ends, non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._flight.append((told, event))
        if len(self._flight) > 1:
            told, event = self._flight.pop(0)
            event.synchronize()
            self.least, self.most = told.tolist()
