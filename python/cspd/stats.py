"""What a speculative run did: counts, acceptance and time, gathered without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from cspd_kernels import CandidateVerdict

PREFILLED, ACCEPTED, REDRAWN, FELL_BACK = range(4)
OUTCOMES = ("prefilled", "accepted", "redrawn", "fell back")


@dataclass(frozen=True)
class RunStats:
    """Statistics of one :meth:`cspd.SpecDecodeRunner.run`. ``print`` shows them as a table.

    A round of strict verification is counted as a window. In strict runs the drafted tokens are those that were judged:
    up to the first step with a token that was not accepted, that step included. What was undone is not counted, so
    every token is judged once. All values but the maps of tokens are on the host: showing them does not wait for the
    device.

    Attributes:
        acceptance: acceptance rate: the fraction of drafted tokens that was kept, at the runner's relaxation. None if
            nothing was drafted.
        raw_acceptance: mean of min(1, r) over the first candidates of the same tokens, at relaxation 1.
        acceptance_per_window, raw_acceptance_per_window: the same for each window.
        fallback: fraction of drafted tokens that took the target's own sample. The redraw ran out of tries, or had no
            closed form. At temperature 0 these are all tokens that were not accepted.
        target_calls, draft_calls: passes through each transformer with its head. Strict runs include the steps that
            were undone. Windows do not count the step that a :class:`cspd.EntropyDraft` drew and dropped.
        gammas: drafted steps of each window. Strict runs include those that were undone.
        drafted, prefilled: tokens that the draft drew first, and tokens that the target drew alone.
        seconds: by phase. ``"draft"``; ``"target"``: pre-filling and the target's passes that verify; ``"verify"``: the
            accept test and the redraw; ``"round"``: a whole round as one CUDA graph; ``"total"``.
        outcome: (B, L) int8 on the device: 0 pre-filled, 1 accepted, 2 redrawn, 3 fell back.
        probability: (B, L) float32 on the device: min(1, r) of the first candidate of each drafted token, at relaxation
            1. ``raw_acceptance`` is its mean over the drafted tokens. 1 where the target drew alone.
        verify: the runner's. rounds: number of windows.
        steps_per_round: steps by which a window advances an image, the mean over windows and unfinished images.
            None without windows.
        target_rows: prefixes that the target looked at to verify. One for each image and window; in strict runs one for
            every drafted step of each branch. Guidance doubles them.
        candidates: how many tokens were accepted as their first, second, ... candidate.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> target, draft = load_pair()
        >>> runner = cspd.SpecDecodeRunner(draft, target, prefill=0.25)
        >>> images = runner.run(2, steps=8, gamma=3, labels=torch.tensor([3, 7]), seed=0)
        >>> runner.stats.target_calls, runner.stats.draft_calls, runner.stats.gammas
        (4, 6, [3, 3])
        >>> print(runner.stats)  # doctest: +ELLIPSIS
        images           2
        tokens           32: 28 drafted, 4 by the target alone
        acceptance       ... %
        ...
        >>> sorted(runner.stats.to_dict()["seconds"])
        ['draft', 'target', 'total', 'verify']
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

    def __str__(self) -> str:
        """An aligned table, for ``print``."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}s}  {value}" for name, value in rows)

    def _rows(self) -> list[tuple[str, str]]:
        images, length = self.outcome.shape
        windows = "rounds" if self.verify == "strict" else "windows"
        steps = "" if self.steps_per_round is None else f" of {self.steps_per_round:.2f} steps"
        return [
            ("images", f"{images}"),
            ("tokens", f"{images * length}: {self.drafted} drafted, {self.prefilled} by the target alone"),
            ("acceptance", percent(self.acceptance)),
            ("raw acceptance", percent(self.raw_acceptance)),
            ("fallback", percent(self.fallback)),
            ("target calls", f"{self.target_calls}"),
            ("draft calls", f"{self.draft_calls}"),
            (windows, f"{self.rounds}{steps}"),
            *((f"seconds, {name}", f"{value:.4f}") for name, value in self.seconds.items()),
        ]

    @property
    def line(self) -> str:
        """The main figures in one line."""
        kept = "nothing drafted" if self.acceptance is None else f"acceptance {percent(self.acceptance)}"
        calls = f"{self.target_calls} target calls, {self.draft_calls} draft calls"
        return f"{kept}, {calls}, {self.seconds['total']:.3f} s"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps of tokens, as values that JSON has.

        Example:
            >>> import cspd
            >>> from cspd.demo.pair import load_pair
            >>> target, draft = load_pair()
            >>> stats = cspd.SpecDecodeRunner(draft, target).run(1, steps=4, gamma=2, seed=0).stats
            >>> stats.to_dict()["gammas"]
            [2, 1]
        """
        return {name: value for name, value in vars(self).items() if not isinstance(value, torch.Tensor)}


