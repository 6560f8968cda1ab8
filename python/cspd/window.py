"""One drafting window of a run: device tensors and tables in, device tensors out, and nothing read between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from cspd_kernels import CandidateVerdict, Denoised, DenoisedInParallel, accept_reject, denoise, log_density_ratio
from cspd_kernels.head import stream_dtype

from .candidates import first_candidate, tokens_of, with_candidates
from .errors import CallError
from .order import Pass, WindowPlan
from .relaxations import of_window
from .run_state import Model, RunState, tolerance_of
from .stats import ACCEPTED, FELL_BACK, REDRAWN, window_sums


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
    return None if state.ends is None else drawn.entropy.mean().view(1)


@torch.no_grad()
def look(state: RunState, plan: Pass) -> Drawn:
    """The target's pass over all positions of a window, given the tokens known before it."""
    guess = None
    if state.drafted.trajectory is not None and state.draft.head.num_steps == state.target.head.num_steps:
        guess = state.drafted.read(plan.columns)[1]
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
    probability = probability_of(raw)
    state.probability.scatter_(1, plan.where, probability.view_as(plan.where))
    state.remember(target.z)
    return Judged(window_sums(verdict, probability), verdict.log_ratio[:, 0].view_as(plan.where))


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


def probability_of(raw: torch.Tensor) -> torch.Tensor:
    """(N,) float32: min(1, r)."""
    return raw.clamp(max=0).exp().float()


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

    It works on device tensors and on tables made before, reads nothing back, and writes the state's buffers in place.
    So a caller may capture it in a CUDA graph, after one call with the same sizes. A replay reads and writes the same
    buffers for the same positions, images and seed. Keep the state, the window and the result as long as the graph: it
    holds no reference to their tensors. The call before the capture changes what a relaxation policy sees of the window
    before. For a first window, set ``state.previous_target_z`` to None again.

    Args:
        state, window: of :meth:`SpecDecodeRunner.begin` and ``state.plan.window(first, stop)``.
        phase: gives a context for each of "draft" (once a step), "target" and "verify", to time them; not in a graph.

    Raises:
        RuntimeError: captured, and a model waits for the device in its own methods, or the torch backend after its
            sweeps, which wait in a run without a graph, too.
    """
    waiting = [model for model in (state.draft, state.target) if model.transformer.waits]
    if waiting and state.tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CallError(
            "expected models that do not synchronise inside a CUDA graph, got "
            f"{waiting[0].name}, whose own methods do: run the window without a graph"
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
    entropy: torch.Tensor | None = None  # (B, n) of the model's attention, where it is wanted


def _draw(state: RunState, model: Model, plan: Pass, guess: torch.Tensor | None = None) -> Drawn:
    """One pass of a model over the known tokens, and its head for all positions of the pass.

    ``guess``: the trajectory of another head's chain through the same noise; sweeps start from it.
    """
    return _draw_chains(state, model, plan, guess, state.chains)


def _draw_chains(state: RunState, model: Model, plan: Pass, guess=None, chains: int = 1) -> Drawn:
    z, entropy = conditions(state, model, state.tokens, plan, model.embedding)
    return Drawn(chains_of(state, model, plan, z, guess, chains, entropy), z[: len(plan.where)], entropy)


def conditions(
    state: RunState, model: Model, tokens, plan: Pass, embedding
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z (R, n, Z), and the entropy (B, n) of the attention where windows end by it or x_T is scaled by it."""
    if model.initial_scale is not None or (state.ends is not None and model is state.draft):
        return model.transformer.conditions(tokens, plan, embedding, attention=True)
    return model.transformer.conditions(tokens, plan, embedding), None


def chains_of(state: RunState, model: Model, plan: Pass, z, guess=None, chains: int = 1, entropy=None):
    """The chains (N chains, ...) of the N tokens of a pass, token by token, from their conditions z (R, n, Z).

    A head that scales its x_T also needs the entropies (B, n) of the attention.
    """
    x_T, noise = state.noise.of(plan, model.head, chains)  # noqa: N806
    if model.initial_scale is not None:
        scale = model.initial_scale(entropy).flatten()[:, None]
        x_T = x_T * (scale if chains == 1 else scale.repeat_interleave(chains, dim=0)).to(x_T.dtype)  # noqa: N806
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
