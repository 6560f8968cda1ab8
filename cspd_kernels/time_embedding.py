"""The time embeddings of a head, packed: sinusoidal features of a timestep through a two-layer MLP.

The features themselves are float32 whatever the head's type: that is the definition trained networks saw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .dtypes import without_autocast
from .errors import InvalidInput
from .schedule import Schedule
from .spec import TimeSpec


@dataclass(frozen=True)
class TimeEmbedding:
    """Weights of one time embedding, all in the residual stream's type: :class:`TimeSpec` has its formula."""

    spec: TimeSpec
    weight0: torch.Tensor  # (W, size)
    bias0: torch.Tensor
    weight1: torch.Tensor  # (W, W)
    bias1: torch.Tensor
    norm_weight: torch.Tensor | None = None  # (W,)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that :meth:`of_features` reads."""
        weights = (self.weight0, self.bias0, self.weight1, self.bias1, self.norm_weight)
        return tuple(weight for weight in weights if weight is not None)

    def to(self, dtype: torch.dtype) -> TimeEmbedding:
        """The same in another type."""
        norm = None if self.norm_weight is None else self.norm_weight.to(dtype)
        return TimeEmbedding(self.spec, *(w.to(dtype) for w in self.tensors()[:4]), norm)

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        """(M, size) -> (M, W)."""
        with without_autocast(features.device):
            hidden = F.silu(F.linear(features, self.weight0, self.bias0))
            x = F.linear(hidden, self.weight1, self.bias1)
            if self.norm_weight is None:
                return x
            spread = x.square().mean(-1, keepdim=True) if self.spec.norm == "rms" else x.var(-1, keepdim=True)
            return x * self.norm_weight * torch.rsqrt(spread + self.spec.norm_eps)


def features(spec: TimeSpec, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(M,) timesteps of any type -> (M, size): their cosines and sines."""
    # In this order of operations: trained networks saw its rounding.
    t, frequencies = timesteps.float(), _frequencies(spec, timesteps.device)
    angles = (t if spec.scale == 1.0 else spec.scale * t)[:, None] * frequencies
    halves = (angles.cos(), angles.sin()) if spec.cosines_first else (angles.sin(), angles.cos())
    return torch.cat([*halves, angles.new_zeros(len(angles), spec.size % 2)], dim=1).to(dtype)


_kept: dict[tuple, torch.Tensor] = {}


def _frequencies(spec: TimeSpec, device: torch.device) -> torch.Tensor:
    """(size // 2,) float32, made on the CPU once: a device's exp rounds otherwise."""
    key = (spec.size, spec.max_period, device)
    if key not in _kept:
        half = spec.size // 2
        exponents = torch.arange(half, dtype=torch.float32, device="cpu")
        with torch.inference_mode(False):
            _kept[key] = torch.exp(-math.log(spec.max_period) * exponents / half).to(device)
    return _kept[key]


@torch.no_grad()
def embed(times: tuple[TimeEmbedding, ...], timesteps: torch.Tensor) -> torch.Tensor:
    """(M, W), the mean of the embeddings: of timesteps (M,) for all of them, or (M, K) with one column for each."""
    dtype = times[0].weight0.dtype
    columns = timesteps.unbind(1) if timesteps.dim() == 2 else [timesteps] * len(times)
    made = [time.of_features(features(time.spec, t, dtype)) for time, t in zip(times, columns)]
    return made[0] if len(made) == 1 else sum(made) / len(made)


@torch.no_grad()
def embed_schedule(times: tuple[TimeEmbedding, ...], schedule: Schedule) -> torch.Tensor:
    """(T, W), as :func:`embed`, of a schedule's timesteps, whose features are kept with it: they are asked for again
    where weights are watched."""
    if schedule.timesteps.ndim == 2 and schedule.timesteps.shape[1] != len(times):
        raise InvalidInput(
            f"a head of {len(times)} time embeddings expected a schedule with timesteps of shape (T,) or "
            f"(T, {len(times)}), got {schedule.timesteps.shape}"
        )
    kept = schedule.__dict__.setdefault("_features", {})
    made = []
    for k, time in enumerate(times):
        weight = time.weight0
        key = (time.spec, k if schedule.timesteps.ndim == 2 else 0, weight.device, weight.dtype)
        if key not in kept:
            timesteps = torch.tensor(schedule.timesteps, device=weight.device)
            kept[key] = features(time.spec, timesteps[:, k] if timesteps.dim() == 2 else timesteps, weight.dtype)
        made.append(time.of_features(kept[key]))
    return made[0] if len(made) == 1 else sum(made) / len(made)
