"""What a speculative run did: counts, acceptance and time, gathered without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from cspd_kernels import CandidateVerdict

PREFILLED, ACCEPTED, REDRAWN, FELL_BACK = range(4)
OUTCOMES = ("prefilled", "accepted", "redrawn", "fell back")


@dataclass(frozen=True)
class RunStats:
    """Statistics of one :meth:`SpecDecodeRunner.run`.

    A window is also a round of strict verification. Of that the drafted tokens here are those that were judged, up to
    and including the first step with a token that was not accepted: what was undone counts nowhere, and every token is
    judged once.

    Attributes:
        acceptance: fraction of drafted tokens kept, at the runner's relaxation; None if none was drafted.
        raw_acceptance: mean of min(1, r) over the first candidates of the same tokens at relaxation 1.
        acceptance_per_window, raw_acceptance_per_window: the same, window by window.
        fallback: fraction of drafted tokens that took the target's own sample: out of tries, or without a closed form.
            At temperature 0 all that were not accepted.
        target_calls, draft_calls: passes through each transformer with its head. In strict runs with the steps that
            were undone; in windows without the one that an :class:`cspd.EntropyDraft` has drawn and left out.
        gammas: steps of each window, drafted ones: in strict runs with those that were undone.
        drafted, prefilled: tokens drawn by the draft first, and by the target alone.
        seconds: by phase: ``"draft"``, ``"target"`` (pre-filling and verification passes), ``"verify"``
            (the acceptance test and redraw), ``"round"`` (all of a round that is one CUDA graph), ``"total"``.
        outcome: (B, L) int8 on the device: 0 pre-filled, 1 accepted, 2 redrawn, 3 fell back.
        probability: (B, L) float32 on the device: of each drafted token min(1, r) of its first candidate at
            relaxation 1, which ``raw_acceptance`` is the mean of; 1 where the target drew alone.
        verify: of the runner. rounds: how many windows.
        steps_per_round: steps that a window moves an image by, in the mean over windows and over images that were not
            done; None without windows.
        target_rows: prefixes that the target looked at when it verified: one for an image and a window, in strict runs
            one for every drafted step of each branch. Guidance doubles them.
        candidates: how many tokens were accepted as their first, second, ... candidate.
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
    probability: torch.Tensor = field(repr=False)
    verify: str = "window"
    rounds: int = 0
    steps_per_round: float | None = None
    target_rows: int = 0
    candidates: list[int] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Everything but the two maps, ready for JSON."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, torch.Tensor)}


def window_sums(verdict: CandidateVerdict, probability: torch.Tensor, judged: torch.Tensor | None = None):
    """(3 + K,) on the device, of tokens (n,): how many were accepted, the sum of min(1, r), how many fell back, and how
    many were accepted as each of their K candidates. ``probability`` (n,): min(1, r). ``judged`` (n,) bool: which of
    them count.
    """
    ways = torch.arange(verdict.log_ratio.shape[1], device=probability.device)
    counted = [
        verdict.accepted[:, None],
        probability[:, None],
        (verdict.tries < 0)[:, None],
        verdict.candidate[:, None] == ways,
    ]
    if judged is not None:
        counted = [torch.where(judged[:, None], value, torch.zeros_like(value)) for value in counted]
    return torch.cat([value.float().sum(dim=0) for value in counted])


class Recorder:
    """Collects during a run, without waiting for the device."""

    def __init__(self, outcome: torch.Tensor, probability: torch.Tensor, verify: str = "window", candidates: int = 1):
        self.outcome, self.probability, self._verify, self._candidates = outcome, probability, verify, candidates
        self._sums: list[torch.Tensor] = []
        self._tokens: list[int] = []
        self._gammas: list[int] = []
        self._rows: list[int] = []
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

    def window(self, sums: torch.Tensor, tokens: int, steps: int, rows: int) -> None:
        """Add one verified window: its :func:`window_sums`, its tokens and steps, and the rows of the target's pass."""
        self.round(sums, steps, rows)
        self._tokens.append(tokens)

    def round(self, sums: torch.Tensor, steps: int, rows: int) -> None:
        """Add one round: its :func:`cspd.strict.round_sums`, and how many steps it drafted and the target's rows."""
        self._sums.append(sums)
        self._gammas.append(steps)
        self._rows.append(rows)

    def stop(self) -> None:
        """Mark the end of the run."""
        self._spans.append(("total", self._start, self._now()))

    def finish(self) -> RunStats:
        """Wait for the device, once, and read everything."""
        if self._cuda:
            torch.cuda.synchronize(self.outcome.device)
        seconds = dict.fromkeys(("draft", "target", "verify", "total"), 0.0)
        for name, start, end in self._spans:
            taken = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            seconds[name] = seconds.get(name, 0.0) + taken
        ways = 3 + self._candidates
        like = dict(dtype=torch.float32, device="cpu")
        sums = [sums[: ways + 3] for sums in self._sums]
        sums = torch.stack(sums).cpu() if sums else torch.zeros(0, ways + 3, **like)
        gammas, per_round = torch.tensor(self._gammas, **like), None
        if self._verify == "strict":
            counts, moved, images = sums[:, ways:].unbind(1)
            done = images == 0  # a round that was launched before the host knew that there was nothing left
            sums, counts, gammas = sums[~done], counts[~done], gammas[~done]
            per_round = float(moved.sum() / images.sum()) if len(sums) else None
        else:
            counts = torch.tensor(self._tokens, **like)
            per_round = float(gammas.mean()) if len(sums) else None
        drafted, sums = int(counts.sum()), sums[:, :ways]
        means = sums / counts[:, None].clamp(min=1)
        total = (sums.sum(0) / drafted).tolist() if drafted else [None] * ways
        return RunStats(
            acceptance=total[0],
            raw_acceptance=total[1],
            acceptance_per_window=means[:, 0].tolist(),
            raw_acceptance_per_window=means[:, 1].tolist(),
            fallback=total[2],
            target_calls=self._prefills + len(gammas),
            draft_calls=int(gammas.sum()),
            gammas=[int(gamma) for gamma in gammas.tolist()],
            drafted=drafted,
            prefilled=self.outcome.numel() - drafted,
            seconds=seconds,
            outcome=self.outcome,
            probability=self.probability,
            verify=self._verify,
            rounds=len(sums),
            steps_per_round=per_round,
            target_rows=sum(self._rows),
            candidates=[int(count) for count in sums[:, 3:].sum(0).tolist()],
        )


class _Span:
    def __init__(self, recorder: Recorder, name: str):
        self.recorder, self.name = recorder, name

    def __enter__(self):
        self.start = self.recorder._now()

    def __exit__(self, *_):
        self.recorder._spans.append((self.name, self.start, self.recorder._now()))
