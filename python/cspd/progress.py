"""How far a run is: what a callback is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class Meter(Protocol):
    """What knows the acceptance of a run."""

    def read(self) -> float | None: ...

    def latest(self) -> float | None: ...


@dataclass(frozen=True)
class Progress:
    """Progress of a run, for the ``callback=`` of :meth:`cspd.SpecDecodeRunner.run` and :func:`cspd.sample_tokens`.

    The callback receives one after every part of the run. It is called on the host, between launches. A GPU may not
    have finished those yet. Reading :attr:`acceptance` synchronises. Nothing else here does.

    Attributes:
        phase: what was launched last. ``"prefill"``: a step of the target alone. ``"draft"``: a step of the draft.
            ``"verify"``: a window was verified and its rejected tokens were redrawn. ``"round"``: a round of strict
            verification. ``"sample"``: a step of :func:`cspd.sample_tokens`.
        step: autoregressive steps that every image has so far, drafted ones included. In strict verification a step
            counts when the host knows that it was kept.
        steps: autoregressive steps of the run.
        tokens: tokens that the images have after so many steps, all images together.
        total: tokens of all images at the end.
        images: images of the run.

    Example:
        >>> import cspd
        >>> seen = cspd.Progress("draft", step=3, steps=16, tokens=6, total=32, images=2)
        >>> f"{seen.phase}: {seen.tokens} of {seen.total} tokens"
        'draft: 6 of 32 tokens'
        >>> print(seen.acceptance)
        None
    """

    phase: str
    step: int
    steps: int
    tokens: int
    total: int
    images: int
    _meter: Meter | None = field(default=None, repr=False, compare=False)

    @property
    def acceptance(self) -> float | None:
        """Acceptance rate of the drafted tokens so far; None before the first verification.

        Reading it waits for the device. Read it in the callback: later it includes what was verified since.
        """
        return None if self._meter is None else self._meter.read()

    @property
    def recent_acceptance(self) -> float | None:
        """The same without waiting: the last acceptance rate that has reached the host.

        On a GPU each reading asks for a newer value, which a later reading finds. Progress bars show this one.
        """
        return None if self._meter is None else self._meter.latest()
