"""MSA-T2M's rectified flow: Euler steps from 1, where the noise is, to 0, and guidance by one condition or by two."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from cspd_kernels import Schedule

from ..errors import UnsupportedModel
from .adapter import Adapter, Draws, Reading


class RectifiedFlow(Adapter):
    """``RectifiedFlowHead`` of 177-Liukuan/MSA-T2M; the temperature scales x_T."""

    source = "177-Liukuan/MSA-T2M"
    attributes = ("in_channels", "num_flow_steps", "flow_solver")
    methods = ("sample", "sample_additive_cfg")

    def sample(self, head, z, temperature, cfg) -> Reading:
        scales = (cfg,) if cfg != 1.0 else ()
        return self._read(head, z, scales, temperature, copies=1 + len(scales))

    def sample_additive_cfg(self, head, z_nn, z_tn, z_tr, s_t, s_r, temperature) -> Reading:
        return self._read(head, torch.cat([z_tr, z_tn, z_nn]), (float(s_r), float(s_t)), temperature, copies=1)

    def _read(self, head, cond, scales, temperature, copies: int) -> Reading:
        if head.flow_solver != "euler" or cond.dtype != torch.float32:
            raise UnsupportedModel(f"its flow is solved by {head.flow_solver} in {cond.dtype}, not by euler in float32")
        draws = Draws(steps=False, scale=float(temperature))
        return Reading(steps(max(1, int(head.num_flow_steps))), cond, scales, draws, copies=copies)

    def trials(self, head, z):
        yield "sample", dict(z=z(4), temperature=0.8)
        yield "sample", dict(z=z(4), temperature=0.8, cfg=2.5)
        yield "sample_additive_cfg", dict(z_nn=z(3), z_tn=z(3), z_tr=z(3), temperature=0.8)


@lru_cache(maxsize=64)
def steps(count: int) -> Schedule:
    return Schedule.euler(1.0 - np.arange(count + 1) / count, data_at=0.0)
