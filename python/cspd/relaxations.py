"""The relaxation of every token that is judged: a number, one per position, or what a policy makes of its window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cspd_kernels import Denoised

from .order import Pass
from .policies import Window, relaxation_of
from .tree import Tree

if TYPE_CHECKING:
    from .run_state import RunState
    from .strict import Proposed


def of_window(state: RunState, plan: Pass, draft: Denoised, draft_z, target: Denoised, target_z, raw: torch.Tensor):
    """Relaxation of the tokens of a window, image by image: a number, or (B n,).

    Args:
        draft, target: chains of B n tokens with their candidates. raw: (B n,) log r at relaxation 1.
    """
    if not callable(state.relaxation):
        return _given(state, plan)
    shape = plan.where.shape
    window = Window(
        positions=plan.where,
        steps=plan.steps,
        target_z=target_z,
        draft_z=draft_z,
        previous_target_z=state.previous_target_z,
        log_ratio=raw.view(shape),
        draft_log_std=draft.log_std[:, 0].view(*shape, -1),
        target_log_std=target.log_std[:, 0].view(*shape, -1),
    )
    return relaxation_of(state.relaxation, window)


def of_round(state: RunState, tree: Tree, plan: Pass, proposed: Proposed, raw: torch.Tensor):
    """Relaxation of the tokens of a round of strict verification, row by row: a number, or (R m,).

    A policy is shown every branch of an image as a window of its own. Of the first step, which branches share, what it
    says in the first one counts.
    """
    if not callable(state.relaxation):
        return _given(state, plan)
    shape, draft, target = plan.where.shape, proposed.draft, proposed.target  # (R, m)

    def windows(value: torch.Tensor) -> torch.Tensor:
        """(R, m, ...) -> (B w, gamma m, ...)."""
        return tree.by_branch(value).flatten(2, 3).flatten(0, 1)

    previous, z = state.previous_target_z, proposed.target_z
    before = branches = None
    if proposed.next_z is not None:
        # Of a step the hidden states from a step earlier are in the row of the one before it; of the first they are
        # in no row.
        before = F.pad(tree.by_branch(proposed.next_z)[:, :, :-1], (0, 0, 0, 0, 1, 0), value=torch.nan)
        before = before.flatten(2, 3).flatten(0, 1)
        if tree.branches > 1:
            branches = tree.by_branch(z).flatten(2, 3).repeat_interleave(tree.branches, dim=0)
    window = Window(
        positions=windows(plan.where),
        steps=windows(plan.steps),
        target_z=windows(z),
        draft_z=windows(proposed.draft_z),
        previous_target_z=None if previous is None else previous.repeat_interleave(tree.branches, dim=0),
        log_ratio=windows(raw.view(shape)),
        draft_log_std=windows(draft.log_std[:, 0].view(*shape, -1)),
        target_log_std=windows(target.log_std[:, 0].view(*shape, -1)),
        valid=windows(plan.valid),
        known=windows(plan.count[:, None].expand(shape)),
        draft_entropy=None if proposed.entropy is None else windows(proposed.entropy),
        target_before=before,
        target_branches=branches,
    )
    value = relaxation_of(state.relaxation, window)
    value = tree.by_row(value.view(tree.batch, tree.branches, tree.gamma, -1))
    return torch.where(plan.valid, value, torch.ones_like(value)).flatten()


def _given(state: RunState, plan: Pass) -> float | torch.Tensor:
    relaxation = state.relaxation
    return relaxation[plan.where].flatten() if isinstance(relaxation, torch.Tensor) else relaxation
