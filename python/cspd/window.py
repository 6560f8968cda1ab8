"""One drafting window of a run: device tensors and tables in, device tensors out, and nothing read between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cspd_kernels import (
    Denoised,
    DenoisedInParallel,
    DiffusionHead,
    PhiloxNoise,
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
from .transformer import conditions, conditions_by_masks


@dataclass(frozen=True)
class Model:
    """What a run needs of one of its models."""

    module: object
    head: DiffusionHead
    by_tables: bool  # whether its conditions are computed by tables, see cspd.transformer
    embedding: torch.Tensor  # (B or 2 B, E): of the classes, then, under guidance, of no class


@dataclass
class RunState:
    """What the steps of one run share. All tensors are on the models' device; the buffers are written in place."""

    tokens: torch.Tensor  # (B, L, C) float32 buffer: grows step by step
    outcome: torch.Tensor  # (B, L) int8 buffer: what became of each token, as in RunStats
    plan: Plan
    prefilled: int  # how many of the plan's steps are the target's alone
    draft: Model
    target: Model
    seed: int
    temperature: float
    relaxation: float | torch.Tensor | Callable[[Window], torch.Tensor]  # a tensor has one per position, (L,)
    backend: str | None
    parallel_tol: float | str | None  # of both heads, as in denoise
    rule: dict  # options of accept_reject: sigma, max_tries, residual, target_sigma
    previous_target_z: torch.Tensor | None = None  # (B, Z) buffer for policies: of the target's last token

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


def _untimed(_: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


@torch.no_grad()
def run_window(
    state: RunState, window: WindowPlan, phase: Callable[[str], contextlib.AbstractContextManager] = _untimed
) -> Judged:
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
    plan, drafts = window.whole, []
    waiting = [model for model in (state.draft, state.target) if not model.by_tables]
    if waiting and state.tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "expected models whose conditions are computed by tables of indices inside a CUDA graph, got "
            f"{type(waiting[0].module).__name__}, whose own methods wait for the device: run the window without a graph"
        )
    for step in window.drafts:
        with phase("draft"):
            drafts.append(_draw(state, state.draft, step))
            state.write(step, drafts[-1].chain.sample)
    with phase("target"):
        draft = _join(drafts)
        target = _draw(state, state.target, plan, draft.chain.trajectory)
    with phase("verify"):
        x, sigma = draft.chain.sample, state.rule["sigma"]
        raw = log_density_ratio(x, draft.chain, target.chain, sigma=sigma, backend=state.backend)
        verdict = accept_reject(
            x,
            draft.chain,
            target.chain,
            seed=state.seed,
            rows=plan.rows,
            relaxation=_relaxation(state, plan, draft, target, raw),
            backend=state.backend,
            **state.rule,
        )
        state.write(plan, verdict.token)
        redrawn = torch.where(verdict.tries < 0, FELL_BACK, REDRAWN)
        outcome = torch.where(verdict.accepted, ACCEPTED, redrawn).to(torch.int8)
        state.outcome.scatter_(1, plan.where, outcome.view_as(plan.where))
        state.remember(target.z)
        sums = window_sums(verdict.accepted, raw, verdict.tries)
    return Judged(sums, verdict.log_ratio.view_as(plan.where))


class _Drawn(NamedTuple):
    chain: Denoised | DenoisedInParallel  # of B n tokens, image by image
    z: torch.Tensor  # (B, n, Z) hidden states of the conditional rows


def _draw(state: RunState, model: Model, plan: Pass, trajectory: torch.Tensor | None = None) -> _Drawn:
    """One pass of a model over the known tokens, and its head for all positions of the pass.

    ``trajectory`` is of another head's chain through the same noise; sweeps start from it.
    """
    batch = len(plan.where)
    compute, known = (conditions, plan.known) if model.by_tables else (conditions_by_masks, plan.mask)
    tokens = state.tokens if len(plan.wanted) == batch else state.tokens.repeat(2, 1, 1)
    z = compute(model.module, tokens, known, model.embedding, plan.wanted)
    noise = PhiloxNoise(state.seed, plan.rows)
    tolerance, guess = state.parallel_tol, None
    if tolerance == AUTO:  # resolved here, as a trajectory comes back only where a number is asked for
        tolerance = automatic_tolerance(model.head, len(plan.rows), len(z) != batch, state.backend)
    if tolerance is not None and trajectory is not None:
        # Of a token that did not settle it may be anything, and only its own chain, made step by step then, counts.
        guess = trajectory.to(stream_dtype(model.head.dtype)).nan_to_num(0.0, 0.0, 0.0)
    chain = denoise(
        model.head,
        z.flatten(0, 1),  # conditional rows first
        noise.x_T(model.head.channels),
        noise,
        temperature=state.temperature,
        cfg_scale=plan.cfg_scale,
        backend=state.backend,
        parallel_tol=tolerance,
        guess=guess,
    )
    return _Drawn(chain, z[:batch])


def _join(drawn: list[_Drawn]) -> _Drawn:
    """What was drawn in several steps, (B n_k, ...) each, as one, image by image: (B n, ...).

    Where not all of them were made in sweeps, what only those leave, the last fields, is left out.
    """
    batch, kinds = len(drawn[0].z), {type(one.chain) for one in drawn}
    kind = kinds.pop() if len(kinds) == 1 else Denoised
    chain = kind(
        *(
            torch.cat([field.view(batch, -1, *field.shape[1:]) for field in fields], dim=1).flatten(0, 1)
            for fields in zip(*(one.chain for one in drawn))
        )
    )
    return _Drawn(chain, torch.cat([one.z for one in drawn], dim=1))


def _relaxation(state: RunState, plan: Pass, draft: _Drawn, target: _Drawn, raw: torch.Tensor):
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
        draft_z=draft.z,
        previous_target_z=state.previous_target_z,
        log_ratio=raw.view(shape),
        draft_log_std=draft.chain.log_std.view(*shape, -1),
        target_log_std=target.chain.log_std.view(*shape, -1),
    )
    return relaxation_of(relaxation, window)
