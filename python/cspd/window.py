"""One drafting window of a run: device tensors and tables in, device tensors out, and nothing read between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cspd_kernels import (
    Denoised,
    DenoisedInParallel,
    DiffusionHead,
    accept_reject,
    denoise,
    log_density_ratio,
)
from cspd_kernels.head import stream_dtype
from cspd_kernels.ops.denoise import automatic_tolerance
from cspd_kernels.ops.denoise.parallel import AUTO

from .order import Pass, Plan, WindowPlan
from .policies import Window, relaxation_of
from .stats import ACCEPTED, FELL_BACK, REDRAWN, window_sums
from .whole.noise import PhiloxSource, TableSource
from .whole.transformers import ByMasks, ByTables, ByWeights


@dataclass(frozen=True)
class Model:
    """What a run needs of one of its models."""

    name: str
    head: DiffusionHead
    transformer: ByWeights | ByTables | ByMasks
    embedding: torch.Tensor  # (B or 2 B, E): of the classes, then, under guidance, of no class


def class_embedding(model, bsz: int, labels: torch.Tensor | None, guided: bool) -> torch.Tensor:
    """(B or 2 B, E): of labels (B,) or, without, of no class; under guidance of no class again behind."""
    none = model.fake_latent.repeat(bsz, 1)
    embedding = none if labels is None else model.class_emb(labels)
    return torch.cat([embedding, none]) if guided else embedding


@dataclass
class RunState:
    """What the steps of one run share. All tensors are on the models' device; the buffers are written in place."""

    tokens: torch.Tensor  # (B, L, C) float32 buffer: grows step by step
    plan: Plan
    target: Model
    noise: PhiloxSource | TableSource
    temperature: float
    backend: str | None
    parallel_tol: float | str | None  # of both heads, as in denoise
    draft: Model | None = None  # None where the target is alone, with all that follows
    prefilled: int = 0  # how many of the plan's steps are the target's alone
    outcome: torch.Tensor | None = None  # (B, L) int8 buffer: what became of each token, as in RunStats
    relaxation: float | torch.Tensor | Callable[[Window], torch.Tensor] = 1.0  # a tensor has one per position, (L,)
    rule: dict = field(default_factory=dict)  # options of accept_reject: sigma, max_tries, residual, target_sigma
    drafted: Drafted | None = None
    previous_target_z: torch.Tensor | None = None  # (B, Z) buffer for policies: of the target's last token

    def make_room(self) -> None:
        """For what the draft will draw, where it draws anything."""
        steps = self.plan.steps[self.prefilled :]
        if not steps:
            return
        sizes = {len(self.tokens) * (step.before - step.after) for step in steps}
        sweeps = any(tolerance_of(self, self.draft.head, size) is not None for size in sizes)
        hidden = self.draft.head.cond_channels if callable(self.relaxation) else 0
        self.drafted = Drafted(
            *self.tokens.shape[:2], self.draft.head, self.draft.head.num_steps if sweeps else 0, hidden
        )

    def write(self, plan: Pass, tokens: torch.Tensor) -> None:
        """Put (B n, C) tokens at the positions of a pass."""
        tokens = tokens.to(self.tokens.dtype).view(*plan.where.shape, -1)
        self.tokens.scatter_(1, plan.where[..., None].expand_as(tokens), tokens)

    def remember(self, z: torch.Tensor) -> None:
        """Keep the hidden state of the last of the tokens (B, n, Z) that the target looked at, for a policy."""
        if not callable(self.relaxation):
            return
        if self.previous_target_z is None:
            self.previous_target_z = z[:, -1].clone()
        else:
            self.previous_target_z.copy_(z[:, -1])


