"""Small heads of VibeVoice, under the two sets of names that its parts have, and the models around them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from foreign import CHANNELS, DEPTH, WIDTH

from cspd.models.diffloss import TimestepEmbedder

from .flow_heads import guided
from .schedulers import DPMSolverMultistepScheduler


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-5, elementwise_affine=True):
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(width)) if elementwise_affine else None)

    def forward(self, x):
        wide = x.float()
        h = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x)
        return h if self.weight is None else h * self.weight


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HeadLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ffn, self.norm = FeedForward(width, 3 * width), RMSNorm(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width, bias=False))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.ffn(self.norm(x) * (1 + scale) + shift)


class RmsFinal(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final, self.linear = RMSNorm(width, elementwise_affine=False), nn.Linear(width, channels, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias=False))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class BareEmbedder(TimestepEmbedder):
    """Without biases."""

    def __init__(self, width):
        super().__init__(width)
        self.mlp = nn.Sequential(nn.Linear(256, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False))


class VibeVoiceDiffusionHead(nn.Module):
    """microsoft/VibeVoice: RMS norms, gated parts, no biases."""

    evaluations = 0

    def __init__(self):
        super().__init__()
        self.config, self.cond_dim = SimpleNamespace(hidden_size=WIDTH, latent_size=CHANNELS), WIDTH
        self.noisy_images_proj = nn.Linear(CHANNELS, WIDTH, bias=False)
        self.cond_proj, self.t_embedder = nn.Linear(WIDTH, WIDTH, bias=False), BareEmbedder(WIDTH)
        self.layers = nn.ModuleList(HeadLayer(WIDTH) for _ in range(DEPTH))
        self.final_layer = RmsFinal(WIDTH, CHANNELS)

    def forward(self, noisy_images, timesteps, condition):
        self.evaluations = self.evaluations + 1
        x = self.noisy_images_proj(noisy_images)
        c = self.cond_proj(condition) + self.t_embedder(timesteps)
        for layer in self.layers:
            x = layer(x, c)
        return self.final_layer(x, c)


class VibeVoice(nn.Module):
    """The model around it, whose method samples; N tokens have 2N conditions."""

    def __init__(self, sde=False):
        super().__init__()
        self.model = nn.Module()
        self.model.prediction_head = VibeVoiceDiffusionHead()
        self.model.noise_scheduler = DPMSolverMultistepScheduler(sde)
        self.ddpm_inference_steps, self.config = 5, SimpleNamespace(acoustic_vae_dim=CHANNELS)

    @torch.no_grad()
    def sample_speech_tokens(self, condition, neg_condition, cfg_scale=3.0):
        head, scheduler = self.model.prediction_head, self.model.noise_scheduler
        scheduler.set_timesteps(self.ddpm_inference_steps)
        condition = torch.cat([condition, neg_condition]).to(next(head.parameters()).device)
        speech = torch.randn(len(condition), self.config.acoustic_vae_dim).to(condition)
        for t in scheduler.timesteps:
            half = speech[: len(speech) // 2]
            both = torch.cat([half, half])
            out = head(both, t.repeat(len(both)).to(both), condition=condition)
            out = guided(out, cfg_scale).repeat(2, 1)
            speech = scheduler.step(out, t, speech).prev_sample
        return speech[: len(speech) // 2]


class TimestepFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        freq = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
        self.register_buffer("freq", freq, persistent=False)

    def forward(self, t):
        args = t[:, None].float() * self.freq
        return torch.cat([args.cos(), args.sin()], dim=-1).to(t.dtype)


class TimestepProj(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)))


class AdaLayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ffn, self.norm, self.act_fn = FeedForward(width, 3 * width), RMSNorm(width), nn.SiLU()
        self.norm.variance_epsilon = self.norm.eps
        self.linear = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x, c):
        shift, scale, gate = self.linear(self.act_fn(c)).chunk(3, dim=-1)
        return x + gate * self.ffn(self.norm(x) * (1 + scale) + shift)


class AdaFinal(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.rms_norm_eps, self.act_fn = 1e-5, nn.SiLU()
        self.linear_1, self.linear_2 = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, channels, bias=False)

    def forward(self, x, c):
        shift, scale = self.linear_1(self.act_fn(c)).chunk(2, dim=-1)
        return self.linear_2(F.rms_norm(x, (x.shape[-1],), eps=self.rms_norm_eps) * (1 + scale) + shift)


class HubHead(nn.Module):
    """VibeVoice in transformers: the same network, its parts under other names."""

    evaluations = 0

    def __init__(self):
        super().__init__()
        self.noisy_images_proj = nn.Linear(CHANNELS, WIDTH, bias=False)
        self.cond_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.timestep_embedding, self.timestep_proj = TimestepFeatures(), TimestepProj(WIDTH)
        self.layers = nn.ModuleList(AdaLayerNorm(WIDTH) for _ in range(DEPTH))
        self.final_layer = AdaFinal(WIDTH, CHANNELS)

    def forward(self, noisy_images, timesteps, condition):
        self.evaluations = self.evaluations + 1
        x = self.noisy_images_proj(noisy_images)
        c = self.cond_proj(condition) + self.timestep_proj(self.timestep_embedding(timesteps))
        for layer in self.layers:
            x = layer(x, c)
        return self.final_layer(x, c)


HubHead.__name__ = HubHead.__qualname__ = VibeVoiceDiffusionHead.__name__


class HubVibeVoice(nn.Module):
    """The model of transformers, whose method is given the scheduler; tokens (N, 1, C)."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_head = HubHead()
        self.config = SimpleNamespace(audio_config=SimpleNamespace(hidden_size=CHANNELS))

    @torch.no_grad()
    def _sample_audio_latent(
        self, positive_condition, negative_condition, noise_scheduler, num_diffusion_steps, guidance_scale
    ):
        noise_scheduler.set_timesteps(num_diffusion_steps)
        condition = torch.cat([positive_condition, negative_condition])
        speech = torch.randn(len(condition), self.config.audio_config.hidden_size).to(condition)
        for t in noise_scheduler.timesteps:
            half = speech[: len(speech) // 2]
            both = torch.cat([half, half])
            out = self.model.diffusion_head(both, t.repeat(len(both)).to(both), condition)
            speech = noise_scheduler.step(guided(out, guidance_scale).repeat(2, 1), t, speech).prev_sample
        return speech[: len(speech) // 2].unsqueeze(1)
