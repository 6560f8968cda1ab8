"""Small models for the tests of the model-side package."""

from __future__ import annotations

import numpy as np
import torch

from cspd.models import MAR, DiffLoss, GaussianDiffusion
from cspd_kernels import Schedule
from cspd_kernels.testing import randomize_


def small_mar(seed: int = 0, width: int = 32, **changes) -> MAR:
    """A 16-token MAR with random weights in eval mode; T = 12 cosine steps unless changed."""
    torch.manual_seed(seed)
    config = dict(
        img_size=8, vae_stride=1, patch_size=2, vae_embed_dim=1, class_num=10, buffer_size=3,
        encoder_embed_dim=width, encoder_depth=1, encoder_num_heads=2,
        decoder_embed_dim=width, decoder_depth=1, decoder_num_heads=2,
        diffloss_d=2, diffloss_w=width, num_sampling_steps="12",
    )  # fmt: skip
    return randomize_(MAR(**{**config, **changes}), seed + 1).eval()


def sample(model: MAR, seed: int = 0, **options) -> torch.Tensor:
    """``sample_tokens`` of three labelled images, its two global generators seeded."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    with torch.no_grad():
        return model.sample_tokens(3, **{"num_iter": 6, "labels": torch.tensor([1, 4, 9]), **options})


class Manager:
    """Where CSpD's diffusion object leaves the last step's distribution."""

    mean = variance = log_var = sample = None


class CSpDDiffusion(GaussianDiffusion):
    """A diffusion object that fills a manager, and has a second loop, in which the noise of the steps may be given."""

    def __init__(self, schedule: Schedule):
        super().__init__(schedule)
        self.manager = Manager()

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, temperature=1.0,
    ):  # fmt: skip
        return self._walk(model, shape, noise, None, clip_denoised, denoised_fn, model_kwargs, temperature, False)

    def p_sample_loop_with_noise(
        self, model, shape, noise=None, inter_noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
        model_kwargs=None, device=None, progress=False, temperature=1.0,
    ):  # fmt: skip
        return self._walk(model, shape, noise, inter_noise, clip_denoised, denoised_fn, model_kwargs, temperature, True)

    @torch.no_grad()
    def _walk(self, model, shape, x, inter_noise, clip, denoised_fn, kwargs, temperature, keep_path):
        if x is None:  # by the CPU's generator, then to the network's device, whatever ``device`` says
            x = torch.randn(*shape).to(kwargs["c"].device)
        path = 0.0
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), int(self.schedule.timesteps[i]), device=x.device)
            out = model(x, t, **kwargs)
            x0 = self._x0(out, x, i)
            x0 = x0 if denoised_fn is None else denoised_fn(x0)
            mean, log_variance = self._mean(out, x0.clamp(-1, 1) if clip else x0, x, i)
            std = torch.exp(0.5 * log_variance) * temperature
            drawn = torch.randn_like(x) if inter_noise is None else inter_noise[i]
            if i == 0:
                x = self.manager.sample = self.manager.mean = mean
                self.manager.variance = std
            else:
                x = mean + std * drawn
                path = path + 0.5 * log_variance
        if keep_path:
            self.manager.log_var = path
        return x


class CSpDDiffLoss(DiffLoss):
    """A head with the additional methods of MarkXCloud/CSpD."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gen_diffusion = CSpDDiffusion(self.gen_diffusion.schedule)

    def sample_with_noise(self, z, noise, temperature=1.0, cfg=1.0):
        network, kwargs = self._network(z, cfg)
        return self.gen_diffusion.p_sample_loop(
            network, noise.shape, noise, clip_denoised=False, model_kwargs=kwargs, temperature=temperature
        )

    def sample_with_inter_noise(self, z, noise, inter_noise, temperature=1.0, cfg=1.0):
        network, kwargs = self._network(z, cfg)
        return self.gen_diffusion.p_sample_loop_with_noise(
            network, noise.shape, noise, inter_noise, clip_denoised=False, model_kwargs=kwargs, temperature=temperature
        )

    def _network(self, z, cfg):
        if cfg == 1.0:
            return self.net.forward, {"c": z}
        return self.net.forward_with_cfg, {"c": z, "cfg_scale": cfg}
