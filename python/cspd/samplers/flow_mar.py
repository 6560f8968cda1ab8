"""MAR with a flow-matching head: Euler steps of the velocity, as many as torchdiffeq makes between 250 points."""

from __future__ import annotations

from functools import cache

import torch

from cspd_kernels import Schedule

from .adapter import Adapter, Draws, Reading

POINTS = 250  # whatever number of steps the head was built with


class FlowMar(Adapter):
    """``FlowLoss.sample`` of lavinal712/flow_mar; its temperature changes nothing."""

    source = "lavinal712/flow_mar"
    attributes = ("in_channels", "gen_transport", "transport_sampler")

    def sample(self, head, z, temperature, cfg) -> Reading:
        scales = () if cfg == 1.0 else (cfg,)
        return Reading(steps(), z, scales, Draws(first="cpu", steps=False), copies=1 + len(scales))

    def trials(self, head, z):
        for cfg in (1.0, 2.5):
            yield "sample", dict(z=z(4), temperature=0.8, cfg=cfg)


@cache
def steps() -> Schedule:
    return Schedule.euler(torch.linspace(0, 1, POINTS, device="cpu").numpy())
