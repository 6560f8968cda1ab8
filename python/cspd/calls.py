"""What a call of a sampling loop means, and the same call by the kernels.

A call is served where it is of a kind that the kernels compute: a method of the network, nothing moved or hooked, no
argument that they do not know. What its names leave open is found by comparison (:mod:`cspd.meanings`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn as nn

from cspd_kernels import Denoised, DenoisedInParallel, DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.head import stream_dtype
from cspd_kernels.released_noise import randn_steps

from .diffusions import DDIM, NotServedError

if TYPE_CHECKING:
    from cspd_kernels.spec import HeadSpec

    from .meanings import Meaning

_IGNORED = ("model", "shape", "noise", "inter_noise", "model_kwargs", "temperature", "device", "progress",
            "clip_denoised")  # fmt: skip
_PLAIN = {"denoised_fn": "x0 goes through a denoised_fn", "cond_fn": "the mean is moved by a cond_fn"}


@dataclass(frozen=True)
class Call:
    """One call of a sampling loop that the kernels may compute. N tokens in G groups of rows, the first of which is
    wanted: one group without guidance, else one more than there are scales."""

    loop: str
    net: nn.Module
    spec: HeadSpec  # of the network
    method: str  # "forward", or one that mixes the groups
    nothing: tuple[str, ...]  # further keywords of the network, all None
    cond: torch.Tensor  # (rows, Z), or whatever the network embeds
    scales: dict[str, float | torch.Tensor]  # of guidance, by keyword
    extra: dict[str, torch.Tensor]  # further inputs of the network, by keyword
    shape: tuple[int, ...]  # of what the loop draws, (rows, ..., C)
    noise: torch.Tensor | None  # of that shape; None: drawn
    inter_noise: torch.Tensor | None  # (T, rows, C); None: drawn
    temperature: float | torch.Tensor
    clip: bool  # whether x0 is limited
    eta: float | None  # of DDIM
    function: Callable  # behind the method

    @property
    def groups(self) -> int:
        """G."""
        return 1 + len(self.scales)

    @property
    def rows(self) -> int:
        """N: a row of the loop is one token, or as many as its shape has in between."""
        return math.prod(self.shape[:-1]) // self.groups

    @property
    def kind(self) -> tuple:
        """What decides whether the kernels compute the same; the numbers do not."""
        given = (self.noise is None, self.inter_noise is None)
        inputs = tuple((name, value.dim(), value.dtype) for name, value in self.extra.items())
        more = (tuple(self.scales), inputs, self.shape[1:-1], self.cond.dim(), self.clip, self.eta)
        return (self.loop, self.method, self.function, self.nothing, *given, self.cond.device.type, more)


def read_call(
    loop: str, arguments: dict, parameters, found: tuple[nn.Module, str] | None, spec: HeadSpec | None
) -> Call:
    """What a call of a loop means.

    Args:
        arguments: of the call, by the loop's own names. parameters: of the loop, for its defaults.
        found: what :func:`bound_network` says about its model. spec: of that network.

    Raises:
        NotServedError: something that the kernels do not know.
    """
    function = None if found is None else getattr(type(found[0]), found[1], None)
    if function is None or spec is None:
        name = getattr(arguments["model"], "__qualname__", type(arguments["model"]).__name__)
        raise NotServedError(f"the loop is given {name}, not the network's forward or forward_with_cfg")
    net, method = found
    for name, meaning in _PLAIN.items():
        if name in arguments and not (arguments[name] is None or arguments[name] is False):
            raise NotServedError(f"{meaning} ({name})")
    for name, value in arguments.items():
        known = name in _IGNORED or name in _PLAIN or (loop == DDIM and name == "eta")
        if not known and not _is_default(value, parameters[name]):
            raise NotServedError(f"the loop is called with {name}, which the kernels do not know")
    kwargs = dict(arguments.get("model_kwargs") or {})
    cond = kwargs.pop("c", None)
    shape = tuple(arguments["shape"])
    scales, extra = _inputs(method, kwargs, shape)
    groups, noise, channels = 1 + len(scales), arguments.get("noise"), spec.channels
    if len(shape) < 2 or shape[-1] != channels or (noise is not None and tuple(noise.shape) != shape):
        got = shape if noise is None else tuple(noise.shape)
        raise NotServedError(f"the loop starts from {got}, not from (N, {channels})")
    linear = spec.condition == "linear" and not extra
    fits = isinstance(cond, torch.Tensor) and cond.dim() >= 2 and len(cond) == shape[0]
    if fits and linear:
        fits = cond.shape[-1] == spec.cond_channels and _broadcasts(cond.shape[1:-1], shape[1:-1])
    if not fits or shape[0] % groups:
        got = tuple(cond.shape) if isinstance(cond, torch.Tensor) else type(cond).__name__
        rows = {1: "", 2: " with an even number of rows under guidance"}.get(groups, f" with {groups} groups of rows")
        raise NotServedError(f"its conditions are {got}, not {(*shape[:-1], spec.cond_channels)}{rows}")
    if linear and not cond.is_floating_point():
        raise NotServedError(f"its conditions are {cond.dtype}, not floats")
    if cond.is_meta or (noise is not None and noise.is_meta):
        raise NotServedError("its conditions or its noise are on the meta device")
    for name in (*scales, "temperature"):
        value = kwargs.get(name, arguments.get(name))
        wide = isinstance(value, torch.Tensor) and value.dim() and value.dtype == torch.float64
        if wide and spec.parts.input.weight.dtype != torch.float64:
            raise NotServedError(f"{name} is a float64 tensor of shape {tuple(value.shape)}: it makes all of x float64")
    inter = arguments.get("inter_noise")
    if inter is not None and (inter.dim() != 3 or tuple(inter.shape[1:]) != shape):
        raise NotServedError(f"the noise of the steps is {tuple(inter.shape)}, not (T, {shape[0]}, {channels})")
    return Call(
        loop=loop,
        net=net,
        spec=spec,
        method=method,
        nothing=tuple(sorted(name for name, value in kwargs.items() if value is None)),
        cond=cond,
        scales=scales,
        extra=extra,
        shape=shape,
        noise=noise,
        inter_noise=inter,
        temperature=_temperature(arguments.get("temperature", 1.0)),
        clip=_clip(arguments.get("clip_denoised", False)),
        eta=_eta(arguments.get("eta", 0.0)) if loop == DDIM else None,
        function=function,
    )


def _inputs(method: str, kwargs: dict, shape: tuple[int, ...]) -> tuple[dict, dict]:
    """(scales of guidance, further inputs) among the network's keywords.

    Raises:
        NotServedError: one that is neither.
    """
    scales, extra = {}, {}
    for name, value in kwargs.items():
        if value is None:
            continue
        number = isinstance(value, (Real, np.number)) and not isinstance(value, bool)
        tensor = isinstance(value, torch.Tensor)
        if tensor and value.dim() >= 1 and len(value) == shape[0] and not (method != "forward" and "cfg" in name):
            extra[name] = value
        elif method != "forward" and (number or tensor or "cfg_scale" in name):
            scales[name] = value
        else:
            raise NotServedError(f"the network is also given {name}")
    if method != "forward" and not scales:
        raise NotServedError(f"{method} is called without cfg_scale")
    if len(scales) > 2:
        raise NotServedError(f"{method} is called with {', '.join(scales)}: not one scale of guidance, or two")
    rows = math.prod(shape[:-1]) // (1 + len(scales))
    return {name: _scale(name, value, rows) for name, value in scales.items()}, extra


def _broadcasts(inner: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether conditions of one row are for each of its tokens."""
    return len(inner) == len(wanted) and all(a in (1, b) for a, b in zip(inner, wanted))


