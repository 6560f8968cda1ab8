"""Is it the same? A head's own sampling against the patched one, on small copies with random weights.

What is the same differs by rounding, below 1e-5 of the largest value; what is not, by more than a tenth. All steps are
compared, and the last ten by themselves: with random weights x grows over all of them, and would hide what adds little.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn

from cspd_kernels.parts import part_of
from cspd_kernels.spec import spec_of

from .calls import Call
from .diffusions import DDIM, LOOPS
from .errors import UnsupportedModel
from .heads import FoundHead
from .loop import NO_LOOP, LoopHook
from .meanings import Meaning, all_meanings
from .twin import CannotRunError, Copies, OwnNumbers, Run, Trial, copies_of, first_line, normal, quiet, seeded

_ROWS, _TEMPERATURE, _GUIDANCE, _LAST = 4, 0.8, 2.5, 10
_AGAIN = 1.1  # guidance of the last steps: what a method does with its scale may be right at one alone
_SCALES, _SCALES_AGAIN = (_GUIDANCE, 1.7), (0.6, -0.4)
_GUIDANCE_NAMES = ("cfg", "cfg_scale", "guidance_scale", "guidance")


class DiffersError(UnsupportedModel):
    """The module's own code and the kernels compute different tokens."""


@dataclass
class Outcome:
    """What a head's own ``sample`` showed: kinds of calls that are served and right, by what they mean; why others are
    not."""

    kinds: dict[tuple, Meaning] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)
    plain: dict[float, bool] = field(default_factory=dict)  # by guidance: one ancestral loop of it, and nothing more


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
        again = scale != 1.0 and copies.trial.steps is not None
        given = {name: _AGAIN if again and name in _GUIDANCE_NAMES else value for name, value in options.items()}
        return copies.module.sample(normal(shape, copies.trial.net), **given)

    make = partial(copies_of, found.net, found.samplers, found.module, cut=cut)
    own, served, result = _compare(make, run, what)
    outcome.own += own.reasons
    if served is None:
        outcome.own += [] if own.reasons else [NO_LOOP]
        return
    # What else the network is given is compared with values of our own, at the first call.
    outcome.kinds |= {kind: meaning for kind, meaning in served.meanings.items() if not served.kinds[kind][0].extra}
    (first, *more), tokens = served.calls, served.tokens
    meanings = [*served.meanings.values()]
    scales = [meaning.scales([*first.scales.values()]) for meaning in meanings]
    asked = scales in ([()], [(1.0,)]) if scale == 1.0 else scales == [(scale,)]
    ancestral = first.loop == LOOPS[0] and all(m.clip is None and m.way is None for m in meanings)
    warm = first.temperature == _TEMPERATURE or "temperature" not in options
    nothing_else = isinstance(result, torch.Tensor) and result.shape == tokens.shape and torch.equal(result, tokens)
    outcome.plain[scale] = asked and ancestral and warm and not more and nothing_else


