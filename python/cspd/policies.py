"""Acceptance as a policy: how far the accept test is relaxed for each token, and how long a window is.

A relaxation policy is a function of a :class:`Window` that gives one number > 0 per token; it works on the device
and makes the host wait for nothing. One with the attribute ``looks_ahead = True`` is also shown what the target makes
of the tokens that follow (:class:`cspd.ContextRelaxation`). A rule that relaxes the test where the target itself is
undecided, in the manner of entropy-informed speculation (Drift-AR, arXiv 2603.28049), takes three lines::

    def by_entropy(window):
        entropy = window.target_log_std.mean(dim=-1)  # of a Gaussian, but for a constant; (B, n)
        return 1.0 + 41.0 * torch.sigmoid(2.0 * (entropy + 3.0))

    cspd.SpecDecodeRunner(draft, target, by_entropy)

A gamma policy is a function of the acceptance of the windows so far that gives the number of steps of the
next one; see :class:`AdaptiveDraft`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F

from .errors import InvalidInput


@dataclass(frozen=True)
class Window:
    """What a relaxation policy may look at: n drafted tokens in each of B images, all tensors on the models' device.

    Tokens stand step by step, and by ascending position within a step. Under guidance the hidden states are those
    of the conditional rows. A policy must not write into any of them.

    In strict verification B is images times branches, an image's branches one after the other, and it changes from
    round to round: on a CPU images that are done are left out. There every step takes up the same room: what only
    fills up has ``valid`` False and anything finite in the other fields.

    Attributes:
        positions: (B, n) int64, where in the sequence each token is.
        steps: (n,) int64, index of the autoregressive step that draws it; (B, n) in strict verification.
        target_z: (B, n, Z_target), the target's hidden states: the conditions of its head.
        draft_z: (B, n, Z_draft), the draft's, each the one its token was drawn from.
        previous_target_z: (B, Z_target), that of the last token that the target looked at before this window, in
            pre-filling or in the window before; None if there was none.
        log_ratio: (B, n) float32, log r at relaxation 1 (:func:`cspd_kernels.log_density_ratio`).
        draft_log_std, target_log_std: (B, n, C), log standard deviations of the last denoising step,
            log(temperature) included.
        valid: (B, n) bool, False for what only fills up a step's room; None: all are tokens.
        known: (B, n) int64, how many tokens are known where the token is drawn: equal within a step, with what fills up
            its room, and larger from step to step.
        draft_entropy: (B, n), the entropy of the draft's attention there, in [0, 1].
        target_before: (B, n, Z_target), the target's hidden state of the same token a step earlier: without the tokens
            of the step before its own. NaN where nobody has computed it, as in the first step of a window.
        target_branches: (B, w, n, Z_target), the target's hidden states of the same token in each branch of its image.

    What the last five hold is there in strict verification, ``target_before`` and ``target_branches`` for policies
    that look ahead, ``draft_entropy`` where a gamma policy wants it, ``target_branches`` with more than one
    branch; else they are None.
    """

    positions: torch.Tensor
    steps: torch.Tensor
    target_z: torch.Tensor
    draft_z: torch.Tensor
    previous_target_z: torch.Tensor | None
    log_ratio: torch.Tensor
    draft_log_std: torch.Tensor
    target_log_std: torch.Tensor
    valid: torch.Tensor | None = None
    known: torch.Tensor | None = None
    draft_entropy: torch.Tensor | None = None
    target_before: torch.Tensor | None = None
    target_branches: torch.Tensor | None = None


def relaxation_of(policy: Callable[[Window], torch.Tensor], window: Window) -> torch.Tensor:
    """What a policy gives for a window, (B n,), image by image.

    Values are looked at by the op that uses them, on the CPU only.

    Raises:
        ValueError: it is no floating tensor of one number per token on the window's device.
    """
    value: Any = policy(window)
    like = window.log_ratio
    fits = isinstance(value, torch.Tensor) and value.shape == like.shape and value.is_floating_point()
    if not fits or value.device != like.device:
        if isinstance(value, torch.Tensor):
            got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
        else:
            got = type(value).__name__
        raise InvalidInput(
            f"expected the relaxation policy to return one number > 0 per token, a floating tensor "
            f"{tuple(like.shape)} on {like.device}, got {got}"
        )
    flat: torch.Tensor = value.flatten()
    return flat


class SimilarityRelaxation:
    """Relaxation that grows where the target's hidden states change little from token to token.

    With s_t the cosine similarity of the target's hidden states of token t and of the one before it in the order
    of drawing (for the first of a window, ``previous_target_z``)::

        a_t          = clamp((s_t - low) / (high - low), 0, 1)
        relaxation_t = least (most / least)^a_t

    so it is ``least`` up to the similarity ``low``, ``most`` from ``high`` on, and log-linear between; a token with
    none before it gets ``least``. In the manner of CASCADE's context-aware relaxation (Yildirim et al. 2026, arXiv
    2605.07230), which relaxes where hidden states are redundant; the paper's own rule is for discrete tokens. MAR's
    hidden states carry an embedding of their position, so look at the similarities of a model before trusting the
    bounds on it.

    Args:
        least, most: bounds of the relaxation, 0 < least <= most.
        low, high: similarities at which they are reached, -1 <= low < high <= 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, least: float = 1.0, most: float = 42.0, *, low: float = 0.0, high: float = 1.0):
        if not 0 < least <= most < math.inf:
            raise InvalidInput(f"expected 0 < least <= most, both finite, got {least!r} and {most!r}")
        if not -1 <= low < high <= 1:
            raise InvalidInput(f"expected -1 <= low < high <= 1, got {low!r} and {high!r}")
        self.least, self.most, self.low, self.high = float(least), float(most), float(low), float(high)

    def __repr__(self) -> str:
        return f"SimilarityRelaxation({self.least}, {self.most}, low={self.low}, high={self.high})"

    def __call__(self, window: Window) -> torch.Tensor:
        """(B, n) float32."""
        z, previous = window.target_z.float(), window.previous_target_z
        first = z[:, :1] if previous is None else previous[:, None].float()
        similarity = F.cosine_similarity(z, torch.cat([first, z[:, :-1]], dim=1), dim=-1)
        amount = ((similarity - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        if previous is None:
            amount = F.pad(amount[:, 1:], (1, 0))
        return self.least * torch.exp(amount * math.log(self.most / self.least))


class AdaptiveDraft:
    """Number of steps of the next window, from how well the windows before were accepted.

    The expected acceptance e_k of the k-th step of a window is learned from the windows of the run so far: the
    first window that has such a step sets it, and every later one moves it, ::

        e_k <- memory e_k + (1 - memory) a_k

    with a_k the mean acceptance there; a window that ends before step k moves it towards 1 likewise, so that what
    has failed is tried again. In strict verification an image's window ends, for this, with the first step that has a
    rejected token: steps that were undone were never judged, and a_k is the mean over the images that were judged
    there. The next window ends before the first step whose expectation is below ``bound``. Steps
    that no window has reached count as accepted, but no window is longer than twice the longest so far, nor
    than ``most``, nor shorter than 1. It is a function of the run's own windows alone: nothing is kept between
    runs, and a seed gives the same images again. In windows an image then depends on its batch, whose mean it is; in
    strict verification it does not, unless a relaxation policy looks at the window.

    In the manner of acceptance- and entropy-informed draft lengths (Drift-AR, arXiv 2603.28049). For
    ``SpecDecodeRunner.run(gamma=...)``, which then reads the acceptance of every window from the device: one
    wait a window, which a fixed number does not have.

    Args:
        bound: in (0, 1], the least acceptance to go on for.
        most, first: the longest and the first window, >= 1, in steps.
        memory: in [0, 1), the weight of the past; 0 looks at the last window only.

    Raises:
        ValueError: an argument out of range.

    See also :class:`cspd.EntropyDraft`, which ends a window while it is drafted.
    """

    bound: float
    most: int
    memory: float
    first: int

    def __init__(self, bound: float = 0.9, most: int = 16, memory: float = 0.5, *, first: int = 4):
        if not isinstance(bound, Real) or not 0 < bound <= 1:
            raise InvalidInput(f"expected bound in (0, 1], got {bound!r}")
        if not isinstance(memory, Real) or not 0 <= memory < 1:
            raise InvalidInput(f"expected memory in [0, 1), got {memory!r}")
        for name, value in (("most", most), ("first", first)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"expected {name} as an int >= 1, got {value!r}")
        self.bound, self.most, self.memory, self.first = float(bound), most, float(memory), first

    def __repr__(self) -> str:
        return f"AdaptiveDraft({self.bound}, {self.most}, {self.memory}, first={self.first})"

    def __call__(self, windows: list[list[float]]) -> int:
        """Steps of the next window; ``windows`` holds the mean of min(1, r) by step for each so far."""
        if not windows:
            return min(self.first, self.most)
        expected: list[float] = []
        for window in windows:
            seen = [*window, *[1.0] * (len(expected) - len(window))]
            moved = [self.memory * e + (1 - self.memory) * a for e, a in zip(expected, seen)]
            expected = moved + seen[len(expected) :]
        longest = min(2 * len(expected), self.most)
        good = next((k for k, e in enumerate(expected) if e < self.bound), longest)
        return max(1, min(good, longest))


def draft_length(policy: Callable[[list[list[float]]], int], windows: list[list[float]]) -> int:
    """What a gamma policy gives, or one clear error."""
    steps: Any = policy(windows)
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise InvalidInput(f"expected the gamma policy to return an int >= 1, got {steps!r}")
    return int(steps)