def _is_default(value, parameter: inspect.Parameter) -> bool:
    default = parameter.default
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return not value
    return value is default or (
        type(value) is type(default) and isinstance(value, (int, float, str)) and value == default
    )


def _scale(name: str, scale, rows: int) -> float | torch.Tensor:
    """A tensor stays where it is: the host does not wait for its value."""
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1 and tuple(scale.shape) != (rows, 1):
            raise NotServedError(f"{name} is of shape {tuple(scale.shape)}, not one number or ({rows}, 1)")
        return scale.reshape(-1) if scale.is_floating_point() else scale.reshape(-1).float()
    if not isinstance(scale, (Real, np.number)) or not math.isfinite(scale):
        raise NotServedError(f"{name} is {scale!r}, not a finite number")
    return float(scale)


def _clip(clip) -> bool:
    if isinstance(clip, (bool, np.bool_)) or clip is None:
        return bool(clip)
    raise NotServedError(f"clip_denoised is {clip!r}, neither True nor False")


def _eta(eta) -> float:
    if not isinstance(eta, (Real, np.number)) or not 0 <= eta <= 1:
        raise NotServedError(f"eta is {eta!r}, not a number in [0, 1]")
    return float(eta)


def _temperature(temperature) -> float | torch.Tensor:
    """A tensor on a device stays there: the host does not wait for its value."""
    one = isinstance(temperature, torch.Tensor) and temperature.numel() == 1
    if not one and not isinstance(temperature, (Real, np.number)):
        raise NotServedError(f"the temperature is a {type(temperature).__name__}, not one number")
    if one and temperature.device.type != "cpu":
        return temperature.reshape(()) if temperature.is_floating_point() else temperature.reshape(()).float()
    if not 0 <= (value := float(temperature)) < math.inf:
        raise NotServedError(f"the temperature is {value}, not a finite number >= 0")
    return value


