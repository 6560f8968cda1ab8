"""Is it the same? A head's own sampling against the patched one, on a small copy with random weights.

The copy is of the head's own classes, its weights cut to a small width and made random: a freshly built head puts out
zeros whatever it computes, and trained ones may hide a difference. What is the same differs by rounding, below 1e-5 of
the largest value; what is not, by more than a tenth.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn

from cspd_kernels.head import without_autocast
from cspd_kernels.structure import linears, norms

from .diffusions import LOOPS, NotServedError
from .heads import FoundHead, HeadCache
from .loop import PATCHES, Call, LoopHook, finish, run_call

_WIDTH, _ROWS, _TEMPERATURE, _GUIDANCE = 32, 4, 0.8, 2.5
_GUIDANCE_NAMES = ("cfg", "cfg_scale", "guidance_scale", "guidance")
_SEED = 20240617


class DiffersError(ValueError):
    """The module's own code and the kernels compute different tokens."""


class CannotRunError(ValueError):
    """The module's own code does not run on a small copy here; nothing is known."""


@dataclass
class Trial:
    """The patch of a copied network: runs its own loop, or serves its calls by the torch backend, and keeps notes."""

    net: nn.Module
    serving: bool
    draw: str = "cpu"
    calls: list[Call] = field(default_factory=list)
    kinds: set[tuple] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)
    tokens: torch.Tensor | None = None  # of the last call that was served

    def __post_init__(self):
        self.cache = HeadCache(self.net)

    def take(self, call: Call, hook: LoopHook) -> torch.Tensor:
        head = self.cache.get(hook.tables.schedule(), torch.float32)
        self.calls.append(call)
        self.kinds.add(hook.kind(call))
        if not self.serving:
            raise NotServedError("")
        out = run_call(call, head, backend="torch", philox=False, draw=self.draw)
        self.tokens = finish(call, out, hook.diffusion)
        return self.tokens

    def tell(self, reason: str) -> None:
        if reason:
            self.reasons.append(reason)


@dataclass
class Outcome:
    """What a head's own ``sample`` showed: kinds of calls that are served and right; why others are not."""

    kinds: set[tuple] = field(default_factory=set)
    own: list[str] = field(default_factory=list)
    plain: dict[float, bool] = field(default_factory=dict)  # by guidance: one loop with just that, and nothing more


def check_sample(found: FoundHead) -> Outcome:
    """Run a copy's own ``sample`` with and without the kernels, at guidance 1 and 2.5.

    Raises:
        DiffersError: with the figure. CannotRunError: its own code raised, or it has no ``sample``.
    """
    if not callable(getattr(found.module, "sample", None)):
        raise CannotRunError("it has no method sample")
    outcome = Outcome()
    parameters = inspect.signature(found.module.sample).parameters
    guidance = next((name for name in _GUIDANCE_NAMES if name in parameters), None)
    for scale in (1.0, _GUIDANCE) if guidance else (1.0,):
        options = {guidance: scale} if guidance else {}
        if "temperature" in parameters:
            options["temperature"] = _TEMPERATURE
        with _quiet(found.net):
            _compare_samples(found, scale, options, outcome)
    return outcome


def _compare_samples(found: FoundHead, scale: float, options: dict, outcome: Outcome) -> None:
    shape, cut, own, trial = _own_sample(found, options)
    if not trial.calls:
        outcome.own += trial.reasons or ["its sample runs without p_sample_loop: by a sampler of its own"]
        return
    what = "its sample at " + ", ".join(f"{name} {value}" for name, value in options.items()) if options else "sample"
    copies = _copies(found.net, found.diffusions, found.module, cut=cut, serving=True)
    served = _seeded(lambda: copies.module.sample(_normal(shape, copies.trial.net), **options), copies.diffusions)
    guided = [call for call in trial.calls if call.cfg_scale is not None]
    _same(own, served, len(guided[0].cond) if guided else None, what, found.net)
    outcome.kinds |= trial.kinds
    outcome.own += trial.reasons
    first, tokens = copies.trial.calls[0], copies.trial.tokens
    asked = first.cfg_scale in (None, 1.0) if scale == 1.0 else first.cfg_scale == scale
    same = isinstance(served.result, torch.Tensor) and served.result.shape == tokens.shape
    outcome.plain[scale] = (
        asked
        and len(copies.trial.calls) == 1
        and (first.temperature == _TEMPERATURE or "temperature" not in options)
        and same
        and torch.equal(served.result, tokens)
    )


