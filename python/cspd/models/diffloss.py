"""The diffusion head of MAR: an adaLN-MLP that denoises one token given its condition.

State-dict names and shapes follow LTH14/mar (``models/diffloss.py``); Li et al. 2024, arXiv 2406.11838.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from cspd_kernels import Schedule

from ..errors import InvalidInput
from .diffusion import GaussianDiffusion

_FLOWS = ("euler", "euler_maruyama")


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a timestep (cosines first) through a two-layer MLP: (N,) -> (N, W)."""

    def __init__(self, width: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
        half = dim // 2
        freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        args = t[:, None].float() * freqs
        return torch.cat([torch.cos(args), torch.sin(args), args.new_zeros(len(args), dim % 2)], dim=-1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        first: Any = self.mlp[0]
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size).to(first.weight.dtype))


class ResBlock(nn.Module):
    """``x + gate * mlp(modulate(LN(x)))`` with shift, scale and gate from the condition y."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(_modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """``linear(modulate(LN(x)))``, the LN without affine parameters."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """The denoising network: x (N, C), t (N,), c (N, Z) -> (N, out_channels).

    Example:
        >>> import torch
        >>> from cspd.models import SimpleMLPAdaLN
        >>> net = SimpleMLPAdaLN(in_channels=4, model_channels=8, out_channels=8, z_channels=6, num_res_blocks=2)
        >>> net(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 6)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        z_channels: int,
        num_res_blocks: int,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks = nn.ModuleList(ResBlock(model_channels) for _ in range(num_res_blocks))
        self.final_layer = FinalLayer(model_channels, out_channels)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        mlp: Any = self.time_embed.mlp
        nn.init.normal_(mlp[0].weight, std=0.02)
        nn.init.normal_(mlp[2].weight, std=0.02)
        # Every block starts as the identity and the output as zero (adaLN-zero, arXiv 2212.09748).
        blocks: Any = self.res_blocks
        zero: list[Any] = [block.adaLN_modulation[-1] for block in blocks]
        for layer in [*zero, self.final_layer.adaLN_modulation[-1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        y = self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = checkpoint(block, x, y, use_reentrant=False) if self.grad_checkpointing else block(x, y)
        return self.final_layer(x, y)

    def forward_with_cfg(
        self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor, cfg_scale: float | torch.Tensor
    ) -> torch.Tensor:
        """Guided output for 2N rows, conditional rows first: both halves see the conditional x and share eps.

        Example:
            >>> import torch
            >>> from cspd.models import SimpleMLPAdaLN
            >>> net = SimpleMLPAdaLN(4, 8, 8, 6, 2)
            >>> net.forward_with_cfg(torch.zeros(6, 4), torch.zeros(6), torch.zeros(6, 6), cfg_scale=3.0).shape
            torch.Size([6, 8])
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, c)
        eps, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        eps_c, eps_u = eps.chunk(2)
        eps = eps_u + cfg_scale * (eps_c - eps_u)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)


class DiffLoss(nn.Module):
    """Diffusion loss of a token given its condition, and its sampler.

    Args:
        target_channels: C. z_channels: Z. depth, width: D residual blocks of width W.
        num_sampling_steps: T of ``sample`` (an int, or a string as in LTH14/mar).
        schedule: ``"cosine"`` (MAR) or ``"linear"`` for a diffusion; ``"euler"`` or ``"euler_maruyama"`` for a flow.
            A flow's network predicts the velocity from time 0 (noise) to 1, and learns no variance.
        num_train_steps: steps of the schedule it is trained on. T of them are kept for sampling.
        learn_sigma: True if the network puts out a variance besides the noise (MAR). False uses the posterior's
            variance (as in MotionStreamer and MARDM).

    Example:
        >>> import torch
        >>> from cspd.models import DiffLoss
        >>> head = DiffLoss(target_channels=4, z_channels=6, depth=2, width=8, num_sampling_steps=5)
        >>> z = torch.zeros(3, 6)
        >>> head(torch.zeros(3, 4), z).shape, head.sample(z).shape
        (torch.Size([]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        target_channels: int,
        z_channels: int,
        depth: int,
        width: int,
        num_sampling_steps: int | str,
        grad_checkpointing: bool = False,
        schedule: str = "cosine",
        num_train_steps: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if schedule not in ("cosine", "linear", *_FLOWS):
            raise InvalidInput(
                f"DiffLoss expected schedule 'cosine', 'linear', 'euler' or 'euler_maruyama', got {schedule!r}"
            )
        learn_sigma = learn_sigma and schedule not in _FLOWS
        self.in_channels = target_channels
        out_channels = target_channels * (2 if learn_sigma else 1)
        make: Callable[[int], Schedule]
        if schedule in _FLOWS:
            make = partial(flow_schedule, schedule)
        else:
            variance = "learned" if learn_sigma else "fixed_small"
            make = partial(getattr(Schedule, schedule), train_steps=num_train_steps, variance=variance)
        self.net = SimpleMLPAdaLN(target_channels, width, out_channels, z_channels, depth, grad_checkpointing)
        self.train_diffusion = GaussianDiffusion(make(num_train_steps))
        self.gen_diffusion = GaussianDiffusion(make(int(num_sampling_steps)))

    def forward(self, target: torch.Tensor, z: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean loss over rows; target (N, C), z (N, Z), mask (N,) weights."""
        t = self.train_diffusion.random_times(target.shape[0], target.device)
        loss = self.train_diffusion.training_losses(self.net, target, t, dict(c=z))
        return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()

    def sample(self, z: torch.Tensor, temperature: float = 1.0, cfg: float = 1.0) -> torch.Tensor:
        """Tokens for conditions z: (N, Z) -> (N, C); with guidance z and the result have 2N rows,
        conditional first. The first noise comes from the CPU generator, the others from the device's.

        Example:
            >>> import torch
            >>> from cspd.models import DiffLoss
            >>> head = DiffLoss(4, 6, 2, 8, num_sampling_steps=5)
            >>> head.sample(torch.zeros(6, 6), temperature=0.9, cfg=3.0).shape  # 3 tokens, and their guidance
            torch.Size([6, 4])
        """
        noise = first_noise(len(z) if cfg == 1.0 else len(z) // 2, self.in_channels, z.device)
        return sample_from(self, noise, z, temperature, cfg)


def flow_schedule(name: str, steps: int) -> Schedule:
    """``"euler"`` or ``"euler_maruyama"`` in equal steps from noise, at 0, to data, at 1."""
    return getattr(Schedule, name)(np.linspace(0.0, 1.0, steps + 1))


def sample_from(diffloss: Any, noise: torch.Tensor, z: torch.Tensor, temperature: float, cfg: float) -> torch.Tensor:
    """What ``sample`` of a head gives from x_T (N, C): under guidance of both halves of z the same."""
    guided = cfg != 1.0
    noise = torch.cat([noise, noise]) if guided else noise
    return diffloss.gen_diffusion.p_sample_loop(
        diffloss.net.forward_with_cfg if guided else diffloss.net.forward,
        noise.shape,
        noise,
        clip_denoised=False,
        model_kwargs=dict(c=z, cfg_scale=cfg) if guided else dict(c=z),
        progress=False,
        temperature=temperature,
    )


def first_noise(rows: int, channels: int, device: torch.device) -> torch.Tensor:
    """x_T (rows, C) of the CPU's generator, on a device."""
    noise = torch.randn(rows, channels, device="cpu")
    # From other memory the copy would wait for all that the device has yet to do. While the caller captures a graph it
    # must fail: replays would read memory that is long somebody else's.
    pinned = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return (noise.pin_memory() if pinned else noise).to(device, non_blocking=pinned)
