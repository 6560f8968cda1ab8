"""Heads whose loops belong to no diffusion object, in miniature: solvers, schedulers and networks of other code.

Written for these tests from what such code computes. Networks count how often their own forward runs.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from foreign import CHANNELS, COND, WIDTH, Net, made


def ready(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """One with random weights, whose every layer has its share in the result; for sampling."""
    return made(kind, seed=seed).requires_grad_(False)


class SolverHead(nn.Module):
    """Like ML-GSAI/eMIGM's with a solver: DPM-Solver++ over MAR's network, first and second order by turns; the network
    is called with the unconditional rows first, by a method of its own that drops the variance."""

    class Network(Net):
        def forward_with_solver(self, x, t, c):
            return self.forward(x, t, c)[:, :CHANNELS]

    def __init__(self, steps: int = 5):
        super().__init__()
        self.net, self.steps = self.Network(), steps

    def sample(self, z, cfg=1.0):
        guided = cfg != 1.0
        rows = len(z) // 2 if guided else len(z)
        z = torch.cat([z[rows:], z[:rows]]) if guided else z

        def x0(x, time, alpha, sigma):
            t = torch.full((len(z),), 1000.0 * time, device=x.device)
            out = self.net.forward_with_solver(torch.cat([x, x]) if guided else x, t, z)
            if guided:
                out, conditional = out.chunk(2)
                out = out + cfg * (conditional - out)
            return (x - sigma * out) / alpha

        x = torch.randn(rows, CHANNELS).to(z.device)
        times = [0.99 - 0.95 * i / self.steps for i in range(self.steps + 1)]
        alphas = [math.cos(0.5 * math.pi * time) for time in times]
        sigmas = [math.sin(0.5 * math.pi * time) for time in times]
        lambdas, before = [math.log(a / s) for a, s in zip(alphas, sigmas)], None
        for i in range(self.steps):
            now = x0(x, times[i], alphas[i], sigmas[i])
            h = lambdas[i + 1] - lambdas[i]
            both = now
            if i % 2:
                both = now + 0.5 * h / (lambdas[i] - lambdas[i - 1]) * (now - before)
            x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-h) * both
            before = now
        return x


class RootNorm(nn.Module):
    def __init__(self, width: int | None = None):
        super().__init__()
        self.eps = 1e-5
        self.weight = None if width is None else nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)).type_as(x)
        return x if self.weight is None else x * self.weight


class Features(nn.Module):
    """Cosines, then sines, then two layers without biases."""

    def __init__(self, size: int = 16):
        super().__init__()
        self.frequency_embedding_size = size
        self.mlp = nn.Sequential(
            nn.Linear(size, WIDTH, bias=False), nn.SiLU(), nn.Linear(WIDTH, WIDTH, bias=False)
        )  # fmt: skip

    def forward(self, t):
        half = self.frequency_embedding_size // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(t.dtype))


class Gated(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(WIDTH, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SpeechLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.ffn = RootNorm(WIDTH), Gated(3 * WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH, bias=False))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.ffn(self.norm(x) * (1 + scale) + shift)


class SpeechFinal(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final, self.linear = RootNorm(), nn.Linear(WIDTH, CHANNELS, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH, bias=False))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SpeechNet(nn.Module):
    """Like microsoft/VibeVoice's prediction head: root mean square norms, gated MLPs, no biases."""

    evaluations = 0

    def __init__(self):
        super().__init__()
        self.noisy_images_proj = nn.Linear(CHANNELS, WIDTH, bias=False)
        self.cond_proj, self.t_embedder = nn.Linear(COND, WIDTH, bias=False), Features()
        self.layers, self.final_layer = nn.ModuleList(SpeechLayer() for _ in range(2)), SpeechFinal()

    def forward(self, noisy_images, timesteps, condition):
        self.evaluations = self.evaluations + 1
        x, y = self.noisy_images_proj(noisy_images), self.cond_proj(condition) + self.t_embedder(timesteps)
        for layer in self.layers:
            x = layer(x, y)
        return self.final_layer(x, y)


class Scheduler:
    """A multistep sampler of velocities with a state of its own, as schedulers of libraries have."""

    def __init__(self, steps: int):
        self.timesteps = torch.linspace(999, 0, steps + 1).round().long()[:-1]
        self.before = None

    def step(self, v, t, x):
        i = int((self.timesteps == t).nonzero())
        following = float(self.timesteps[i + 1]) if i + 1 < len(self.timesteps) else 0.0
        angle, then = (0.5 * math.pi * float(value) / 1000 for value in (t, following))
        x0 = math.cos(angle) * x - math.sin(angle) * v
        both = x0 if self.before is None else 1.5 * x0 - 0.5 * self.before
        self.before = x0
        noise = (x - math.cos(angle) * x0) / math.sin(angle)
        return math.cos(then) * both + math.sin(then) * noise


class Speech(nn.Module):
    """A model with such a network deep inside, and a loop that calls it by keyword, guided by two conditions."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"prediction_head": SpeechNet(), "other": nn.Linear(4, 4)})

    @torch.no_grad()
    def sample_speech_tokens(self, condition, negative, steps=4, scale=1.3):
        scheduler, rows = Scheduler(steps), len(condition)
        both = torch.cat([condition, negative])
        x = torch.randn(2 * rows, CHANNELS).to(condition)
        for t in scheduler.timesteps:
            half = x[:rows]
            v = self.model["prediction_head"](
                torch.cat([half, half]), t.repeat(2 * rows).to(both), condition=both
            )  # fmt: skip
            positive, negative = v.chunk(2)
            v = negative + scale * (positive - negative)
            x = scheduler.step(torch.cat([v, v]), t, x)
        return x[:rows]


def integrate(velocity, x, steps: int = 3):
    """Runge and Kutta's fourth order in time from 0 to 1; times are tensors of rank 0, as ODE solvers have them."""
    h = torch.tensor(1.0 / steps, device=x.device)
    for i in range(steps):
        t = i * h
        k1 = velocity(t, x)
        k2 = velocity(t + h / 2, x + h / 2 * k1)
        k3 = velocity(t + h / 2, x + h / 2 * k2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(t + h, x + h * k3))
    return x


class FlowHead(nn.Module):
    """Like neu-vi/MARDM's: MAR's network as the velocity of an ODE, guided by ``forward_with_cfg``."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.net = CHANNELS, Net(learned=False)

    def sample(self, z, cfg=1.0):
        x = torch.randn(len(z) if cfg == 1.0 else len(z) // 2, CHANNELS).to(z.device)
        if cfg == 1.0:
            return integrate(lambda t, x: self.net(x, t.expand(len(x)), c=z), x)
        x = torch.cat([x, x])
        return integrate(lambda t, x: self.net.forward_with_cfg(x, t.expand(len(x)), z, cfg), x)
