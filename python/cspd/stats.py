"""What a speculative run did: counts, acceptance and time, gathered without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

PREFILLED, ACCEPTED, REDRAWN, FELL_BACK = range(4)
OUTCOMES = ("prefilled", "accepted", "redrawn", "fell back")


@dataclass(frozen=True)
class RunStats:
    """Statistics of one :meth:`SpecDecodeRunner.run`.

    Attributes:
        acceptance: fraction of drafted tokens kept, at the runner's relaxation; None if none was drafted.
        raw_acceptance: mean of min(1, r) over the same tokens at relaxation 1.
        acceptance_per_window, raw_acceptance_per_window: the same, window by window.
        fallback: fraction of drafted tokens that took the target's own sample: out of tries, or without a closed form.
        target_calls, draft_calls: passes through each transformer with its head.
        gammas: steps of each window.
        drafted, prefilled: tokens drawn by the draft first, and by the target alone.
        seconds: by phase: ``"draft"``, ``"target"`` (pre-filling and verification passes), ``"verify"``
            (the acceptance test and redraw), ``"total"``.
        outcome: (B, L) int8 on the device: 0 pre-filled, 1 accepted, 2 redrawn, 3 fell back.
    """

    acceptance: float | None
    raw_acceptance: float | None
    acceptance_per_window: list[float]
    raw_acceptance_per_window: list[float]
    fallback: float | None
    target_calls: int
    draft_calls: int
    gammas: list[int]
    drafted: int
    prefilled: int
    seconds: dict[str, float]
    outcome: torch.Tensor = field(repr=False)

    def to_dict(self) -> dict:
        """Everything but the outcome map, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "outcome"}


def window_sums(accepted: torch.Tensor, raw_log_ratio: torch.Tensor, tries: torch.Tensor) -> torch.Tensor:
    """(3,) on the device, of a window's tokens (n,): how many were accepted, sum of min(1, r), how many fell back."""
    raw = torch.exp(raw_log_ratio.clamp(max=0))
    return torch.stack([accepted.float().sum(), raw.sum(), (tries < 0).float().sum()])


class Recorder:
    """Collects during a run, without waiting for the device."""

    def __init__(self, outcome: torch.Tensor):
        self.outcome = outcome
        self._sums: list[torch.Tensor] = []
        self._tokens: list[int] = []
        self._gammas: list[int] = []
        self._prefills = 0
        self._spans: list[tuple[str, object, object]] = []
        self._cuda = outcome.device.type == "cuda"
        self._start = self._now()

    def _now(self):
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.outcome.device))
            return event
        return time.perf_counter()

    def phase(self, name: str) -> _Span:
        """Context manager that adds its duration to a phase."""
        return _Span(self, name)

    def prefill(self) -> None:
        """Add one step of the target alone."""
        self._prefills += 1

    def window(self, sums: torch.Tensor, tokens: int, steps: int) -> None:
        """Add one verified window: its :func:`window_sums`, and how many tokens and steps it has."""
        self._sums.append(sums)
        self._tokens.append(tokens)
        self._gammas.append(steps)

    def stop(self) -> None:
        """Mark the end of the run."""
        self._spans.append(("total", self._start, self._now()))

    def finish(self) -> RunStats:
        """Wait for the device, once, and read everything."""
        if self._cuda:
            torch.cuda.synchronize(self.outcome.device)
        seconds = dict.fromkeys(("draft", "target", "verify", "total"), 0.0)
        for name, start, end in self._spans:
            seconds[name] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        sums = torch.stack(self._sums).cpu() if self._sums else torch.zeros(0, 3, dtype=torch.float32, device="cpu")
        counts = torch.tensor(self._tokens, dtype=torch.float32, device="cpu")
        drafted = int(counts.sum())
        means = sums / counts[:, None].clamp(min=1)
        total = (sums.sum(0) / drafted).tolist() if drafted else [None] * 3
        return RunStats(
            acceptance=total[0],
            raw_acceptance=total[1],
            acceptance_per_window=means[:, 0].tolist(),
            raw_acceptance_per_window=means[:, 1].tolist(),
            fallback=total[2],
            target_calls=self._prefills + len(self._gammas),
            draft_calls=sum(self._gammas),
            gammas=self._gammas,
            drafted=drafted,
            prefilled=self.outcome.numel() - drafted,
            seconds=seconds,
            outcome=self.outcome,
        )


class _Span:
    def __init__(self, recorder: Recorder, name: str):
        self.recorder, self.name = recorder, name

    def __enter__(self):
        self.start = self.recorder._now()

    def __exit__(self, *_):
        self.recorder._spans.append((self.name, self.start, self.recorder._now()))
