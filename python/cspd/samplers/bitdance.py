"""BitDance's head of class-conditional images: Euler-Maruyama of a network that predicts the data."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from cspd_kernels import Schedule

from .adapter import Adapter, Reading

LAST, LEAST = 0.05, 0.05  # size of the last step; the least that x - data is divided by


class BitDance(Adapter):
    """``DiffHead.sample`` of shallowdream204/BitDance, imagenet_gen: both halves of the rows come back, the same."""

    source = "shallowdream204/BitDance"
    attributes = ("ch_target", "time_shift")

    def sample(self, head, z, cfg, num_sampling_steps) -> Reading:
        scales = (float(cfg),) if cfg > 1.0 else ()
        schedule = steps(int(num_sampling_steps), float(head.time_shift))
        return Reading(schedule, z, scales, copies=1 + len(scales))

    def trials(self, head, z):
        for cfg, count in ((1.0, 5), (2.5, 7)):
            yield "sample", dict(z=z(4), cfg=cfg, num_sampling_steps=count)


@lru_cache(maxsize=64)
def steps(count: int, shift: float) -> Schedule:
    """``v = (out - x) / max(1 - t, LEAST)``, the drift is ``(1 + t) v - x``; last ``x + LAST v`` at ``1 - LAST``."""
    times = torch.linspace(0, 1 - LAST, count + 1, device="cpu")
    times = ((1 / shift) / ((1 / shift) + (1 / times - 1))).double().numpy()
    dt, t = np.append(np.diff(times), LAST)[::-1], np.append(times[:-1], 1 - LAST)[::-1]
    out = (1 + t) * dt / np.maximum(1 - t, LEAST)
    mean_x, log_std = 1 - dt - out, 0.5 * np.log(2 * (1 - t) * dt)
    out[0] = LAST / max(1 - t[0], LEAST)
    mean_x[0] = 1 - out[0]
    zeros, ones = np.zeros_like(t), np.ones_like(t)
    return Schedule(t, zeros, ones, out, mean_x, log_std, name="euler_maruyama", prediction="x0")
