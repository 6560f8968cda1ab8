"""What a call of a head's network means: its x, its times and its condition, whatever they are named and shaped.

A kind of call is what decides whether the kernels compute the same: names, ranks, which dimensions are equal, types,
autocast. How many rows there are does not.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch

from cspd_kernels.head import call_dtype

from .diffusions import NotServedError
from .verify import DiffersError

# What networks name their arguments, as far as this is known; else the first three are x, t and c.
NAMES = {
    "x": ("x", "noisy_images", "noisy_latents", "x_t", "xt", "noisy", "noised", "latents", "sample", "input"),
    "t": ("t", "s", "timesteps", "timestep", "time", "times", "ts", "sigma"),
    "c": ("c", "condition", "cond", "conditions", "z", "context", "y"),
}  # LTH14/mar; microsoft/VibeVoice; kyutai-labs/pocket-tts and others
MISSING = inspect.Parameter.empty
_TENSORS = (torch.Tensor, torch.nn.Parameter)  # of a subclass anything may come back
_SIZES = (3, 4, 5, 6, 7, 8, 9)  # of a small call, for every size that differs from the others


class Roles:
    """Which parameter of a network's forward is x, which are times, which is the condition."""

    def __init__(self, forward: Callable, times: int):
        parameters = inspect.signature(forward).parameters.values()
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in parameters if p.kind in plain]
        self.defaults = {p.name: p.default for p in parameters if p.kind in (*plain, inspect.Parameter.KEYWORD_ONLY)}
        by_role = {role: [n for n in self.names if n in known] for role, known in NAMES.items()}
        if [len(by_role[role]) for role in ("x", "t", "c")] != [1, times, 1]:
            first = self.names[: 2 + times]
            by_role = {"x": first[:1], "t": first[1:-1], "c": first[-1:]}
        self.x, self.times, self.c = by_role["x"][0], tuple(by_role["t"]), by_role["c"][0]
        if len(self.times) != times:
            raise DiffersError(f"its forward takes {', '.join(self.names)}, but x, {times} times and c were expected")
        self.needed = (self.x, *self.times, self.c)

    def read(self, args: tuple, kwargs: dict) -> tuple:
        """(x, times, c) of a call.

        Raises:
            NotServedError: it has other arguments.
        """
        if len(args) > len(self.names):
            raise NotServedError(
                f"its network is called with {len(args)} arguments, of which {len(self.names)} are known"
            )
        given = dict(zip(self.names, args))
        for name, value in kwargs.items():
            if name in given:
                raise NotServedError(f"its network is given {name} twice")
            given[name] = value
        for name, value in given.items():
            if name not in self.needed and value is not None and value is not self.defaults.get(name, MISSING):
                raise NotServedError(f"its network is also given {name}")
        if missing := [name for name in self.needed if name not in given]:
            raise NotServedError(f"its network is called without {', '.join(missing)}")
        return given[self.x], tuple(given[name] for name in self.times), given[self.c]

    def arguments(self, x, times: tuple, c) -> dict:
        """The keyword arguments of such a call."""
        return dict(zip(self.needed, (x, *times, c)))


