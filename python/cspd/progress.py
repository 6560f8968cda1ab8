"""How far a run is: what a callback is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far a run is, for ``callback=`` of :meth:`cspd.SpecDecodeRunner.run` and :func:`cspd.sample_tokens`.

    The callback gets one after every part of the run. It runs on the host, between launches: on a GPU the device may be
    behind. Only :attr:`acceptance` waits for the device, and only when it is read.

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
    _acceptance: Callable[[], float | None] | None = field(default=None, repr=False, compare=False)

    @property
    def acceptance(self) -> float | None:
        """Fraction of the drafted tokens that was accepted so far; None before the first verification.

        Reading it waits for the device.
        """
        return None if self._acceptance is None else self._acceptance()
