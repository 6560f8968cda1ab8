"""Continuous speculative decoding: a draft model proposes tokens, the target verifies windows of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch

from cspd_kernels.backends import implementation
from cspd_kernels.ops.denoise.parallel import AUTO, check_tolerance

from .check_heads import check_residual, check_sampler
from .checks import check_dtype, check_gamma, check_models, check_options, check_run, check_verify
from .loops import end_by, run_rounds, run_windows
from .model_pair import ModelPair
from .order import Plan, by_token, plan_steps, random_orders, to_device
from .policies import Window
from .released_names import released_attribute, released_names
from .run_state import RunState
from .sampling import Sampling
from .stats import PREFILLED, Recorder, RunStats
from .whole.noise import PhiloxSource
from .whole.steps import PlainSteps, Steps, keep_current, signature, why_not_graphs

_MOST_STEPS = 4  # sizes of runs whose graphs are kept


class SpecDecodeRunner:
    """Generate images with a draft and a target MAR model.

    The first of the autoregressive steps, the fraction ``prefill``, are the target's (pre-filling). Then the draft
    draws ``gamma`` steps, a window; the target computes the conditions of all their positions in one pass over the
    tokens known before the window, denoises them from the draft's x_T and noise (trajectory alignment), and each
    token is accepted or redrawn on its own (:func:`cspd_kernels.accept_reject`); all positions of the window are
    kept.

    Approximate by construction: the test compares two trajectories that meet in the token, windows are judged against
    the context before them, and a ``relaxation`` above 1 relaxes the test. Compare with the target alone at fewer
    steps.

    ``verify="strict"`` judges every step given the tokens before it (one pass of the target over ``gamma`` prefixes
    an image), and what follows a step with a rejected token is undone and drafted again; each image goes on from its
    own step. With ``criterion="last_step"``, ``relaxation=1`` and heads of one sigma (or one candidate) the tokens
    then have exactly the distribution of the target whose last denoising step adds its noise, up to rounding and
    ``stats.fallback`` (:mod:`cspd.strict`). They depend on neither ``gamma`` nor ``branches``.

    Noise is addressed by (seed; image, position, step, channel): it takes no memory, and an image does not depend on
    its batch, up to rounding, unless a gamma policy, which looks at the batch, ends its windows.

    The transformers run over packed weights (:mod:`cspd.whole`), and on a GPU every step of the draft and every look
    of the target is one CUDA graph, its head included, as is a whole round of strict verification; batches that keep
    the device busy by themselves run kernel by kernel. So it is with models in eval mode whose transformers compute
    what those of ``cspd.models.MAR``, LTH14/mar and MarkXCloud/CSpD do. That is compared here, and again when a
    model's code has changed. Models with hooks or other layers run their own blocks; others run their own methods,
    which wait for the device at every pass; the log says why.

    On a device the host waits nowhere between a run's first kernel and its result; in strict runs, only for the round
    before the one in flight. Exceptions: those own methods, in strict runs own blocks, too; the first run of a size,
    which compiles and captures; a gamma policy; CUDA graphs of the heads that outgrow their memory; sweeps
    (``parallel_tol``) of the torch backend.

    Args:
        draft_model, target_model: MAR objects (``cspd.models.MAR``, LTH14/mar, MarkXCloud/CSpD) with the same
            sequence, token width and number of denoising steps, on one device. With ``criterion="last_step"`` the
            draft may have a head of one step (:class:`cspd.models.drift.DriftLoss`). A head with a method
            ``initial_scale`` is given x_T scaled by it, by the entropy of its transformer's attention.
        relaxation: > 0, of the accept test; 1 is the paper's formula, 42 the released default. A number; (L,) with
            one per position; or a policy, a function of a :class:`cspd.Window` that gives one per token
            (:class:`cspd.SimilarityRelaxation`). ``inner_temperature`` in the released code.
        prefill: fraction of the steps that is pre-filled, 0..1; a fraction of a step counts whole. ``ratio`` in the
            released code, whose names are accepted as keywords here and in :meth:`run`.
        verify: ``"window"`` or ``"strict"``, as above.
        num_candidates: 1..16 of every drafted token, tried in order (recursive rejection); a window's context goes on
            with the first. More than one needs heads with a fixed variance, or ``target_sigma``.
        branches: how many of the candidates of a window's first step are drafted on to its end, each in a branch of
            its own; at most ``num_candidates``, above 1 for strict runs only.
        criterion: ``"trajectory"``, the paper's surrogate: a candidate is the end of a chain of its own.
            ``"last_step"``: the last denoising step adds its noise, in both models; candidates share a chain, and the
            test is of that step's Gaussians alone.
        sigma: ``"paper"`` or ``"released"``, see :func:`cspd_kernels.log_density_ratio`: the sign of the path's term,
            which ``"last_step"`` does not have.
        backend: as in :func:`cspd.patch`.
        dtype: type of the matrix products' operands in transformers and heads, as autocast has it; None follows
            autocast, else the weights' type. The residual streams stay float32.
        max_tries: redraws per rejected token before it takes the target's own aligned sample.
        residual, target_sigma: how a rejected token is redrawn, see :func:`cspd_kernels.accept_reject`.
            ``"closed_form"`` is for heads with a fixed variance; learned ones need ``target_sigma``.
        parallel_tol: how both heads make their steps, see :func:`cspd_kernels.denoise`. Where sweeps run, the
            target's verification starts from the draft's trajectories, which saves sweeps. A decision whose ratio is
            within the tolerance of its random number may come out otherwise.
        sampler, eta, sampling_steps: the sampler of both models, as in :func:`cspd.patch`: other images than their own
            make. A run needs densities, so DDIM needs ``eta`` > 0; it has one sigma, also of heads whose networks
            learned a variance. A pair of ``sampling_steps`` holds from window to window, not in strict runs.

    Raises:
        TypeError, ValueError: models that do not fit together, or an argument out of range.

    Source: arXiv 2411.11925; MarkXCloud/CSpD ``spec_decode/spec_decode_runner.py``.
    """

    @released_names(inner_temperature="relaxation", ratio="prefill")
    def __init__(
        self,
        draft_model,
        target_model,
        relaxation: float | torch.Tensor | Callable[[Window], torch.Tensor] = 42.0,
        prefill: float = 0.15,
        *,
        verify: str = "window",
        num_candidates: int = 1,
        branches: int = 1,
        criterion: str = "trajectory",
        sigma: str = "paper",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        max_tries: int = 100,
        residual: str = "rejection",
        target_sigma: bool = False,
        parallel_tol: float | str | None = AUTO,
        sampler: str | None = None,
        eta: float = 0.0,
        sampling_steps: int | tuple[int, int] | None = None,
    ):
        implementation("accept_reject", backend)
        check_tolerance("SpecDecodeRunner", parallel_tol)
        sampling = Sampling(sampler, eta, sampling_steps)
        sampling.check("SpecDecodeRunner")
        check_models(draft_model, target_model, criterion)
        check_options(target_model.seq_len, relaxation, prefill, sigma, max_tries)
        check_dtype(dtype)
        check_sampler(draft_model, target_model, sampling, verify, drafts=prefill < 1)
        check_verify(draft_model, target_model, relaxation, verify, num_candidates, branches, criterion, sampling)
        check_residual(draft_model, target_model, residual, target_sigma, num_candidates, sampling)
        self.seq_len, self.token_embed_dim = target_model.seq_len, target_model.token_embed_dim
        self.relaxation, self.prefill, self.sigma = relaxation, float(prefill), sigma
        self.backend, self.dtype, self.max_tries = backend, dtype, max_tries
        self.residual, self.target_sigma, self.parallel_tol = residual, target_sigma, parallel_tol
        self.verify, self.criterion, self.sampling = verify, criterion, sampling
        self.num_candidates, self.branches = num_candidates, branches
        self._pair = ModelPair(draft_model, target_model, backend, sampling)
        self._lock = threading.Lock()
        self._steps: OrderedDict[tuple, Steps] = OrderedDict()  # of runs whose steps are CUDA graphs
        self._recorder: Recorder | None = None
        self._stats: RunStats | None = None

    inner_temperature, ratio = released_attribute("relaxation"), released_attribute("prefill")

    @property
    def draft_model(self):
        """The draft, as given; another one needs another runner."""
        return self._pair.models["draft"]

    @property
    def target_model(self):
        """The target, as given; another one needs another runner."""
        return self._pair.models["target"]

    @property
    def stats(self) -> RunStats:
        """Statistics of the last run (:class:`cspd.stats.RunStats`); reading them waits for the device."""
        if self._recorder is not None:
            self._stats, self._recorder = self._recorder.finish(), None
        if self._stats is None:
            raise RuntimeError("no statistics yet: call run() first")
        return self._stats

    @released_names(num_iter="steps", num_draft="gamma")
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(
        self,
        bsz: int,
        steps: int = 64,
        gamma: int | Callable[[list[list[float]]], int] = 8,
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
            steps: autoregressive steps. ``num_iter`` in the released code.
            gamma: steps of a window; the last may be shorter. Or a policy that is asked before each window
                (:class:`cspd.AdaptiveDraft`): a function of the list of the windows so far, each a list with
                the mean of min(1, r) over the tokens of each of its steps, r at the relaxation in use; the host
                then waits for the device once a window. Or :class:`cspd.EntropyDraft`, which ends windows by the
                draft's attention: in strict runs on the device. ``num_draft`` in the released code.
            cfg_schedule: ``"linear"`` or ``"constant"``. cfg: guidance scale, 1 for none.
            labels: (bsz,) int64 class labels, or None for no class.
            temperature: >= 0; at 0 every token is the target's own.
            progress: show a tqdm bar over the steps.
            seed: int in [0, 2^64); None draws one from torch's CPU generator.
            first_image: number of the first image: an image is addressed by (seed; its number). Numbers times the
                sequence's length go to 2^48.
            orders: (bsz, L) int64 generation orders; None derives them from the seed.

        Returns:
            (bsz, c, h, w) float32, as the target's ``unpatchify`` lays them out.
        """
        check_gamma(gamma)
        state = self.begin(
            bsz, steps, cfg_schedule, labels, temperature, cfg, seed=seed, first_image=first_image, orders=orders
        )
        end_by(state, gamma)
        self._stats, self._recorder = None, None
        if why_not_graphs(state, self.branches) is not None:
            images, self._recorder = self._run(PlainSteps(state), gamma, progress)
            return images
        state.noise.seed_on_device()
        graphs = self._graphs(state)
        with graphs.of(state):
            images, recorder = self._run(graphs, gamma, progress)
            images = images.clone()  # the next run writes there, and into the maps
            recorder.outcome, recorder.probability = recorder.outcome.clone(), recorder.probability.clone()
        self._recorder = recorder
        return images

    def _run(self, steps: Steps | PlainSteps, gamma, progress: bool) -> tuple[torch.Tensor, Recorder]:
        if self.verify == "strict":
            recorder = run_rounds(steps, gamma, self.branches, progress)
        else:
            recorder = run_windows(steps, gamma, progress)
        images = self.target_model.unpatchify(steps.state.tokens)
        recorder.stop()
        return images, recorder

    def _graphs(self, state: RunState) -> Steps:
        """The graphs for runs like this one."""
        key = signature(state)
        with self._lock:
            if key not in self._steps:
                self._steps[key] = Steps(state)
            self._steps.move_to_end(key)
            keep_current(self._steps, self._pair.packed(), _MOST_STEPS)
            return self._steps[key]

    @released_names(num_iter="steps")
    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(
        self,
        bsz: int,
        steps: int,
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

        :meth:`run` calls :func:`cspd.window.prefill` with ``state.plan.step(i)`` for the first ``state.prefilled``
        steps, then :func:`cspd.window.run_window` with windows of the others; in strict runs, rounds of
        :mod:`cspd.strict` until ``state.at`` is at the end. The tokens are in ``state.tokens``.
        """
        draft, target = self.draft_model, self.target_model
        check_run(draft, target, bsz, labels, temperature, cfg, seed, first_image, orders)
        planned = plan_steps(self.seq_len, steps, cfg, cfg_schedule)
        device, guided = target.fake_latent.device, bool(cfg != 1.0)
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
        # What may wait for the device, and what comes from the host, goes before the first kernel.
        transformers = self._pair.transformers(self.dtype)
        labels = None if labels is None else to_device(labels, device)
        relaxation = self.relaxation
        if isinstance(relaxation, torch.Tensor):
            relaxation = to_device(relaxation.float(), device)
        tables = by_token(planned, device)
        orders = None if orders is None else to_device(orders, device)
        heads = self._pair.heads(self.dtype, planned, steps)
        images = torch.arange(first_image, first_image + bsz, device=device)
        orders = random_orders(seed, images, self.seq_len) if orders is None else orders
        plan = Plan(orders, images, planned, guided, tables)
        models = self._pair.of_run(heads[0], transformers, bsz, labels, guided)
        annealed = tuple({role: replace(models[role], head=head) for role, head in each.items()} for each in heads)
        state = RunState(
            tokens=torch.zeros(bsz, self.seq_len, self.token_embed_dim, dtype=torch.float32, device=device),
            outcome=torch.full(orders.shape, PREFILLED, dtype=torch.int8, device=device),
            probability=torch.ones(orders.shape, dtype=torch.float32, device=device),
            plan=plan,
            prefilled=sum(step.index < self.prefill * steps - 1e-9 for step in planned),
            **models,
            noise=PhiloxSource(seed, plan.rows, self.token_embed_dim, *self._noise()),
            temperature=float(temperature),
            relaxation=relaxation,
            backend=self.backend,
            parallel_tol=self.parallel_tol,
            rule={name: getattr(self, name) for name in ("sigma", "max_tries", "residual", "target_sigma")},
            candidates=self.num_candidates,
            criterion=self.criterion,
            annealed=annealed if self.sampling.anneals else (),
        )
        if self.verify == "strict":
            state.at = torch.full((bsz,), state.prefilled, dtype=torch.int64, device=device)
        else:
            state.make_room()
        return state

    def _noise(self) -> tuple[int, int]:
        """Of how many chains a token has noise, and of how many last steps beside them."""
        return (self.num_candidates, 0) if self.criterion == "trajectory" else (1, self.num_candidates)
