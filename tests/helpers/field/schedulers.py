"""Schedulers as diffusers has them: objects that keep their place, and take a step from what the network put out."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch


class DPMSolverMultistepScheduler:
    """DPM-Solver++ of order 2 (arXiv 2211.01095), multistep, for v; ``sde``: its stochastic form."""

    def __init__(self, sde=False):
        self.config = SimpleNamespace(
            num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
            algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++", solver_order=2, solver_type="midpoint",
            lower_order_final=True, final_sigmas_type="zero", timestep_spacing="linspace", thresholding=False,
        )  # fmt: skip
        level = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = [min(1 - after / now, 0.999) for now, after in itertools.pairwise(level)]
        self.alphas_cumprod = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), dim=0)
        self.init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps):
        self.num_inference_steps = num_inference_steps
        grid = torch.linspace(0, 999, num_inference_steps + 1, dtype=torch.float64).round()
        self.timesteps = grid.flip(0)[:-1].long()
        kept = self.alphas_cumprod[self.timesteps]
        self.sigmas = torch.cat([((1 - kept) / kept) ** 0.5, torch.zeros(1)])
        self.step_index, self.before = 0, None

    def step(self, model_output, timestep, sample):
        i, last = self.step_index, self.step_index == self.num_inference_steps - 1
        (a, s), (a_next, s_next) = (self._parts(sigma) for sigma in self.sigmas[i : i + 2])
        x0 = direction = a * sample - s * model_output
        level, level_next = torch.log(a) - torch.log(s), torch.log(a_next) - torch.log(s_next)
        if self.before is not None and not last:
            x0_before, level_before = self.before
            direction = x0 + (x0 - x0_before) / ((level - level_before) / (level_next - level)) / 2
        self.before, self.step_index = (x0, level), i + 1
        h = level_next - level
        if self.config.algorithm_type == "dpmsolver++":
            return SimpleNamespace(prev_sample=s_next / s * sample - a_next * (torch.exp(-h) - 1) * direction)
        noise, shrunk = torch.randn_like(model_output), 1 - torch.exp(-2 * h)
        mean = s_next / s * torch.exp(-h) * sample + a_next * shrunk * direction
        return SimpleNamespace(prev_sample=mean + s_next * shrunk**0.5 * noise)

    @staticmethod
    def _parts(sigma):
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha


class DDIMScheduler:
    """DDIM for v, its betas rescaled so that the noisiest step holds no data."""

    def __init__(self):
        self.config = SimpleNamespace(
            num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
            timestep_spacing="trailing", rescale_betas_zero_snr=True, thresholding=False,
        )  # fmt: skip
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        root = torch.cumprod(1 - betas, dim=0).sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.alphas_cumprod, self.final_alpha_cumprod = root**2, torch.tensor(1.0)
        self.init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps):
        self.num_inference_steps = num_inference_steps
        stride = 1000 / num_inference_steps
        self.timesteps = torch.tensor([round(1000 - i * stride) - 1 for i in range(num_inference_steps)])

    def step(self, model_output, timestep, sample):
        before = timestep - 1000 // self.num_inference_steps
        acp = self.alphas_cumprod[timestep]
        acp_before = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        x0 = acp**0.5 * sample - (1 - acp) ** 0.5 * model_output
        eps = acp**0.5 * model_output + (1 - acp) ** 0.5 * sample
        return SimpleNamespace(prev_sample=acp_before**0.5 * x0 + (1 - acp_before) ** 0.5 * eps)
