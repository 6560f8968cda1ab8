"""A call of a head's own sampler as the kernels make it: read by its adapter, looked at, drawn for and denoised."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real

import numpy as np
import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead, PhiloxNoise
from cspd_kernels.head import stream_dtype

from ..calls import is_default
from ..diffusions import NotServedError
from ..made_calls import denoised, draw_steps
from ..source import Source
from .adapter import Adapter, Reading


@dataclass(frozen=True)
class Plan:
    """A call that the kernels can make. Nothing is drawn yet.

    Attributes:
        rows: N. drawn: rows of a draw, repeated down those.
    """

    method: str
    reading: Reading
    rows: int
    drawn: int

    @property
    def cond(self) -> torch.Tensor:
        """(G N, Z)."""
        return self.reading.cond

    @property
    def kind(self) -> tuple:
        """What decides whether the kernels compute the same; the numbers do not."""
        reading, draws = self.reading, self.reading.draws
        drawn = (draws.rows is None, draws.first, draws.steps, draws.last)
        return (self.method, reading.groups, reading.copies, *drawn, self.cond.device.type)


def plan_of(adapter: Adapter, head: nn.Module, name: str, bound: inspect.BoundArguments, source: Source) -> Plan:
    """What a call of a head's method means.

    Args:
        bound: its arguments, defaults included. source: the head's network.

    Raises:
        NotServedError: something that is not known.
    """
    read, parameters, arguments = getattr(adapter, name), bound.signature.parameters, {}
    known = _parameters(read.__func__)
    for key, value in bound.arguments.items():
        if key in known:
            arguments[key] = value
        elif not is_default(value, parameters[key]):
            raise NotServedError(f"its {name} is called with {key}, which is not known")
    try:
        reading = read(head, **arguments)
    except ValueError as error:
        raise NotServedError(f"{error}") from None
    except Exception as error:  # noqa: BLE001  (of arguments that nobody has thought of)
        raise NotServedError(f"the arguments of its {name} cannot be read: {type(error).__name__}: {error}") from None
    cond, groups, width = reading.cond, reading.groups, source.spec.cond_channels
    if not isinstance(cond, torch.Tensor) or cond.dim() != 2 or cond.shape[1] != width or len(cond) % groups:
        got = tuple(cond.shape) if isinstance(cond, torch.Tensor) else type(cond).__name__
        raise NotServedError(f"its conditions are {got}, not ({groups} N, {width})")
    if not cond.is_floating_point() or cond.device != source.device or cond.is_meta:
        raise NotServedError(f"its conditions are {cond.dtype} on {cond.device}, its weights on {source.device}")
    rows = len(cond) // groups
    drawn = rows if reading.draws.rows is None else reading.draws.rows
    if not isinstance(drawn, int) or drawn < (reading.draws.rows is not None) or (drawn and rows % drawn):
        raise NotServedError(f"it draws {drawn!r} rows for {rows} tokens")
    for scale in reading.scales:
        _check_number("a scale of its guidance", scale, rows)
    _check_number("its temperature", reading.temperature, 1)
    return Plan(name, reading, rows, drawn)


@lru_cache(maxsize=64)
def _parameters(read: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(read).parameters)


def _check_number(what: str, value, rows: int) -> None:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 and tuple(value.shape) != (rows, 1):
            raise NotServedError(f"{what} is of shape {tuple(value.shape)}, not one number or ({rows}, 1)")
    elif not isinstance(value, (Real, np.number)) or not math.isfinite(value):
        raise NotServedError(f"{what} is {value!r}, not a finite number")


def run(
    plan: Plan, head: DiffusionHead, backend: str | None, philox: bool, parallel_tol: float | str | None
) -> torch.Tensor:
    """Draw what the method draws, in its order, and make the tokens.

    Args:
        philox: the noise of the steps is addressed by one drawn seed. parallel_tol: as in
            :func:`cspd_kernels.denoise`.
    """
    reading = plan.reading
    x_T, noise = _draw(plan, head, backend, philox)  # noqa: N806
    scales = [s.reshape(-1) if isinstance(s, torch.Tensor) else float(s) for s in reading.scales]
    out = denoised(
        head, reading.cond, x_T, noise, scales, reading.temperature, backend=backend, parallel_tol=parallel_tol
    )
    tokens = out.sample.to(reading.dtype)
    return tokens if reading.copies == 1 else tokens.repeat(reading.copies, 1)


def _draw(plan: Plan, head: DiffusionHead, backend: str | None, philox: bool):
    """(x_T (N, C), the noise of the steps as :func:`cspd_kernels.denoise` takes it)."""
    draws, device, stream = plan.reading.draws, head.device, stream_dtype(head.dtype)
    shape, times = (plan.drawn, head.channels), plan.rows // max(plan.drawn, 1)
    x_T = torch.randn(shape, dtype=draws.dtype, device="cpu" if draws.first == "cpu" else device)  # noqa: N806
    if draws.scale != 1.0:
        x_T = x_T * draws.scale  # noqa: N806
    x_T = x_T.to(device).repeat(times, 1)  # noqa: N806
    if draws.steps and not philox:
        drawn = draw_steps(head.num_steps - 1 + draws.last, shape, draws.dtype, draws.dtype, device, backend).to(stream)
        if not draws.last:  # which has a place, and adds nothing
            drawn = torch.cat([drawn.new_zeros(1, *shape), drawn])
        return x_T, drawn if times == 1 else drawn.repeat(1, times, 1)
    tokens, seed = torch.arange(plan.rows, device=device), 0
    if draws.steps:
        tokens, seed = tokens % plan.drawn, int(torch.randint(2**63 - 1, (), device="cpu"))
    return x_T, PhiloxNoise(seed, tokens)  # of a sampler whose steps add none, nobody sees it
