"""Where the noise of a run comes from: addressed, or drawn beforehand as the released loop draws it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from cspd_kernels import DiffusionHead, PhiloxNoise
from cspd_kernels.head import stream_dtype
from cspd_kernels.noise import CANDIDATE_STRIDE

from ..made_calls import draw_steps
from ..order import Pass, Step, to_device
from ..seeds import GLOBAL, Generators

_TABLE_BYTES = 256 << 20  # of noise that is drawn before the steps that need it


def candidate_rows(rows: torch.Tensor, candidates: int) -> torch.Tensor:
    """(N,) addresses of tokens -> (N candidates,) those of their candidates, token by token."""
    if candidates == 1:
        return rows
    return (rows[:, None] + CANDIDATE_STRIDE * torch.arange(candidates, device=rows.device)).flatten()


class PhiloxSource:
    """Addressed by (seed; image, position, candidate), whatever the batch, the step and the branch.

    Args:
        seed: an int. rows: (B, L) int64 addresses of all tokens, in the order of drawing.
        chains: most chains of a token. last: of how many candidates the last step's noise is wanted, which a chain
            alone does not use.
    """

    def __init__(self, seed: int, rows: torch.Tensor, channels: int, chains: int = 1, last: int = 0):
        self.seed, self.on_device = seed, None

        def noise(candidates: int) -> PhiloxNoise:
            return PhiloxNoise(seed, candidate_rows(rows.flatten(), candidates))

        # Of all tokens at once: it is some hundred launches, whatever their number. (B, L, candidates, C)
        self.x_T = noise(chains).x_T(channels).view(*rows.shape, chains, channels)
        self.last = noise(last).step(0, channels).view(*rows.shape, last, channels) if last else None

    @property
    def values(self) -> list[torch.Tensor]:
        """What of it differs between runs of one size."""
        return [value for value in (self.x_T, self.last, self.on_device) if value is not None]

    @property
    def kind(self) -> tuple:
        """What of it must not, in a graph."""
        return (self.on_device is None, self.last is None)

    def of_images(self, index: torch.Tensor) -> PhiloxSource:
        """The noise of some of the images (n,) int64, as a copy."""
        source = copy.copy(self)
        source.x_T, source.last = self.x_T[index], None if self.last is None else self.last[index]
        return source

    @property
    def key(self) -> int | torch.Tensor:
        """The seed: where a graph may be captured, the one on the device."""
        return self.seed if self.on_device is None else self.on_device

    def seed_on_device(self) -> None:
        """Keep the seed on the device, too, where a replayed graph finds another one; the host does not wait."""
        signed = self.seed - (1 << 64) if self.seed >> 63 else self.seed
        self.on_device = to_device(torch.tensor([signed], dtype=torch.int64, device="cpu"), self.x_T.device)

    def of(self, plan: Pass, head: DiffusionHead, chains: int = 1) -> tuple[torch.Tensor, PhiloxNoise]:
        """x_T (B n chains, C), and the noise of the steps."""
        x_T = plan.take(self.x_T)[:, :, :chains].flatten(0, 2)  # noqa: N806
        return x_T, PhiloxNoise(self.key, candidate_rows(plan.rows, chains))

    def last_of(self, plan: Pass, candidates: int) -> torch.Tensor:
        """(B n, candidates, C): the noise of the last step."""
        return plan.take(self.last)[:, :, :candidates].flatten(0, 1)


class TableSource:
    """Drawn beforehand by torch's generators, for some steps of the loop at a time, in the order of the released code.

    Each step draws x_T (N, C) from the CPU's generator (or the device's). Then each of the T denoising steps draws
    ``randn_like`` of all rows, 2N of them under guidance.

    Args:
        batch: B. span: tokens of an image that are kept at a time. head: that with the most denoising steps.
        first_on: "cpu" or "device".
    """

    values = ()  # of :class:`PhiloxSource`; tables are filled where they are
    seed = None

    def seed_on_device(self) -> None:
        """See :class:`PhiloxSource`: there is no seed."""

    def __init__(self, batch: int, span: int, head: DiffusionHead, guided: bool, first_on: str, backend: str | None):
        self.batch, self.span, self.guided, self.first_on, self.backend = batch, span, guided, first_on, backend
        self.steps, self.channels = head.num_steps, head.channels
        self.device, self.stream = head.device, stream_dtype(head.dtype)
        self.x_T: torch.Tensor | None = None  # (B, span, C)
        self.noise: torch.Tensor | None = None  # (T, B, span, C)
        self.base: torch.Tensor | None = None  # (1,) int64: tokens drawn before these

    @property
    def kind(self) -> tuple:
        """See :class:`PhiloxSource`."""
        return (self.batch, self.span, self.guided, self.steps, self.channels, self.stream)

    def fill(
        self,
        steps: list[Step],
        length: int,
        loop_dtype: torch.dtype,
        counts: list[int] | None = None,
        generators: Generators = GLOBAL,
    ) -> None:
        """Draw what these steps need.

        Args:
            loop_dtype: of the loop's x behind its first step. counts: denoising steps of each, where they differ.
        """
        base = length - steps[0].before
        if self.base is None:
            shape, options = (self.batch, self.span, self.channels), {"dtype": self.stream, "device": self.device}
            self.x_T, self.noise = torch.zeros(shape, **options), torch.zeros(self.steps, *shape, **options)
            self.base = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.base.fill_(base)
        first = []
        for step, count in zip(steps, counts or [self.steps] * len(steps), strict=True):
            n = self.batch * (step.before - step.after)
            columns = slice(length - step.before - base, length - step.after - base)
            on = torch.device("cpu") if self.first_on == "cpu" else self.device
            x = torch.randn(n, self.channels, device=on, generator=generators.on(on))
            first.append(x.to(self.stream).view(self.batch, -1, self.channels))
            drawn = draw_steps(
                count, (2 * n if self.guided else n, self.channels), x.dtype,
                torch.promote_types(x.dtype, loop_dtype), self.device, self.backend, generators.on(self.device),
            )  # fmt: skip
            self.noise[:count, :, columns] = drawn[:, :n].view(count, self.batch, -1, self.channels)
        x = to_device(torch.cat(first, dim=1), self.device)
        self.x_T[:, : x.shape[1]] = x

    def of(self, plan: Pass, head: DiffusionHead, chains: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """x_T (B n, C), and the noise (T, B n, C) of the steps; there is one chain a token."""
        columns = plan.columns - self.base
        x_T = self.x_T.index_select(1, columns).flatten(0, 1)  # noqa: N806
        return x_T, self.noise[: head.num_steps].index_select(2, columns).flatten(1, 2)


def most_tokens(batch: int, head: DiffusionHead) -> int:
    """How many tokens of an image have their noise drawn at a time."""
    return max(1, _TABLE_BYTES // (4 * batch * head.num_steps * head.channels))


def chunks(steps: list[Step], most: int) -> Iterator[tuple[int, list[Step]]]:
    """Steps whose noise is drawn at a time, of ``most`` tokens or one step, each with the index of its first one."""
    first = 0
    while first < len(steps):
        stop = first + 1
        while stop < len(steps) and steps[first].before - steps[stop].after <= most:
            stop += 1
        yield first, steps[first:stop]
        first = stop
