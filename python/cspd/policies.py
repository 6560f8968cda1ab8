"""Acceptance as a policy: how far the accept test is relaxed for each token, and how long a window is.

A relaxation policy is a function of a :class:`Window` that gives one number > 0 per token. It works on the device and
does not synchronise. A policy with the attribute ``looks_ahead = True`` also sees what the target makes of the tokens
that follow (:class:`cspd.ContextRelaxation`). A rule that relaxes the test where the target itself is undecided takes
three lines, in the manner of entropy-informed speculation (Drift-AR, arXiv 2603.28049)::

    def by_entropy(window):
        entropy = window.target_log_std.mean(dim=-1)  # of a Gaussian, but for a constant; (B, n)
        return 1.0 + 41.0 * torch.sigmoid(2.0 * (entropy + 3.0))

    cspd.SpecDecodeRunner(draft, target, by_entropy)

A gamma policy is a function of the acceptance rates of the windows so far. It gives the number of steps of the next
window; see :class:`AdaptiveDraft`.
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
    """What a relaxation policy may look at: n drafted tokens in each of B images.

    All tensors are on the models' device. Tokens are in the order of their steps, and by ascending position within a
    step. Under guidance the hidden states are those of the conditional rows. A policy must not write into any of them.

    In strict verification B is images times branches; the branches of an image are neighbours. B changes from round to
    round, since images that are done are left out on a CPU. Every step takes up the same room there. Places that only
    fill up the room have ``valid`` False and some finite value in the other fields.

    Attributes:
        positions: (B, n) int64, where in the sequence each token is.
        steps: (n,) int64, index of the autoregressive step that draws the token; (B, n) in strict verification.
        target_z: (B, n, Z_target), the target's hidden states: the conditions of its head.
        draft_z: (B, n, Z_draft), the draft's hidden states, from which the tokens were drawn.
        previous_target_z: (B, Z_target), the target's hidden state of the last token that it looked at before this
            window, in pre-filling or in the window before. None if there was none.
        log_ratio: (B, n) float32, log r at relaxation 1 (:func:`cspd_kernels.log_density_ratio`).
        draft_log_std, target_log_std: (B, n, C), log standard deviations of the last denoising step,
            log(temperature) included.
        valid: (B, n) bool, False for places that only fill up a step's room. None: all are tokens.
        known: (B, n) int64, how many tokens are known when the token is drawn. It is equal within a step and its room,
            and grows from step to step.
        draft_entropy: (B, n), the entropy of the draft's attention there, in [0, 1].
        target_before: (B, n, Z_target), the target's hidden state of the same token a step earlier: without the tokens
            of the step before its own. NaN where it was not computed, as in the first step of a window.
        target_branches: (B, w, n, Z_target), the target's hidden states of the same token in each branch of its image.

    The last five are None outside strict verification. ``target_before`` and ``target_branches`` are for policies that
    look ahead, and ``target_branches`` needs more than one branch. ``draft_entropy`` is there if a gamma policy needs
    it.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> def by_position(window: cspd.Window) -> torch.Tensor:
        ...     return 1.0 + window.positions.float()
        >>> target, draft = load_pair()
        >>> runner = cspd.SpecDecodeRunner(draft, target, by_position)
        >>> runner.run(1, steps=4, gamma=2, seed=0).shape
        torch.Size([1, 1, 8, 8])
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

    The op that uses the values checks them, on the CPU only.

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

    Let s_t be the cosine similarity of the target's hidden states of token t and of the token drawn before it. For the
    first of a window that is ``previous_target_z``. Then ::

        a_t          = clamp((s_t - low) / (high - low), 0, 1)
        relaxation_t = least (most / least)^a_t

    So the relaxation is ``least`` up to the similarity ``low``, ``most`` from ``high`` on, and log-linear between. A
    token with none before it gets ``least``.

    This is in the manner of CASCADE's context-aware relaxation (Yildirim et al. 2026, arXiv 2605.07230), which relaxes
    where hidden states are redundant. The paper's own rule is for discrete tokens. MAR's hidden states carry an
    embedding of their position: look at the similarities of your model before you trust the bounds.

    Args:
        least, most: bounds of the relaxation, 0 < least <= most.
        low, high: similarities at which they are reached, -1 <= low < high <= 1.

    Raises:
        InvalidInput: an argument is out of range.

    Example:
        >>> import cspd
        >>> from cspd.demo.pair import load_pair
        >>> target, draft = load_pair()
        >>> runner = cspd.SpecDecodeRunner(draft, target, cspd.SimilarityRelaxation(1.0, 42.0, low=0.5))
        >>> runner.relaxation
        SimilarityRelaxation(1.0, 42.0, low=0.5, high=1.0)
        >>> runner.run(1, steps=4, gamma=2, seed=0).stats.gammas
        [2, 1]
    """

    def __init__(self, least: float = 1.0, most: float = 42.0, *, low: float = 0.0, high: float = 1.0) -> None:
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
    """Chooses the number of steps of the next window from the acceptance of earlier windows.

    The policy learns the expected acceptance e_k of the k-th step of a window from the windows of the run so far. The
    first window that has such a step sets it, and every later one moves it::

        e_k <- memory e_k + (1 - memory) a_k

    Here a_k is the mean acceptance of that step. A window that ends before step k moves e_k towards 1 in the same way,
    so that a failed step is tried again. The next window ends before the first step whose expectation is below
    ``bound``. Steps that no window has reached count as accepted. But no window is longer than twice the longest so
    far, or than ``most``, or shorter than 1.

    Steps that strict verification has undone were never judged. So the window of an image counts up to its first step
    with a rejected token, and a_k is the mean over the images that were judged there.

    The policy depends on the windows of its own run only: nothing is kept between runs, and a seed gives the same
    images again. With ``verify="window"`` an image depends on its batch, because a_k is a mean over the batch. In
    strict verification it does not, unless a relaxation policy looks at the window.

    This is in the manner of acceptance- and entropy-informed draft lengths (Drift-AR, arXiv 2603.28049). It is for
    ``SpecDecodeRunner.run(gamma=...)``. The run then synchronises once a window to read the acceptance, which a fixed
    number of steps does not.

    Args:
        bound: in (0, 1], the least acceptance to go on for.
        most, first: the longest and the first window, >= 1, in steps.
        memory: in [0, 1), the weight of the past; 0 looks at the last window only.

    Raises:
        InvalidInput: an argument is out of range.

    Example:
        >>> import cspd
        >>> policy = cspd.AdaptiveDraft(bound=0.9, first=2)
        >>> policy([])  # the first window
        2
        >>> policy([[1.0, 0.95]])  # both steps were accepted: at most twice as many
        4
        >>> policy([[1.0, 0.95], [1.0, 0.9, 0.4, 0.2]])  # the third step has failed
        2

    See also :class:`cspd.EntropyDraft`, which ends a window while it is drafted.
    """

    bound: float
    most: int
    memory: float
    first: int

    def __init__(self, bound: float = 0.9, most: int = 16, memory: float = 0.5, *, first: int = 4) -> None:
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
        """Steps of the next window. ``windows`` holds, for each window so far, the mean of min(1, r) of each step."""
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
