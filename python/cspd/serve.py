"""What one request of ``cspd serve`` makes: checked, drawn by the pair and by the target alone, and as HTML."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from cspd_kernels.ops.accept_reject import MOST_CANDIDATES

from .check_heads import learned_variance
from .checks import VERIFY
from .demo.picture import to_pixels
from .errors import InvalidInput
from .speculative import SpecDecodeRunner
from .stats import OUTCOMES

MAX_SEED = 2**32 - 1
MAX_GUIDANCE = 10.0
MAX_BRANCHES = 4  # a round of gamma steps is nearly as many times gamma rows of the batch for the target
COLOURS = ((120, 120, 120), (70, 160, 90), (235, 150, 40), (200, 50, 50))  # one for each of OUTCOMES
NAMES = dict(zip(OUTCOMES, ("pre-filled", "accepted", "redrawn", "fell back to the target's")))


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    steps: int
    gamma: int
    images: int


@dataclass(frozen=True)
class Made:
    """The result of a request, for ``n`` images; the figures are of all of them together.

    Attributes:
        speculative, alone: (n, H, W, 3) or (n, H, W) uint8, of the pair and of the target alone.
        outcome: (n, L) int8, as in :class:`cspd.stats.RunStats`.
        seconds, seconds_alone: of both runs, without the decoder.
        target_calls, draft_calls, target_calls_alone: passes through each model.
        acceptance: fraction of drafted tokens kept, or None.
        verify, rounds, steps_per_round: as in :class:`cspd.stats.RunStats`, of the pair.
    """

    speculative: torch.Tensor
    alone: torch.Tensor
    outcome: torch.Tensor
    seconds: float
    seconds_alone: float
    target_calls: int
    draft_calls: int
    target_calls_alone: int
    acceptance: float | None
    verify: str = "window"
    rounds: int = 0
    steps_per_round: float | None = None


class Studio:
    """A pair of models that makes images for one request after another.

    Args:
        vae: the decoder of :func:`cspd.vae.load_vae`; None for the digits pair, whose tokens are pixels.
        classes: how many labels there are; options: further arguments of :class:`SpecDecodeRunner`, of which
            ``relaxation`` is that of windows.

    Attributes:
        one_sigma: both heads have a fixed variance.
    """

    def __init__(self, target, draft, vae=None, *, limits: Limits, steps: int, classes: int, name: str, **options):
        self.vae, self.limits, self.steps, self.classes, self.name = vae, limits, steps, classes, name
        self.device = target.fake_latent.device
        self.pair = SpecDecodeRunner(draft, target, **options)
        self.alone = SpecDecodeRunner(target, target, 1.0, 1.0, **{k: v for k, v in options.items() if k == "dtype"})
        self.one_sigma = not any(learned_variance(model.diffloss) for model in (target, draft))
        self._relaxation = self.pair.relaxation
        self._lock = threading.Lock()  # the runners hold the statistics of their last run

    @property
    def gamma(self) -> int:
        """The window that a page starts with."""
        return min(8 if self.vae else 4, self.limits.gamma)

    def make(self, label, steps, gamma, guidance, seed, images, verify="window", candidates=1, branches=1) -> Made:
        """Draw ``images`` images of one class, by the pair and by the target alone.

        With strict verification or several candidates the last denoising step adds its noise, of both pictures
        (``criterion="last_step"`` of :class:`SpecDecodeRunner`). Strict verification is exact where the pair can be:
        without relaxation, and with one sigma without fallbacks.

        Raises:
            ValueError: something is no number, out of range, or does not go together. What a page allows is not
                relied upon.
        """
        label = whole("the class", label, 0, self.classes - 1)
        steps = whole("steps", steps, 1, self.limits.steps)
        gamma = whole("gamma", gamma, 1, self.limits.gamma)
        seed = whole("the seed", seed, 0, MAX_SEED)
        images = whole("the number of images", images, 1, self.limits.images)
        guidance = number("guidance", guidance, 1, MAX_GUIDANCE)
        options = verification(verify, candidates, branches)
        strict = verify == "strict"
        options["relaxation"] = 1.0 if strict else self._relaxation
        options["residual"] = "closed_form" if strict and self.one_sigma else "rejection"
        with self._lock, _threads(1 if self.vae is None else None):
            self._set(options)
            labels = torch.full((images,), label)
            made = []
            for runner in (self.alone, self.pair):
                drawn = runner.run(images, steps, gamma, labels=labels, cfg=guidance, seed=seed)
                made.append((runner.stats, self._pixels(drawn)))  # reading the statistics waits for the device
        (alone, plain), (pair, speculative) = made
        return Made(
            speculative=speculative,
            alone=plain,
            outcome=pair.outcome.cpu(),
            seconds=pair.seconds["total"],
            seconds_alone=alone.seconds["total"],
            target_calls=pair.target_calls,
            draft_calls=pair.draft_calls,
            target_calls_alone=alone.target_calls,
            acceptance=pair.acceptance,
            verify=pair.verify,
            rounds=pair.rounds,
            steps_per_round=pair.steps_per_round,
        )

    def _set(self, options: dict) -> None:
        """Of the runners there are, whose packed weights and graphs stay."""
        for name, value in options.items():
            setattr(self.pair, name, value)
        self.alone.criterion = options["criterion"]

    def _pixels(self, drawn: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return to_pixels(drawn.cpu())
        from .vae import to_uint8

        return to_uint8(self.vae.decode(drawn))


def whole(name: str, value, low: int, high: int) -> int:
    """``value`` as a whole number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not low <= value <= high:
        raise InvalidInput(f"Expected {name} as a whole number from {low} to {high}, got {_shown(value)}.")
    if value != int(value):
        raise InvalidInput(f"Expected {name} as a whole number from {low} to {high}, got {_shown(value)}.")
    return int(value)


