"""Training of a flow: the velocity along the straight path between noise and data."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from cspd_kernels import Schedule

from ..errors import InvalidInput


def velocity_losses(
    schedule: Schedule, model, x0: torch.Tensor, t: torch.Tensor, model_kwargs: dict | None = None
) -> torch.Tensor:
    """Per-row loss (N,): MSE of ``dx/dt`` at ``x_t = s x0 + (1 - s) noise``.

    s is the share of data at time t: t itself, or 1 - t where the schedule's data is at 0.

    Args:
        schedule: of :meth:`Schedule.euler` or :meth:`Schedule.euler_maruyama`, whose steps have no part in it.
        t: (N,) times in [0, 1], as the network sees them.

    Raises:
        ValueError: not such a schedule, or one whose network is given something else than the time.

    Source: Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (arXiv 2209.03003).
    """
    data_at = 1.0 if schedule.x0_out[-1] > 0 else 0.0
    if schedule.prediction != "velocity" or not np.allclose(schedule.x0_out, data_at - schedule.timesteps):
        raise InvalidInput(
            "a flow's loss expected a schedule by Schedule.euler or Schedule.euler_maruyama whose network predicts the "
            f"velocity and is given the time itself, got {schedule!r}"
        )
    noise = torch.randn_like(x0)
    towards = t[:, None].to(x0.dtype)
    share = towards if data_at == 1.0 else 1.0 - towards
    velocity = x0 - noise if data_at == 1.0 else noise - x0
    out = model(share * x0 + (1.0 - share) * noise, t, **(model_kwargs or {}))
    return F.mse_loss(out[:, : x0.shape[1]], velocity, reduction="none").mean(1)
