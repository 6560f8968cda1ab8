"""Strict verification: a drafted step is judged given what was kept before it, and what follows a rejection is undone.

One round: the draft draws gamma steps of every image from its own next step; one pass of the target looks at every
prefix (:class:`cspd.tree.Tree`); one launch judges all tokens; :func:`cspd.tree.walk` says which steps are kept. Images
go on at different places, each by one step a round at least.

**What is exact.** By the criterion ``"last_step"``, at relaxation 1, the tokens have exactly the distribution of the
target whose last denoising step adds its noise, up to rounding. A token's context is the one that the target alone
would have had; given it and the noise of the other steps the draft's token and the target's are two Gaussians, and
the test and the redrawing keep the target's (:func:`cspd_kernels.accept_reject`); and a step that is undone is
drafted again from the same noise, which is right because nothing of it decided that it was. With several candidates
that needs heads with one sigma.

**What is not.** Tokens that fell back to the target's aligned sample (``RunStats.fallback``: out of tries, or a
closed form beyond six sigma). ``target_sigma`` where the sigmas differ. A relaxation other than 1. The criterion
``"trajectory"``, a surrogate as in windows, though each token is judged in its exact context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cspd_kernels import CandidateVerdict, Denoised

from .order import Pass
from .stats import window_sums
from .tree import Tree, placed, walk
from .window import (
    Model,
    Phase,
    RunState,
    candidates,
    chains_of,
    decide,
    outcome_of,
    raw_log_ratio,
    untimed,
)


class Proposed(NamedTuple):
    """What a round has drafted, and what the target sees there, of R rows of m tokens."""

    draft: Denoised  # of R m tokens with their candidates
    target: Denoised
    live: torch.Tensor  # (R,) bool: whether there is such a step
    draft_z: torch.Tensor  # (R, m, Z)
    target_z: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [*self.draft, *self.target, *self[2:]]

    @staticmethod
    def of(tensors: list[torch.Tensor]) -> Proposed:
        return Proposed(Denoised(*tensors[:4]), Denoised(*tensors[4:8]), *tensors[8:])


@torch.no_grad()
def propose(state: RunState, tree: Tree, room: int, phase: Phase = untimed) -> Proposed:
    """Draft a round's steps and let the target look at them; nothing of the state is written.

    ``room``: at least as many tokens as are known before any of its steps.
    """
    steps, images = tree.prefixes(state.at)
    known, drafted, hidden = state.tokens, [], []  # known: the tokens of every row, its own drafted ones among them
    for depth in range(tree.gamma):
        with phase("draft"):
            rows = _rows_of(tree, depth)
            plan = state.plan.ragged(steps[rows], images[rows], room)
            chain, z = _draw(state, state.draft, plan, known)
            proposed = candidates(state, plan, chain)
            x = proposed.sample.view(*plan.where.shape, state.candidates, -1)[
                :, :, : tree.branches if depth == 0 else 1
            ]
            x = x.movedim(2, 1).flatten(0, 1)  # (rows of the next step, m, C)
            if depth == 0:
                known = known.repeat_interleave(tree.branches, dim=0)
            at = steps[rows].repeat_interleave(len(x) // len(plan.where))
            known = placed(state.plan, known, at, torch.ones_like(at), x[:, None])
            drafted.append((chain, proposed))
            hidden.append(z)
    with phase("target"):
        plan = state.plan.ragged(steps, images, room)
        tokens = torch.cat([state.tokens, known.repeat(tree.gamma - 1, 1, 1)])
        chain, z = _draw(state, state.target, plan, tokens, _guess(state, [chain for chain, _ in drafted]))
        target = candidates(state, plan, chain)
    draft = Denoised(*(torch.cat(values) for values in zip(*(proposed for _, proposed in drafted))))
    return Proposed(draft, target, plan.count < state.tokens.shape[1], torch.cat(hidden), z)


@torch.no_grad()
def settle(state: RunState, tree: Tree, room: int, proposed: Proposed) -> torch.Tensor:
    """Judge what was proposed, write what is kept, move on; the round's :func:`sums <round_sums>`."""
    plan, draft, target = state.plan.ragged(*tree.prefixes(state.at), room), proposed.draft, proposed.target
    shape = plan.where.shape  # (R, m)
    raw = raw_log_ratio(state, draft, target)
    verdict = decide(state, plan, draft, target, _relaxation(state, plan))
    branch, kept = walk(tree, verdict.candidate.view(shape), plan.valid, proposed.live)

    def of_walk(value: torch.Tensor) -> torch.Tensor:
        """(R m, ...) -> (B, gamma, m, ...)."""
        return tree.chosen(value.view(*shape, *value.shape[1:]), branch)

    outcome = of_walk(outcome_of(verdict))
    state.tokens.copy_(placed(state.plan, state.tokens, state.at, kept, of_walk(verdict.token)))
    state.outcome.copy_(placed(state.plan, state.outcome, state.at, kept, outcome))
    judged = of_walk(plan.valid.flatten())
    judged &= torch.arange(tree.gamma, device=kept.device)[:, None] < kept[:, None, None]
    state.at.add_(kept)
    walked = CandidateVerdict(*(of_walk(value).flatten(0, 2) for value in verdict))
    return round_sums(walked, of_walk(raw).flatten(), judged.flatten(), kept)


def round_sums(verdict: CandidateVerdict, raw, judged: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(6 + K,) on the device: :func:`cspd.stats.window_sums` of what is kept, and how many tokens, steps and images."""
    return torch.cat(
        [
            window_sums(verdict, raw, judged),
            torch.stack([judged.sum(), kept.sum(), (kept > 0).sum()]).float(),
        ]
    )


def _rows_of(tree: Tree, depth: int) -> slice:
    """The rows of a step of a round."""
    each = tree.batch * tree.branches
    return slice(tree.batch) if depth == 0 else slice(tree.batch + (depth - 1) * each, tree.batch + depth * each)


def _draw(state: RunState, model: Model, plan: Pass, tokens: torch.Tensor, guess: torch.Tensor | None = None):
    """(chains, z (rows, n, Z)) of the rows of a pass, given the tokens (rows, L, C) that each takes for known."""
    embedding = model.embedding.view(plan.doubled, len(state.tokens), -1)[:, plan.image].flatten(0, 1)
    z = model.transformer.conditions(tokens, plan, embedding)
    return chains_of(state, model, plan, z, guess, state.chains), z[: len(plan.where)]


def _guess(state: RunState, chains: list) -> torch.Tensor | None:
    """The draft's trajectories, where it has them and the target makes as many steps."""
    same = state.draft.head.num_steps == state.target.head.num_steps
    if not same or any(chain.trajectory is None for chain in chains):
        return None
    return torch.cat([chain.trajectory for chain in chains])


def _relaxation(state: RunState, plan: Pass) -> float | torch.Tensor:
    """Of each token of a pass: a number, or (R m,)."""
    relaxation = state.relaxation
    return relaxation[plan.where].flatten() if isinstance(relaxation, torch.Tensor) else relaxation
