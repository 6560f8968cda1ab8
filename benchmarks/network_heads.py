"""Networks of the sizes that people run, with random weights: the ones of ``network.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from cspd.models.diffloss import SimpleMLPAdaLN, TimestepEmbedder
from cspd_kernels.testing import randomize_


class Layer(nn.Module):
    """A gated MLP behind a root mean square norm, shifted, scaled and gated by the condition."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.ffn = nn.RMSNorm(width, eps=1e-5), nn.Module()
        self.ffn.gate_proj, self.ffn.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ffn.down_proj = nn.Linear(hidden, width, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width, bias=False))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.ffn.down_proj(F.silu(self.ffn.gate_proj(h)) * self.ffn.up_proj(h))


class Final(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=1e-5, elementwise_affine=False)
        self.linear = nn.Linear(width, channels, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias=False))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SpeechNetwork(nn.Module):
    """What microsoft/VibeVoice's prediction head computes: x (N, C), t (N,), c (N, W) -> (N, C)."""

    def __init__(self, channels: int, width: int, hidden: int, depth: int):
        super().__init__()
        self.noisy_images_proj = nn.Linear(channels, width, bias=False)
        self.cond_proj = nn.Linear(width, width, bias=False)
        self.t_embedder = TimestepEmbedder(width)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            layer.register_parameter("bias", None)
        self.layers = nn.ModuleList(Layer(width, hidden) for _ in range(depth))
        self.final_layer = Final(width, channels)

    def forward(self, noisy_images: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x, y = self.noisy_images_proj(noisy_images), self.cond_proj(condition) + self.t_embedder(timesteps)
        for layer in self.layers:
            x = layer(x, y)
        return self.final_layer(x, y)


@dataclass(frozen=True)
class Head:
    """A network and what it is called with."""

    make: Callable[[], nn.Module]
    channels: int  # C
    cond_channels: int  # Z
    largest_time: float


HEADS = {
    "MAR-B": Head(partial(SimpleMLPAdaLN, 16, 1024, 32, 768, 6), 16, 768, 999),
    "VibeVoice-1.5B": Head(partial(SpeechNetwork, 64, 1536, 4608, 4), 64, 1536, 999),
    "NextStep-1": Head(partial(SimpleMLPAdaLN, 64, 1536, 64, 5120, 12), 64, 5120, 1),
}


def network_of(head: Head, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """With random weights that all have their share in the result."""
    net = randomize_(head.make(), 0, 0.02)
    return net.to(device, dtype).eval().requires_grad_(False)