def _own_sample(found: FoundHead, options: dict):
    """(shape of z, whether the copy was cut, the run, its trial) of the first copy whose own code runs."""
    width, failure = found.net.cond_embed.in_features, None
    for cut in (True, False):  # a fork may have more parts, which fit the full width only
        for shape in ((_ROWS, width), (2, _ROWS // 2, width)):
            try:
                copies = _copies(found.net, found.diffusions, found.module, cut=cut, serving=False)
                z = _normal(shape, copies.trial.net)
                own = _seeded(lambda: copies.module.sample(z, **options), copies.diffusions)  # noqa: B023
                return shape, cut, own, copies.trial
            except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
                failure = failure or error
        if "CUDA" in str(failure):
            break
    raise CannotRunError(_first_line(failure)) from failure


def check_loop(call: Call, diffusion) -> str:
    """Run a copy's loop with and without the kernels, for a kind of call.

    Returns:
        Where the loop draws x_T where none is given: "cpu" or "device".

    Raises:
        DiffersError: with the figure. CannotRunError: its own code raised.
    """
    with _quiet(call.net):
        failure, draws = None, ("cpu", "device") if call.noise is None else ("cpu",)
        try:
            copies = _copies(call.net, [diffusion], cut=True, serving=False)
            own = _seeded(lambda: _run_loop(call, copies), copies.diffusions)
        except Exception as error:
            raise CannotRunError(_first_line(error)) from error
        for draw in draws:
            copies = _copies(call.net, [diffusion], cut=True, serving=True)
            copies.trial.draw = draw
            served = _seeded(lambda: _run_loop(call, copies), copies.diffusions)  # noqa: B023
            try:
                _same(own, served, None if call.cfg_scale is None else _ROWS, "its sampling loop", call.net)
                return draw
            except DiffersError as error:
                failure = failure or error
        raise failure


def plain_call(net: nn.Module, method: str) -> Call:
    """A call as ``sample`` of LTH14/mar makes it, of no rows."""
    weight = net.input_proj.weight
    noise = weight.new_empty(0, net.input_proj.in_features)
    return Call(
        loop=LOOPS[0],
        net=net,
        method=method,
        nothing=(),
        cond=weight.new_empty(0, net.cond_embed.in_features),
        cfg_scale=None if method == "forward" else _GUIDANCE,
        shape=tuple(noise.shape),
        noise=noise,
        inter_noise=None,
        temperature=1.0,
        function=getattr(type(net), method),
    )


def _run_loop(call: Call, copies: Copies):
    net, (diffusion,) = copies.trial.net, copies.diffusions
    hook, channels = LoopHook.of(diffusion), net.input_proj.in_features
    shape = (_ROWS, channels)
    kwargs = {"c": _normal((_ROWS, net.cond_embed.in_features), net), **dict.fromkeys(call.nothing)}
    if call.method == "forward_with_cfg":
        kwargs["cfg_scale"] = _GUIDANCE
    arguments = {"clip_denoised": False, "model_kwargs": kwargs, "temperature": _TEMPERATURE}
    if call.noise is not None:
        half = _normal((_ROWS // 2, channels), net)
        arguments["noise"] = torch.cat([half, half])
    if call.inter_noise is not None:
        arguments["inter_noise"] = _normal((hook.tables.schedule().num_steps, *shape), net)
    known = inspect.signature(hook.original(call.loop)).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}
    return getattr(diffusion, call.loop)(getattr(net, call.method), shape, **arguments)


@dataclass
class Copies:
    """A copied head that samples by its own code, watched by a :class:`Trial`."""

    trial: Trial
    diffusions: list
    module: nn.Module | None


def _copies(net: nn.Module, diffusions: list, module: nn.Module | None = None, *, cut: bool, serving: bool) -> Copies:
    """Copies with random weights, cut to a small width or not; the weights themselves are never copied."""
    memo, sizes, width = {}, [], net.input_proj.out_features
    small = min(width, _WIDTH) if cut else width
    generator = torch.Generator("cpu").manual_seed(_SEED)

    def fresh(parameter: torch.Tensor | None, *shape: int, scale: float, around: float = 0.0) -> None:
        if parameter is not None and id(parameter) not in memo:
            values = around + scale * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            memo[id(parameter)] = nn.Parameter(values.to(parameter.device), requires_grad=False)

    for name, layer in linears(net):
        narrow = name in ("net.input_proj", "net.cond_embed", "net.time_embed.mlp[0]")
        fan_in = layer.in_features if narrow else layer.in_features // width * small
        last = name == "net.final_layer.linear"
        fan_out = layer.out_features if last else layer.out_features // width * small
        fresh(layer.weight, fan_out, fan_in, scale=fan_in**-0.5)
        fresh(layer.bias, fan_out, scale=0.1)
        sizes.append((fan_in, fan_out))
    for _, norm in norms(net):
        fresh(norm.weight, small, scale=0.1, around=1.0)
        fresh(norm.bias, small, scale=0.1)
    for part in [net, *(module.modules() if module is not None else ())]:
        if (patches := part.__dict__.get(PATCHES)) is not None:  # a copy is nobody's yet
            memo[id(patches)] = []
    wrapper = module.net if module is not None else net
    net_copy, layers = copy.deepcopy((net, [layer for _, layer in linears(net)]), memo)
    while wrapper is not net:  # compiled, or made parallel: the copy is neither
        memo[id(wrapper)] = net_copy
        wrapper = wrapper._modules.get("_orig_mod") or wrapper._modules["module"]
    module, diffusions = copy.deepcopy((module, diffusions), memo)
    for layer, size in zip(layers, sizes):
        layer.in_features, layer.out_features = size
    for _, norm in norms(net_copy):
        norm.normalized_shape = (small,)
    for part in (net_copy, module):
        if part is not None:
            part.float().eval()
    trial = Trial(net_copy, serving)
    net_copy.__dict__[PATCHES] = [trial]
    for diffusion in diffusions:
        if (hook := LoopHook.of(diffusion)) is not None:
            hook.remove()
        LoopHook(diffusion).install()
    return Copies(trial, diffusions, module)


def _normal(shape: tuple, net: nn.Module) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(_SEED + 1)
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return values.to(net.input_proj.weight.device)


@dataclass
class Run:
    """A run from fixed seeds: its result, the generators' states after it, what it set on its diffusion objects."""

    result: object
    states: list[torch.Tensor]
    kept: set[str]


def _seeded(run: Callable[[], object], diffusions: list) -> Run:
    generators = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    for generator in generators:
        generator.manual_seed(_SEED)
    np.random.seed(0)
    random.seed(0)
    before = _attributes(diffusions)
    result = run()
    after = _attributes(diffusions)
    kept = {name for name, value in after.items() if name not in before or before[name] is not value}
    return Run(result, [generator.get_state() for generator in generators], kept)


def _attributes(diffusions: list) -> dict[str, object]:
    """Of the diffusion objects, and of the plain objects that those hold."""
    found = {}
    for i, diffusion in enumerate(diffusions):
        for name, value in vars(diffusion).items():
            found[f"{i}.{name}"] = value
            if name not in LOOPS and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
                found |= {f"{i}.{name}.{inner}": part for inner, part in vars(value).items()}
    return found


def _same(own: Run, served: Run, guided_rows: int | None, what: str, net: nn.Module) -> None:
    """Raise where two runs differ. ``guided_rows``: 2N under guidance, of which callers drop the last N."""
    expected, actual = (_tensors(run.result) for run in (own, served))
    if not expected or len(expected) != len(actual):
        raise DiffersError(f"{what} returns {type(own.result).__name__}, not tensors")
    for a, b in zip(expected, actual):
        if a.shape != b.shape or a.dtype != b.dtype:
            theirs, ours = (f"{v.dtype} {tuple(v.shape)}" for v in (a, b))
            raise DiffersError(f"{what} returns {theirs}, through the kernels it returns {ours}")
        if guided_rows and a.numel() == guided_rows * net.input_proj.in_features:
            a, b = (v.reshape(guided_rows, -1)[: guided_rows // 2] for v in (a, b))
        error = _difference(a, b)
        if not error <= _tolerance(net):
            raise DiffersError(f"{what} and the kernels' differ by {error:.2g} of the largest value")
    if not all(map(torch.equal, own.states, served.states)):
        raise DiffersError(f"{what} leaves the random number generators in another state than the kernels do")
    if missing := own.kept - served.kept:
        names = ", ".join(sorted(name.split(".", 1)[1] for name in missing))
        raise DiffersError(f"{what} also sets {names} of its diffusion object, which the kernels do not")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def _tolerance(net: nn.Module) -> float:
    """Between rounding and a difference; TF32 products round to three digits."""
    tf32 = net.input_proj.weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return 5e-2 if tf32 else 1e-3


def _tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


@contextlib.contextmanager
def _quiet(net: nn.Module) -> Iterator[None]:
    """Nothing of the caller's state has a part in a comparison, and nothing is left of it afterwards."""
    device = net.input_proj.weight.device
    if device.type == "meta":
        raise CannotRunError("its weights are on the meta device")
    dtype, numbers, python = torch.get_default_dtype(), np.random.get_state(), random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            if dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
            with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
                yield
        finally:
            if dtype != torch.float32:
                torch.set_default_dtype(dtype)
            np.random.set_state(numbers)
            random.setstate(python)
