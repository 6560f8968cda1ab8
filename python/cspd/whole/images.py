"""Whole images of one MAR model: its own loop, compared once, by a launch a step."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead
from cspd_kernels.backends import implementation
from cspd_kernels.errors import InvalidInput, NotAModel
from cspd_kernels.ops.denoise.parallel import AUTO, check_tolerance
from cspd_kernels.parts import part_of

from ..checks import check_run
from ..diffusions import NotServedError, Tables
from ..heads import HeadCache, unwrapped
from ..order import Plan, by_token, plan_steps, to_device
from ..reporting import Callback, Reporter
from ..run_state import Model, RunState, class_embedding
from ..sampling import OWN, Sampling
from ..seeds import Generators
from ..standins import WholeSampling
from .chosen import ChosenTransformer, training
from .compare import own, where_it_starts, why_not_its_loop
from .noise import PhiloxSource, TableSource, chunks, most_tokens
from .steps import KeptSteps, PlainSteps, Steps, why_not_graphs

_NOISES = ("upstream", "philox")
_MOST_STEPS = 2  # sizes of calls whose graphs, buffers and noise are kept


@dataclass(frozen=True)
class SampleOptions:
    """How :func:`sample_tokens` computes."""

    dtype: torch.dtype | None = None
    backend: str | None = None
    noise: str = "upstream"
    parallel_tol: float | str | None = AUTO
    compile: bool = False
    sampling: Sampling = OWN

    def check(self) -> None:
        """Raise on an option that cannot be.

        Raises:
            InvalidInput, BackendUnavailable: what was expected.
        """
        if self.noise not in _NOISES:
            raise InvalidInput(f"sample_tokens expected noise one of {_NOISES}, got {self.noise!r}")
        check_tolerance("sample_tokens", self.parallel_tol)
        self.sampling.check("sample_tokens")
        implementation("denoise", self.backend)


class Sampler:
    """Whole images of one model. It does not keep the model alive.

    Args:
        cache: of the model's head, where somebody has one.

    Raises:
        TypeError: the object is no MAR model.
    """

    def __init__(self, model: nn.Module, options: SampleOptions, cache: HeadCache | None = None):
        needed = ("seq_len", "token_embed_dim", "diffloss", "fake_latent", "class_emb", "unpatchify", "sample_tokens")
        missing = [name for name in needed if not hasattr(model, name)]
        if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod") or missing:
            lacks = ", ".join(missing) or "modules"
            if hasattr(model, "_orig_mod"):
                lacks += ": pass the model inside, model._orig_mod"
            raise NotAModel(f"sample_tokens expected a MAR model, got {type(model).__name__} without {lacks}")
        self._model, self.options = weakref.ref(model), options
        self._transformer = ChosenTransformer(model, type(model).__name__, options.backend, options.compile)
        self._loop: tuple[object, str | None] = (None, None)  # what was compared, and why it differs
        self._cache = cache
        self._tables: Tables | None = None
        self._head_seen: tuple | None = None
        self._first_on = "cpu"
        self._steps = KeptSteps(_MOST_STEPS)
        self._lock = threading.RLock()

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: torch.Tensor | None = None,
        temperature: float = 1.0,
        progress: bool = False,
        seed: int | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Like :func:`cspd.sample_tokens`, but returns a plain tensor.

        Raises:
            InvalidInput: an argument is out of range. NotServedError: the model computes something else. Nothing was
                drawn.
        """
        with self._lock:
            model = self._model()
            self.check()
            self.check_call(bsz, num_iter, cfg, cfg_schedule, labels, temperature)
            generators = Generators.seeded(seed, model.fake_latent.device)
            state = self._begin(model, bsz, num_iter, cfg, cfg_schedule, labels, temperature, generators)
            graphs = why_not_graphs(state) is None
            if graphs:
                state.noise.seed_on_device()
            steps = self._steps.of(state, self._transformer.packed()) if graphs else PlainSteps(state)
            with steps.of(state), Reporter("sampling", state.plan.steps, bsz, None, progress, callback) as report:
                self._draw(steps, part_of(self._cache.net, "input").weight.dtype, generators, report)
                images = model.unpatchify(steps.state.tokens)
                return images.clone() if graphs else images

    def check_call(self, bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress=False) -> None:
        """Raise on an argument out of range."""
        model = self._model()
        check_run(model, model, bsz, labels, temperature, cfg, None, 0, None)
        plan_steps(1, num_iter, cfg, cfg_schedule)

    def _draw(self, steps: Steps | PlainSteps, weights: torch.dtype, generators: Generators, report: Reporter) -> None:
        state = steps.state
        heads = [state.target.head, *(models["target"].head for models in state.annealed)]
        most = most_tokens(len(state.tokens), max(heads, key=lambda head: head.num_steps))
        for first, chunk in chunks(state.plan.steps, most):
            if isinstance(state.noise, TableSource):
                heads = [models["target"].head for models in state.annealed[first : first + len(chunk)]]
                wide = torch.promote_types(torch.float32, weights)
                state.noise.fill(chunk, self.length, wide, [head.num_steps for head in heads] or None, generators)
            for i in range(first, first + len(chunk)):
                state.go_to(i)
                steps.target(i)
                report.tell("sample", i + 1)

    @property
    def model(self) -> nn.Module | None:
        """Whose images they are; None once it is gone."""
        return self._model()

    def release(self) -> None:
        """Let go of what was made for weights that have moved on."""
        with self._lock:
            if self._transformer.release():
                self._steps.clear()

    @property
    def length(self) -> int:
        return self._model().seq_len

    def check(self) -> None:
        """Compare what has not been compared as it is now.

        Raises:
            NotServedError: it is something else.
        """
        model = self._model()
        stands = vars(model).get("sample_tokens")
        if stands is not None and not isinstance(getattr(stands, "__self__", None), WholeSampling):
            raise NotServedError("its sample_tokens has been replaced on the instance")
        if training(model):
            raise NotServedError("the model is in training mode: call .eval() first")
        self._transformer.compare()
        if reason := self._transformer.why_not_by_weights:
            raise NotServedError(reason)
        seen = (self._transformer.seen, type(model).sample_tokens)  # what stands on instances is in the first
        if self._loop[0] != seen:
            plain = self._transformer
            if self.options.compile:  # compared as it is
                plain = ChosenTransformer(model, type(model).__name__, self.options.backend)
            self._loop = (seen, why_not_its_loop(model, plain.get(model.mask_token.dtype)))
        if self._loop[1] is not None:
            raise NotServedError(self._loop[1])
        net, reason = unwrapped(model.diffloss.net)
        diffusion = getattr(model.diffloss, "gen_diffusion", None)
        if reason is not None or diffusion is None:
            raise NotServedError(reason or "its head has no gen_diffusion")
        if self._cache is None or self._cache.net is not net:
            self._cache = HeadCache(net)
        if self._tables is None or self._tables.diffusion is not diffusion:
            self._tables = Tables(diffusion)
        seen = (
            self._transformer.seen,
            self._cache.look().written,
            type(model.diffloss).sample,
            diffusion,
            own(diffusion),
        )
        if self._head_seen != seen:
            self._first_on = where_it_starts(model.diffloss, net, self._head(part_of(net, "input").weight.dtype))
            self._head_seen = seen

    def _head(self, dtype: torch.dtype | None) -> DiffusionHead:
        return self._cache.get(self._tables.schedule(), dtype)

    def _begin(self, model, bsz, num_iter, cfg, cfg_schedule, labels, temperature, generators: Generators) -> RunState:
        steps, guided = plan_steps(self.length, num_iter, cfg, cfg_schedule), bool(cfg != 1.0)
        device, options = model.fake_latent.device, self.options
        own, sampling = self._tables.schedule(), options.sampling
        heads = [
            self._cache.get(sampling.schedule(own, step.index, num_iter), options.dtype)
            for step in (steps if sampling.anneals else steps[:1])
        ]
        head = max(heads, key=lambda head: head.num_steps)
        transformer = self._transformer.get(options.dtype, refresh=self._cache.weights == "live")
        labels = None if labels is None else to_device(labels, device)
        orders = np.tile(np.arange(self.length), (bsz, 1))
        for order in orders:  # one by one, as the released code draws them
            generators.orders.shuffle(order)
        orders = to_device(torch.from_numpy(orders), device)
        plan = Plan(orders, torch.arange(bsz, device=device), steps, guided, by_token(steps, device))
        if options.noise == "philox":
            key = int(torch.randint(2**63 - 1, (), device="cpu", generator=generators.cpu))
            noise = PhiloxSource(key, plan.rows, head.channels)
        else:
            span = max(sum(s.before - s.after for s in chunk) for _, chunk in chunks(steps, most_tokens(bsz, head)))
            noise = TableSource(bsz, span, head, guided, self._first_on, options.backend)
        target = Model(type(model).__name__, head, transformer, class_embedding(model, bsz, labels, guided))
        return RunState(
            tokens=torch.zeros(bsz, self.length, model.token_embed_dim, dtype=torch.float32, device=device),
            plan=plan,
            target=target,
            annealed=tuple({"target": replace(target, head=head)} for head in heads) if sampling.anneals else (),
            noise=noise,
            temperature=float(temperature),
            backend=options.backend,
            parallel_tol=options.parallel_tol,
        )
