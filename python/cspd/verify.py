"""Is it the same? A head's own sampling against the patched one, on small copies with random weights.

What is the same differs by rounding, below 1e-5 of the largest value; what is not, by more than a tenth. All steps are
compared, and the last ten by themselves: with random weights x grows over all of them, and would hide what adds little.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn

from cspd_kernels.parts import part_of

from .calls import Call
from .diffusions import LOOPS
from .heads import FoundHead
from .loop import NO_LOOP, LoopHook
from .twin import CannotRunError, Copies, OwnNumbers, Run, copies_of, first_line, normal, quiet, seeded

_ROWS, _TEMPERATURE, _GUIDANCE, _LAST = 4, 0.8, 2.5, 10
_GUIDANCE_NAMES = ("cfg", "cfg_scale", "guidance_scale", "guidance")


class DiffersError(ValueError):
    """The module's own code and the kernels compute different tokens."""


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
        with quiet(found.net):
            _compare_samples(found, scale, options, outcome)
    return outcome


def _compare_samples(found: FoundHead, scale: float, options: dict, outcome: Outcome) -> None:
    at = ", ".join(f"{name} {value}" for name, value in options.items())
    what = f"its sample at {at}" if at else "its sample"
    shape, cut = _what_runs(found, options)

    def run(copies: Copies):
        return copies.module.sample(normal(shape, copies.trial.net), **options)

    make = partial(copies_of, found.net, found.samplers, found.module, cut=cut)
    own, served, result = _compare(make, run, what)
    outcome.own += own.reasons
    outcome.kinds |= own.kinds
    if served is None:
        outcome.own += [] if own.reasons else [NO_LOOP]
        return
    (first, *more), tokens = served.calls, served.tokens
    asked = first.cfg_scale in (None, 1.0) if scale == 1.0 else first.cfg_scale == scale
    warm = first.temperature == _TEMPERATURE or "temperature" not in options
    nothing_else = isinstance(result, torch.Tensor) and result.shape == tokens.shape and torch.equal(result, tokens)
    outcome.plain[scale] = asked and warm and not more and nothing_else


