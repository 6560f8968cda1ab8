"""Samplers that change what is drawn: DDIM, and fewer denoising steps, also annealed along the autoregressive steps."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

from cspd_kernels import Schedule

from .errors import InvalidInput

SAMPLERS = (None, "ddim")


@dataclass(frozen=True)
class Sampling:
    """How a head's schedule is sampled in place of what it says itself. The default changes nothing.

    Attributes:
        sampler: ``"ddim"`` (arXiv 2010.02502), or None for the schedule's own steps.
        eta: of DDIM, 0..1: 0 adds no noise, 1 as much as ancestral sampling.
        steps: denoising steps; a pair (first, last) goes linearly from the first autoregressive step to the last
            (DiSA, arXiv 2505.20297); None: the schedule's own.
    """

    sampler: str | None = None
    eta: float = 0.0
    steps: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, list):
            object.__setattr__(self, "steps", tuple(self.steps))

    def check(self, who: str) -> None:
        """Raise on an option that does not exist, whatever the schedule."""
        if self.sampler not in SAMPLERS:
            raise InvalidInput(f"{who} expected sampler one of {SAMPLERS}, got {self.sampler!r}")
        number = isinstance(self.eta, Real) and not isinstance(self.eta, bool)
        if not number or not 0.0 <= self.eta <= 1.0:
            raise InvalidInput(f"{who} expected eta in [0, 1], got {self.eta!r}")
        if self.eta != 0.0 and self.sampler != "ddim":
            raise InvalidInput(f"{who} expected eta={self.eta!r} together with sampler='ddim', got {self.sampler!r}")
        counts: tuple[Any, ...] = self.steps if isinstance(self.steps, tuple) else (self.steps,)
        right = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts)
        if self.steps is not None and not (right and len(counts) in (1, 2) and self.steps != counts[:1]):
            raise InvalidInput(
                f"{who} expected sampling_steps as an int >= 1 or a pair (first, last) of them, got {self.steps!r}"
            )

    @property
    def changes(self) -> bool:
        """Whether what is drawn is another than the head's own sampler draws."""
        return self != OWN

    @property
    def anneals(self) -> bool:
        """Whether the number of denoising steps depends on the autoregressive step."""
        return isinstance(self.steps, tuple) and self.steps[0] != self.steps[1]

    def count(self, step: int, of: int) -> int | None:
        """Denoising steps at an autoregressive step, 0..of-1; None: the schedule's own number."""
        if not isinstance(self.steps, tuple):
            return self.steps
        (first, last), steps = self.steps, max(1, of - 1)
        gone = (steps - step) * abs(first - last) // steps  # in whole numbers: 1/5 is no binary fraction
        return last + (gone if first > last else -gone)

    def schedule(self, schedule: Schedule, step: int = 0, of: int = 1) -> Schedule:
        """The steps that are made at an autoregressive step; the same object for the same steps.

        Raises:
            ValueError: the schedule cannot be sampled so; the message says what it can.
        """
        if not self.changes:
            return schedule
        count = self.count(step, of)
        kept: dict[Any, Schedule] = schedule.__dict__.setdefault("_sampled", {})  # heads are kept by their schedule
        key = (self.sampler, self.eta, count)
        if key not in kept:
            kept[key] = self._made(schedule, count)
        return kept[key]

    def _made(self, schedule: Schedule, count: int | None) -> Schedule:
        if schedule.betas is None or schedule.width is not None:
            raise InvalidInput(
                f"expected a head with a noise schedule for {self}, got {schedule!r}: set its number of steps where "
                "you build it"
            )
        if count is not None and count > schedule.num_steps:
            raise InvalidInput(f"expected sampling_steps up to the head's own {schedule.num_steps}, got {count}")
        made = schedule if count is None else schedule.respaced(count)
        return made.ddim(self.eta) if self.sampler == "ddim" else made

    def __str__(self) -> str:
        parts = [f"sampler {self.sampler!r}, eta {self.eta:g}"] if self.sampler else []
        parts += [f"sampling_steps {self.steps}"] if self.steps is not None else []
        return ", ".join(parts) or "its own sampler"


OWN = Sampling()  # the head's own sampler