def percent(value: float | None) -> str:
    """A fraction for people; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def window_sums(
    verdict: CandidateVerdict, probability: torch.Tensor, judged: torch.Tensor | None = None
) -> torch.Tensor:
    """(3 + K,) sums over tokens (n,), on the device.

    How many were accepted; the sum of min(1, r); how many fell back; how many were accepted as each of their K
    candidates. ``probability`` (n,) is min(1, r). ``judged`` (n,) bool says which tokens count.
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
        self._spans: list[tuple[str, Any, Any]] = []
        self._stats: RunStats | None = None
        self._cuda = outcome.device.type == "cuda"
        self._start = self._now()

    def _now(self) -> Any:
        """A moment: an event of the device, or seconds."""
        if self._cuda:
            event: Any = _timing_event()
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

    @property
    def device(self) -> torch.device:
        """The models'."""
        return self.outcome.device

    def judged(self, first: int) -> tuple[torch.Tensor | None, int]:
        """(2,) float64 on the device: accepted and judged tokens of all windows from the first one given. None without
        such windows. And how many windows there are.
        """
        new, ways = self._sums[first:], 3 + self._candidates
        if not new:
            return None, first
        if self._verify == "strict":
            found = torch.stack([sums[: ways + 1] for sums in new]).double().sum(dim=0)[::ways]
        else:
            accepted = torch.stack([sums[0] for sums in new]).double().sum()
            found = torch.stack([accepted, torch.full_like(accepted, sum(self._tokens[first:]))])
        return found, len(self._sums)

    @property
    def line(self) -> str:
        """The statistics in one line, where reading them does not wait for the device."""
        if self._stats is None and self._cuda:
            return "statistics not read yet"
        return self.finish().line

    def finish(self) -> RunStats:
        """Everything; the first call waits for the device."""
        if self._stats is None:
            self._stats = self._read()
            self._spans = []  # events of the device
        return self._stats

    def _read(self) -> RunStats:
        if self._cuda:
            torch.cuda.synchronize(self.outcome.device)
        seconds = dict.fromkeys(("draft", "target", "verify", "total"), 0.0)
        for name, start, end in self._spans:
            taken = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            seconds[name] = seconds.get(name, 0.0) + taken
        ways, cpu = 3 + self._candidates, torch.device("cpu")  # whatever the caller's default device
        rows = [sums[: ways + 3] for sums in self._sums]
        sums = torch.stack(rows).cpu() if rows else torch.zeros(0, ways + 3, dtype=torch.float32, device=cpu)
        gammas, per_round = torch.tensor(self._gammas, dtype=torch.float32, device=cpu), None
        if self._verify == "strict":
            counts, moved, images = sums[:, ways:].unbind(1)
            done = images == 0  # a round that was launched before the host knew that there was nothing left
            sums, counts, gammas = sums[~done], counts[~done], gammas[~done]
            per_round = float(moved.sum() / images.sum()) if len(sums) else None
        else:
            counts = torch.tensor(self._tokens, dtype=torch.float32, device=cpu)
            per_round = float(gammas.mean()) if len(sums) else None
        drafted, sums = int(counts.sum()), sums[:, :ways]
        means = sums / counts[:, None].clamp(min=1)
        total: list[float | None] = (sums.sum(0) / drafted).tolist() if drafted else [None] * ways
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


def _timing_event() -> Any:
    event: Any = torch.cuda.Event
    return event(enable_timing=True)


class _Span:
    def __init__(self, recorder: Recorder, name: str):
        self.recorder, self.name = recorder, name

    def __enter__(self) -> None:
        self.start = self.recorder._now()

    def __exit__(self, *_: object) -> None:
        self.recorder._spans.append((self.name, self.start, self.recorder._now()))
