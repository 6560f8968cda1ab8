"""What a call of a sampling loop means (:mod:`cspd.made_calls` makes it).

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

from .diffusions import DDIM, NotServedError

if TYPE_CHECKING:
    from cspd_kernels.spec import HeadSpec

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
        if not known and not is_default(value, parameters[name]):
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
        fits = cond.shape[-1] == spec.cond_channels and broadcasts(cond.shape[1:-1], shape[1:-1])
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


def broadcasts(inner: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether conditions of one row are for each of its tokens."""
    return len(inner) == len(wanted) and all(a in (1, b) for a, b in zip(inner, wanted))


def is_default(value, parameter: inspect.Parameter) -> bool:
    """Whether an argument has its default's value; what collects further ones, none."""
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
