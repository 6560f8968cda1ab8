"""One drafting window of a run: device tensors and tables in, device tensors out, and nothing read between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cspd_kernels import (
    CandidateVerdict,
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

from .candidates import Drafted, first_candidate, tokens_of, with_candidates
from .entropy_draft import EntropyDraft
from .order import Pass, Plan, WindowPlan
from .policies import Window
from .relaxations import of_window
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
    candidates: int = 1  # K of every drafted token
    criterion: str = "trajectory"  # one of :data:`cspd.candidates.CRITERIA`
    at: torch.Tensor | None = None  # (B,) int64 buffer: each image's next step of the plan, of strict runs
    ends: EntropyDraft | None = None  # what ends a window by the draft's attention
    entropy: torch.Tensor | None = None  # (B,) buffer of its state, of strict runs; in windows it is the host's

    @property
    def chains(self) -> int:
        """Of a drafted token, and as many when the target looks at it."""
        return self.candidates if self.criterion == "trajectory" else 1

    def make_room(self) -> None:
        """For what the draft will draw, where it draws anything."""
        steps = self.plan.steps[self.prefilled :]
        if not steps:
            return
        sizes = {len(self.tokens) * (step.before - step.after) * self.chains for step in steps}
        sweeps = any(tolerance_of(self, self.draft.head, size) is not None for size in sizes)
        hidden = self.draft.head.cond_channels if callable(self.relaxation) else 0
        self.drafted = Drafted(
            *self.tokens.shape[:2], self.draft.head, self.draft.head.num_steps if sweeps else 0, hidden,
            self.chains, 0 if self.criterion == "trajectory" else self.candidates,
        )  # fmt: skip

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

    sums: torch.Tensor  # (3 + K,) of :func:`cspd.stats.window_sums`
    log_ratio: torch.Tensor  # (B, n) of the first candidates, at the relaxation in use


@torch.no_grad()
def prefill(state: RunState, plan: Pass) -> None:
    """One step of the target alone."""
    drawn = _draw_chains(state, state.target, plan)
    state.write(plan, _tokens(state, plan, drawn.chain, 1)[:, 0])
    state.remember(drawn.z)


@torch.no_grad()
def draft(state: RunState, plan: Pass) -> torch.Tensor | None:
    """One step of the draft: the first candidates of its tokens are taken for known until the window is judged.

    Returns:
        Where something ends windows by it, the mean entropy (1,) of the draft's attention.
    """
    drawn = _draw(state, state.draft, plan)
    x = _tokens(state, plan, drawn.chain)
    state.drafted.write(plan.columns, drawn, x)
    state.write(plan, x[:, 0])
    return None if drawn.entropy is None else drawn.entropy.mean().view(1)


@torch.no_grad()
def look(state: RunState, plan: Pass) -> Drawn:
    """The target's pass over all positions of a window, given the tokens known before it."""
    guess = None if state.drafted.trajectory is None else state.drafted.read(plan.columns)[1]
    return _draw(state, state.target, plan, guess)


@torch.no_grad()
def judge(state: RunState, plan: Pass, target: Drawn) -> Judged:
    """Accept or redraw the drafted tokens of a window, and write what comes of them."""
    chain, _, draft_z = state.drafted.read(plan.columns)
    draft = candidates(state, plan, chain, state.drafted.tokens(plan.columns))
    looked = candidates(state, plan, target.chain)
    raw = raw_log_ratio(state, draft, looked)
    verdict = decide(state, plan, draft, looked, of_window(state, plan, draft, draft_z, looked, target.z, raw))
    state.write(plan, verdict.token)
    state.outcome.scatter_(1, plan.where, outcome_of(verdict).view_as(plan.where))
    state.remember(target.z)
    return Judged(window_sums(verdict, raw), verdict.log_ratio[:, 0].view_as(plan.where))


def candidates(state: RunState, plan: Pass, chain: Denoised, x: torch.Tensor | None = None) -> Denoised:
    """The chains of a pass with their candidates x (N, K, C), which are made here where they are not given."""
    x = _tokens(state, plan, chain) if x is None else x
    return with_candidates(chain, x, state.criterion == "trajectory")


def _tokens(state: RunState, plan: Pass, chain: Denoised, count: int | None = None) -> torch.Tensor:
    """(N, K, C): candidates of the tokens of a pass, or the first ``count`` of them."""
    trajectory = state.criterion == "trajectory"
    last = None if trajectory else state.noise.last_of(plan, state.candidates if count is None else count)
    return tokens_of(chain, last, len(plan.rows))


