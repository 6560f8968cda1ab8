"""What a call of a sampling loop means, and the same call by the kernels.

A call is served where it is MAR's: the network's ``forward`` or ``forward_with_cfg``, nothing clipped or hooked, no
argument that the kernels do not know.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
import torch.nn as nn

from cspd_kernels import Denoised, DenoisedInParallel, DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.head import stream_dtype
from cspd_kernels.parts import part_of
from cspd_kernels.released_noise import randn_steps

from .diffusions import NotServedError

_IGNORED = ("model", "shape", "noise", "inter_noise", "model_kwargs", "temperature", "device", "progress")
_PLAIN = {"clip_denoised": "x0 is clipped", "denoised_fn": "x0 goes through a denoised_fn",
          "cond_fn": "the mean is moved by a cond_fn"}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of a sampling loop that has MAR's meaning. N tokens; with guidance 2N rows, conditional first."""

    loop: str
    net: nn.Module
    method: str  # "forward" or "forward_with_cfg"
    nothing: tuple[str, ...]  # further keywords of the network, all None
    cond: torch.Tensor  # (N or 2N, Z)
    cfg_scale: float | torch.Tensor | None  # None without guidance
    shape: tuple[int, int]  # of what the loop draws, (N or 2N, C)
    noise: torch.Tensor | None  # of that shape; None: drawn
    inter_noise: torch.Tensor | None  # (T, N or 2N, C); None: drawn
    temperature: float
    function: Callable  # behind the method

    @property
    def rows(self) -> int:
        """N."""
        return self.shape[0] if self.cfg_scale is None else self.shape[0] // 2

    @property
    def kind(self) -> tuple:
        """What decides whether the kernels compute the same; the numbers do not."""
        given = (self.noise is None, self.inter_noise is None)
        return (self.loop, self.method, self.function, self.nothing, *given, self.cond.device.type)


