"""The generation order: which positions are drawn at which autoregressive step.

Everything here follows from the orders and a few numbers known before the first step. It is computed before it,
as tensors on the models' device, and never depends on what is drawn: nothing is read back.
"""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass
from itertools import pairwise

import torch

from cspd_kernels.noise import STREAM_ORDER, words

from .errors import InvalidInput


def is_count(value, least: int) -> bool:
    """Whether a value is an int from ``least`` on, or stands for one as NumPy's and tensors of one number do."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def mask_lengths(seq_len: int, steps: int) -> list[int]:
    """How many tokens are still masked before step 0, after step 0, ..., after the last step.

    After step k of K, ``floor(L cos(pi/2 (k+1)/K))`` tokens stay masked (MaskGIT, arXiv 2202.04200; MAR). It is at
    least one fewer than before, and at least one. The last step draws all that remain. The list has K + 1 entries, from
    L down to 0. Equal neighbours mean a step with nothing to draw.
    """
    if not is_count(steps, 1):
        raise InvalidInput(f"expected steps as an int >= 1 (num_iter in MAR's sample_tokens), got {steps!r}")
    lengths = [seq_len]
    for step in range(steps - 1):
        cosine = math.floor(seq_len * math.cos(math.pi / 2.0 * (step + 1) / steps))
        lengths.append(max(1, min(lengths[-1] - 1, cosine)))
    return [*lengths, 0]


def guidance_scale(cfg: float, cfg_schedule: str, masked: int, seq_len: int) -> float:
    """Guidance of a step that leaves ``masked`` tokens: constant, or growing linearly from 1 to cfg (Muse)."""
    if cfg_schedule == "constant":
        return float(cfg)
    if cfg_schedule == "linear":
        return 1.0 + (float(cfg) - 1.0) * (seq_len - masked) / seq_len
    raise InvalidInput(f"expected cfg_schedule 'linear' or 'constant', got {cfg_schedule!r}")


@dataclass(frozen=True)
class Step:
    """One autoregressive step: it draws ``orders[:, after:before]`` at guidance ``cfg``."""

    index: int
    before: int
    after: int
    cfg: float


def plan_steps(seq_len: int, steps: int, cfg: float, cfg_schedule: str) -> list[Step]:
    """The steps that draw at least one token, in order."""
    lengths = mask_lengths(seq_len, steps)
    return [
        # The last step counts as leaving one token, as in MAR's loop.
        Step(k, before, after, guidance_scale(cfg, cfg_schedule, max(after, 1), seq_len))
        for k, (before, after) in enumerate(pairwise(lengths))
        if before > after
    ]


def positions(orders: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """(B, before - after) positions drawn between two mask lengths, ascending within each image."""
    return orders[:, after:before].sort(dim=1).values


def known_of(orders: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L - length) positions already drawn where ``length`` tokens are masked, ascending within each image."""
    return positions(orders, orders.shape[1], length)


