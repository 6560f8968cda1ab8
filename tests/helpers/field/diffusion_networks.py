"""Small heads that sample with a diffusion object, and whose network is not quite MAR's."""

from __future__ import annotations

import torch
import torch.nn as nn
from foreign import CHANNELS, COND, DEPTH, WIDTH, Head, Net, Spaced, Var

from cspd.models.diffloss import SimpleMLPAdaLN, TimestepEmbedder


class FarNet(Net):
    """An index is embedded and added to the condition."""

    def __init__(self):
        super().__init__()
        self.index_cond_embed = nn.Linear(1, WIDTH)

    def forward(self, x, t, c, index=None):
        self.evaluations = self.evaluations + 1
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        y = y if index is None else y + self.index_cond_embed(index)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def forward_with_cfg(self, x, t, c, cfg_scale, index):
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, c, index)
        eps, rest = out[:, :CHANNELS], out[:, CHANNELS:]
        eps_c, eps_u = eps.chunk(2)
        eps = eps_u + cfg_scale * (eps_c - eps_u)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)


class Far(Head):
    """yuhuUSTC/FAR: the network is given an index of the frequency level; guided always, also by 1."""

    net_class = FarNet

    def sample(self, z, temperature=1.0, cfg=1.0, index=None):
        noise = torch.randn(len(z) // 2, CHANNELS).repeat(2, 1)
        return self.gen_diffusion.p_sample_loop(
            self.net.forward_with_cfg, noise.shape, noise, clip_denoised=False,
            model_kwargs={"c": z, "cfg_scale": cfg, "index": index}, progress=False, temperature=temperature,
        )  # fmt: skip


class FreqpolicyNet(Net):
    """The index has channels of its own beside the embedded condition, whose layer is narrower than the network."""

    def __init__(self):
        super().__init__()
        self.cond_embed, self.index_cond_embed = nn.Linear(COND, WIDTH // 2), nn.Linear(1, WIDTH // 2)

    def forward(self, x, t, c, index=None):
        self.evaluations = self.evaluations + 1
        x, t = self.input_proj(x), self.time_embed(t)
        y = t + torch.cat([self.cond_embed(c), self.index_cond_embed(index)], dim=-1)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    forward_with_cfg = FarNet.forward_with_cfg


class Freqpolicy(Head):
    """4DVLab/Freqpolicy: as FAR, and ``num_steps`` makes a diffusion object for the one call."""

    net_class = FreqpolicyNet

    def sample(self, z, temperature=1.0, cfg=1.0, index=None, num_steps=None):
        args, options = self.call(z, cfg, index=index)
        diffusion = self.gen_diffusion if num_steps is None else Spaced(num_steps)
        return diffusion.p_sample_loop(*args, **options, progress=False, temperature=temperature)


class Pooling(nn.Module):
    """Learned tokens attend to the hidden states: (N, 4, Z) -> (N, 1, W)."""

    def __init__(self):
        super().__init__()
        self.hidden_embedding = nn.Parameter(torch.randn(1, COND))
        self.layer = nn.TransformerEncoderLayer(COND, 2, 4 * COND, dropout=0.1, activation="gelu", batch_first=True)
        self.cond_proj = nn.Linear(COND, WIDTH)

    def forward(self, z):
        tokens = torch.cat([self.hidden_embedding.expand(len(z), 1, COND), z], dim=1)
        return self.cond_proj(self.layer(tokens)[:, :1])


class MotionGpt3Net(Net):
    """Tokens (N, 1, C); the time embedding is given the same rank."""

    def __init__(self, pooled):
        super().__init__(learned=False)
        self.cond_embed = Pooling() if pooled else nn.Linear(COND, WIDTH)

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        x, y = self.input_proj(x), self.time_embed(t).unsqueeze(1) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class MotionGpt3(Head):
    """OpenMotionLab/MotionGPT3: tokens (N, 1, C), attention in place of the condition's layer, fixed variance."""

    net_class = MotionGpt3Net

    def __init__(self, pooled=True):
        super().__init__(Spaced(var=Var.FIXED_SMALL), pooled=pooled)
        self.in_size, self.multi_hidden = 1, pooled

    def sample(self, z, temperature=1.0, cfg=1.0):
        rows = len(z) if cfg == 1.0 else len(z) // 2
        noise, kwargs = torch.randn(rows, self.in_size, CHANNELS).to(z.device), {"c": z}
        network = self.net.forward
        if cfg != 1.0:
            noise, kwargs = torch.cat([noise, noise]), {"c": z, "cfg_scale": cfg}
            network = self.net.forward_with_cfg
        return self.gen_diffusion.p_sample_loop(
            network, noise.shape, noise, clip_denoised=False, model_kwargs=kwargs, progress=False,
            temperature=temperature,
        )  # fmt: skip


class DetokFinal(nn.Module):
    """The last layer, whose norm is called ``norm``."""

    def __init__(self, width, out_channels):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DetokNet(Net):
    def __init__(self):
        super().__init__()
        self.final_layer = DetokFinal(WIDTH, 2 * CHANNELS)

    def forward(self, x, t=None, c=None):
        return super().forward(x, t, c)

    def forward_with_cfg(self, x, t, c, cfg_scale, cfg_interval=None, cfg_interval_start=None):
        return super().forward_with_cfg(x, t, c, cfg_scale)


class Detok(Head):
    """Jiawei-Yang/DeTok with its diffusion: other names."""

    net_class = DetokNet


class PlainNet(nn.Module):
    """MAR's parts without ``forward_with_cfg``."""

    evaluations = 0

    def __init__(self):
        super().__init__()
        self.in_channels, self.grad_checkpointing = CHANNELS, False
        for name, part in SimpleMLPAdaLN(CHANNELS, WIDTH, 2 * CHANNELS, COND, DEPTH).named_children():
            setattr(self, name, part)

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        return SimpleMLPAdaLN.forward(self, x, t, c)


class Calm(Head):
    """shaochenze/calm: conditions of any rank, and a network that cannot be guided."""

    net_class = PlainNet

    def sample(self, z, temperature=1.0, cfg=1.0):
        return super().sample(z.reshape(-1, COND), temperature, cfg).reshape(*z.shape[:-1], CHANNELS)


class AttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x, y):
        h = x + y
        return x + self.attention(h, h, h)[0]


class AttentionNet(nn.Module):
    """Tokens of a cell see one another."""

    evaluations = 0

    def __init__(self):
        super().__init__()
        self.in_channels = CHANNELS
        self.time_embed, self.cond_embed = TimestepEmbedder(WIDTH), nn.Linear(COND, WIDTH)
        self.input_proj = nn.Linear(CHANNELS, WIDTH)
        self.res_blocks = nn.ModuleList(AttentionBlock() for _ in range(DEPTH))
        self.final_layer = DetokFinal(WIDTH, 2 * CHANNELS)

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class AttentionHead(Head):
    """As in OliverRensu/xAR and OliverRensu/TransDiff: the head is a transformer over the tokens of a cell."""

    net_class = AttentionNet
