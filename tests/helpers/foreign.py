"""Stand-ins for the diffusion heads of other code: a respaced diffusion object with tables, and heads that use it.

Written for these tests; what a fork changes is changed in a subclass.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch
import torch.nn as nn

from cspd.diffusions import diffusions_of
from cspd.models.diffloss import SimpleMLPAdaLN
from cspd_kernels import Schedule
from cspd_kernels.testing import randomize_

CHANNELS, COND, WIDTH, DEPTH, STEPS = 4, 8, 32, 2, 12
Mean = Enum("Mean", ["EPSILON", "START_X", "PREVIOUS_X"])
Var = Enum("Var", ["LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"])


class Spaced:
    """A diffusion object with betas, the tables that follow from them, and the loops that read those."""

    def __init__(self, steps: int = STEPS, mean=Mean.EPSILON, var=Var.LEARNED_RANGE):
        schedule = Schedule.diffusion(np.linspace(0.01, 0.1, steps), 3 * np.arange(steps))
        self.betas, self.timestep_map = schedule.betas.copy(), schedule.timesteps.astype(int).tolist()
        self.num_timesteps = len(self.betas)
        self.model_mean_type, self.model_var_type = mean, var
        acp = np.cumprod(1 - self.betas)
        before = np.append(1.0, acp[:-1])
        self.alphas_cumprod, self.alphas_cumprod_prev = acp, before
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / acp)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / acp - 1)
        self.posterior_variance = self.betas * (1 - before) / (1 - acp)
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_mean_coef1 = self.betas * np.sqrt(before) / (1 - acp)
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - self.betas) / (1 - acp)

    def estimate(self, model, x, i, clip_denoised, denoised_fn, kwargs):
        """(x0, mean, log variance) of step i."""
        out = model(x, torch.full((len(x),), self.timestep_map[i], device=x.device), **kwargs)
        first, rest = out[..., : x.shape[-1]], out[..., x.shape[-1] :]
        if self.model_mean_type is Mean.START_X:
            x0 = first
        else:
            x0 = float(self.sqrt_recip_alphas_cumprod[i]) * x - float(self.sqrt_recipm1_alphas_cumprod[i]) * first
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = self.limited(x0)
        low, high = float(self.posterior_log_variance_clipped[i]), float(np.log(self.betas[i]))
        if self.model_var_type is Var.LEARNED_RANGE:
            share = (rest + 1) / 2
            log_variance = share * high + (1 - share) * low
        else:
            large = self.model_var_type is Var.FIXED_LARGE and i > 0
            log_variance = torch.full_like(x, high if large else low)
        return x0, self.mean(x0, x, i), log_variance

    def limited(self, x0):
        """x0 where it is clipped."""
        return x0.clamp(-1, 1)

    def mean(self, x0, x, i):
        return float(self.posterior_mean_coef1[i]) * x0 + float(self.posterior_mean_coef2[i]) * x

    def p_sample(self, model, x, i, clip_denoised, denoised_fn, kwargs, temperature):
        _, mean, log_variance = self.estimate(model, x, i, clip_denoised, denoised_fn, kwargs)
        noise = torch.randn_like(x)
        return mean + (i > 0) * torch.exp(0.5 * log_variance) * noise * temperature

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, temperature=1.0,
    ):  # fmt: skip
        x = torch.randn(*shape, device=device) if noise is None else noise
        with torch.no_grad():
            for i in reversed(range(self.num_timesteps)):
                x = self.p_sample(model, x, i, clip_denoised, denoised_fn, model_kwargs or {}, temperature)
        return x

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        """DDIM (arXiv 2010.02502). As in the released code noise is drawn at every step, also where eta is 0."""
        x = torch.randn(*shape, device=device) if noise is None else noise
        with torch.no_grad():
            for i in reversed(range(self.num_timesteps)):
                x0, *_ = self.estimate(model, x, i, clip_denoised, denoised_fn, model_kwargs or {})
                acp, before = float(self.alphas_cumprod[i]), float(self.alphas_cumprod_prev[i])
                sigma = eta * ((1 - before) / (1 - acp)) ** 0.5 * (1 - acp / before) ** 0.5
                eps = (x - acp**0.5 * x0) / (1 - acp) ** 0.5
                mean = before**0.5 * x0 + (1 - before - sigma**2) ** 0.5 * eps
                x = mean + (i > 0) * sigma * torch.randn_like(x)
        return x


class Net(SimpleMLPAdaLN):
    """The network of a head; it counts its evaluations."""

    evaluations = 0

    def __init__(self, learned: bool = True):
        super().__init__(CHANNELS, WIDTH, (1 + learned) * CHANNELS, COND, DEPTH)

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        return super().forward(x, t, c)


class Head(nn.Module):
    """A head that samples as MAR's does."""

    net_class = Net

    def __init__(self, diffusion=None, **options):
        super().__init__()
        self.in_channels = CHANNELS
        self.net = self.net_class(**options)
        self.gen_diffusion = Spaced() if diffusion is None else diffusion

    def call(self, z, cfg=1.0, **more):
        """(network, arguments of the loop) as MAR's sample gives them."""
        rows = len(z) if cfg == 1.0 else len(z) // 2
        noise = torch.randn(rows, self.in_channels).to(z.device)
        kwargs = {"c": z}
        if cfg != 1.0:
            noise, kwargs = torch.cat([noise, noise]), {"c": z, "cfg_scale": cfg}
        network = self.net.forward if cfg == 1.0 else self.net.forward_with_cfg
        return (network, noise.shape, noise), {"clip_denoised": False, "model_kwargs": {**kwargs, **more}}

    def sample(self, z, temperature=1.0, cfg=1.0):
        args, options = self.call(z, cfg)
        return self.gen_diffusion.p_sample_loop(*args, **options, temperature=temperature)


def made(kind=Head, *args, seed: int = 0, **options) -> nn.Module:
    """A head with random weights, whose every layer has its share in the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize_(kind(*args, **options), seed, WIDTH**-0.5).eval()


def conditions(rows: int = 6, seed: int = 3) -> torch.Tensor:
    """z (rows, COND)."""
    return torch.randn(rows, COND, generator=torch.Generator().manual_seed(seed))


def run(head, call, seed: int = 5):
    """(result, state of torch's generator afterwards, evaluations of the network) of a seeded call."""
    torch.manual_seed(seed)
    before = head.net.evaluations
    result = call(head)
    return result, torch.get_rng_state(), head.net.evaluations - before


def own_messages(caplog) -> list[str]:
    """What was told about code that is not accelerated."""
    return [r.getMessage() for r in caplog.records if "runs its own code, unaccelerated" in r.getMessage()]


def state(head) -> list[tuple]:
    """Everything that a head, its network and its diffusion objects hold, by identity, and what their tables hold."""
    parts = [*head.modules(), *diffusions_of(head).values()]
    held = [(part, name, value) for part in parts for name, value in vars(part).items()]
    held += [
        (part, name, v) for part, name, value in held if isinstance(value, dict) for v in (*value, *value.values())
    ]
    return held


def unchanged(before: list[tuple], after: list[tuple]) -> bool:
    """Whether two states are the same objects in the same places."""
    return len(before) == len(after) and all(
        a[0] is b[0] and a[1] == b[1] and a[2] is b[2] for a, b in zip(before, after)
    )
