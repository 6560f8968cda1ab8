"""Continuous speculative decoding: a draft model proposes tokens, the target verifies windows of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cspd_kernels.backends import implementation
from cspd_kernels.dtypes import as_dtype_or_none
from cspd_kernels.errors import CallError
from cspd_kernels.ops.denoise.parallel import AUTO, check_tolerance

from .beginning import begin_run
from .check_heads import check_residual, check_sampler
from .checks import check_gamma, check_models, check_options, check_verify
from .entropy_draft import EntropyDraft
from .loops import end_by, run_rounds, run_windows
from .model_pair import ModelPair
from .output import SampleOutput
from .policies import Window
from .released_names import released_attribute, released_names
from .reporting import Callback, runner_text
from .run_state import RunState
from .sampling import Sampling
from .seeds import drawn_seed
from .stats import Recorder, RunStats
from .whole.steps import KeptSteps, PlainSteps, Steps, why_not_graphs


class SpecDecodeRunner:
    """Generate images with a draft and a target MAR model.

    The target draws the first autoregressive steps alone (pre-filling). Then the draft draws a window of ``gamma``
    steps. The target computes the conditions of all their positions in one pass over the tokens known before the
    window. It denoises them from the draft's x_T and noise (trajectory alignment). Each token is accepted or redrawn on
    its own (:func:`cspd_kernels.accept_reject`). All positions of the window are kept.

    This is approximate by construction. The test compares two trajectories that meet in the token. Windows are judged
    given the tokens before them. A ``relaxation`` above 1 accepts more than the exact test does. Compare with the
    target alone at fewer steps.

    ``verify="strict"`` judges every step given the tokens before it, in one pass of the target over ``gamma`` prefixes
    of an image. What follows a step with a rejected token is undone and drafted again. Each image goes on from its own
    step. The tokens then depend on neither ``gamma`` nor ``branches``. They have exactly the distribution of the target
    whose last denoising step adds its noise if three things hold: ``criterion="last_step"``, ``relaxation=1``, and
    heads of one sigma or a single candidate. Rounding and ``stats.fallback`` remain (:mod:`cspd.strict`).

    Noise has an address (seed; image, position, step, channel). It takes no memory. Up to rounding an image does not
    depend on its batch, unless a gamma policy looks at the batch to end windows.

    The transformers run over packed weights (:mod:`cspd.whole`). On a GPU a step of the draft, a pass of the target or
    a whole strict round is one CUDA graph, head included. Large batches, which keep the GPU busy anyway, run kernel by
    kernel. This needs models in eval mode whose transformers compute what those of ``cspd.models.MAR``, LTH14/mar and
    MarkXCloud/CSpD do. They are compared here, and again when a model's code has changed. Models with hooks or other
    layers run their own blocks. Others run their own methods, which synchronise at every pass. The log says why.

    On a GPU a run does not synchronise between its first kernel and its result. Strict runs wait for the round before
    the one in flight. Some cases synchronise more. Models that run their own methods do, and in strict runs those that
    run their own blocks. The first run of a size compiles and captures. Gamma policies, heads whose CUDA graphs outgrow
    their memory, and sweeps (``parallel_tol``) of the torch backend synchronise, too.

    Args:
        draft_model, target_model: MAR objects (``cspd.models.MAR``, LTH14/mar, MarkXCloud/CSpD) on one device, with the
            same sequence, token width and number of denoising steps. With ``criterion="last_step"`` the draft may have
            a head of one step (:class:`cspd.models.drift.DriftLoss`). A head with a method ``initial_scale`` gets an
            x_T that is scaled by it, by the entropy of its transformer's attention.
        relaxation: > 0, of the accept test. 1 is the paper's formula, 42 the released default. A number; (L,) with one
            per position; or a policy: a function of a :class:`cspd.Window` that gives one per token, such as
            :class:`cspd.SimilarityRelaxation`. ``inner_temperature`` in the released code.
        prefill: fraction of the steps that is pre-filled, 0..1, rounded up to whole steps. ``ratio`` in the released
            code. The released names are accepted as keywords here and in :meth:`run`.
        verify: ``"window"`` or ``"strict"``, as above.
        num_candidates: 1..16 candidates of every drafted token, tried in order (recursive rejection). A window's
            context goes on with the first. More than one needs heads with a fixed variance, or ``target_sigma``.
        branches: how many candidates of a window's first step are drafted on to its end, each in a branch of its own.
            At most ``num_candidates``; above 1 in strict runs only.
        criterion: ``"trajectory"``, the paper's surrogate: a candidate is the end of a chain of its own.
            ``"last_step"``: the last denoising step adds its noise in both models. Candidates share a chain, and the
            test compares that step's Gaussians.
        sigma: ``"paper"`` or ``"released"``, see :func:`cspd_kernels.log_density_ratio`: the sign of the path's term,
            which ``"last_step"`` does not have.
        backend: as in :func:`cspd.patch`.
        dtype: type of the matrix products' operands in transformers and heads, also by name ("bfloat16"). By default it
            is the autocast dtype, or the dtype of the weights. Residual streams stay float32.
        max_tries: redraws per rejected token before it takes the target's own aligned sample.
        residual, target_sigma: how a rejected token is redrawn, see :func:`cspd_kernels.accept_reject`.
            ``"closed_form"`` is for heads with a fixed variance. Learned ones need ``target_sigma``.
        parallel_tol: how both heads make their steps, see :func:`cspd_kernels.denoise`. Where sweeps run, the target's
            verification starts from the draft's trajectories, which saves sweeps. The accept test may turn out
            differently where its ratio is within the tolerance of its random number.
        sampler, eta, sampling_steps: the sampler of both models, as in :func:`cspd.patch`. The images are then others
            than the models' own. A run needs densities, so DDIM needs ``eta`` > 0. DDIM has one sigma, also for heads
            that learned a variance. A pair of ``sampling_steps`` holds for each window, and not in strict runs.

    Raises:
        CspdError: models that do not fit together, or an argument that is out of range. The message says which.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> target, draft = load_pair()
        >>> runner = cspd.SpecDecodeRunner(draft, target)
        >>> images = runner.run(2, steps=8, gamma=4, labels=torch.tensor([3, 7]), seed=0)
        >>> images.shape, runner.stats.gammas
        (torch.Size([2, 1, 8, 8]), [4, 2])

    Source: arXiv 2411.11925; MarkXCloud/CSpD ``spec_decode/spec_decode_runner.py``.
    """

    @released_names(inner_temperature="relaxation", ratio="prefill")
    def __init__(
        self,
        draft_model: Any,
        target_model: Any,
        relaxation: float | torch.Tensor | Callable[[Window], torch.Tensor] = 42.0,
        prefill: float = 0.15,
        *,
        verify: str = "window",
        num_candidates: int = 1,
        branches: int = 1,
        criterion: str = "trajectory",
        sigma: str = "paper",
        backend: str | None = None,
        dtype: torch.dtype | str | None = None,
        max_tries: int = 100,
        residual: str = "rejection",
        target_sigma: bool = False,
        parallel_tol: float | str | None = AUTO,
        sampler: str | None = None,
        eta: float = 0.0,
        sampling_steps: int | tuple[int, int] | None = None,
    ) -> None:
        implementation("accept_reject", backend)
        check_tolerance("SpecDecodeRunner", parallel_tol)
        sampling = Sampling(sampler, eta, sampling_steps)
        sampling.check("SpecDecodeRunner")
        check_models(draft_model, target_model, criterion)
        check_options(target_model.seq_len, relaxation, prefill, sigma, max_tries)
        self.dtype = as_dtype_or_none(dtype, "SpecDecodeRunner")
        check_sampler(draft_model, target_model, sampling, verify, drafts=prefill < 1)
        check_verify(draft_model, target_model, relaxation, verify, num_candidates, branches, criterion, sampling)
        check_residual(draft_model, target_model, residual, target_sigma, num_candidates, sampling)
        self.seq_len, self.token_embed_dim = target_model.seq_len, target_model.token_embed_dim
        self.relaxation, self.prefill, self.sigma = relaxation, float(prefill), sigma
        self.backend, self.max_tries = backend, max_tries
        self.residual, self.target_sigma, self.parallel_tol = residual, target_sigma, parallel_tol
        self.verify, self.criterion, self.sampling = verify, criterion, sampling
        self.num_candidates, self.branches = num_candidates, branches
        self._pair = ModelPair(draft_model, target_model, backend, sampling)
        self._steps = KeptSteps(most=4)  # of runs whose steps are CUDA graphs
        self._recorder: Recorder | None = None
        self._gamma: object = None  # of the last run

    inner_temperature, ratio = released_attribute("relaxation"), released_attribute("prefill")

    def __repr__(self) -> str:
        """Models and options; it does not wait for the device."""
        return runner_text(self, self._pair.lines(), self._gamma)

    @property
    def draft_model(self) -> Any:
        """The draft, as given. Another one needs another runner."""
        return self._pair.models["draft"]

    @property
    def target_model(self) -> Any:
        """The target, as given. Another one needs another runner."""
        return self._pair.models["target"]

    @property
    def stats(self) -> RunStats:
        """Statistics of the last run (:class:`cspd.RunStats`). Reading them waits for the device, the first time.

        Raises:
            CallError: no run has come to its end since the last one began.
        """
        if self._recorder is None:
            raise CallError("no statistics yet: call run() first, and let it come to its end")
        return self._recorder.finish()

    @released_names(num_iter="steps", num_draft="gamma")
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(
        self,
        bsz: int,
        steps: int = 64,
        gamma: int | Callable[[list[list[float]]], int] | EntropyDraft = 8,
        cfg_schedule: str = "linear",
        labels: torch.Tensor | None = None,
        temperature: float = 1.0,
        cfg: float = 1.0,
        progress: bool = False,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        first_image: int = 0,
        orders: torch.Tensor | None = None,
    ) -> SampleOutput:
        """Generate ``bsz`` images.

        Args:
            steps: autoregressive steps. ``num_iter`` in the released code.
            gamma: steps of a window; the last may be shorter. ``num_draft`` in the released code. Or a policy that is
                asked before each window (:class:`cspd.AdaptiveDraft`). It is a function of the list of the windows so
                far. A window is a list with the mean of min(1, r) over the tokens of each of its steps, r at the
                relaxation in use. The host then synchronises once a window. Or :class:`cspd.EntropyDraft`, which ends
                windows by the draft's attention, in strict runs on the device.
            cfg_schedule: ``"linear"`` or ``"constant"``. cfg: guidance scale, 1 for none.
            labels: (bsz,) int64 class labels, or None for no class.
            temperature: >= 0; at 0 every token is the target's own.
            progress: show a bar with phase, tokens and acceptance rate. It never synchronises: on a GPU it shows the
                acceptance rate that reached the host last. It is drawn at most every half second.
            seed: int in [0, 2^64). By default it is drawn from torch's global CPU generator.
            generator: a :class:`torch.Generator` that the seed is drawn from, in place of ``seed``. The seed is
                ``torch.randint(2**63 - 1, (), generator=generator)``, so every run with it gets another one. The same
                state of the generator gives the same images. Global generators are not used.
            callback: called with a :class:`cspd.Progress` after every step and every window or round. To stop early,
                raise an exception in it: it comes out of this call, and the next run starts afresh.
            first_image: number of the first image: an image is addressed by (seed; its number). Numbers times the
                sequence's length go to 2^48.
            orders: (bsz, L) int64 generation orders. By default they follow from the seed.

        Returns:
            (bsz, c, h, w) float32, as the target's ``unpatchify`` lays them out; ``.stats`` has the run's statistics.

        Example:
            >>> import cspd, torch
            >>> from cspd.demo.pair import load_pair
            >>> target, draft = load_pair()
            >>> runner, phases = cspd.SpecDecodeRunner(draft, target, prefill=0.25), []
            >>> out = runner.run(1, steps=4, gamma=3, seed=0, callback=lambda seen: phases.append(seen.phase))
            >>> phases
            ['prefill', 'draft', 'draft', 'draft', 'verify']
            >>> torch.equal(out, runner.run(1, steps=4, gamma=3, seed=0))
            True
        """
        check_gamma(gamma)
        state = self.begin(
            bsz, steps, cfg_schedule, labels, temperature, cfg,
            seed=seed, generator=generator, first_image=first_image, orders=orders,
        )  # fmt: skip
        end_by(state, gamma)
        self._recorder, self._gamma = None, gamma
        made: Steps | PlainSteps = PlainSteps(state)
        graphs = why_not_graphs(state, self.branches) is None
        if graphs:
            state.noise.seed_on_device()
            made = self._steps.of(state, self._pair.packed())
        with made.of(state):
            if self.verify == "strict":
                recorder = run_rounds(made, gamma, self.branches, progress, callback)
            else:
                recorder = run_windows(made, gamma, progress, callback)
            images = self.target_model.unpatchify(made.state.tokens)
            recorder.stop()
            if graphs:
                images = images.clone()  # the next run writes there, and into the maps
                recorder.outcome, recorder.probability = recorder.outcome.clone(), recorder.probability.clone()
        self._recorder = recorder
        return SampleOutput.of(images, recorder)

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
        generator: torch.Generator | None = None,
        first_image: int = 0,
        orders: torch.Tensor | None = None,
    ) -> RunState:
        """The state of a run before its first step, for callers with a loop of their own. Arguments as in :meth:`run`.

        :meth:`run` makes the first ``state.prefilled`` steps by :func:`cspd.window.prefill` of ``state.plan.step(i)``,
        and windows of the others by :func:`cspd.window.run_window`. Strict runs make rounds of :mod:`cspd.strict` until
        ``state.at`` is at the end. The tokens are in ``state.tokens``.

        Example:
            >>> import cspd
            >>> from cspd.demo.pair import load_pair
            >>> target, draft = load_pair()
            >>> state = cspd.SpecDecodeRunner(draft, target, prefill=0.25).begin(1, steps=8, seed=0)
            >>> state.prefilled, len(state.plan.steps), state.tokens.shape
            (2, 8, torch.Size([1, 16, 4]))
        """
        with drawn_seed("run", seed, generator) as drawn:
            return begin_run(
                self, self._pair, bsz, steps, cfg_schedule, labels, temperature, cfg, drawn, first_image, orders
            )