def _what_runs(found: FoundHead, options: dict) -> tuple[tuple[int, ...], bool]:
    """(shape of z, whether the copy may be cut) with which the head's own code runs, and calls a loop where it does.

    Raises:
        CannotRunError: none.
    """
    width, failure = _fan_in(part_of(found.net, "cond")), None
    runs = None
    for cut in (True, False):  # a fork may have more parts, which fit the full width only
        for shape in ((_ROWS, width), (2, _ROWS // 2, width), (_ROWS, 1, width)):
            try:
                copies = copies_of(found.net, found.samplers, found.module, cut=cut, serving=False, steps=_LAST)
                with OwnNumbers():
                    copies.module.sample(normal(shape, copies.trial.net), **options)
                runs = runs or (shape, cut)
                if copies.trial.calls:
                    return shape, cut
            except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
                failure = failure or error
        if runs is not None or any(word in str(failure) for word in ("CUDA", "NVIDIA")):  # of any size
            break
    if runs is None:
        raise CannotRunError(first_line(failure)) from failure
    return runs


def _fan_in(cond: nn.Module) -> int:
    """Channels of the conditions that a module embeds, as far as its layers say."""
    fan_in = (layer.in_features for layer in cond.modules() if isinstance(layer, nn.Linear))
    return next(fan_in, 1)


def check_loop(call: Call, diffusion) -> Meaning:
    """Run a copy's loop with and without the kernels, for a kind of call.

    Returns:
        What such calls mean.

    Raises:
        DiffersError: with the figure. CannotRunError: its own code raised.
    """
    failure = None
    with quiet(call.net):
        for cut in (True, False):  # a fork may have more parts, which fit the full width only
            make = partial(copies_of, call.net, [diffusion], cut=cut)
            try:
                _, served, _ = _compare(make, partial(_run_loop, call), "its sampling loop")
            except CannotRunError as error:
                failure = failure or error
                continue
            if served is None:
                raise CannotRunError("its loop is called with other arguments on a copy")
            (meaning,) = served.meanings.values()
            return meaning
    raise failure


def _compare(make: Callable[..., Copies], run: Callable[[Copies], object], what: str):
    """(trial of its own code, trial of the kernels, what the kernels returned), over all steps.

    The first meaning of its calls that agrees is used. (trial, None, None) if its own code made no call that is served.
    """
    owns: list[tuple[int | None, Run, Trial]] = []
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
        owns.append((steps, own, trial))
    failure = None
    for meanings in all_meanings(owns[0][2].kinds):
        try:
            served = [_serve(make, run, what, meanings, *own) for own in owns]
            return owns[0][2], *served[0]
        except (DiffersError, CannotRunError) as error:
            failure = error if failure is None or isinstance(failure, CannotRunError) else failure
    raise failure


def _serve(make, run, what: str, meanings: dict, steps: int | None, own: Run, trial: Trial) -> tuple[Trial, object]:
    """(trial of the kernels, what that returned), the same as its own run did.

    Raises:
        DiffersError: it is not. CannotRunError: the kernels did not serve it.
    """
    copies = make(serving=True, steps=steps)
    copies.trial.meanings = meanings
    try:
        served = seeded(lambda: run(copies), copies.diffusions)
    except Exception as error:
        raise DiffersError(f"{what} runs, but with the kernels it raises {first_line(error)}") from error
    if copies.trial.served != len(trial.calls):  # its own code ran twice, which compares nothing
        raise CannotRunError(f"the kernels did not serve it: {'; '.join(copies.trial.reasons)}")
    guided = next((call for call in trial.calls if call.groups > 1), None)
    same(own, served, guided, what, copies.trial.net)
    return copies.trial, served.result


def plain_call(net: nn.Module, loop: str, method: str, inter_noise: torch.Tensor | None = None) -> Call:
    """A call as the released ``sample`` makes it, of no rows."""
    spec = spec_of(net)
    weight = spec.parts.input.weight
    noise = weight.new_empty(0, spec.channels)
    return Call(
        loop=loop,
        net=net,
        spec=spec,
        method=method,
        nothing=(),
        cond=weight.new_empty(0, spec.cond_channels),
        scales={} if method == "forward" else {"cfg_scale": _GUIDANCE},
        extra={},
        shape=tuple(noise.shape),
        noise=noise,
        inter_noise=inter_noise,
        temperature=1.0,
        clip=False,
        eta=0.0 if loop == DDIM else None,
        function=getattr(type(net), method),
    )


def plain_calls(net: nn.Module, loop: str, steps: int) -> list[Call]:
    """Every kind of call that the released code makes of a loop.

    Raises:
        CannotRunError: they depend on what it is given.
    """
    spec = spec_of(net)
    if spec.condition != "linear":
        raise CannotRunError("its conditions are only known when it is called")
    given = [None]
    if loop == LOOPS[1]:
        given.append(spec.parts.input.weight.new_empty(steps, 0, spec.channels))
    methods = [method for method in ("forward", "forward_with_cfg") if hasattr(net, method)]
    return [plain_call(net, loop, method, noise) for method in methods for noise in given]


def _run_loop(call: Call, copies: Copies):
    net, (diffusion,) = copies.trial.net, copies.diffusions
    hook, groups = LoopHook.of(diffusion), call.groups
    rows = _ROWS * groups // 2 if groups > 1 else _ROWS
    shape = (rows, *call.shape[1:])
    kwargs = {"c": normal((rows, *call.cond.shape[1:]), net), **dict.fromkeys(call.nothing)}
    kwargs |= dict(zip(call.scales, _SCALES if copies.trial.steps is None else _SCALES_AGAIN))
    kwargs |= {name: _rows_of(value, rows) for name, value in call.extra.items()}
    arguments = {"clip_denoised": call.clip, "model_kwargs": kwargs, "temperature": _TEMPERATURE, "eta": call.eta}
    if call.noise is not None:
        arguments["noise"] = normal((rows // groups, *shape[1:]), net).repeat(groups, *(1,) * (len(shape) - 1))
    if call.inter_noise is not None:
        arguments["inter_noise"] = normal((len(call.inter_noise), *shape), net)
    known = inspect.signature(hook.original(call.loop)).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}
    return getattr(diffusion, call.loop)(getattr(net, call.method), shape, **arguments)


def _rows_of(value: torch.Tensor, rows: int) -> torch.Tensor:
    """So many rows like those that a call gave the network: floats between zero and what they were, or 0 and 1/2.

    An index must be one that there is; and one that is 0 would hide what is done with it.
    """
    value = value.detach().clone()
    value = value[torch.arange(rows, device=value.device) % len(value)]
    if not value.is_floating_point():
        return value
    share = torch.linspace(0.2, 1.0, rows, device=value.device).view(-1, *(1,) * (value.dim() - 1))
    value = value.float()
    return torch.where(value == 0, 0.45 * share, value * (0.5 + 0.5 * share))


def hidden(call: Call) -> str | None:
    """The whole numbers that a call gives its network as 0 alone: others may be no index that there is."""
    whole = (name for name, value in call.extra.items() if not value.is_floating_point() and not bool(value.any()))
    return next(whole, None)


def same(own: Run, served: Run, guided: Call | None, what: str, net: nn.Module) -> None:
    """Raise where two runs differ. ``guided``: a call of G N rows, of which callers keep the first N."""
    expected, actual = (_tensors(run.result) for run in (own, served))
    if not expected or len(expected) != len(actual):
        raise DiffersError(f"{what} returns {type(own.result).__name__}, not tensors")
    for a, b in zip(expected, actual):
        if a.shape != b.shape or a.dtype != b.dtype:
            theirs, ours = (f"{v.dtype} {tuple(v.shape)}" for v in (a, b))
            raise DiffersError(f"{what} returns {theirs}, with the kernels it returns {ours}")
        if guided is not None and a.numel() == math.prod(guided.shape):
            a, b = (v.reshape(-1, guided.shape[-1])[: guided.rows] for v in (a, b))
        error = difference(a, b)
        if not error <= tolerance(net):
            raise DiffersError(f"{what} and the kernels' differ by {error:.2g} of the largest value")
    if len(own.states) != len(served.states) or not all(map(torch.equal, own.states, served.states)):
        raise DiffersError(f"{what} leaves the random number generators in a different state than the kernels")
    if missing := own.kept - served.kept:
        names = ", ".join(sorted(name.split(".", 1)[1] for name in missing))
        raise DiffersError(f"{what} also sets {names} of its diffusion object, which the kernels do not")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Difference relative to the largest value of ``a``."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def tolerance(net: nn.Module) -> float:
    """Tolerance relative to the largest value. Between rounding and a difference; TF32 products round to three
    digits."""
    try:
        tf32 = part_of(net, "input").weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by an interface that the old one does not know
        tf32 = True
    return 5e-2 if tf32 else 1e-4


def _tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
