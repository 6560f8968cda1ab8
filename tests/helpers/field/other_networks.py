"""Small heads whose networks are not MAR's, as other code bases have them, and the loops that they sample by."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from foreign import CHANNELS, COND, DEPTH, WIDTH

from cspd.models.diffloss import SimpleMLPAdaLN, TimestepEmbedder

from .flow_heads import guided
from .schedulers import DDIMScheduler


class GatedBlock(nn.Module):
    """The first half of what ``w1`` puts out goes through SiLU; scale comes before shift."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.w1, self.w2 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x, scale, shift, gate):
        gated, straight = self.w1(self.norm(x) * (1 + scale) + shift).chunk(2, dim=-1)
        return x + gate * self.w2(F.silu(gated) * straight)


class PlainFinal(nn.Module):
    def __init__(self, width, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ada_ln_modulation, self.linear = nn.Linear(width, 2 * width), nn.Linear(width, out_channels)

    def forward(self, x, y):
        scale, shift = self.ada_ln_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class ThousandEmbedder(TimestepEmbedder):
    """Of the thousandfold time."""

    def forward(self, t):
        return super().forward(1000 * t)


class MlpEncoder(nn.Module):
    """Several blocks share a modulation, and SiLU acts once on what all modulations are given."""

    evaluations = 0

    def __init__(self, blocks=4, modulations=2):
        super().__init__()
        self.in_channels, self.model_channels = CHANNELS, WIDTH
        self.time_embed, self.cond_embed = ThousandEmbedder(WIDTH), nn.Linear(COND, WIDTH)
        self.input_proj = nn.Linear(CHANNELS, WIDTH)
        self.res_blocks = nn.ModuleList(GatedBlock(WIDTH, int(1.5 * WIDTH)) for _ in range(blocks))
        self.ada_ln_blocks = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(modulations))
        self.ada_ln_switch_freq = max(1, blocks // modulations)
        self.final_layer = PlainFinal(WIDTH, CHANNELS)

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        x, y = self.input_proj(x), F.silu(self.time_embed(t) + self.cond_embed(c))
        for i, block in enumerate(self.res_blocks):
            if i % self.ada_ln_switch_freq == 0:
                scale, shift, gate = self.ada_ln_blocks[i // self.ada_ln_switch_freq](y).chunk(3, dim=-1)
            x = block(x, scale, shift, gate)
        return self.final_layer(x, y)


class CompiledEncoder(MlpEncoder):
    """Its class compiles ``forward``, as the released code does."""

    forward = torch.compile(MlpEncoder.forward, backend="eager")


class DiffHead(nn.Module):
    """shallowdream204/BitDance: the network puts out the data; Euler-Maruyama, then one step to the data."""

    def __init__(self, time_shift=1.0, network=MlpEncoder):
        super().__init__()
        self.ch_target, self.time_shift, self.net = CHANNELS, time_shift, network()

    def sample(self, z, cfg, num_sampling_steps):
        return to_data(self.ch_target, self.net.forward, z, cfg, num_sampling_steps, time_shift=self.time_shift)


def to_data(channels, network, c, cfg=1.0, num_sampling_steps=20, last_step_size=0.05, time_shift=1.0):
    """Samples of every row of c, guided where cfg is above 1; both groups come back."""
    groups = 2 if cfg > 1.0 else 1
    scales = (cfg,) if groups == 2 else ()
    x = torch.randn(len(c) // groups, channels, device=c.device)

    def velocity(t):
        both = torch.cat([x] * groups)
        out = network(both, t.expand(len(c)), c)
        return guided(((out - both) / (1 - t).clamp_min(0.05)).float(), *scales)

    grid = torch.linspace(0, 1 - last_step_size, num_sampling_steps + 1, device=c.device)
    grid = (1 / time_shift) / (1 / time_shift + (1 / grid - 1))
    t = torch.zeros((), device=c.device)
    for dt in grid[1:] - grid[:-1]:
        v = velocity(t)
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        x = x + (v + (1 - t) * score) * dt + (2 * (1 - t) * dt) ** 0.5 * torch.randn_like(x)
        t = t + dt
    x = x + velocity(torch.full((), 1 - last_step_size, device=c.device)) * last_step_size
    return torch.cat([x] * groups)


class CenteredNorm(nn.Module):
    """x alpha / sqrt(eps + the unbiased variance of x); x itself is not centred."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps, self.alpha = eps, nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * (self.alpha * torch.rsqrt(self.eps + x.var(dim=-1, keepdim=True)))


class NormedEmbedder(nn.Module):
    """Of times (N, 1); its frequencies are a buffer, and a norm comes last."""

    def __init__(self, width):
        super().__init__()
        half = torch.arange(128, dtype=torch.float32) / 128
        self.register_buffer("freqs", torch.exp(-math.log(10000.0) * half))
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), CenteredNorm(width))

    def forward(self, t):
        args = t * self.freqs
        return self.mlp(torch.cat([args.cos(), args.sin()], dim=-1))


class TwoTimesNet(nn.Module):
    """The condition comes first, and two times, whose embeddings are averaged."""

    evaluations = 0

    def __init__(self):
        super().__init__()
        self.num_time_conds = 2
        for name, part in SimpleMLPAdaLN(CHANNELS, WIDTH, CHANNELS, COND, DEPTH).named_children():
            setattr(self, name, part)
        self.time_embed = nn.ModuleList(NormedEmbedder(WIDTH) for _ in range(2))

    def forward(self, c, s, t, x):
        self.evaluations = self.evaluations + 1
        x, y = self.input_proj(x), (self.time_embed[0](s) + self.time_embed[1](t)) / 2 + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class FlowLMModel(nn.Module):
    """kyutai-labs/pocket-tts: steps of a learned flow map, from normals of variance ``temp``."""

    def __init__(self):
        super().__init__()
        self.flow_net, self.ldim, self.backbone = TwoTimesNet(), CHANNELS, nn.Linear(CHANNELS, COND)

    def forward(self, sequence, lsd_decode_steps=1, temp=0.7):
        out = self.backbone(sequence).float()[:, -1]
        noise = torch.empty(len(out), self.ldim, device=out.device)
        nn.init.normal_(noise, std=temp**0.5)
        return lsd_decode(partial(self.flow_net, out), noise, lsd_decode_steps)


def lsd_decode(velocity, x, num_steps=1):
    for i in range(num_steps):
        s, t = torch.full_like(x[:, :1], i / num_steps), torch.full_like(x[:, :1], (i + 1) / num_steps)
        x += velocity(s, t, x) / num_steps
    return x


class OneOutput(SimpleMLPAdaLN):
    evaluations = 0

    def __init__(self):
        super().__init__(CHANNELS, WIDTH, CHANNELS, COND, DEPTH)

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        return super().forward(x, t, c)


class Orthus(nn.Module):
    """zhijie-group/Orthus: its model samples one token in line, x of one row beside conditions of one to three."""

    def __init__(self):
        super().__init__()
        self.mlp_head, self.sample_scheduler = OneOutput(), DDIMScheduler()

    def forward(self, hidden_states, *scales):
        z = hidden_states[:, -1]
        self.sample_scheduler.set_timesteps(20)
        x = torch.randn(1, CHANNELS, device=z.device) * self.sample_scheduler.init_noise_sigma
        for t in self.sample_scheduler.timesteps:
            with torch.no_grad():
                out = self.mlp_head(x, torch.as_tensor([t], device=z.device).repeat(len(z)), z)
                x = self.sample_scheduler.step(guided(out, *scales), t, x).prev_sample
        return x.repeat(len(z), 1) / 0.1