def _what_runs(found: FoundHead, options: dict) -> tuple[tuple[int, ...], bool]:
    """(shape of z, whether the copy may be cut) with which the head's own code runs.

    Raises:
        CannotRunError: none.
    """
    width, failure = part_of(found.net, "cond").in_features, None
    for cut in (True, False):  # a fork may have more parts, which fit the full width only
        for shape in ((_ROWS, width), (2, _ROWS // 2, width)):
            try:
                copies = copies_of(found.net, found.samplers, found.module, cut=cut, serving=False, steps=_LAST)
                with OwnNumbers():
                    copies.module.sample(normal(shape, copies.trial.net), **options)
                return shape, cut
            except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
                failure = failure or error
        if any(word in str(failure) for word in ("CUDA", "NVIDIA")):  # of any size
            break
    raise CannotRunError(first_line(failure)) from failure


def check_loop(call: Call, diffusion) -> str:
    """Run a copy's loop with and without the kernels, for a kind of call.

    Returns:
        Where the loop draws x_T where none is given: "cpu" or "device".

    Raises:
        DiffersError: with the figure. CannotRunError: its own code raised.
    """
    failure = None
    with quiet(call.net):
        for draw in ("cpu", "device") if call.noise is None else ("cpu",):
            make = partial(copies_of, call.net, [diffusion], cut=True)
            try:
                _compare(make, partial(_run_loop, call), "its sampling loop", draw)
                return draw
            except DiffersError as error:
                failure = failure or error
    raise failure


def _compare(make: Callable[..., Copies], run: Callable[[Copies], object], what: str, draw: str = "cpu"):
    """(trial of its own code, trial of the kernels, what that returned) over all steps; (trial, None, None) where
    its own code made no call that is served."""
    answer = None
    for steps in (None, _LAST):
        try:
            copies = make(serving=False, steps=steps)
            own = seeded(lambda: run(copies), copies.diffusions)  # noqa: B023
        except Exception as error:
            raise CannotRunError(first_line(error)) from error
        trial = copies.trial
        if not trial.calls:
            return trial, None, None
        if steps is not None and trial.evaluations > steps * len(trial.calls):
            break  # its number of steps is not read where it was set
        copies = make(serving=True, steps=steps)
        copies.trial.draw = draw
        try:
            served = seeded(lambda: run(copies), copies.diffusions)  # noqa: B023
        except Exception as error:
            raise DiffersError(f"{what} runs, and through the kernels it raises {first_line(error)}") from error
        if copies.trial.served != len(trial.calls):  # its own code ran twice, which compares nothing
            raise CannotRunError(f"the kernels did not serve it: {'; '.join(copies.trial.reasons)}")
        guided = [call for call in trial.calls if call.cfg_scale is not None]
        _same(own, served, len(guided[0].cond) if guided else None, what, copies.trial.net)
        answer = answer or (trial, copies.trial, served.result)
    return answer


def plain_call(net: nn.Module, loop: str, method: str, inter_noise: torch.Tensor | None = None) -> Call:
    """A call as the released ``sample`` makes it, of no rows."""
    weight = part_of(net, "input").weight
    noise = weight.new_empty(0, part_of(net, "input").in_features)
    return Call(
        loop=loop,
        net=net,
        method=method,
        nothing=(),
        cond=weight.new_empty(0, part_of(net, "cond").in_features),
        cfg_scale=None if method == "forward" else _GUIDANCE,
        shape=tuple(noise.shape),
        noise=noise,
        inter_noise=inter_noise,
        temperature=1.0,
        function=getattr(type(net), method),
    )


def plain_calls(net: nn.Module, loop: str, steps: int) -> list[Call]:
    """Every kind of call that the released code makes of a loop."""
    given = [None]
    if loop != LOOPS[0]:
        given.append(part_of(net, "input").weight.new_empty(steps, 0, part_of(net, "input").in_features))
    methods = [method for method in ("forward", "forward_with_cfg") if hasattr(net, method)]
    return [plain_call(net, loop, method, noise) for method in methods for noise in given]


def _run_loop(call: Call, copies: Copies):
    net, (diffusion,) = copies.trial.net, copies.diffusions
    hook, channels = LoopHook.of(diffusion), part_of(net, "input").in_features
    shape = (_ROWS, channels)
    kwargs = {"c": normal((_ROWS, part_of(net, "cond").in_features), net), **dict.fromkeys(call.nothing)}
    if call.method == "forward_with_cfg":
        kwargs["cfg_scale"] = _GUIDANCE
    arguments = {"clip_denoised": False, "model_kwargs": kwargs, "temperature": _TEMPERATURE}
    if call.noise is not None:
        half = normal((_ROWS // 2, channels), net)
        arguments["noise"] = torch.cat([half, half])
    if call.inter_noise is not None:
        arguments["inter_noise"] = normal((len(call.inter_noise), *shape), net)
    known = inspect.signature(hook.original(call.loop)).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}
    return getattr(diffusion, call.loop)(getattr(net, call.method), shape, **arguments)


def _same(own: Run, served: Run, guided_rows: int | None, what: str, net: nn.Module) -> None:
    """Raise where two runs differ. ``guided_rows``: 2N under guidance, of which callers drop the last N."""
    expected, actual = (_tensors(run.result) for run in (own, served))
    if not expected or len(expected) != len(actual):
        raise DiffersError(f"{what} returns {type(own.result).__name__}, not tensors")
    for a, b in zip(expected, actual):
        if a.shape != b.shape or a.dtype != b.dtype:
            theirs, ours = (f"{v.dtype} {tuple(v.shape)}" for v in (a, b))
            raise DiffersError(f"{what} returns {theirs}, through the kernels it returns {ours}")
        if guided_rows and a.numel() == guided_rows * part_of(net, "input").in_features:
            a, b = (v.reshape(guided_rows, -1)[: guided_rows // 2] for v in (a, b))
        error = difference(a, b)
        if not error <= tolerance(net):
            raise DiffersError(f"{what} and the kernels' differ by {error:.2g} of the largest value")
    if len(own.states) != len(served.states) or not all(map(torch.equal, own.states, served.states)):
        raise DiffersError(f"{what} leaves the random number generators in another state than the kernels do")
    if missing := own.kept - served.kept:
        names = ", ".join(sorted(name.split(".", 1)[1] for name in missing))
        raise DiffersError(f"{what} also sets {names} of its diffusion object, which the kernels do not")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the largest value of ``a``."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def tolerance(net: nn.Module) -> float:
    """Of the largest value. Between rounding and a difference; TF32 products round to three digits."""
    try:
        tf32 = part_of(net, "input").weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by an interface that the old one does not know
        tf32 = True
    return 5e-2 if tf32 else 1e-4


def _tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
