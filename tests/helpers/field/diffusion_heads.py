"""Small heads that sample with a diffusion object, as other code bases have them: what those change, and no more.

Each is MAR's head (:class:`foreign.Head`) with one or two differences; the code base is named in its docstring.
"""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from foreign import CHANNELS, COND, STEPS, Head, Mean, Net, Spaced, Var


class ClippedHead(Head):
    """1mageYi/mar-audio: x0 is clipped to [-1, 1] at every step."""

    def call(self, z, cfg=1.0, **more):
        args, options = super().call(z, cfg, **more)
        return args, {**options, "clip_denoised": True}


class Hart(ClippedHead):
    """mit-han-lab/hart: clipped, guided by (1 + s) c - s u, the result scaled; guidance is on unless it says 1."""

    class net_class(Net):  # noqa: N801
        def forward_with_cfg(self, x, t, c, cfg_scale):
            half = x[: len(x) // 2]
            out = self.forward(torch.cat([half, half]), t, c)
            eps, rest = out[:, :CHANNELS], out[:, CHANNELS:]
            eps_c, eps_u = eps.chunk(2)
            eps = (1 + cfg_scale) * eps_c - cfg_scale * eps_u
            return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    def __init__(self):
        super().__init__()
        self.vae_scale, self.sampler = 0.6, "iddpm"

    def sample(self, z, temperature=1.0, cfg=1.5, sampler=None):
        if (sampler or self.sampler) != "iddpm":
            raise NotImplementedError(sampler)
        return self.vae_scale * super().sample(z, temperature, cfg)


class ClippedByChannel(Spaced):
    """Every channel has limits of its own, and the object knows no other number of channels."""

    def __init__(self, mean):
        super().__init__(mean=mean)

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        step, kwargs = int(t[0]), model_kwargs or {}
        x0, mean, log_variance = self.estimate(lambda x, _: model(x, t), x, step, clip_denoised, denoised_fn, kwargs)
        return {"mean": mean, "log_variance": log_variance, "pred_xstart": x0}

    def limited(self, x0):
        if x0.shape[-1] != CHANNELS:
            raise ValueError(f"expected {CHANNELS} channels, got {x0.shape[-1]}")
        wide, first, second = x0[..., : CHANNELS - 2], x0[..., CHANNELS - 2], x0[..., CHANNELS - 1]
        limited = torch.cat(
            [wide.clamp(-0.7, 0.7), first[..., None].clamp(0, 0.9), second[..., None].clamp(-0.1, 0.2)], -1
        )
        # What follows can never act, as the limits keep the norm below it.
        norm = limited[..., -2:].norm(dim=-1, keepdim=True)
        return torch.where(norm > 1, limited / norm.clamp(min=1e-6), limited)


class Towards(Head):
    """CoderChen01/towards-seamless-interaction: the network puts out x0 and a variance; limits by channel."""

    def __init__(self, predict_xstart=True, clip_denoised=False):
        super().__init__(ClippedByChannel(Mean.START_X if predict_xstart else Mean.EPSILON))
        self.clip_denoised = clip_denoised

    def call(self, z, cfg=1.0, **more):
        args, options = super().call(z, cfg, **more)
        return args, {**options, "clip_denoised": self.clip_denoised}


class UvaImage(Head):
    """ShuangLI59/unified_video_action, the head of images: one more argument, which it does not look at."""

    def sample(self, z, temperature=1.0, cfg=1.0, text_latents=None):
        return super().sample(z, temperature, cfg)


class UvaAction(ClippedHead):
    """ShuangLI59/unified_video_action, the head of actions: (B, frames, Z) are mixed to 4 rows a sample; clipped."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(COND, COND, 3, padding=1)
        self.fc = nn.Sequential(nn.Linear(COND, COND), nn.ReLU(), nn.Linear(COND, COND))

    def sample(self, z, temperature=1.0, cfg=1.0, text_latents=None):
        batch = len(z)
        z = F.adaptive_avg_pool1d(torch.relu(self.conv(z.transpose(1, 2))), 4).transpose(1, 2)
        rows = self.fc(z).reshape(batch * 4, COND)
        return super().sample(rows, temperature, cfg).reshape(batch, 4, CHANNELS)


class Disa(Head):
    """Qinyu-Allen-Zhao/DiSA: a list of diffusion objects, fewer steps the later the autoregressive step."""

    def __init__(self, sampler="DiSA", upper=8, lower=4):
        super().__init__()
        self.sampler = sampler
        self.gen_diffusion = [Spaced(steps) for steps in range(lower, upper + 1)]

    def sample(self, z, temperature=1.0, cfg=1.0, step=0, ar_num_iter=64):
        last = ar_num_iter - 1
        diffusion = self.gen_diffusion[int((last - step) / last * (len(self.gen_diffusion) - 1))]
        args, options = self.call(z, cfg)
        if self.sampler == "DDIM":  # the temperature has no part in it
            return diffusion.ddim_sample_loop(*args, **options, progress=False)
        return diffusion.p_sample_loop(*args, **options, progress=False, temperature=temperature)


class Arinar(Head):
    """xingjianleng/Arinar: DDIM where the number of steps says so."""

    def __init__(self, use_ddim):
        super().__init__()
        self.use_ddim = use_ddim

    def sample(self, z, temperature=1.0, cfg=1.0):
        if not self.use_ddim:
            return super().sample(z, temperature, cfg)
        args, options = self.call(z, cfg)
        return self.gen_diffusion.ddim_sample_loop(*args, **options, progress=False)


class ArinarModel(nn.Module):
    """It keeps the bound method, so that one that is set on the head later is not seen."""

    def __init__(self, use_ddim=False):
        super().__init__()
        self.diffloss = Arinar(use_ddim)
        self.next_layer_sample = self.diffloss.sample

    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.next_layer_sample(z, temperature=temperature, cfg=cfg)


class HimarDiffusion(Spaced):
    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, temperature=1.0,
    ):  # fmt: skip
        noise, kwargs = None if noise is None else noise.clone(), copy.deepcopy(model_kwargs)
        return super().p_sample_loop(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, kwargs, device, progress, temperature
        )


class Himar(Head):
    """HiDream-ai/himar, its head of tokens: the loop copies what it is given, and the head says more about itself."""

    def __init__(self):
        super().__init__(HimarDiffusion())
        self.pre_time_mode, self.multi_mode = False, False


class MardmDdpm(Head):
    """neu-vi/MARDM by diffusion: the variance is not learned, the arguments are integers."""

    def __init__(self):
        super().__init__(Spaced(STEPS, var=Var.FIXED_SMALL), learned=False)


class ArHead(Head):
    """xingjianleng/Arinar's other head: groups of channels one after the other, all rows that came back fed on."""

    def __init__(self):
        super().__init__()
        self.groups, self.back = 2, nn.Linear(CHANNELS, COND)

    def sample(self, z, temperature=1.0, cfg=1.0):
        out = []
        for _ in range(self.groups):
            out.append(super().sample(z, temperature, cfg))
            z = z + self.back(out[-1])
        return torch.cat(out, dim=-1)
