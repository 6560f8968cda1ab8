"""Strict verification: a drafted step is judged given what was kept before it, and what follows a rejection is undone.

In one round the draft draws gamma steps of every image, from that image's own next step. One pass of the target looks
at every prefix (:class:`cspd.tree.Tree`). One launch judges all tokens. :func:`cspd.tree.walk` says which steps are
kept. Images go on at different places, each by at least one step a round.

**What is exact.** With the criterion ``"last_step"`` and relaxation 1, the tokens have exactly the distribution of the
target whose last denoising step adds its noise, up to rounding. A token's context is the one that the target alone
would have had. Given it and the noise of the other steps, the draft's token and the target's are two Gaussians. The
test and the redrawing keep the target's (:func:`cspd_kernels.accept_reject`). Several candidates need heads with one
sigma for that.

A step that is undone is drafted again from the same noise. What is kept of a step depends on the tokens before it and
on its own noise, whenever it is drafted. No token before it depends on its noise. So that noise is as good as new. The
tokens do not depend on how many steps a round drafts, in how many branches, or on what ends a window. The exception is
a relaxation policy that looks at more than that, for example at later steps.

**What is not.** Tokens that fell back to the target's aligned sample (``RunStats.fallback``: out of tries, or a
closed form beyond six sigma). ``target_sigma`` where the sigmas differ. Sweeps to a ``parallel_tol`` coarser than
rounding. A relaxation other than 1. The criterion ``"trajectory"``, a surrogate as in windows, though each token is
judged in its exact context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cspd_kernels import CandidateVerdict, Denoised

from .order import Pass
from .relaxations import of_round
from .run_state import Model, RunState
from .stats import window_sums
from .tree import Tree, placed, walk
from .window import (
    Drawn,
    Phase,
    candidates,
    chains_of,
    conditions,
    decide,
    outcome_of,
    probability_of,
    raw_log_ratio,
    untimed,
)


class Proposed(NamedTuple):
    """What a round has drafted, and what the target sees there, of R rows of m tokens."""

    draft: Denoised  # of R m tokens with their candidates
    target: Denoised
    live: torch.Tensor  # (R,) bool: whether there is such a step in the window
    draft_z: torch.Tensor  # (R, m, Z)
    target_z: torch.Tensor
    next_z: torch.Tensor | None  # (R, m, Z): the target's of the step behind, for policies that look ahead
    entropy: torch.Tensor | None  # (R, m) of the draft's attention, where something ends windows by it
    ends: torch.Tensor | None  # (R,): its state behind the row's step

    def tensors(self) -> list[torch.Tensor | None]:
        return [*self.draft, *self.target, *self[2:]]

    @staticmethod
    def of(tensors: list[torch.Tensor | None]) -> Proposed:
        return Proposed(Denoised(*tensors[:4]), Denoised(*tensors[4:8]), *tensors[8:])


@torch.no_grad()
def propose(state: RunState, tree: Tree, room: int, phase: Phase = untimed) -> Proposed:
    """Draft a round's steps and let the target look at them; nothing of the state is written.

    ``room``: at least as many tokens as are known before any of its steps.
    """
    steps, images = tree.prefixes(state.at)
    known, drafted, ends = state.tokens, [], _Ends(state)  # known: what a row takes for known, its own drafts with it
    for depth in range(tree.gamma):
        with phase("draft"):
            rows = tree.rows_of(depth)
            plan = state.plan.ragged(steps[rows], images[rows], room)
            drawn = _draw(state, state.draft, plan, known)
            proposed = candidates(state, plan, drawn.chain)
            ends.behind(plan, drawn.entropy)
            taken = tree.branches if depth == 0 else 1
            x = proposed.sample.view(*plan.where.shape, state.candidates, -1)[:, :, :taken]
            x = x.movedim(2, 1).flatten(0, 1)  # (rows of the next step, m, C)
            if depth == 0:
                known = known.repeat_interleave(tree.branches, dim=0)
                ends.branch(tree.branches)
            at = steps[rows].repeat_interleave(taken)
            (known,) = placed(state.plan, at, torch.ones_like(at), [(known, x[:, None])])
            drafted.append((proposed, drawn))
    with phase("target"):
        plan = state.plan.ragged(steps, images, room)
        tokens = torch.cat([state.tokens, known.repeat(tree.gamma - 1, 1, 1)])
        drawn, next_z = _look(state, plan, tokens, steps, room, _guess(state, [d.chain for _, d in drafted]))
        target = candidates(state, plan, drawn.chain)
    draft = Denoised(*(torch.cat(values) for values in zip(*(proposed for proposed, _ in drafted))))
    draft_z = torch.cat([drawn.z for _, drawn in drafted])
    live = (plan.count < state.tokens.shape[1]) & ends.live(tree)
    return Proposed(draft, target, live, draft_z, drawn.z, next_z, *ends.collected())


@torch.no_grad()
def settle(state: RunState, tree: Tree, room: int, proposed: Proposed) -> torch.Tensor:
    """Judge what was proposed, write what is kept, move on; the round's :func:`sums <round_sums>`."""
    plan, draft, target = state.plan.ragged(*tree.prefixes(state.at), room), proposed.draft, proposed.target
    shape = plan.where.shape  # (R, m)
    raw = raw_log_ratio(state, draft, target)
    verdict = decide(state, plan, draft, target, of_round(state, tree, plan, proposed, raw))
    branch, kept = walk(tree, verdict.candidate.view(shape), plan.valid, proposed.live)

    def of_walk(value: torch.Tensor) -> torch.Tensor:
        """(R m, ...) -> (B, gamma, m, ...)."""
        return tree.chosen(value.view(*shape, *value.shape[1:]), branch)

    probability = of_walk(probability_of(raw))
    buffers = (state.tokens, state.outcome, state.probability)
    values = (of_walk(verdict.token), of_walk(outcome_of(verdict)), probability)
    for buffer, new in zip(buffers, placed(state.plan, state.at, kept, list(zip(buffers, values)))):
        buffer.copy_(new)
    valid = of_walk(plan.valid.flatten())
    judged = valid & (torch.arange(tree.gamma, device=kept.device)[:, None] < kept[:, None, None])
    if callable(state.relaxation):
        tokens = judged.flatten(1).int()
        # Of the last token that was kept: they are counted from 1 there. Nobody asks for that of an image that is done.
        last = (tokens.cumsum(dim=1) * tokens).argmax(dim=1)
        z = of_walk(proposed.target_z.flatten(0, 1)).flatten(1, 2)[torch.arange(tree.batch, device=last.device), last]
        state.remember(z[:, None])
    if proposed.ends is not None:
        states = tree.chosen(proposed.ends, branch).gather(1, (kept - 1).clamp(min=0)[:, None])
        state.entropy.copy_(states[:, 0])
    state.at.add_(kept)
    walked = CandidateVerdict(*(of_walk(value).flatten(0, 2) for value in verdict))
    return round_sums(walked, probability, judged, kept)


