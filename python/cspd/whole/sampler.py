"""MAR's ``sample_tokens`` without the host: the released loop's images, seed for seed, by a launch a step."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from cspd_kernels import DiffusionHead
from cspd_kernels.backends import implementation, untraced
from cspd_kernels.head import OPERAND_DTYPES
from cspd_kernels.ops.denoise.parallel import AUTO, check_tolerance
from cspd_kernels.parts import part_of

from ..checks import check_run
from ..diffusions import NotServedError, Tables
from ..heads import HeadCache, unwrapped
from ..order import Plan, Step, by_token, plan_steps, to_device
from ..run_state import Model, RunState, class_embedding
from ..sampling import OWN, Sampling
from ..standins import WholeSampling
from .chosen import ChosenTransformer, training
from .compare import own, where_it_starts, why_not_its_loop
from .noise import PhiloxSource, TableSource
from .steps import PlainSteps, Steps, keep_current, signature, why_not_graphs

_NOISES = ("upstream", "philox")
_TABLE_BYTES = 256 << 20  # of noise that is drawn before the steps that need it
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
        if self.noise not in _NOISES:
            raise ValueError(f"sample_tokens expected noise one of {_NOISES}, got {self.noise!r}")
        if self.dtype is not None and self.dtype not in OPERAND_DTYPES:
            raise ValueError(f"sample_tokens expected dtype None or one of {OPERAND_DTYPES}, got {self.dtype!r}")
        check_tolerance("sample_tokens", self.parallel_tol)
        self.sampling.check("sample_tokens")
        implementation("denoise", self.backend)


_SAMPLERS = "_cspd_samplers"  # attribute of a model: its samplers, which so end with it
_MOST_SAMPLERS = 4
_lock = threading.Lock()


class _Samplers(OrderedDict):
    """By options. Copies and pickles of the model make their own."""

    def __deepcopy__(self, memo) -> _Samplers:
        return _Samplers()

    def __reduce__(self):
        return _Samplers, ()


@untraced
def sample_tokens(
    model: nn.Module,
    bsz: int,
    num_iter: int = 64,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    labels: torch.Tensor | None = None,
    temperature: float = 1.0,
    progress: bool = False,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    noise: str = "upstream",
    parallel_tol: float | str | None = AUTO,
    compile: bool = False,
    sampler: str | None = None,
    eta: float = 0.0,
    sampling_steps: int | tuple[int, int] | None = None,
) -> torch.Tensor:
    """Generate images with a MAR model: the same as ``model.sample_tokens`` draws from the same seeds, up to rounding.

    The transformer runs over packed weights, its last layer for the positions of the step alone; on a GPU a step is one
    CUDA graph, head included, and the host waits nowhere. The graphs are made in the first call of a kind (batch,
    guidance on or off, temperature), and whenever a later one has steps that draw more tokens than any before.

    Args:
        model: ``cspd.models.MAR``, or a MAR of LTH14/mar or a fork whose loop and transformer compute the same: both
            are compared at the first call. In eval mode.
        bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress: as of the model's own method.
        dtype: type of the matrix products' operands in transformer and head, as autocast has it; None follows
            autocast, else the weights' type. The residual streams stay float32.
        backend, noise, parallel_tol: as in :func:`cspd.patch`.
        compile: run the transformer's blocks under ``torch.compile``, on a GPU. It takes about a minute at first.
        sampler, eta, sampling_steps: as in :func:`cspd.patch`; other images than the model's own.

    Returns:
        (bsz, c, h, w) float32 latents.

    Raises:
        TypeError, ValueError: no such model, or an argument out of range; nothing was drawn.
        NotServedError: the model computes something else; the message says what. ``cspd.patch(model, whole=True)``
            runs the model's own method then.

    Source: LTH14/mar ``models/mar.py`` (sample_tokens), arXiv 2406.11838.
    """
    sampling = Sampling(sampler, eta, sampling_steps)
    options = SampleOptions(dtype, backend, noise, parallel_tol, compile, sampling)
    options.check()
    with _lock:
        own = vars(model).get(_SAMPLERS) if isinstance(model, nn.Module) else None
        if own is None or options not in own or own[options].model is not model:
            made = Sampler(model, options)
            own = model.__dict__.setdefault(_SAMPLERS, _Samplers())
            own[options] = made
            while len(own) > _MOST_SAMPLERS:
                own.popitem(last=False)
        own.move_to_end(options)
        sampler = own[options]
    return sampler.sample(bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress)


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
            raise TypeError(f"sample_tokens expected a MAR model, got {type(model).__name__} without {lacks}")
        self._model, self.options = weakref.ref(model), options
        self._transformer = ChosenTransformer(model, type(model).__name__, options.backend, options.compile)
        self._loop: tuple[object, str | None] = (None, None)  # what was compared, and why it differs
        self._cache = cache
        self._tables: Tables | None = None
        self._head_seen: tuple | None = None
        self._first_on = "cpu"
        self._steps: OrderedDict[tuple, Steps] = OrderedDict()
        self._lock = threading.RLock()

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(self, bsz, num_iter=64, cfg=1.0, cfg_schedule="linear", labels=None, temperature=1.0, progress=False):
        """As :func:`sample_tokens`.

        Raises:
            ValueError: an argument out of range. NotServedError: the model is something else. Nothing was drawn.
        """
        with self._lock:
            model = self._model()
            self.check()
            self.check_call(bsz, num_iter, cfg, cfg_schedule, labels, temperature)
            state = self._begin(model, bsz, num_iter, cfg, cfg_schedule, labels, temperature)
            graphs = why_not_graphs(state) is None
            if graphs and isinstance(state.noise, PhiloxSource):
                state.noise.seed_on_device()
            steps = self._graphs(state) if graphs else PlainSteps(state)
            with steps.of(state):
                self._draw(steps, part_of(self._cache.net, "input").weight.dtype, progress)
                images = model.unpatchify(steps.state.tokens)
                return images.clone() if graphs else images

    def check_call(self, bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress=False) -> None:
        """Raise on an argument out of range."""
        model = self._model()
        check_run(model, model, bsz, labels, temperature, cfg, None, 0, None)
        plan_steps(1, num_iter, cfg, cfg_schedule)

    def _draw(self, steps: Steps | PlainSteps, weights: torch.dtype, progress: bool) -> None:
        state = steps.state
        with tqdm(total=len(state.plan.steps), disable=not progress) as bar:
            for first, chunk in _chunks(state):
                if isinstance(state.noise, TableSource):
                    heads = [models["target"].head for models in state.annealed[first : first + len(chunk)]]
                    wide = torch.promote_types(torch.float32, weights)
                    state.noise.fill(chunk, self.length, wide, [head.num_steps for head in heads] or None)
                for i in range(first, first + len(chunk)):
                    state.go_to(i)
                    steps.target(i)
                    bar.update()

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

    def _begin(self, model, bsz, num_iter, cfg, cfg_schedule, labels, temperature) -> RunState:
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
        for order in orders:  # from numpy's global generator, as the released code draws them
            np.random.shuffle(order)
        orders = to_device(torch.from_numpy(orders), device)
        plan = Plan(orders, torch.arange(bsz, device=device), steps, guided, by_token(steps, device))
        if options.noise == "philox":
            noise = PhiloxSource(int(torch.randint(2**63 - 1, (), device="cpu")), plan.rows, head.channels)
        else:
            span = max(sum(s.before - s.after for s in chunk) for _, chunk in _grouped(steps, _most(bsz, head)))
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

    def _graphs(self, state: RunState) -> Steps:
        key = signature(state)
        if key not in self._steps:
            self._steps[key] = Steps(state)
        self._steps.move_to_end(key)
        keep_current(self._steps, self._transformer.packed(), _MOST_STEPS)
        return self._steps[key]


def _most(batch: int, head: DiffusionHead) -> int:
    """How many tokens of an image have their noise drawn at a time."""
    return max(1, _TABLE_BYTES // (4 * batch * head.num_steps * head.channels))


def _chunks(state: RunState) -> Iterator[tuple[int, list[Step]]]:
    """Steps whose noise is drawn at a time, each with the index of its first one."""
    heads = [state.target.head, *(models["target"].head for models in state.annealed)]
    return _grouped(state.plan.steps, _most(len(state.tokens), max(heads, key=lambda head: head.num_steps)))


def _grouped(steps: list[Step], most: int) -> Iterator[tuple[int, list[Step]]]:
    first = 0
    while first < len(steps):
        stop = first + 1
        while stop < len(steps) and steps[first].before - steps[stop].after <= most:
            stop += 1
        yield first, steps[first:stop]
        first = stop
