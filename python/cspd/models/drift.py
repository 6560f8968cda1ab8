"""A head that makes a token of noise and its condition in one network call, trained by drifting.

"Generative Modeling via Drifting", arXiv 2602.04770: data attract samples, and samples repel each other. The field of
both is zero where both have one distribution. The network learns to put out where the field would move its samples.
Drift-AR, arXiv 2603.28049, uses this as the head of an autoregressive model. There the first noise is as wide as the
transformer's attention is spread.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from cspd_kernels import Schedule

from ..errors import InvalidInput
from .diffloss import SimpleMLPAdaLN, first_noise, sample_from
from .diffusion import GaussianDiffusion

TAUS = (0.05, 0.2, 1.0)  # of distances whose mean is 1


def affinities(x: torch.Tensor, points: torch.Tensor, tau, alone: torch.Tensor | None = None) -> torch.Tensor:
    """(..., N, P): the geometric mean of exp(-|x - p| / tau) normalised over the points and over the samples.

    x (..., N, C), points (..., P, C), tau a number or (..., 1, 1), alone (N, P) bool: pairs that count for nothing.
    """
    logits = -torch.cdist(x, points) / tau
    if alone is not None:
        logits = logits.masked_fill(alone, -math.inf)
    return (logits.softmax(-1) * logits.softmax(-2)).sqrt()


def drift(x: torch.Tensor, data: torch.Tensor, tau, others: torch.Tensor | None = None) -> torch.Tensor:
    """V (..., N, C) at samples x (..., N, C): towards data (..., P, C), away from others (..., Q, C).

    With k+ and k- the :func:`affinities` to both, normalised over both together::

        V = V+ - V- = sum_ij k+_i k-_j (data_i - others_j)

    Exchanging data and others turns its sign, so it is zero where they are the same. ``others`` None: the samples
    themselves, each without itself. Source: arXiv 2602.04770, algorithm 2.
    """
    alone = None
    if others is None:
        others = x
        own = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
        alone = torch.cat([own.new_zeros(x.shape[-2], data.shape[-2]), own], dim=1)
    weights = affinities(x, torch.cat([data, others], dim=-2), tau, alone)
    near, far = weights.split([data.shape[-2], others.shape[-2]], dim=-1)
    return far.sum(-1, keepdim=True) * (near @ data) - near.sum(-1, keepdim=True) * (far @ others)


def drifting_loss(x: torch.Tensor, data: torch.Tensor, taus=TAUS, least: float = 1e-2) -> torch.Tensor:
    """Mean of |x - stopgrad(x + V)|^2 over conditions: samples x (B, N, C), data (B, P, C) -> ().

    Distances are relative to their mean in each condition, which is at least ``least``. V is the sum over ``taus`` of
    fields that are brought to unit length on average over the batch (arXiv 2602.04770, section 3.4). So the loss
    stays near the same value, whatever was learned: watch the samples instead.
    """
    with torch.no_grad():
        size = torch.cdist(x, data).mean((-2, -1), keepdim=True).clamp_min(least)
        total = torch.zeros_like(x)
        for tau in taus:
            field = drift(x, data, tau * size) / size
            total += field / field.square().mean().sqrt().clamp_min(1e-6)
    return ((x - (x + total * size).detach()) / size).square().mean()


class DriftLoss(nn.Module):
    """Drifting loss of a token given its condition, and its sampler of one step: has the parts of ``DiffLoss``.

    The network's output at x_T is the token (:meth:`cspd_kernels.Schedule.one_step`). Speculative decoding needs a
    density of it, which there is none of: a Gaussian of measured ``std`` about the output stands for it.

    ``std``, ``entropies`` and ``least`` are in the state dict, as its extra state, and :meth:`set_extra_state` changes
    them.

    Args:
        target_channels, z_channels, depth, width: as of ``DiffLoss``.
        std: of a token about the network's output. entropies: (low, high), between which :meth:`initial_scale` grows.
        least: the smallest scale of x_T.
    """

    def __init__(self, target_channels, z_channels, depth, width, std=1.0, entropies=(0.0, 1.0), least=0.5):
        super().__init__()
        self.in_channels = target_channels
        self.net = SimpleMLPAdaLN(target_channels, width, target_channels, z_channels, depth)
        self.set_extra_state((std, *entropies, least))

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self._state, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state) -> None:
        """(std, low, high, least), numbers or a tensor."""
        std, low, high, least = (float(value) for value in state)
        if not low < high or not 0 < least <= 1:
            raise InvalidInput(
                "DriftLoss expected entropies (low, high) with low < high and least in (0, 1], got "
                f"({low!r}, {high!r}) and {least!r}"
            )
        # A new one every time: what was made for the old numbers, as a CUDA graph, goes by it.
        self.gen_diffusion = GaussianDiffusion(Schedule.one_step(std))
        self._state = (std, low, high, least)

    @property
    def std(self) -> float:
        """Standard deviation of a token about the network's output."""
        return self._state[0]

    @property
    def entropies(self) -> tuple[float, float]:
        """Between which :meth:`initial_scale` grows."""
        return self._state[1:3]

    @property
    def least(self) -> float:
        """The smallest scale of x_T."""
        return self._state[3]

    def initial_scale(self, entropy: torch.Tensor) -> torch.Tensor:
        """Scale of x_T, in [least, 1], for an entropy of the attention in [0, 1]; of any shape.

        Its square, the variance, grows linearly between the two entropies of the head. Without an entropy it is 1.
        """
        low, high = self.entropies
        spread = ((entropy.float() - low) / (high - low)).clamp(0.0, 1.0)
        return (self.least**2 + (1.0 - self.least**2) * spread).sqrt()

    def forward(self, target, z, entropy=None):
        """Loss of conditions z (N, Z) from several of each one's tokens, target (N, P, C), and as many samples.

        entropy (N,) or None.
        """
        rows, count, channels = target.shape
        x_T = torch.randn(rows, count, channels, device=z.device)  # noqa: N806
        if entropy is not None:
            x_T = x_T * self.initial_scale(entropy)[:, None, None]  # noqa: N806
        t = torch.zeros(rows * count, dtype=torch.int64, device=z.device)
        x = self.net(x_T.flatten(0, 1), t, z.repeat_interleave(count, dim=0))
        return drifting_loss(x.view(rows, count, channels), target)

    def sample(self, z, temperature=1.0, cfg=1.0, entropy=None):
        """Like ``DiffLoss.sample``, in one step; entropy (N,) scales the first noise. ``temperature`` changes
        nothing."""
        noise = first_noise(len(z) if cfg == 1.0 else len(z) // 2, self.in_channels, z.device)
        if entropy is not None:
            noise = noise * self.initial_scale(entropy)[:, None]
        return sample_from(self, noise, z, temperature, cfg)