def raw_log_ratio(state: RunState, draft: Denoised, target: Denoised) -> torch.Tensor:
    """(N,): log r of the first candidates at relaxation 1."""
    draft, target = first_candidate(draft), first_candidate(target)
    return log_density_ratio(draft.sample, draft, target, sigma=state.rule["sigma"], backend=state.backend)


def decide(state: RunState, plan: Pass, draft: Denoised, target: Denoised, relaxation) -> CandidateVerdict:
    """Accept one of the candidates of every token of a pass, or redraw it."""
    one = state.candidates == 1
    if one:
        draft, target = first_candidate(draft), first_candidate(target)
    verdict = accept_reject(
        draft.sample,
        draft,
        target,
        seed=state.noise.key,
        rows=plan.rows,
        relaxation=relaxation,
        backend=state.backend,
        **state.rule,
    )
    if not one:
        return verdict
    candidate = torch.where(verdict.accepted, 0, -1).to(torch.int32)
    return CandidateVerdict(verdict.token, verdict.accepted, candidate, verdict.tries, verdict.log_ratio[:, None])


def outcome_of(verdict: CandidateVerdict) -> torch.Tensor:
    """(N,) int8, as in :class:`cspd.stats.RunStats`."""
    redrawn = torch.where(verdict.tries < 0, FELL_BACK, REDRAWN)
    return torch.where(verdict.accepted, ACCEPTED, redrawn).to(torch.int8)


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
    chain: Denoised | DenoisedInParallel  # of B n tokens, image by image, and of each token's chains
    z: torch.Tensor  # (B, n, Z) hidden states of the conditional rows
    entropy: torch.Tensor | None = None  # (B, n) of the draft's attention, where it is wanted


def _draw(state: RunState, model: Model, plan: Pass, guess: torch.Tensor | None = None) -> Drawn:
    """One pass of a model over the known tokens, and its head for all positions of the pass.

    ``guess``: the trajectory of another head's chain through the same noise; sweeps start from it.
    """
    return _draw_chains(state, model, plan, guess, state.chains)


def _draw_chains(state: RunState, model: Model, plan: Pass, guess=None, chains: int = 1) -> Drawn:
    z, entropy = conditions(state, model, state.tokens, plan, model.embedding)
    return Drawn(chains_of(state, model, plan, z, guess, chains), z[: len(plan.where)], entropy)


def conditions(
    state: RunState, model: Model, tokens, plan: Pass, embedding
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z (R, n, Z), and where it is wanted the entropy (B, n) of the attention."""
    if state.ends is not None and model is state.draft:
        return model.transformer.conditions(tokens, plan, embedding, attention=True)
    return model.transformer.conditions(tokens, plan, embedding), None


def chains_of(state: RunState, model: Model, plan: Pass, z, guess=None, chains: int = 1):
    """The chains (N chains, ...) of the N tokens of a pass, token by token, from their conditions z (R, n, Z)."""
    x_T, noise = state.noise.of(plan, model.head, chains)  # noqa: N806
    tolerance = tolerance_of(state, model.head, len(x_T))
    if tolerance is None:
        guess = None
    elif guess is not None:
        # Of a token that did not settle it may be anything, and only its own chain, made step by step then, counts.
        guess = guess.to(stream_dtype(model.head.dtype)).nan_to_num(0.0, 0.0, 0.0)
    z, scale = z.flatten(0, 1), plan.cfg_scale  # conditional rows first
    if chains > 1:
        z = z.repeat_interleave(chains, dim=0)
        scale = scale.repeat_interleave(chains) if isinstance(scale, torch.Tensor) else scale
    return denoise(
        model.head,
        z,
        x_T,
        noise,
        temperature=state.temperature,
        cfg_scale=scale,
        backend=state.backend,
        parallel_tol=tolerance,
        guess=guess,
    )


def tolerance_of(state: RunState, head: DiffusionHead, tokens: int) -> float | None:
    """``parallel_tol`` of a head's call, "auto" resolved: a trajectory comes back only where a number is asked for."""
    if state.parallel_tol != AUTO:
        return state.parallel_tol
    return automatic_tolerance(head, tokens, state.plan.guided, state.backend)
