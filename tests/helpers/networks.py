"""Networks of heads as other code bases write them: norms, MLPs, orders, shared modulations and times by choice.

Written for these tests from descriptions. Nothing of them is zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

C, Z, W, D = 5, 7, 48, 4


class OwnLayerNorm(nn.Module):
    def __init__(self, width, affine=True):
        super().__init__()
        self.eps = 1e-6
        if affine:
            self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + self.eps)
        return x * self.weight + self.bias if hasattr(self, "weight") else x


class OwnRMSNorm(nn.Module):
    def __init__(self, width, affine=True):
        super().__init__()
        self.variance_epsilon = 1e-5
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x if self.weight is None else x * self.weight


class SpreadNorm(nn.Module):
    """By the unbiased variance about the mean, of an x that is not centred."""

    def __init__(self, width):
        super().__init__()
        self.eps, self.alpha = 1e-5, nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.alpha / torch.sqrt(self.eps + x.var(-1, keepdim=True))


NORMS = {
    "layer": lambda width, affine=True: nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine),
    "plain": lambda width, affine=False: nn.LayerNorm(width, eps=1e-6, elementwise_affine=False),
    "own layer": OwnLayerNorm,
    "rms": lambda width, affine=True: nn.RMSNorm(width, eps=1e-5, elementwise_affine=affine),
    "own rms": OwnRMSNorm,
}


class Times(nn.Module):
    def __init__(self, bias=True, scale=1.0, cosines_first=True, norm=False, size=16):
        super().__init__()
        self.scale, self.cosines_first, self.size = scale, cosines_first, size
        layers = [nn.Linear(size, W, bias=bias), nn.SiLU(), nn.Linear(W, W, bias=bias)]
        self.mlp = nn.Sequential(*layers, *([SpreadNorm(W)] if norm else []))

    def forward(self, t):
        half = self.size // 2
        angles = (self.scale * t.float())[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        parts = [angles.cos(), angles.sin()] if self.cosines_first else [angles.sin(), angles.cos()]
        features = torch.cat([*parts, angles.new_zeros(len(t), self.size % 2)], -1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class Gated(nn.Module):
    def __init__(self, hidden, bias):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(W, hidden, bias=bias), nn.Linear(W, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, W, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, norm, mlp, hidden, bias, own):
        super().__init__()
        self.form, self.in_ln = mlp, NORMS[norm](W)
        if mlp == "silu":
            self.mlp = nn.Sequential(nn.Linear(W, hidden, bias=bias), nn.SiLU(), nn.Linear(hidden, W, bias=bias))
        elif mlp == "gated":
            self.ffn = Gated(hidden, bias)
        else:
            self.w1, self.w2 = nn.Linear(W, 2 * hidden, bias=bias), nn.Linear(hidden, W, bias=bias)
        if own:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(W, 3 * W, bias=bias))

    def forward(self, x, shift, scale, gate):
        h = self.in_ln(x) * (1 + scale) + shift
        if self.form == "silu":
            return x + gate * self.mlp(h)
        if self.form == "gated":
            return x + gate * self.ffn(h)
        a, b = self.w1(h).chunk(2, -1)
        a, b = (a, b) if self.form == "fused" else (b, a)
        return x + gate * self.w2(F.silu(a) * b)


class Final(nn.Module):
    def __init__(self, norm, bias, outputs, own):
        super().__init__()
        self.norm_final, self.linear = NORMS[norm](W, affine=False), nn.Linear(W, outputs, bias=bias)
        modulation = nn.Linear(W, 2 * W, bias=bias)
        if own:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)
        else:
            self.ada_ln_modulation = modulation


class Network(nn.Module):
    """``net(x, t, c)``; with several times, t is (N, K).

    Args:
        order: of the rows of a modulation. groups: so many modulations are shared; None: each block has its own.
        times: options of the time embeddings. count: how many of them are averaged.
        outputs: of the last layer. kept: of those, how many are returned.
    """

    def __init__(
        self, *, norm="layer", mlp="silu", hidden=W, bias=True, order=("shift", "scale", "gate"), groups=None, times=(),
        count=1, outputs=2 * C, kept=None, seed=0,
    ):  # fmt: skip
        super().__init__()
        self.order, self.groups, self.kept = order, groups, kept
        self.input_proj, self.cond_embed = nn.Linear(C, W, bias=bias), nn.Linear(Z, W, bias=bias)
        embeddings = [Times(bias, **dict(times)) for _ in range(count)]
        self.time_embed = embeddings[0] if count == 1 else nn.ModuleList(embeddings)
        self.res_blocks = nn.ModuleList(Block(norm, mlp, hidden, bias, groups is None) for _ in range(D))
        if groups is not None:
            self.ada_ln_blocks = nn.ModuleList(nn.Linear(W, 3 * W, bias=bias) for _ in range(groups))
        self.final_layer = Final(norm, bias, outputs, groups is None)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * scale
            parameter.data = noise if parameter.dim() == 2 else parameter.data * bool((parameter == 1).all()) + noise

    def forward(self, x, t, c):
        times = self.time_embed if isinstance(self.time_embed, nn.ModuleList) else [self.time_embed]
        columns = t.unbind(1) if t.dim() == 2 else [t] * len(times)
        y = F.silu(sum(time(column) for time, column in zip(times, columns)) / len(times) + self.cond_embed(c))
        x = self.input_proj(x)
        for i, block in enumerate(self.res_blocks):
            if self.groups is None:
                modulation = block.adaLN_modulation[1]
            else:
                modulation = self.ada_ln_blocks[i // (D // self.groups)]
            x = block(x, **dict(zip(self.order, modulation(y).chunk(3, -1))))
        final = self.final_layer
        last = final.adaLN_modulation[1] if self.groups is None else final.ada_ln_modulation
        parts = dict(zip([name for name in self.order if name != "gate"], last(y).chunk(2, -1)))
        return final.linear(final.norm_final(x) * (1 + parts["scale"]) + parts["shift"])[:, : self.kept]


# By what is special: options of a Network.
KINDS = {
    "plain": {},
    "no affine norms": {"norm": "plain"},
    "norms of its own": {"norm": "own layer"},
    "hidden width": {"hidden": 80},
    "no biases": {"bias": False},
    "root mean square": {"norm": "own rms", "mlp": "gated", "hidden": 144, "bias": False},
    "gated with biases": {"mlp": "gated", "hidden": 32},
    "gate and up in one": {"mlp": "fused", "hidden": 72},
    "up and gate in one": {"mlp": "fused, up first", "hidden": 72},
    "scale first": {"order": ("scale", "shift", "gate")},
    "gate first": {"order": ("gate", "shift", "scale")},
    "shared": {"groups": 2, "order": ("scale", "shift", "gate"), "mlp": "fused", "times": (("scale", 1000.0),)},
    "one for all blocks": {"groups": 1, "times": (("scale", 1000.0),)},
    "sines first": {"times": (("cosines_first", False), ("size", 15))},
    "averaged times": {"count": 2, "times": (("norm", True),), "norm": "own layer", "outputs": C},
    "variance dropped": {"kept": C},
    **({"torch's root mean square": {"norm": "rms"}} if hasattr(nn, "RMSNorm") else {}),
}


def inputs(net: Network, rows: int, seed: int = 0):
    """(x, t, c) float32; t between 0 and 1 where there are several, else whole numbers too."""
    generator = torch.Generator().manual_seed(seed)
    several = isinstance(net.time_embed, nn.ModuleList)
    x, c = (torch.randn(rows, size, generator=generator) for size in (C, Z))
    t = torch.rand(rows, 2, generator=generator) if several else torch.arange(rows) * 0.37
    return x, t, c