@dataclass(frozen=True)
class Kind:
    """A kind of call, by which a small one like it can be made."""

    x: tuple  # (leading shape by small sizes, type)
    times: tuple  # of each: the same, or the class of a number
    c: tuple
    autocast: torch.dtype | None

    @staticmethod
    def of(x, times: tuple, c) -> Kind:
        """Raises NotServedError where a tensor is none, or of a kind that the kernels must not see."""
        for value in (x, c):
            if type(value) not in _TENSORS or not value.is_floating_point() or value.layout != torch.strided:
                raise NotServedError(f"its network is given a {_kind(value)}, not a dense tensor of floats")
            if value.dim() < 2:
                raise NotServedError(f"its network is given a tensor of rank {value.dim()}, not rows")
        device, sizes = x.device, {0: 0, 1: 1}

        def small(shape) -> tuple[int, ...]:
            return tuple(sizes.setdefault(n, _SIZES[min(len(sizes) - 2, len(_SIZES) - 1)]) for n in shape)

        lead, told = small(x.shape[:-1]), []
        for t in times:
            if type(t) in _TENSORS and t.dtype != torch.bool and not t.is_complex() and t.layout == torch.strided:
                if t.device != device and (t.dim() or t.device.type != "cpu"):
                    raise NotServedError(f"its network is given times on {t.device} and x on {device}")
                told.append((small(t.shape), t.dtype))
            elif isinstance(t, Real) and math.isfinite(t):
                told.append((type(t),))
            else:
                raise NotServedError(f"its network is given a {_kind(t)} as a time")
        if device != c.device or x.is_meta:
            raise NotServedError(f"its network is given x on {device} and a condition on {c.device}")
        narrowed = call_dtype(device, torch.float64)  # float64 is no autocast's
        return Kind(
            (lead, x.dtype),
            tuple(told),
            (small(c.shape[:-1]), c.dtype),
            None if narrowed == torch.float64 else narrowed,
        )

    def call(self, device: torch.device, channels: int, cond_channels: int, *, exact: bool) -> tuple:
        """(x, times, c) of a small call like it; ``exact``: in float32 where it is of floats."""
        generator = torch.Generator("cpu").manual_seed(20261127)

        def wide(dtype: torch.dtype) -> torch.dtype:
            return torch.float32 if exact and dtype.is_floating_point else dtype

        def normal(what: tuple, channels: int) -> torch.Tensor:
            values = torch.randn((*what[0], channels), generator=generator, dtype=torch.float32, device="cpu")
            return values.to(device, wide(what[1]))

        def time(what: tuple, k: int):
            if len(what) == 1:
                return what[0](977 - k) if issubclass(what[0], int) else what[0](0.7265625 - k / 8)
            shape, dtype = what
            if not dtype.is_floating_point:
                return torch.randint(0, 1000, shape, generator=generator, device="cpu").to(device, dtype)
            # Of flows and of steps: a scale of the time shows in the one, its features' frequencies in the other.
            values = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            large = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5
            return torch.where(large, (values * 999).round(), values).to(device, wide(dtype))

        x, c = normal(self.x, channels), normal(self.c, cond_channels)
        return x, tuple(time(what, k) for k, what in enumerate(self.times)), c


@dataclass(frozen=True)
class Flat:
    """A call as rows: what :func:`cspd_kernels.evaluate` takes, and the shape that comes back."""

    x: torch.Tensor  # (M, C)
    times: torch.Tensor | float  # (M,), (M, K), or one for all
    c: torch.Tensor  # (M, Z)
    shape: tuple[int, ...]


# How times of a shape stand beside the rows of x: as they broadcast; with a last dimension that is their one feature,
# as of (N, 1); or by the first dimensions of x, as (N,) beside (N, 1, C).
READINGS = ("rows", "columns", "first")


def flatten(x: torch.Tensor, times: tuple, c: torch.Tensor, reading: str) -> Flat:
    """Rows of a call whose dimensions broadcast as those of ``time(t) + cond(c)`` and of x do.

    Args:
        reading: one of READINGS.

    Raises:
        NotServedError: they do not.
    """
    leads = [t.shape for t in times if isinstance(t, torch.Tensor)]
    if reading == "columns":
        if not all(lead[-1:] == (1,) for lead in leads):
            raise NotServedError("its times have no column")
        leads = [lead[:-1] for lead in leads]
    elif reading == "first":
        leads = [(*lead, *[1] * (x.dim() - 1 - len(lead))) for lead in leads]
    if len(leads) not in (0, len(times)):
        raise NotServedError("its times are a number and a tensor")
    if x.dim() == 2 and c.shape[:-1] == x.shape[:-1] and all(lead == x.shape[:-1] for lead in leads):  # as most are
        shape, columns = x.shape[:-1], [t.reshape(-1) for t in times] if leads else list(times)
    else:
        try:
            shape = torch.broadcast_shapes(x.shape[:-1], c.shape[:-1], *leads)
        except RuntimeError as error:
            raise NotServedError(f"the rows of its network's arguments do not fit each other: {error}") from None
        x = x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1])
        c = c if c.dim() == 2 and c.shape[0] == len(x) else c.expand(*shape, c.shape[-1]).reshape(-1, c.shape[-1])
        one = all(math.prod(lead) == 1 for lead in leads)
        columns = [t.reshape(-1) if one else t.reshape(lead).expand(shape).reshape(-1) for t, lead in zip(times, leads)]
        columns = columns or list(times)
    if len(times) == 1:
        return Flat(x, columns[0], c, (*shape,))
    if not leads:
        columns = [x.new_full((len(x),), float(t), dtype=torch.float32) for t in columns]
    return Flat(x, torch.stack([t.expand(len(x)) for t in columns], 1), c, (*shape,))


def _kind(value) -> str:
    if type(value) not in _TENSORS:
        return type(value).__name__
    return f"{value.dtype} tensor" if value.layout == torch.strided else f"tensor of {value.layout}"
