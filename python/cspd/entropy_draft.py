"""The end of a window from the draft's own attention, before a token of the next step is drawn."""

from __future__ import annotations

from numbers import Real

import torch

from .errors import InvalidInput


class EntropyDraft:
    """Windows that end before a step at which the draft's attention is unusually narrow, or wide.

    Take the entropy of the draft's attention to the known tokens, divided by its largest possible value, so that early
    and late steps compare. Let a be its mean over a step's tokens, and e the running mean of a over the image's steps.
    The window ends before the step where ::

        a < factor e          ends="below"
        a > factor e          ends="above"
        e <- memory e + (1 - memory) a          after each step; the image's first a sets it

    The first step of a window is always drafted, and no window is longer than ``most``. Nothing is kept between runs,
    and a seed gives the same images again.

    The idea is Drift-AR's entropy-informed speculation (Zou et al. 2026, arXiv 2603.28049), which we know only from
    summaries. Its own rule may differ. On the digits of ``cspd.demo`` the target rejects drafts of low entropy. The
    mean entropy is 0.82, and its rank correlation with the log ratio of the draft's own tokens is +0.43. At the
    defaults 30 % of the steps lie below the threshold. Their expected acceptance at relaxation 1 is 0.29, that of the
    others 0.48, with one token a step (0.24 and 0.31 with two). ``ends="above"`` with a factor > 1 is for drafts that
    fail where they do not know where to look.

    It is for ``SpecDecodeRunner.run(gamma=...)``. In strict verification every image ends its own window, on the
    device: later steps are not judged. With ``verify="window"`` the mean entropy of the batch decides for all images.
    The run then synchronises once a step, and an image depends on its batch.

    Args:
        most: the longest window, >= 1, in steps.
        factor: > 0, the threshold relative to the running mean.
        memory: in [0, 1), the weight of the past; 0 compares with the step before.
        ends: "below" or "above".

    Raises:
        InvalidInput: an argument is out of range.

    Example:
        >>> import cspd
        >>> from cspd.demo.pair import load_pair
        >>> target, draft = load_pair()
        >>> runner = cspd.SpecDecodeRunner(draft, target, verify="strict")
        >>> images = runner.run(1, steps=8, gamma=cspd.EntropyDraft(most=4), seed=0)
        >>> max(images.stats.gammas) <= 4
        True
    """

    wants_entropy = True
    most: int
    factor: float
    memory: float
    ends: str

    def __init__(self, most: int = 16, factor: float = 0.9, memory: float = 0.8, *, ends: str = "below") -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise InvalidInput(f"expected most as an int >= 1, got {most!r}")
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 0 < factor < float("inf"):
            raise InvalidInput(f"expected a finite factor > 0, got {factor!r}")
        if isinstance(memory, bool) or not isinstance(memory, Real) or not 0 <= memory < 1:
            raise InvalidInput(f"expected memory in [0, 1), got {memory!r}")
        if ends not in ("below", "above"):
            raise InvalidInput(f"expected ends as 'below' or 'above', got {ends!r}")
        self.most, self.factor, self.memory, self.ends = most, float(factor), float(memory), ends

    def __repr__(self) -> str:
        return f"EntropyDraft({self.most}, {self.factor}, {self.memory}, ends={self.ends!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:  # of its numbers as they are now: they are part of the graphs of a run
        return hash((type(self), self.most, self.factor, self.memory, self.ends))

    def start(self, batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The state before an image's first step: (B,) float32 running means, NaN for none.

        Example:
            >>> import cspd
            >>> cspd.EntropyDraft().start(2)
            tensor([nan, nan])
        """
        return torch.full((batch,), torch.nan, dtype=torch.float32, device=device)

    def step(self, state: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The state after a step, and whether the window goes on with it, (B,) bool.

        The result depends on the arguments only. It is computed on their device and does not synchronise. After a step
        that was undone, go on from the state before it. An entropy of NaN stands for no step: it ends nothing and
        leaves the state as it is.

        Args:
            state: (B,), of :meth:`start` or of a step before. entropy: (B,), the mean over the step's tokens.

        Raises:
            InvalidInput: shapes or devices differ, or it is no floating tensor.

        Example:
            >>> import cspd, torch
            >>> policy = cspd.EntropyDraft(factor=0.9, memory=0.5)
            >>> state, goes_on = policy.step(policy.start(1), torch.tensor([0.8]))  # the first step sets the mean
            >>> policy.step(state, torch.tensor([0.6]))  # below 0.9 times 0.8: the window ends
            (tensor([0.7000]), tensor([False]))
        """
        if entropy.shape != state.shape or entropy.device != state.device or not entropy.is_floating_point():
            raise InvalidInput(
                f"expected entropies as a floating tensor {tuple(state.shape)} on {state.device}, got "
                f"{entropy.dtype} {tuple(entropy.shape)} on {entropy.device}"
            )
        entropy, bound = entropy.to(state.dtype), self.factor * state
        over = entropy < bound if self.ends == "below" else entropy > bound  # NaN: neither
        mean = torch.where(state.isnan(), entropy, self.memory * state + (1 - self.memory) * entropy)
        return torch.where(entropy.isnan(), state, mean), ~over