def read_call(loop: str, arguments: dict, parameters, found: tuple[nn.Module, str] | None) -> Call:
    """What a call of a loop means.

    Args:
        arguments: of the call, by the loop's own names. parameters: of the loop, for its defaults.
        found: what :func:`bound_network` says about its model.

    Raises:
        NotServedError: something that the kernels do not know.
    """
    if found is None or found[1] not in ("forward", "forward_with_cfg"):
        name = getattr(arguments["model"], "__qualname__", type(arguments["model"]).__name__)
        raise NotServedError(f"the loop is given {name}, not the network's forward or forward_with_cfg")
    net, method = found
    for name, meaning in _PLAIN.items():
        if name in arguments and not (arguments[name] is None or arguments[name] is False):
            raise NotServedError(f"{meaning} ({name})")
    for name, value in arguments.items():
        known = name in _IGNORED or name in _PLAIN
        if not known and not _is_default(value, parameters[name]):
            raise NotServedError(f"the loop is called with {name}, which the kernels do not know")
    kwargs = dict(arguments.get("model_kwargs") or {})
    cond, scale = kwargs.pop("c", None), None
    if method == "forward_with_cfg":
        scale = kwargs.pop("cfg_scale", None)
        if scale is None:
            raise NotServedError("forward_with_cfg is called without cfg_scale")
    if unknown := [name for name, value in kwargs.items() if value is not None]:
        raise NotServedError(f"the network is also given {', '.join(unknown)}")
    noise, shape = arguments.get("noise"), tuple(arguments["shape"])
    channels = part_of(net, "input").in_features
    guided = method == "forward_with_cfg"
    if len(shape) != 2 or shape[1] != channels or (noise is not None and tuple(noise.shape) != shape):
        got = shape if noise is None else tuple(noise.shape)
        raise NotServedError(f"the loop starts from {got}, not from (N, {channels})")
    expected = (shape[0], part_of(net, "cond").in_features)
    if not isinstance(cond, torch.Tensor) or tuple(cond.shape) != expected or (guided and shape[0] % 2):
        got = tuple(cond.shape) if isinstance(cond, torch.Tensor) else type(cond).__name__
        raise NotServedError(f"its conditions are {got}, not {expected} with an even number of rows under guidance")
    if cond.is_meta or (noise is not None and noise.is_meta):
        raise NotServedError("its conditions or its noise are on the meta device")
    inter = arguments.get("inter_noise")
    if inter is not None and (inter.dim() != 3 or tuple(inter.shape[1:]) != shape):
        raise NotServedError(f"the noise of the steps is {tuple(inter.shape)}, not (T, {shape[0]}, {channels})")
    return Call(
        loop=loop,
        net=net,
        method=method,
        nothing=tuple(sorted(kwargs)),
        cond=cond,
        cfg_scale=_scale(scale, shape[0] // 2) if guided else None,
        shape=shape,
        noise=noise,
        inter_noise=inter,
        temperature=_temperature(arguments.get("temperature", 1.0)),
        function=getattr(type(net), method),
    )


def _is_default(value, parameter: inspect.Parameter) -> bool:
    default = parameter.default
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return not value
    return value is default or (
        type(value) is type(default) and isinstance(value, (int, float, str)) and value == default
    )


def _scale(scale, rows: int) -> float | torch.Tensor:
    """A tensor stays where it is: the host does not wait for its value."""
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1 and tuple(scale.shape) != (rows, 1):
            raise NotServedError(f"cfg_scale is of shape {tuple(scale.shape)}, not one number or ({rows}, 1)")
        return scale.reshape(-1) if scale.is_floating_point() else scale.reshape(-1).float()
    if not isinstance(scale, (Real, np.number)) or not math.isfinite(scale):
        raise NotServedError(f"cfg_scale is {scale!r}, not a finite number")
    return float(scale)


def _temperature(temperature) -> float:
    one = isinstance(temperature, torch.Tensor) and temperature.numel() == 1
    if not one and not isinstance(temperature, (Real, np.number)):
        raise NotServedError(f"the temperature is a {type(temperature).__name__}, not one number")
    if not 0 <= (value := float(temperature)) < math.inf:
        raise NotServedError(f"the temperature is {value}, not a finite number >= 0")
    return value


def run_call(
    call: Call,
    head: DiffusionHead,
    *,
    backend: str | None,
    philox: bool,
    parallel_tol: float | str | None,
    draw: str = "cpu",
) -> Denoised | DenoisedInParallel:
    """A call by the kernels. What the loop would draw is drawn, in its order; (N, ...) come back.

    Args:
        philox: the noise of the steps is addressed by one drawn seed, not drawn step by step.
        parallel_tol: as in :func:`cspd_kernels.denoise`.
        draw: the generator that x_T comes from where it is not given: the CPU's or the device's.
    """
    device, stream, rows = head.device, stream_dtype(head.dtype), call.rows
    if call.inter_noise is not None and len(call.inter_noise) != head.num_steps:
        raise NotServedError(f"the noise of the steps is of {len(call.inter_noise)}, not {head.num_steps} steps")
    x_T = call.noise  # noqa: N806
    if x_T is None:
        x_T = torch.randn(call.shape, device="cpu" if draw == "cpu" else device)  # noqa: N806
    wide = loop_dtype(call, x_T.dtype)
    if call.inter_noise is not None:
        noise = call.inter_noise[:, :rows].to(stream)
    elif philox:
        noise = PhiloxNoise(int(torch.randint(2**63 - 1, (), device="cpu")), torch.arange(rows, device=device))
    else:
        drawn = draw_steps(head.num_steps, call.shape, x_T.dtype, wide, device, backend)
        noise = drawn[:, :rows].to(stream)
    cond, scale = call.cond, call.cfg_scale
    if isinstance(scale, float) and scale == 1.0:  # guided by nothing
        cond = cond[:rows]
    elif isinstance(scale, torch.Tensor):
        scale = scale.to(device, stream) if scale.numel() != 1 else scale.to(stream)
    cond, x_T = (v.to(stream) if v.dtype == torch.float64 else v for v in (cond, x_T[:rows].to(device)))  # noqa: N806
    return denoise(
        head,
        cond,
        x_T,
        noise,
        temperature=call.temperature,
        cfg_scale=1.0 if scale is None else scale,
        backend=backend,
        parallel_tol=parallel_tol,
    )


def loop_dtype(call: Call, noise: torch.dtype) -> torch.dtype:
    """Type of x after the first step: the loop's tables are float32, its network's output as wide as its weights."""
    weights = part_of(call.net, "input").weight.dtype
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
    """What the loop returns: under guidance 2N rows, of which callers drop the last N; here they repeat the first.

    CSpD's distribution manager is filled as its loops fill it.
    """
    dtype = loop_dtype(call, torch.float32 if call.noise is None else call.noise.dtype)
    double = 1 if call.cfg_scale is None else 2
    tokens = out.sample.to(dtype).repeat(double, 1)
    manager = getattr(diffusion, "manager", None)
    if manager is not None:
        manager.sample, manager.mean = tokens, out.mean.to(dtype).repeat(double, 1)
        manager.variance = out.log_std.exp().to(dtype).repeat(double, 1)  # a standard deviation, despite its name
        if call.loop == "p_sample_loop_with_noise":  # only its sum over the channels is ever used
            channels = out.mean.shape[1]
            manager.log_var = (out.path_log_std[:, None] / channels).to(dtype).repeat(double, channels)
    return tokens