class Drafted:
    """What the draft has drawn, token by token in the order of drawing: buffers, as a window is judged at once.

    Args:
        batch, length: B, L. head: of the draft. steps: of a trajectory, 0 where none is kept. hidden: Z, 0 likewise.
    """

    def __init__(self, batch: int, length: int, head: DiffusionHead, steps: int, hidden: int):
        def empty(*shape):
            return torch.zeros(batch, length, *shape, dtype=stream_dtype(head.dtype), device=head.device)

        self.mean, self.log_std, self.path = empty(head.channels), empty(head.channels), empty()
        self.trajectory = empty(steps, head.channels) if steps else None
        self.z = empty(hidden) if hidden else None

    def write(self, columns: torch.Tensor, drawn: Drawn) -> None:
        chain, batch = drawn.chain, len(self.mean)
        for name, value in (("mean", chain.mean), ("log_std", chain.log_std), ("path", chain.path_log_std)):
            _put(getattr(self, name), columns, value.view(batch, -1, *value.shape[1:]))
        if self.z is not None:
            _put(self.z, columns, drawn.z)
        if self.trajectory is not None and chain.trajectory is not None:
            _put(self.trajectory, columns, chain.trajectory.view(batch, -1, *chain.trajectory.shape[1:]))
        elif self.trajectory is not None:
            self.trajectory.index_fill_(1, columns, 0.0)

    def read(self, columns: torch.Tensor) -> tuple[Denoised, torch.Tensor | None, torch.Tensor | None]:
        """Of the tokens of a window, (B n, ...): the chain, its trajectory, and z (B, n, Z)."""
        mean, log_std, path, trajectory = (
            None if value is None else value.index_select(1, columns).flatten(0, 1)
            for value in (self.mean, self.log_std, self.path, self.trajectory)
        )
        z = None if self.z is None else self.z.index_select(1, columns)
        return Denoised(mean, mean, log_std, path), trajectory, z


def _put(buffer: torch.Tensor, columns: torch.Tensor, value: torch.Tensor) -> None:
    buffer.index_copy_(1, columns, value.to(buffer.dtype))


class Judged(NamedTuple):
    """What is known of a verified window, on the device."""

    sums: torch.Tensor  # (3,) of :func:`cspd.stats.window_sums`
    log_ratio: torch.Tensor  # (B, n) at the relaxation in use


@torch.no_grad()
def prefill(state: RunState, plan: Pass) -> None:
    """One step of the target alone."""
    drawn = _draw(state, state.target, plan)
    state.write(plan, drawn.chain.sample)
    state.remember(drawn.z)


@torch.no_grad()
def draft(state: RunState, plan: Pass) -> None:
    """One step of the draft: its tokens are taken for known until the window is judged."""
    drawn = _draw(state, state.draft, plan)
    state.drafted.write(plan.columns, drawn)
    state.write(plan, drawn.chain.sample)


@torch.no_grad()
def look(state: RunState, plan: Pass) -> Drawn:
    """The target's pass over all positions of a window, given the tokens known before it."""
    guess = None if state.drafted.trajectory is None else state.drafted.read(plan.columns)[1]
    return _draw(state, state.target, plan, guess)


@torch.no_grad()
def judge(state: RunState, plan: Pass, target: Drawn) -> Judged:
    """Accept or redraw the drafted tokens of a window, and write what comes of them."""
    draft, _, draft_z = state.drafted.read(plan.columns)
    raw = log_density_ratio(draft.sample, draft, target.chain, sigma=state.rule["sigma"], backend=state.backend)
    verdict = accept_reject(
        draft.sample,
        draft,
        target.chain,
        seed=state.noise.seed,
        rows=plan.rows,
        relaxation=_relaxation(state, plan, draft, draft_z, target, raw),
        backend=state.backend,
        **state.rule,
    )
    state.write(plan, verdict.token)
    redrawn = torch.where(verdict.tries < 0, FELL_BACK, REDRAWN)
    outcome = torch.where(verdict.accepted, ACCEPTED, redrawn).to(torch.int8)
    state.outcome.scatter_(1, plan.where, outcome.view_as(plan.where))
    state.remember(target.z)
    return Judged(window_sums(verdict.accepted, raw, verdict.tries), verdict.log_ratio.view_as(plan.where))


Phase = Callable[[str], contextlib.AbstractContextManager]


