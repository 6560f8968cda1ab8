"""Continuous speculative decoding: a draft model proposes tokens, the target verifies windows of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from cspd_kernels import Denoised, DiffusionHead, PhiloxNoise, accept_reject, denoise, log_density_ratio
from cspd_kernels.backends import implementation

from .checks import check_models, check_num_draft, check_options, check_run
from .heads import HeadCache
from .order import Pass, Plan, WindowPlan, plan_steps, random_orders, to_device
from .policies import Window, draft_length, relaxation_of
from .stats import ACCEPTED, FELL_BACK, PREFILLED, REDRAWN, Recorder, RunStats, window_sums
from .transformer import conditions, conditions_by_masks, why_not_by_tables

_logger = logging.getLogger("cspd")
_ROLES = ("draft", "target")


class SpecDecodeRunner:
    """Generate images with a draft and a target MAR model.

    The first ``ratio`` of the autoregressive steps are the target's (pre-filling). Then the draft
    draws ``num_draft`` steps at a time; the target computes the conditions of all their positions in
    one pass over the tokens known before the window, denoises them from the draft's x_T and noise
    (trajectory alignment), and each token is accepted or redrawn on its own
    (:func:`cspd_kernels.accept_reject`); all positions of the window are kept.

    Approximate by construction: the test compares two trajectories that meet in the token, windows
    are judged against the context before them, and ``inner_temperature`` above 1 relaxes the test.
    Compare with the target alone at fewer steps.

    Noise is addressed by (seed; image, position, step, channel): it takes no memory, and an image
    does not depend on its batch, up to rounding.

    On a device the host waits nowhere between a run's first kernel and its result, with models in
    eval mode whose transformers compute what :func:`cspd.transformer.conditions` does: those of
    ``cspd.models.MAR``, LTH14/mar and MarkXCloud/CSpD. That is compared here, once, with the weights
    that the models have. Others run their own methods, which wait at every pass; the log says why.

    Args:
        draft_model, target_model: MAR objects (``cspd.models.MAR``, LTH14/mar, MarkXCloud/CSpD) with
            the same sequence, token width and number of denoising steps, on one device.
        inner_temperature: relaxation > 0 of the accept test; 1 is the paper's formula, 42 the
            released default. A number; (L,) with one per position; or a policy, a function of a
            :class:`cspd.Window` that gives one per token (:class:`cspd.SimilarityRelaxation`).
        ratio: fraction of the steps that is pre-filled, 0..1; a fraction of a step counts whole.
        sigma: ``"paper"`` or ``"released"``, see :func:`cspd_kernels.log_density_ratio`.
        backend, dtype: as in :func:`cspd.patch`.
        max_tries: redraws per rejected token before it takes the target's own aligned sample.

    Raises:
        TypeError, ValueError: models that do not fit together, or an argument out of range.

    Source: arXiv 2411.11925; MarkXCloud/CSpD ``spec_decode/spec_decode_runner.py``.
    """

    def __init__(
        self,
        draft_model,
        target_model,
        inner_temperature: float | torch.Tensor | Callable[[Window], torch.Tensor] = 42.0,
        ratio: float = 0.15,
        *,
        sigma: str = "paper",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        max_tries: int = 100,
    ):
        implementation("accept_reject", backend)
        check_models(draft_model, target_model)
        check_options(target_model.seq_len, inner_temperature, ratio, sigma, max_tries)
        self.draft_model, self.target_model = draft_model, target_model
        self.seq_len, self.token_embed_dim = target_model.seq_len, target_model.token_embed_dim
        self.inner_temperature, self.ratio, self.sigma = inner_temperature, float(ratio), sigma
        self.backend, self.dtype, self.max_tries = backend, dtype, max_tries
        self._models = {"draft": draft_model, "target": target_model}
        self._heads = {role: HeadCache(model.diffloss) for role, model in self._models.items()}
        self._tables: dict[str, bool] = {}  # whether a model's conditions are computed by tables
        for role in _ROLES:
            self._by_tables(role)
        self._recorder: Recorder | None = None
        self._stats: RunStats | None = None

    @property
    def stats(self) -> RunStats:
        """Statistics of the last run (:class:`cspd.stats.RunStats`); reading them waits for the device."""
        if self._recorder is not None:
            self._stats, self._recorder = self._recorder.finish(), None
        if self._stats is None:
            raise RuntimeError("no statistics yet: call run() first")
        return self._stats

    @torch.no_grad()
    def run(
        self,
        bsz: int,
        num_iter: int = 64,
        num_draft: int | Callable[[list[list[float]]], int] = 8,
        cfg_schedule: str = "linear",
        labels: torch.Tensor | None = None,
        temperature: float = 1.0,
        cfg: float = 1.0,
        progress: bool = False,
        *,
        seed: int | None = None,
        first_image: int = 0,
        orders: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Generate ``bsz`` images.

        Args:
            num_iter: autoregressive steps.
            num_draft: gamma, steps per window; the last may be shorter. Or a policy that is asked
                before each window (:class:`cspd.AdaptiveDraft`): a function of the list of the windows
                so far, each a list with the mean of min(1, r) over the tokens of each of its steps, r at
                the relaxation in use. The host then waits for the device once a window.
            cfg_schedule: ``"linear"`` or ``"constant"``. cfg: guidance scale, 1 for none.
            labels: (bsz,) int64 class labels, or None for no class.
            temperature: >= 0; at 0 every token is the target's own.
            progress: show a tqdm bar over the steps.
            seed: int in [0, 2^64); None draws one from torch's CPU generator.
            first_image: number of the first image: an image is addressed by (seed; its number).
            orders: (bsz, L) int64 generation orders; None derives them from the seed.

        Returns:
            (bsz, c, h, w) float32, as the target's ``unpatchify`` lays them out.
        """
        check_num_draft(num_draft)
        state = self.begin(
            bsz, num_iter, cfg_schedule, labels, temperature, cfg, seed=seed, first_image=first_image, orders=orders
        )
        plan, stop = state.plan, len(state.plan.steps)
        windows = None
        if not callable(num_draft):  # all of their tables before the first step
            windows = [plan.window(i, min(i + num_draft, stop)) for i in range(state.prefilled, stop, num_draft)]
        recorder = Recorder(state.outcome)
        self._stats, self._recorder = None, None
        with tqdm(total=stop, disable=not progress) as bar:

            @contextlib.contextmanager
            def phase(name: str):
                with recorder.phase(name):
                    yield
                bar.update(name == "draft")

            for i in range(state.prefilled):
                with recorder.phase("target"):
                    self.prefill(state, plan.step(i))
                recorder.calls["target"] += 1
                bar.update()
            for window in self._adaptive(state, num_draft, recorder) if windows is None else windows:
                recorder.window(self.run_window(state, window, phase), window.whole)
        images = self.target_model.unpatchify(state.tokens)
        recorder.stop()
        self._recorder = recorder
        return images

    @torch.no_grad()
    def begin(
        self,
        bsz: int,
        num_iter: int,
        cfg_schedule: str = "linear",
        labels: torch.Tensor | None = None,
        temperature: float = 1.0,
        cfg: float = 1.0,
        *,
        seed: int | None = None,
        first_image: int = 0,
        orders: torch.Tensor | None = None,
    ) -> RunState:
        """The state of a run before its first step, arguments as in :meth:`run`: for callers with a loop of their own.

        :meth:`run` calls :meth:`prefill` with the first ``state.prefilled`` passes of ``state.plan``, then
        :meth:`run_window` with windows of the others.
        """
        draft, target = self.draft_model, self.target_model
        check_run(draft, target, bsz, labels, temperature, cfg, seed, first_image, orders)
        steps = plan_steps(self.seq_len, num_iter, cfg, cfg_schedule)
        device, guided = target.fake_latent.device, cfg != 1.0
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        images = torch.arange(first_image, first_image + bsz, device=device)
        orders = random_orders(seed, images, self.seq_len) if orders is None else to_device(orders, device)
        labels = None if labels is None else to_device(labels, device)
        relaxation = self.inner_temperature
        if isinstance(relaxation, torch.Tensor):
            relaxation = to_device(relaxation.float(), device)
        by_tables = {role: self._by_tables(role) for role in _ROLES}
        return RunState(
            tokens=torch.zeros(bsz, self.seq_len, self.token_embed_dim, device=device),
            outcome=torch.full(orders.shape, PREFILLED, dtype=torch.int8, device=device),
            plan=Plan(orders, images, steps, guided, masks=not all(by_tables.values())),
            prefilled=sum(step.index < self.ratio * num_iter - 1e-9 for step in steps),
            seed=seed,
            temperature=float(temperature),
            relaxation=relaxation,
            by_tables=by_tables,
            heads={role: cache.get(self.dtype) for role, cache in self._heads.items()},
            embeddings={
                role: _class_embedding(model, bsz, labels, guided) for role, model in self._models.items()
            },
        )

    @torch.no_grad()
    def prefill(self, state: RunState, plan: Pass) -> None:
        """One step of the target alone."""
        drawn = self._draw("target", state, plan)
        state.write(plan, drawn.chain.sample)
        self._remember(state, drawn.z)

    @torch.no_grad()
    def run_window(
        self, state: RunState, window: WindowPlan, phase: Callable[[str], contextlib.AbstractContextManager] | None = None
    ) -> Judged:
        """Draft the steps of a window, judge them against the context before it, write what was kept or redrawn.

        Works on device tensors and on tables made before, reads nothing and writes the state's buffers in place: a
        caller may capture it in a CUDA graph, after one call with the same sizes, and with ``phase`` left out.
        Replayed, it reads and writes the same buffers for the same positions.

        Args:
            state, window: of :meth:`begin` and ``state.plan.window(first, stop)``.
            phase: gives a context for each of "draft" (once a step), "target" and "verify", to time them.
        """
        phase, plan = phase or _untimed, window.whole
        drafts = []
        for step in window.drafts:
            with phase("draft"):
                drafts.append(self._draw("draft", state, step))
                state.write(step, drafts[-1].chain.sample)
        with phase("target"):
            target = self._draw("target", state, plan)
        with phase("verify"):
            drafted = _concatenate([draft.chain for draft in drafts], len(state.tokens))
            raw = log_density_ratio(drafted.sample, drafted, target.chain, sigma=self.sigma, backend=self.backend)
            verdict = accept_reject(
                drafted.sample,
                drafted,
                target.chain,
                seed=state.seed,
                rows=plan.rows,
                relaxation=self._relaxation(state, plan, drafts, drafted, target, raw),
                sigma=self.sigma,
                max_tries=self.max_tries,
                backend=self.backend,
            )
            state.write(plan, verdict.token)
            redrawn = torch.where(verdict.tries < 0, FELL_BACK, REDRAWN)
            outcome = torch.where(verdict.accepted, ACCEPTED, redrawn).to(torch.int8)
            state.outcome.scatter_(1, plan.where, outcome.view_as(plan.where))
            self._remember(state, target.z)
            sums = window_sums(verdict.accepted, raw, verdict.tries)
        return Judged(sums, verdict.log_ratio.view(plan.where.shape))

    def _draw(self, role: str, state: RunState, plan: Pass) -> _Drawn:
        """One pass of a model over the known tokens, and its head for all positions of the pass."""
        batch, n = plan.where.shape
        compute, known = (conditions, plan.known) if state.by_tables[role] else (conditions_by_masks, plan.mask)
        tokens = state.tokens.repeat(len(plan.wanted) // batch, 1, 1)
        z = compute(self._models[role], tokens, known, state.embeddings[role], plan.wanted)
        head, noise = state.heads[role], PhiloxNoise(state.seed, plan.rows)
        chain = denoise(
            head,
            z.flatten(0, 1),  # conditional rows first
            noise.x_T(head.channels),
            noise,
            temperature=state.temperature,
            cfg_scale=plan.cfg_scale,
            backend=self.backend,
        )
        return _Drawn(chain, z[:batch])

    def _relaxation(self, state: RunState, plan: Pass, drafts: list[_Drawn], drafted, target: _Drawn, raw):
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
            draft_z=torch.cat([draft.z for draft in drafts], dim=1),
            previous_target_z=state.previous_target_z,
            log_ratio=raw.view(shape),
            draft_log_std=drafted.log_std.view(*shape, -1),
            target_log_std=target.chain.log_std.view(*shape, -1),
        )
        return relaxation_of(relaxation, window)

    def _remember(self, state: RunState, z: torch.Tensor) -> None:
        """Keep the hidden state of the last token that the target looked at, for a policy."""
        if not callable(self.inner_temperature):
            return
        if state.previous_target_z is None:
            state.previous_target_z = z[:, -1].clone()
        else:
            state.previous_target_z.copy_(z[:, -1])

    def _adaptive(self, state: RunState, policy, recorder: Recorder):
        """Windows as a policy wants them; each asks for the acceptance of the one before, and so waits for it."""
        seen, first, stop = [], state.prefilled, len(state.plan.steps)
        while first < stop:
            window = state.plan.window(first, min(first + draft_length(policy, seen), stop))
            yield window
            first += len(window.drafts)
            if first < stop:
                probability = recorder.last.log_ratio.clamp(max=0).exp().split(window.whole.counts, dim=1)
                seen.append(torch.stack([part.mean() for part in probability]).tolist())

    def _by_tables(self, role: str) -> bool:
        """Whether a model's conditions are computed by tables; compared once, when it is first in eval mode."""
        model = self._models[role]
        if getattr(model, "training", False):
            _logger.warning("the %s is in training mode: dropout and label dropping are on; call .eval() first", role)
            return False
        if role not in self._tables:
            reason = why_not_by_tables(model)
            self._tables[role] = reason is None
            if reason is not None:
                _logger.log(
                    logging.WARNING if model.fake_latent.device.type == "cuda" else logging.INFO,
                    "the %s (%s) runs its own forward_mae_encoder and forward_mae_decoder, which wait for the device "
                    "at every pass: %s",
                    role,
                    type(model).__name__,
                    reason,
                )
        return self._tables[role]


