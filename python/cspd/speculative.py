"""Continuous speculative decoding: a draft model proposes tokens, the target verifies windows of them."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from tqdm import tqdm

from cspd_kernels import Denoised, PhiloxNoise, Schedule, accept_reject, denoise, log_density_ratio
from cspd_kernels.backends import implementation
from cspd_kernels.head import why_not_a_head
from cspd_kernels.noise import check_seed
from cspd_kernels.ops.density_ratio import SIGMAS

from .heads import HeadCache, verify_network
from .order import Pass, plan_pass, plan_steps, random_orders
from .stats import ACCEPTED, FELL_BACK, PREFILLED, REDRAWN, Recorder, RunStats

_logger = logging.getLogger("cspd")
_MODEL_INTERFACE = (
    "seq_len", "token_embed_dim", "diffloss", "fake_latent", "class_emb",
    "forward_mae_encoder", "forward_mae_decoder", "unpatchify",
)  # fmt: skip


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

    Args:
        draft_model, target_model: MAR objects (``cspd.models.MAR``, LTH14/mar, MarkXCloud/CSpD) with
            the same sequence, token width and number of denoising steps, on one device.
        inner_temperature: relaxation > 0 of the accept test; 1 is the paper's formula, 42 the
            released default. A number, or (L,) with one per position.
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
        inner_temperature: float | torch.Tensor = 42.0,
        ratio: float = 0.15,
        *,
        sigma: str = "paper",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        max_tries: int = 100,
    ):
        implementation("accept_reject", backend)
        for role, model in (("draft", draft_model), ("target", target_model)):
            missing = [name for name in _MODEL_INTERFACE if not hasattr(model, name)]
            if missing:
                raise TypeError(
                    f"expected {role}_model as a MAR object, got {type(model).__name__} without " + ", ".join(missing)
                )
        for name in ("seq_len", "token_embed_dim"):
            ours, theirs = getattr(draft_model, name), getattr(target_model, name)
            if ours != theirs:
                raise ValueError(f"expected draft and target with the same {name}, got {ours} and {theirs}")
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"expected ratio in [0, 1], got {ratio!r}")
        if sigma not in SIGMAS:
            raise ValueError(f"expected sigma one of {SIGMAS}, got {sigma!r}")
        if isinstance(inner_temperature, torch.Tensor):
            if inner_temperature.shape != (target_model.seq_len,) or not (inner_temperature > 0).all():
                raise ValueError(
                    f"expected inner_temperature > 0, one number or ({target_model.seq_len},), "
                    f"got shape {tuple(inner_temperature.shape)}"
                )
        elif not 0 < inner_temperature < math.inf:
            raise ValueError(f"expected a finite inner_temperature > 0, got {inner_temperature!r}")
        if isinstance(max_tries, bool) or not isinstance(max_tries, int) or max_tries < 0:
            raise ValueError(f"expected max_tries as an int >= 0, got {max_tries!r}")
        self.draft_model, self.target_model = draft_model, target_model
        self.seq_len, self.token_embed_dim = target_model.seq_len, target_model.token_embed_dim
        self.inner_temperature, self.ratio, self.sigma = inner_temperature, float(ratio), sigma
        self.backend, self.dtype, self.max_tries = backend, dtype, max_tries
        self._heads = {}
        for role, model in (("draft", draft_model), ("target", target_model)):
            if (problem := why_not_a_head(model.diffloss)) is not None:
                raise ValueError(f"expected the {role}'s diffloss as a diffusion head: {problem}")
            verify_network(f"the {role}'s diffloss", model.diffloss)
            self._heads[role] = HeadCache(model.diffloss)
        draft_schedule, target_schedule = (
            Schedule.from_diffusion(model.diffloss.gen_diffusion) for model in (draft_model, target_model)
        )
        if draft_schedule.num_steps != target_schedule.num_steps:
            raise ValueError(
                "expected draft and target with the same number of denoising steps (their trajectories are aligned "
                f"step by step), got {draft_schedule.num_steps} and {target_schedule.num_steps}"
            )
        if not np.allclose(draft_schedule.betas, target_schedule.betas, rtol=1e-6):
            raise ValueError(
                "expected draft and target with the same noise schedule (their trajectories are compared step by "
                "step), got different betas"
            )
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
        num_draft: int = 8,
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
            num_iter: autoregressive steps. num_draft: gamma, steps per window; the last may be shorter.
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
        target, device = self.target_model, self.target_model.fake_latent.device
        self._check_run(bsz, num_draft, labels, temperature, cfg, seed, first_image, orders)
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        steps = plan_steps(self.seq_len, num_iter, cfg, cfg_schedule)
        images = torch.arange(first_image, first_image + bsz, device=device)
        orders = random_orders(seed, images, self.seq_len) if orders is None else orders.to(device)
        prefill = [step for step in steps if step.index < self.ratio * num_iter - 1e-9]
        rest = steps[len(prefill) :]
        # All tables of the generation order, before the first step.
        single = {step.index: plan_pass(orders, images, [step], cfg != 1.0) for step in steps}
        windows = [
            (window, plan_pass(orders, images, window, cfg != 1.0))
            for window in (rest[i : i + num_draft] for i in range(0, len(rest), num_draft))
        ]
        state = _State(
            tokens=torch.zeros(bsz, self.seq_len, self.token_embed_dim, device=device),
            seed=seed,
            temperature=float(temperature),
            relaxation=self.inner_temperature.to(device, torch.float32)
            if isinstance(self.inner_temperature, torch.Tensor)
            else self.inner_temperature,
            embeddings={
                name: _class_embedding(model, bsz, labels, cfg != 1.0)
                for name, model in (("draft", self.draft_model), ("target", target))
            },
        )
        recorder = Recorder(torch.full(orders.shape, PREFILLED, dtype=torch.int8, device=device))
        self._stats, self._recorder = None, None
        with tqdm(total=len(steps), disable=not progress) as bar:
            for step in prefill:
                with recorder.phase("target"):
                    recorder.calls["target"] += 1
                    state.write(single[step.index], self._draw("target", state, single[step.index]).sample)
                bar.update()
            for window, whole in windows:
                chains = []
                for step in window:
                    with recorder.phase("draft"):
                        recorder.calls["draft"] += 1
                        chains.append(self._draw("draft", state, single[step.index]))
                        state.write(single[step.index], chains[-1].sample)
                    bar.update()
                self._verify(state, whole, _concatenate(chains, bsz), recorder)
        images = target.unpatchify(state.tokens)
        recorder.stop()
        self._recorder = recorder
        return images

    def _draw(self, name: str, state: _State, plan: Pass) -> Denoised:
        """One pass of a model over the known tokens, and its head for all positions of the pass."""
        model = getattr(self, f"{name}_model")
        tokens = state.tokens.repeat(len(plan.mask) // len(state.tokens), 1, 1)
        z = model.forward_mae_decoder(model.forward_mae_encoder(tokens, plan.mask, state.embeddings[name]), plan.mask)
        z = z.gather(1, plan.gather.expand(-1, -1, z.shape[-1])).flatten(0, 1)  # conditional rows first
        head = self._heads[name].get(self.dtype)
        noise = PhiloxNoise(state.seed, plan.rows)
        return denoise(
            head,
            z,
            noise.x_T(head.channels),
            noise,
            temperature=state.temperature,
            cfg_scale=plan.cfg_scale,
            backend=self.backend,
        )

    def _verify(self, state: _State, plan: Pass, drafted: Denoised, recorder: Recorder) -> None:
        """Judge a window against the context before it, and write what was kept or redrawn."""
        with recorder.phase("target"):
            recorder.calls["target"] += 1
            target = self._draw("target", state, plan)
        with recorder.phase("verify"):
            relaxation = state.relaxation
            if isinstance(relaxation, torch.Tensor):
                relaxation = relaxation[plan.where].flatten()
            verdict = accept_reject(
                drafted.sample,
                drafted,
                target,
                seed=state.seed,
                rows=plan.rows,
                relaxation=relaxation,
                sigma=self.sigma,
                max_tries=self.max_tries,
                backend=self.backend,
            )
            raw = log_density_ratio(drafted.sample, drafted, target, sigma=self.sigma, backend=self.backend)
            state.write(plan, verdict.token)
            redrawn = torch.where(verdict.tries < 0, FELL_BACK, REDRAWN)
            outcome = torch.where(verdict.accepted, ACCEPTED, redrawn).to(torch.int8)
            recorder.outcome.scatter_(1, plan.where, outcome.view_as(plan.where))
            recorder.window(verdict.accepted, raw, verdict.tries)

    def _check_run(self, bsz, num_draft, labels, temperature, cfg, seed, first_image, orders) -> None:
        if bsz < 1 or num_draft < 1:
            raise ValueError(f"expected bsz >= 1 and num_draft >= 1, got {bsz} and {num_draft}")
        if not 0 <= temperature < math.inf or not math.isfinite(cfg):
            raise ValueError(f"expected a finite temperature >= 0 and a finite cfg, got {temperature!r} and {cfg!r}")
        if labels is not None and (
            not isinstance(labels, torch.Tensor) or labels.shape != (bsz,) or labels.is_floating_point()
        ):
            got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(f"expected labels as an integer tensor of shape ({bsz},) or None, got {got}")
        # Values are looked at on the CPU only: elsewhere that would wait for the device.
        if labels is not None and labels.device.type == "cpu":
            classes = [getattr(m, "num_classes", math.inf) for m in (self.draft_model, self.target_model)]
            if not ((labels >= 0) & (labels < min(classes))).all():
                raise ValueError(f"expected labels in 0..{min(classes) - 1}, got {labels.tolist()}")
        if orders is not None and (orders.shape != (bsz, self.seq_len) or orders.dtype != torch.int64):
            raise ValueError(
                f"expected orders as int64 ({bsz}, {self.seq_len}), got {orders.dtype} {tuple(orders.shape)}"
            )
        on_cpu = orders is not None and orders.device.type == "cpu"
        if on_cpu and not (orders.sort(1).values == torch.arange(self.seq_len)).all():
            raise ValueError(f"expected every row of orders to be a permutation of 0..{self.seq_len - 1}")
        if seed is not None:
            check_seed(seed)
        if first_image < 0:
            raise ValueError(f"expected first_image >= 0, got {first_image}")
        devices = {model.fake_latent.device for model in (self.draft_model, self.target_model)}
        if len(devices) > 1:
            raise ValueError(f"expected draft and target on one device, got {sorted(map(str, devices))}")
        if any(getattr(model, "training", False) for model in (self.draft_model, self.target_model)):
            _logger.warning("a model is in training mode: dropout and label dropping are on; call .eval() first")


class _State:
    """What the steps of one run share; ``tokens`` (B, L, C) grow step by step."""

    def __init__(self, *, tokens, seed, temperature, relaxation, embeddings):
        self.tokens, self.seed, self.temperature = tokens, seed, temperature
        self.relaxation, self.embeddings = relaxation, embeddings

    def write(self, plan: Pass, tokens: torch.Tensor) -> None:
        """Put (B n, C) tokens at the positions of a pass."""
        tokens = tokens.to(self.tokens.dtype).view(*plan.where.shape, -1)
        self.tokens = self.tokens.scatter(1, plan.where[..., None].expand_as(tokens), tokens)


def _class_embedding(model, bsz: int, labels: torch.Tensor | None, guided: bool) -> torch.Tensor:
    none = model.fake_latent.repeat(bsz, 1)
    embedding = none if labels is None else model.class_emb(labels.to(none.device))
    return torch.cat([embedding, none]) if guided else embedding


def _concatenate(chains: list[Denoised], bsz: int) -> Denoised:
    """Chains of several steps, (B n_k, ...) each, as one of the window, image by image: (B n, ...)."""
    return Denoised(
        *(torch.cat([f.view(bsz, -1, *f.shape[1:]) for f in fields], dim=1).flatten(0, 1) for fields in zip(*chains))
    )