def run_call(
    call: Call,
    head: DiffusionHead,
    meaning: Meaning,
    *,
    backend: str | None,
    philox: bool,
    parallel_tol: float | str | None,
) -> Denoised | DenoisedInParallel:
    """A call by the kernels. What the loop would draw is drawn, in its order; (N, ...) come back.

    Args:
        head: with the schedule of the call; of embedded conditions where the meaning has them embedded.
        philox: the noise of the steps is addressed by one drawn seed, not drawn step by step.
        parallel_tol: as in :func:`cspd_kernels.denoise`.
    """
    device, stream, rows = head.device, stream_dtype(head.dtype), call.rows
    if call.inter_noise is not None and len(call.inter_noise) != head.num_steps:
        raise NotServedError(f"the noise of the steps is of {len(call.inter_noise)}, not {head.num_steps} steps")
    cond = embedded(call, meaning, head)  # it may raise, so before anything is drawn
    x_T = call.noise  # noqa: N806
    if x_T is None:
        x_T = torch.randn(call.shape, device="cpu" if meaning.draw == "cpu" else device)  # noqa: N806
    x_T = x_T.reshape(-1, call.shape[-1])  # noqa: N806
    wide = loop_dtype(call, x_T.dtype)
    if call.inter_noise is not None:
        noise = call.inter_noise[:, :rows].to(stream)
    elif not meaning.each_step:
        noise = PhiloxNoise(0, torch.arange(rows, device=device))  # no step adds any of it
    elif philox:
        noise = PhiloxNoise(int(torch.randint(2**63 - 1, (), device="cpu")), torch.arange(rows, device=device))
    else:
        drawn = draw_steps(head.num_steps, tuple(x_T.shape), x_T.dtype, wide, device, backend)
        noise = drawn[:, :rows].to(stream)
    scales = [
        s if not isinstance(s, torch.Tensor) else s.to(stream) if s.numel() == 1 else s.to(device, stream)
        for s in meaning.scales(list(call.scales.values()))
    ]
    if len(scales) == 1 and isinstance(scales[0], float) and scales[0] == 1.0:  # guided by nothing
        cond = cond[:rows]
    cond, x_T = (v.to(stream) if v.dtype == torch.float64 else v for v in (cond, x_T[:rows].to(device)))  # noqa: N806
    return denoise(
        head,
        cond,
        x_T,
        noise,
        temperature=call.temperature,
        cfg_scale=tuple(scales) if len(scales) > 1 else scales[0] if scales else 1.0,
        backend=backend,
        parallel_tol=parallel_tol,
    )


def embedded(call: Call, meaning: Meaning, head: DiffusionHead) -> torch.Tensor:
    """(G N, Z), the conditions of all tokens; (G N, W) where the network's own modules embed them.

    Raises:
        NotServedError: those make something else.
    """
    cond, inner = call.cond, call.shape[1:-1]
    if meaning.way is None and not inner:
        return cond
    if meaning.way is not None:
        with torch.no_grad():
            cond = meaning.way.embed(call.net, cond, call.extra)
    if not _broadcasts(cond.shape[1:-1], inner) or cond.shape[-1] != head.cond_channels:
        raise NotServedError(f"its conditions become {tuple(cond.shape)}, not (..., {head.cond_channels})")
    return cond.expand(len(cond), *inner, cond.shape[-1]).reshape(-1, cond.shape[-1]) if inner else cond


def loop_dtype(call: Call, noise: torch.dtype) -> torch.dtype:
    """Type of x after the first step: the loop's tables are float32, its network's output as wide as its weights."""
    weights = call.spec.parts.input.weight.dtype
    return torch.promote_types(torch.promote_types(noise, torch.float32), weights)


def draw_steps(
    steps: int, shape: tuple[int, int], first: torch.dtype, then: torch.dtype, device, backend: str | None = None
) -> torch.Tensor:
    """(T, rows, C) in ``then``, as the loop draws it: ``randn_like(x)`` at every step, T-1 first and 0 included.

    x is of type ``first`` at the first step. ``backend`` is as in :func:`randn_steps`.
    """
    if device.type == "cpu" and first == then and math.prod(shape) % 16 == 0:
        # In blocks of 16 the CPU's generator gives the same numbers at once as it gives step by step.
        return torch.randn((steps, *shape), dtype=then, device=device).flip(0)
    return randn_steps(steps, shape, then, device, first=first, newest_first=True, backend=backend)


def finish(call: Call, out: Denoised | DenoisedInParallel, diffusion) -> torch.Tensor:
    """What the loop returns: under guidance G N rows, of which callers keep the first N; here the others repeat those.

    CSpD's distribution manager is filled as its loops fill it.
    """
    dtype = loop_dtype(call, torch.float32 if call.noise is None else call.noise.dtype)
    double = call.groups
    tokens = out.sample.to(dtype).repeat(double, 1).view(call.shape)
    manager = getattr(diffusion, "manager", None)
    if manager is not None and call.loop != DDIM:
        manager.sample, manager.mean = tokens, out.mean.to(dtype).repeat(double, 1)
        manager.variance = out.log_std.exp().to(dtype).repeat(double, 1)  # a standard deviation, despite its name
        if call.loop == "p_sample_loop_with_noise":  # only its sum over the channels is ever used
            channels = out.mean.shape[1]
            manager.log_var = (out.path_log_std[:, None] / channels).to(dtype).repeat(double, channels)
    return tokens
