"""The rows of a round of strict verification, and which of its steps are kept.

A round drafts ``gamma`` steps of every image. The first is drawn once. Each of its first ``branches`` candidates has a
branch of its own, which takes it as known and draws the later steps. So a round has ``B (1 + branches (gamma - 1))``
rows, one for every set of known tokens that a step is drawn from. The first B rows are the first step's. The others go
step by step, image by image and branch by branch. A step has room for ``m`` tokens, of which some may be padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .order import Plan


@dataclass(frozen=True)
class Tree:
    """B images, gamma steps, w branches; everything below is on the device, and nothing is read."""

    batch: int
    gamma: int
    branches: int = 1

    @property
    def rows(self) -> int:
        """R."""
        return self.batch * (1 + self.branches * (self.gamma - 1))

    def rows_of(self, depth: int) -> slice:
        """The rows of one of the steps."""
        each = self.batch * self.branches
        return slice(self.batch) if depth == 0 else slice(self.batch + (depth - 1) * each, self.batch + depth * each)

    def prefixes(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """at (B,), the next step of every image -> (R,) the step that each row draws, (R,) its image."""
        image = torch.arange(self.batch, device=at.device)
        of_branches = image.repeat_interleave(self.branches)
        images = torch.cat([image, of_branches.repeat(self.gamma - 1)])
        depth = torch.arange(1, self.gamma, device=at.device).repeat_interleave(len(of_branches))
        return at[images] + torch.cat([torch.zeros_like(image), depth]), images

    def by_branch(self, value: torch.Tensor) -> torch.Tensor:
        """(R, ...) -> (B, w, gamma, ...), every branch with the first step that all share."""
        first, later = value[: self.batch], value[self.batch :]
        first = first[:, None, None].expand(-1, self.branches, -1, *[-1] * (value.dim() - 1))
        later = later.view(self.gamma - 1, self.batch, self.branches, *value.shape[1:])
        return torch.cat([first, later.movedim(0, 2)], dim=2)

    def by_row(self, value: torch.Tensor) -> torch.Tensor:
        """(B, w, gamma, ...) -> (R, ...): the other way, with the first branch's first step."""
        return torch.cat([value[:, 0, 0], value[:, :, 1:].movedim(2, 0).flatten(0, 2)])

    def chosen(self, value: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """(R, ...) -> (B, gamma, ...) of one branch (B,) of every image."""
        return self.by_branch(value)[torch.arange(self.batch, device=branch.device), branch]


def walk(
    tree: Tree, candidate: torch.Tensor, valid: torch.Tensor, live: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(branch (B,), kept (B,)): the branch that an image goes on in, and how many of its steps are kept.

    The tokens of a step do not see each other: all of them are kept, accepted or redrawn. After the first step the walk
    goes on in the first branch whose candidates are just those that were accepted. After a later step it goes on only
    if all tokens were accepted as candidate 0, because the next steps were drafted from that one. Whatever comes after
    is undone. A step's own noise does not decide whether the step is kept, so it may be drafted again from the same
    noise.

    Args:
        candidate: (R, m) int32, which candidate of a token was accepted, -1 none. valid: (R, m) bool, False for a token
            that only fills up. live: (R,) bool, whether the row's step is to be drawn at all; behind one that is not,
            none is.
    """
    ways = torch.arange(tree.branches, device=candidate.device)
    first = ((candidate[: tree.batch, None] == ways[:, None]) | ~valid[: tree.batch, None]).all(dim=2)  # (B, w)
    branch = first.int().argmax(dim=1)  # the first of the largest
    good = tree.chosen(((candidate == 0) | ~valid).all(dim=1), branch)  # (B, gamma)
    reached = torch.cat([torch.ones_like(good[:, :1]), first.any(dim=1, keepdim=True), good[:, 1:-1]], dim=1)
    reached = reached[:, : tree.gamma] & tree.chosen(live, branch)
    return branch, reached.int().cumprod(dim=1).sum(dim=1)


def placed(
    plan: Plan, at: torch.Tensor, kept: torch.Tensor, values: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """For each (buffer (B, L, ...), value) the buffer with what steps have drawn in its places: new tensors.

    Args:
        at: (B,) int64, the first of the steps; kept: (B,) int64, how many. A value is (B, gamma, m, ...) by step, each
            with the plan's room for its tokens.
    """
    rank, length = plan.rank, plan.rank.shape[1]
    if len(rank) != len(at):
        rank = rank.repeat_interleave(len(at) // len(rank), dim=0)
    numbers = torch.searchsorted(plan.starts[1:], torch.arange(length, device=rank.device), right=True)
    step = numbers[rank]  # that draws each position
    depth = step - at[:, None]
    here = (depth >= 0) & (depth < kept[:, None])
    gamma, room = values[0][1].shape[1:3]
    column = (depth * room + rank - plan.starts[step]).clamp(0, gamma * room - 1)
    new = []
    for buffer, value in values:
        shape = (*column.shape, *[1] * (value.dim() - 3))
        drawn = value.flatten(1, 2).gather(1, column.view(shape).expand(-1, -1, *value.shape[3:]))
        new.append(torch.where(here.view(shape), drawn.to(buffer.dtype), buffer))
    return new