@dataclass
class RunState:
    """What the steps of one run share. All tensors are on the models' device; the buffers are written in place."""

    tokens: torch.Tensor  # (B, L, C) float32 buffer: grows step by step
    outcome: torch.Tensor  # (B, L) int8 buffer: what became of each token, as in RunStats
    plan: Plan
    prefilled: int  # how many of the plan's steps are the target's alone
    seed: int
    temperature: float
    relaxation: float | torch.Tensor | Callable[[Window], torch.Tensor]  # a tensor has one per position, (L,)
    by_tables: dict[str, bool]
    heads: dict[str, DiffusionHead]
    embeddings: dict[str, torch.Tensor]  # (B or 2 B, E): of the classes, then, under guidance, of no class
    previous_target_z: torch.Tensor | None = None  # (B, Z) buffer for policies: of the target's last token

    def write(self, plan: Pass, tokens: torch.Tensor) -> None:
        """Put (B n, C) tokens at the positions of a pass."""
        tokens = tokens.to(self.tokens.dtype).view(*plan.where.shape, -1)
        self.tokens.scatter_(1, plan.where[..., None].expand_as(tokens), tokens)


class Judged(NamedTuple):
    """What is known of a verified window, on the device."""

    sums: torch.Tensor  # (3,) of :func:`cspd.stats.window_sums`
    log_ratio: torch.Tensor  # (B, n) at the relaxation in use


class _Drawn(NamedTuple):
    chain: Denoised  # of B n tokens
    z: torch.Tensor  # (B, n, Z) hidden states of the conditional rows


def _untimed(_: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def _class_embedding(model, bsz: int, labels: torch.Tensor | None, guided: bool) -> torch.Tensor:
    none = model.fake_latent.repeat(bsz, 1)
    embedding = none if labels is None else model.class_emb(labels)
    return torch.cat([embedding, none]) if guided else embedding


def _concatenate(chains: list[Denoised], bsz: int) -> Denoised:
    """Chains of several steps, (B n_k, ...) each, as one of the window, image by image: (B n, ...)."""
    return Denoised(
        *(torch.cat([f.view(bsz, -1, *f.shape[1:]) for f in fields], dim=1).flatten(0, 1) for fields in zip(*chains))
    )