def verification(verify, candidates, branches) -> dict:
    """The options of :class:`SpecDecodeRunner` that a request means.

    Raises:
        ValueError: out of range, or not together.
    """
    if verify not in VERIFY:
        raise InvalidInput(f"Expected the verification as one of {', '.join(VERIFY)}, got {_shown(verify)}.")
    candidates = whole("the candidates", candidates, 1, MOST_CANDIDATES)
    branches = whole("the branches", branches, 1, MAX_BRANCHES)
    if branches > 1 and verify != "strict":
        raise InvalidInput(f"Expected strict verification for {branches} branches: windows have one.")
    if branches > candidates:
        raise InvalidInput(f"Expected at most as many branches as candidates, got {branches} and {candidates}.")
    plain = verify == "window" and candidates == 1
    return {
        "verify": verify,
        "num_candidates": candidates,
        "branches": branches,
        "criterion": "trajectory" if plain else "last_step",
        "target_sigma": candidates > 1,  # learned variances differ, fixed ones do not
    }


def number(name: str, value, low: float, high: float) -> float:
    """``value`` as a number from ``low`` to ``high``."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        raise InvalidInput(f"Expected {name} as a number from {low:g} to {high:g}, got {_shown(value)}.")
    return float(value)


def _shown(value) -> str:
    return "nothing" if value is None else f"{value!r:.40}"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use so many CPU threads, unless OMP_NUM_THREADS or None says otherwise; afterwards the number before."""
    before = torch.get_num_threads()
    if count and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def render(made: Made) -> str:
    """HTML of a result: pictures, acceptance maps and the target's own pictures, the figures, and the legend."""
    side = math.isqrt(made.outcome.shape[1])
    palette = torch.tensor(COLOURS, dtype=torch.uint8)
    maps = palette[made.outcome.long()].view(-1, side, side, 3)
    rows = (("Speculative", made.speculative), ("Acceptance map", maps), ("The target alone", made.alone))
    figures = "".join(
        f"<figure><figcaption>{name}</figcaption><div class='cspd-row'>"
        + "".join(_img(f"{name}, image {i + 1}", image) for i, image in enumerate(images))
        + "</div></figure>"
        for name, images in rows
    )
    counts = torch.bincount(made.outcome.flatten().long(), minlength=len(OUTCOMES)).tolist()
    legend = "".join(
        f"<li><span style='background:rgb{colour}'></span>{NAMES[name]}: {count}</li>"
        for name, colour, count in zip(OUTCOMES, COLOURS, counts)
        if count or name != "fell back"
    )
    kept = "No token was drafted." if made.acceptance is None else f"{100 * made.acceptance:.1f} % of the drafts kept."
    speed = made.seconds_alone / made.seconds if made.seconds else math.nan
    text = (
        f"<b>{made.seconds:.3f} s</b> speculative, <b>{made.seconds_alone:.3f} s</b> the target alone: "
        f"<b>{speed:.2f} times</b> as fast. {kept} Target passes: {made.target_calls} instead of "
        f"{made.target_calls_alone}; draft passes: {made.draft_calls}."
    )
    if made.verify == "strict" and made.steps_per_round:
        text += f" {made.rounds} rounds, each {made.steps_per_round:.1f} steps of an image."
    many = " cspd-many" if len(maps) > 1 else ""
    return f"<div class='cspd-made{many}'>{figures}</div><ul class='cspd-legend'>{legend}</ul><p>{text}</p>"


def _img(name: str, image: torch.Tensor) -> str:
    # Digits and maps are made larger with their edges kept, photographs are not.
    kind = " class='cspd-pixels'" if len(image) <= 64 else ""
    return f"<img{kind} alt='{html.escape(name, quote=True)}' src='{_data_uri(image)}'>"


def _data_uri(image: torch.Tensor) -> str:
    png = io.BytesIO()
    Image.fromarray(image.numpy()).save(png, format="png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
