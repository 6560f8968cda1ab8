"""Small models for the tests of the model-side package."""

from __future__ import annotations

import numpy as np
import torch

from cspd.models import MAR, DiffLoss
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


class CSpDDiffLoss(DiffLoss):
    """A head with the additional methods of MarkXCloud/CSpD, computed step by step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gen_diffusion.manager = Manager()

    def sample(self, z, temperature=1.0, cfg=1.0):
        rows = len(z) if cfg == 1.0 else len(z) // 2
        noise = torch.randn(rows, self.in_channels)
        return self.sample_with_noise(z, noise if cfg == 1.0 else torch.cat([noise, noise]), temperature, cfg)

    def sample_with_noise(self, z, noise, temperature=1.0, cfg=1.0):
        path = self.gen_diffusion.manager.log_var
        tokens = self.sample_with_inter_noise(z, noise, None, temperature, cfg)
        self.gen_diffusion.manager.log_var = path  # only the other method records it
        return tokens

    @torch.no_grad()
    def sample_with_inter_noise(self, z, noise, inter_noise, temperature=1.0, cfg=1.0):
        net = self.net if cfg == 1.0 else self.net.forward_with_cfg
        kwargs = {} if cfg == 1.0 else {"cfg_scale": cfg}
        manager, x = self.gen_diffusion.manager, noise
        manager.log_var = 0.0
        for i in reversed(range(self.gen_diffusion.num_timesteps)):
            t = torch.full((len(x),), int(self.gen_diffusion.schedule.timesteps[i]))
            mean, log_variance = self.gen_diffusion.posterior(net(x, t, z, **kwargs), x, i)
            std = torch.exp(0.5 * log_variance) * temperature
            drawn = torch.randn_like(x) if inter_noise is None else inter_noise[i]
            if i > 0:
                x = mean + std * drawn
                manager.log_var = manager.log_var + 0.5 * log_variance
        manager.mean, manager.variance, manager.sample = mean, std, mean
        return mean
