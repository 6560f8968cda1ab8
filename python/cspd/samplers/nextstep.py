"""NextStep-1's flow-matching head: Euler-Maruyama, three-part guidance, noise that images of one prompt may share."""

from __future__ import annotations

from functools import lru_cache

import torch

from cspd_kernels import Schedule

from ..errors import UnsupportedModel
from .adapter import Adapter, Draws, Reading


class NextStep(Adapter):
    """``FlowMatchingHead.sample`` of stepfun-ai/NextStep-1 (arXiv 2508.10711)."""

    source = "stepfun-ai/NextStep-1"
    attributes = ("input_dim", "get_score_from_velocity", "get_velocity_from_cfg")
    records = False

    def sample(self, head, c, cfg, cfg2, timesteps_shift, num_sampling_steps, last_step_size, noise_repeat) -> Reading:
        if num_sampling_steps < 2:
            raise UnsupportedModel(f"it makes no step with num_sampling_steps={num_sampling_steps}")
        scales = {1: (), 2: (cfg,), 3: (cfg, cfg2)}[1 + (cfg > 1.0) + (cfg2 > 1.0)]
        return Reading(
            schedule=steps(int(num_sampling_steps), float(timesteps_shift), float(last_step_size), c.dtype),
            cond=c,
            scales=tuple(map(float, scales)),
            draws=Draws(rows=noise_repeat),
            dtype=c.dtype,
        )

    def trials(self, head, z):
        for cfg, cfg2 in ((1.0, 1.0), (3.0, 1.0), (3.0, 1.5), (1.0, 1.5)):
            yield "sample", dict(c=z(12), cfg=cfg, cfg2=cfg2, num_sampling_steps=5, timesteps_shift=1.5, noise_repeat=2)


@lru_cache(maxsize=64)
def steps(count: int, shift: float, last: float, dtype: torch.dtype) -> Schedule:
    """The last step is of the size asked for, whatever the shift made of the times; the network sees ``dtype``."""
    times = torch.linspace(0, 1 - last, count, device="cpu")
    times = times / (shift - (shift - 1) * times)
    sizes = torch.cat([times.diff(), torch.tensor([last])])
    return Schedule.euler_maruyama(times.numpy(), sizes=sizes.numpy(), timesteps=times.to(dtype).float().numpy())