def untimed(_: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


@torch.no_grad()
def run_window(state: RunState, window: WindowPlan, phase: Phase = untimed) -> Judged:
    """Draft the steps of a window, judge them against the context before it, write what was kept or redrawn.

    Where the heads run in sweeps over all of their steps, the target's start from the draft's trajectories: both chains
    go from the same x_T through the same noise.

    It works on device tensors and on tables made before, reads nothing and writes the state's buffers in place, so a
    caller may capture it in a CUDA graph, after one call with the same sizes. Replayed, the graph reads and writes the
    same buffers for the same positions, images and seed: keep the state, the window and the result as long as it, which
    holds no reference to their tensors. The call before the capture moves what a relaxation policy
    sees of the window before: for a first window, set ``state.previous_target_z`` to None again.

    Args:
        state, window: of :meth:`SpecDecodeRunner.begin` and ``state.plan.window(first, stop)``.
        phase: gives a context for each of "draft" (once a step), "target" and "verify", to time them; not in a graph.

    Raises:
        RuntimeError: captured, and a model waits for the device in its own methods, or the torch backend after its
            sweeps, which wait in a run without a graph, too.
    """
    waiting = [model for model in (state.draft, state.target) if model.transformer.waits]
    if waiting and state.tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "expected models whose conditions are computed by tables of indices inside a CUDA graph, got "
            f"{waiting[0].name}, whose own methods wait for the device: run the window without a graph"
        )
    for step in window.drafts:
        with phase("draft"):
            draft(state, step)
    with phase("target"):
        target = look(state, window.whole)
    with phase("verify"):
        return judge(state, window.whole, target)


class Drawn(NamedTuple):
    chain: Denoised | DenoisedInParallel  # of B n tokens, image by image
    z: torch.Tensor  # (B, n, Z) hidden states of the conditional rows


def _draw(state: RunState, model: Model, plan: Pass, guess: torch.Tensor | None = None) -> Drawn:
    """One pass of a model over the known tokens, and its head for all positions of the pass.

    ``guess``: the trajectory of another head's chain through the same noise; sweeps start from it.
    """
    z = model.transformer.conditions(state.tokens, plan, model.embedding)
    x_T, noise = state.noise.of(plan, model.head)  # noqa: N806
    tolerance = tolerance_of(state, model.head, len(plan.rows))
    if tolerance is None:
        guess = None
    elif guess is not None:
        # Of a token that did not settle it may be anything, and only its own chain, made step by step then, counts.
        guess = guess.to(stream_dtype(model.head.dtype)).nan_to_num(0.0, 0.0, 0.0)
    chain = denoise(
        model.head,
        z.flatten(0, 1),  # conditional rows first
        x_T,
        noise,
        temperature=state.temperature,
        cfg_scale=plan.cfg_scale,
        backend=state.backend,
        parallel_tol=tolerance,
        guess=guess,
    )
    return Drawn(chain, z[: len(plan.where)])


def tolerance_of(state: RunState, head: DiffusionHead, tokens: int) -> float | None:
    """``parallel_tol`` of a head's call, "auto" resolved: a trajectory comes back only where a number is asked for."""
    if state.parallel_tol != AUTO:
        return state.parallel_tol
    return automatic_tolerance(head, tokens, state.plan.guided, state.backend)


def _relaxation(state: RunState, plan: Pass, draft: Denoised, draft_z, target: Drawn, raw: torch.Tensor):
    """The relaxation of each token of a window: a number, or (B n,)."""
    relaxation, shape = state.relaxation, plan.where.shape
    if isinstance(relaxation, torch.Tensor):
        return relaxation[plan.where].flatten()
    if not callable(relaxation):
        return relaxation
    window = Window(
        positions=plan.where,
        steps=plan.steps,
        target_z=target.z,
        draft_z=draft_z,
        previous_target_z=state.previous_target_z,
        log_ratio=raw.view(shape),
        draft_log_std=draft.log_std.view(*shape, -1),
        target_log_std=target.chain.log_std.view(*shape, -1),
    )
    return relaxation_of(relaxation, window)