def mask_of(orders: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L) float32 mask, 1 where a token is still to be drawn."""
    mask = torch.zeros(orders.shape, dtype=torch.float32, device=orders.device)
    return mask.scatter_(1, orders[:, :length], 1.0)


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; from the host it goes through pinned memory, and the host does not wait for the copy."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def by_token(steps: list[Step], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 L + 1,) int64 and (L,) float32, the tables of a :class:`Plan`.

    The first has the step index of an image's tokens, in the order of drawing. Then it has how many tokens are known
    before each step, and L after the last step: so its length does not depend on the number of steps. The second has
    the tokens' guidance.
    """
    tokens = [step for step in steps for _ in range(step.before - step.after)]
    starts = [len(tokens) - step.before for step in steps] + [len(tokens)] * (len(tokens) + 1 - len(steps))
    numbers = torch.tensor([step.index for step in tokens] + starts, dtype=torch.int64, device="cpu")
    scale = torch.tensor([step.cfg for step in tokens], dtype=torch.float32, device="cpu")
    return to_device(numbers, device), to_device(scale, device)


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass of a model over an image needs of the generation order: a step's, or a window's.

    Tokens are counted in the order of drawing: step by step, ascending within a step. Under guidance the batch is
    doubled, conditional images first; R is B or 2 B. n tokens are drawn in each image.

    In a ragged pass (:meth:`Plan.ragged`) each row stands at a place of its own, and belongs to any image. B is then
    the number of rows, and ``columns`` and ``steps`` are (B, n). The last three fields say what belongs to each row.
    """

    known: torch.Tensor  # (B, K) int64: the positions drawn before the first of its steps
    count: torch.Tensor | None  # (1 or B,) int64: how many of them, where it is a value on the device; None: all K
    rank: torch.Tensor  # (B, L) int64: the place of every position in the order of drawing
    where: torch.Tensor  # (B, n) int64: the positions it draws
    rows: torch.Tensor  # (B n,) int64: their noise addresses, image number times L plus position
    columns: torch.Tensor  # (n,) int64, ragged (B, n): their places in the order of drawing
    steps: torch.Tensor  # (n,) int64, ragged (B, n): index of the step that draws each of them
    cfg_scale: float | torch.Tensor  # of each token's own step: a number where all are equal, else (B n,)
    counts: tuple[int, ...]  # how many of the n tokens each of its steps draws
    guided: bool
    image: torch.Tensor | None = None  # (B,) int64: whose row it is; None: row b is image b's
    valid: torch.Tensor | None = None  # (B, n) bool: False where a token only fills up a step's room; None: all count

    def take(self, table: torch.Tensor) -> torch.Tensor:
        """(B, n, ...): what a table (images, L, ...) in the order of drawing has for the tokens of the pass."""
        if self.image is None:
            return table.index_select(1, self.columns)
        return table[self.image[:, None], self.columns]

    @property
    def doubled(self) -> int:
        """R / B."""
        return 2 if self.guided else 1

    @property
    def wanted(self) -> torch.Tensor:
        """(R, n) int64: ``where`` of the doubled batch."""
        return self.where.repeat(self.doubled, 1)

    @property
    def mask(self) -> torch.Tensor:
        """(R, L) float32: 0 where a token is known, 1 elsewhere."""
        first = self.known.shape[1] if self.count is None else self.count[:, None]
        return (self.rank >= first).float().repeat(self.doubled, 1)


@dataclass(frozen=True)
class WindowPlan:
    """The passes of one drafting window: the draft's, step by step, and the target's over all of them."""

    drafts: list[Pass]
    whole: Pass


class Plan:
    """All tables of a run.

    Args:
        orders: (B, L) int64 generation orders. images: (B,) int64 image numbers. Both on the models' device.
        steps: of :func:`plan_steps`. guided: whether the batch is doubled. tables: of :func:`by_token`.
    """

    def __init__(
        self,
        orders: torch.Tensor,
        images: torch.Tensor,
        steps: list[Step],
        guided: bool,
        tables: tuple[torch.Tensor, torch.Tensor],
    ):
        self.steps, self.guided = steps, guided
        self.numbers, self.scale = tables  # scale: (L,) of each token in the order of drawing
        length = orders.shape[1]
        # (L,) likewise; (L + 1,): tokens known before each step, L from the last one's end on.
        self.index, self.starts = self.numbers.split([length, length + 1])
        # One sort for all steps: orders are drawn from their ends, and ascending within a step.
        self.drawing = (orders.flip(1) + self.index * length).sort(dim=1).values % length  # (B, L) positions
        self.rank = self.drawing.argsort(dim=1)  # (B, L)
        self.rows = images[:, None] * length + self.drawing  # (B, L)
        self._columns = torch.arange(length, device=orders.device)

    def buffers(self) -> dict[str, torch.Tensor]:
        """What another plan of the same sizes has other values in."""
        return {name: getattr(self, name) for name in ("numbers", "scale", "drawing", "rank", "rows")}

    def of_images(self, index: torch.Tensor) -> Plan:
        """The plan of some of the images (n,) int64, as a copy."""
        plan = copy.copy(self)
        plan.drawing, plan.rank, plan.rows = self.drawing[index], self.rank[index], self.rows[index]
        return plan

    @property
    def most(self) -> int:
        """The largest number of tokens of a step."""
        return max(step.before - step.after for step in self.steps)

    def step(self, i: int) -> Pass:
        """The pass of the i-th step alone."""
        return self._pass([self.steps[i]])

    def window(self, first: int, stop: int) -> WindowPlan:
        """The passes of the steps first..stop-1."""
        drafts = [self.step(i) for i in range(first, stop)]
        return WindowPlan(drafts, drafts[0] if len(drafts) == 1 else self._pass(self.steps[first:stop]))

    def _pass(self, steps: list[Step]) -> Pass:
        length = self.drawing.shape[1]
        first, stop = length - steps[0].before, length - steps[-1].after
        scale: float | torch.Tensor = steps[0].cfg if self.guided else 1.0
        if self.guided and len({step.cfg for step in steps}) > 1:
            scale = self.scale[first:stop].repeat(len(self.drawing))
        return Pass(
            known=self.drawing[:, :first],
            count=None,
            rank=self.rank,
            where=self.drawing[:, first:stop],
            rows=self.rows[:, first:stop].flatten(),
            columns=self._columns[first:stop],
            steps=self.index[first:stop],
            cfg_scale=scale,
            counts=tuple(step.before - step.after for step in steps),
            guided=self.guided,
        )

    def moving(self, first: torch.Tensor, counts: tuple[int, ...], room: int) -> Pass:
        """Like :meth:`step` or the whole of :meth:`window`, after the first tokens, whose number is a value on the
        device.

        Args:
            first: (1,) int64, at most ``room``. counts: of the pass.
        """
        columns = first + self._columns[: sum(counts)]
        scale = self.scale.index_select(0, columns).repeat(len(self.drawing)) if self.guided else 1.0
        return Pass(
            known=self.drawing[:, :room],
            count=first,
            rank=self.rank,
            where=self.drawing.index_select(1, columns),
            rows=self.rows.index_select(1, columns).flatten(),
            columns=columns,
            steps=self.index.index_select(0, columns),
            cfg_scale=scale,
            counts=counts,
            guided=self.guided,
        )

    def ragged(self, at: torch.Tensor, image: torch.Tensor, room: int, steps: int = 1) -> Pass:
        """A pass whose rows stand at different places: row r draws the steps at[r] .. at[r] + steps - 1 of its image,
        given what is known before at[r].

        Every step takes up room for :attr:`most` tokens, n = steps * most. Behind its own ones, where ``valid`` is
        False, its last one is repeated; behind the last step of all, the image's last token. What comes out there is
        finite and of no use.

        Args:
            at: (R,) int64, on the device like image; S and beyond: behind the last step. image: (R,) int64 indices into
                the batch, in any order and any number. room: K, at least as many tokens as are known before any at[r].
        """
        length = len(self._columns)
        places = at[:, None] + torch.arange(steps + 1, device=at.device)
        starts = self.starts[places.clamp(max=length)]  # (R, steps + 1)
        count, ends = starts[:, 0], starts[:, 1:, None]
        check_room(count, room)
        columns = starts[:, :-1, None] + self._columns[: self.most]  # (R, steps, most)
        valid, columns = (columns < ends).flatten(1), torch.minimum(columns, ends - 1).flatten(1)
        taken = image[:, None], columns
        return Pass(
            known=self.drawing[:, :room].index_select(0, image),
            count=count,
            rank=self.rank.index_select(0, image),
            where=self.drawing[taken],
            rows=self.rows[taken].flatten(),
            columns=columns,
            steps=self.index[columns],
            cfg_scale=self.scale[columns].flatten() if self.guided else 1.0,
            counts=(self.most,) * steps,
            guided=self.guided,
            image=image,
            valid=valid,
        )


def check_room(count: torch.Tensor, room: int) -> None:
    """Raise where a row of a ragged pass knows more tokens than there is room for: looked at on the CPU alone."""
    if count.device.type == "cpu" and count.numel() and count.max() > room:
        raise InvalidInput(f"expected room for the {int(count.max())} known tokens, got {room}")


def random_orders(seed: int, images: torch.Tensor, seq_len: int) -> torch.Tensor:
    """(B, L) generation orders, each a function of (seed; image number) alone."""
    rows = images[:, None] * seq_len + torch.arange(seq_len, device=images.device)
    return words(seed, rows, 0, 0, STREAM_ORDER)[0].argsort(dim=1, stable=True)
