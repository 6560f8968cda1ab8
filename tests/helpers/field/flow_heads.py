"""Small heads that sample by flow matching, as other code bases have them: MAR's network, a loop of their own."""

from __future__ import annotations

import itertools

import torch
import torch.nn as nn
from foreign import CHANNELS, COND, DEPTH, WIDTH, Net

from cspd.models.diffloss import SimpleMLPAdaLN


def guided(velocity: torch.Tensor, *scales) -> torch.Tensor:
    """Rows of 1 + len(scales) groups, the fully conditional first -> rows of one: u + s_1 (b - u) + s_0 (a - b)."""
    groups = velocity.chunk(1 + len(scales))
    out = groups[-1]
    for scale, better, worse in zip(reversed(scales), reversed(groups[:-1]), reversed(groups[1:])):
        out = out + scale * (better - worse)
    return out


class NextStepNet(nn.Module):
    """MAR's parts; its numbers have other names, and the number of blocks is called ``layers``."""

    evaluations = 0

    def __init__(self, input_dim, cond_dim, dim, layers):
        super().__init__()
        self.input_dim, self.cond_dim, self.dim, self.layers, self.mlp_ratio = input_dim, cond_dim, dim, layers, 1.0
        for name, part in SimpleMLPAdaLN(input_dim, dim, input_dim, cond_dim, layers).named_children():
            setattr(self, name, part)

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class FlowMatchingHead(nn.Module):
    """stepfun-ai/NextStep-1: Euler-Maruyama, one to three groups, one noise for all rows unless told otherwise."""

    def __init__(self):
        super().__init__()
        self.input_dim = CHANNELS
        self.net = NextStepNet(CHANNELS, COND, WIDTH, DEPTH)

    @property
    def dtype(self):
        return self.net.input_proj.weight.dtype

    @property
    def device(self):
        return self.net.input_proj.weight.device

    def get_score_from_velocity(self, velocity, x, t):
        return (t * velocity - x) / ((1 - t) ** 2 + t * (1 - t))

    def get_velocity_from_cfg(self, velocity, cfg, cfg2, groups):
        return guided(velocity, *{1: (), 2: (cfg,), 3: (cfg, cfg2)}[groups])

    @torch.no_grad()
    def sample(
        self, c, cfg=1.0, cfg2=1.0, timesteps_shift=1.0, num_sampling_steps=20, last_step_size=0.04, noise_repeat=1
    ):
        groups = 1 + (cfg > 1) + (cfg2 > 1)
        rows = len(c) // groups
        if rows % noise_repeat:
            raise ValueError(f"{rows} rows are no multiple of noise_repeat={noise_repeat}")

        def noise():
            drawn = torch.randn(noise_repeat, self.input_dim, device=self.device)
            return drawn.repeat(rows // noise_repeat, 1)

        def velocity(x, t):
            x = torch.cat([x] * groups).to(c.dtype)
            return self.get_velocity_from_cfg(self.net(x, t.expand(len(c)).to(c), c).float(), cfg, cfg2, groups)

        t = torch.linspace(0, 1 - last_step_size, num_sampling_steps)
        t = t / (timesteps_shift - (timesteps_shift - 1) * t)
        x = noise()
        for now, after in itertools.pairwise(t):
            v = velocity(x, now.to(self.device))
            dt, drift = after - now, v + (1 - now) * self.get_score_from_velocity(v, x, now)
            x = x + drift * dt + (2 * (1 - now) * dt) ** 0.5 * noise()
        return (x + velocity(x, t[-1].to(self.device)) * last_step_size).to(c.dtype)


class OneOutputNet(Net):
    """The network puts out a velocity alone."""

    def __init__(self):
        super().__init__(learned=False)


class AdaptiveSampler:
    """Heun's method with steps by the error over all rows, so that the rows are not independent of one another."""

    def sample_ode(self, atol=1e-2, rtol=1e-2):
        def sample(x, model, **kwargs):
            def velocity(x, t):
                return model(x, torch.full((len(x),), t, device=x.device), **kwargs)

            t, dt = 0.0, 0.05
            with torch.no_grad():
                while t < 1:
                    dt = min(dt, 1 - t)
                    first = velocity(x, t)
                    second = velocity(x + dt * first, t + dt)
                    error = (dt / 2 * (second - first) / (atol + rtol * x.abs())).square().mean().sqrt().item()
                    if error <= 1:
                        x, t = x + dt / 2 * (first + second), t + dt
                    dt *= min(5.0, max(0.3, 0.9 * (1 / max(error, 1e-6)) ** 0.5))
            return [x]

        return sample


class DiffMLPs_SiT(nn.Module):  # noqa: N801
    """neu-vi/MARDM by flow matching: the steps are adaptive."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.net = CHANNELS, OneOutputNet()
        self.gen_diffusion = AdaptiveSampler()

    def sample(self, z, temperature=1.0, cfg=1.0):
        if cfg == 1.0:
            noise = torch.randn(len(z), self.in_channels).to(z.device)
            return self.gen_diffusion.sample_ode()(noise, self.net.forward, c=z)[-1]
        noise = torch.randn(len(z) // 2, self.in_channels).to(z.device).repeat(2, 1)
        return self.gen_diffusion.sample_ode()(noise, self.net.forward_with_cfg, c=z, cfg_scale=cfg)[-1]


class EulerSampler:
    """Euler's method on an even grid of points."""

    def sample_ode(self, *, sampling_method="dopri5", num_steps=50):
        def sample(x, model, **kwargs):
            kwargs.pop("temperature", None)
            t = torch.linspace(0, 1, num_steps).to(x.device)
            out = [x]
            for now, after in itertools.pairwise(t):
                out.append(out[-1] + (after - now) * model(out[-1], now.expand(len(x)), **kwargs))
            return torch.stack(out)

        return sample


class FlowMarNet(Net):
    """It has two outputs a channel, and hands the first out."""

    def forward(self, x, t, c):
        return super().forward(x, t, c).chunk(2, dim=1)[0]


class FlowLoss(nn.Module):
    """lavinal712/flow_mar: as many steps of Euler whatever it is made for; the temperature has no part in it."""

    points = 250

    def __init__(self):
        super().__init__()
        self.in_channels, self.net = CHANNELS, FlowMarNet()
        self.train_transport = self.gen_transport = object()
        self.transport_sampler = EulerSampler()

    def sample(self, z, temperature=1.0, cfg=1.0):
        rows = len(z) if cfg == 1.0 else len(z) // 2
        noise, kwargs, network = torch.randn(rows, self.in_channels).to(z.device), {"c": z}, self.net.forward
        if cfg != 1.0:
            noise, kwargs = noise.repeat(2, 1), {"c": z, "cfg_scale": cfg}
            network = self.net.forward_with_cfg
        walk = self.transport_sampler.sample_ode(sampling_method="euler", num_steps=self.points)
        return walk(noise, network, **kwargs, temperature=temperature)[-1]


class RectifiedFlowHead(nn.Module):
    """177-Liukuan/MSA-T2M: from t = 1 down to 0 in even steps; two groups, or three whose order is the other one."""

    def __init__(self, num_flow_steps=10):
        super().__init__()
        self.in_channels, self.num_flow_steps, self.flow_solver = CHANNELS, num_flow_steps, "euler"
        self.net = OneOutputNet()

    def _walk(self, z, groups, temperature, velocity):
        rows, steps = len(z) // groups, self.num_flow_steps
        x = torch.randn(rows, self.in_channels, device=z.device, dtype=z.dtype) * float(temperature)
        for i in range(steps):
            t = torch.full((len(z),), 1 - i / steps, device=z.device, dtype=z.dtype)
            x = x - velocity(self.net(x.repeat(groups, 1), t, z)) / steps
        return x

    def sample(self, z, temperature=1.0, cfg=1.0):
        if cfg == 1.0:
            return self._walk(z, 1, temperature, lambda v: v)
        return self._walk(z, 2, temperature, lambda v: guided(v, cfg)).repeat(2, 1)

    def sample_additive_cfg(self, z_nn, z_tn, z_tr, s_t=6.0, s_r=2.0, temperature=1.0):
        def velocity(v):
            nothing, text, both = v.chunk(3)
            return nothing + float(s_t) * (text - nothing) + float(s_r) * (both - text)

        return self._walk(torch.cat([z_nn, z_tn, z_tr]), 3, temperature, velocity)