def round_sums(verdict: CandidateVerdict, probability, judged: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(6 + K + 2 gamma,) on the device, of what was kept.

    :func:`cspd.stats.window_sums`; how many tokens, steps and images; of each step the sum of min(1, r) of the first
    candidates at the relaxation in use, and how many tokens.

    Args:
        verdict: of B gamma m tokens. probability: (B, gamma, m), min(1, r) of each. judged: likewise, which of them
            count. kept: (B,) steps.
    """
    numbers = torch.stack([judged.sum(), kept.sum(), (kept > 0).sum()]).float()
    ratio = verdict.log_ratio[:, 0].clamp(max=0).exp().view(judged.shape)
    ratio = torch.where(judged, ratio, torch.zeros_like(ratio)).sum(dim=(0, 2))
    sums = window_sums(verdict, probability.flatten(), judged.flatten())
    return torch.cat([sums, numbers, ratio, judged.sum(dim=(0, 2)).float()])


class _Ends:
    """Which steps belong to the window, as the draft's attention says while it is drafted."""

    def __init__(self, state: RunState):
        self._ends, self._state, self._live = state.ends, state.entropy, None
        self._lives: list[torch.Tensor] = []
        self._states: list[torch.Tensor] = []
        self._entropies: list[torch.Tensor] = []

    def behind(self, plan: Pass, entropy: torch.Tensor | None) -> None:
        """A step has been drawn with the entropies (rows, m)."""
        if self._ends is None:
            return
        mean = torch.where(plan.valid, entropy, torch.zeros_like(entropy)).sum(dim=1) / plan.valid.sum(dim=1)
        self._state, goes_on = self._ends.step(self._state, mean.to(self._state.dtype))  # NaN of no step at all
        # The first of a window is drafted in any case.
        self._live = torch.ones_like(goes_on) if self._live is None else self._live & goes_on
        self._lives.append(self._live)
        self._states.append(self._state)
        self._entropies.append(entropy)

    def branch(self, branches: int) -> None:
        """The rows of the first step go on in so many branches each."""
        if self._live is not None:
            self._state, self._live = (v.repeat_interleave(branches) for v in (self._state, self._live))

    def live(self, tree: Tree) -> torch.Tensor | bool:
        """(R,)."""
        return torch.cat(self._lives) if self._lives else True

    def collected(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Entropies (R, m), and the states behind each row's step (R,)."""
        if not self._lives:
            return None, None
        return torch.cat(self._entropies), torch.cat(self._states)


def _draw(state: RunState, model: Model, plan: Pass, tokens: torch.Tensor) -> Drawn:
    """A step of the rows of a pass, given the tokens (rows, L, C) that each takes for known."""
    z, entropy = conditions(state, model, tokens, plan, _embedding(state, model, plan))
    return Drawn(chains_of(state, model, plan, z, None, state.chains, entropy), z[: len(plan.where)], entropy)


def _look(state: RunState, plan: Pass, tokens, steps, room: int, guess) -> tuple[Drawn, torch.Tensor | None]:
    """The target's pass over all rows.

    For a policy that looks ahead it also gives the hidden states of the step after each row's own, from the same known
    tokens. Those are more positions for the decoder's last layer.
    """
    model, most = state.target, plan.where.shape[1]
    ahead = getattr(state.relaxation, "looks_ahead", False)
    seen = state.plan.ragged(steps, plan.image, room, steps=2) if ahead else plan
    z, entropy = conditions(state, model, tokens, seen, _embedding(state, model, plan))
    next_z = z[: len(plan.where), most:] if ahead else None
    z, entropy = z[:, :most], None if entropy is None else entropy[:, :most]
    return Drawn(chains_of(state, model, plan, z, guess, state.chains, entropy), z[: len(plan.where)]), next_z


def _embedding(state: RunState, model: Model, plan: Pass) -> torch.Tensor:
    """(rows or 2 rows, E): of the rows' images."""
    return model.embedding.view(plan.doubled, len(state.tokens), -1)[:, plan.image].flatten(0, 1)


def _guess(state: RunState, chains: list) -> torch.Tensor | None:
    """The draft's trajectories, where it has them and the target makes as many steps."""
    same = state.draft.head.num_steps == state.target.head.num_steps
    if not same or any(chain.trajectory is None for chain in chains):
        return None
    return torch.cat([chain.trajectory for chain in chains])
