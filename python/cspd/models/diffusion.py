"""Gaussian diffusion in plain torch: the training loss and the step-by-step sampling loop.

The loop is the eager baseline of the benchmarks: one network call and a handful of tensor
operations a step, nothing hoisted, nothing fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cspd_kernels import Schedule

from .flow import velocity_losses


class GaussianDiffusion:
    """Training loss and sampling under a :class:`cspd_kernels.Schedule`; the loss needs one of a diffusion or a flow.

    Example:
        >>> import torch
        >>> from cspd.models import GaussianDiffusion
        >>> from cspd_kernels import Schedule
        >>> diffusion = GaussianDiffusion(Schedule.linear(10, variance="fixed_small"))
        >>> diffusion.num_timesteps
        10

    Source: Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 15-16
    for the learned variance and its variational term).
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_steps

    def posterior(self, out: torch.Tensor, x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of reverse step i, (N, C) each, from the network's output (N, C or 2C).

        At least float32, as the tables are, whatever the types of x and of the output.

        Example:
            >>> import torch
            >>> from cspd.models import GaussianDiffusion
            >>> from cspd_kernels import Schedule
            >>> diffusion = GaussianDiffusion(Schedule.linear(10))
            >>> mean, log_variance = diffusion.posterior(torch.zeros(3, 8), torch.ones(3, 4), 9)
            >>> mean.shape, log_variance.shape
            (torch.Size([3, 4]), torch.Size([3, 4]))
        """
        return self._mean(out, self._x0(out, x, i), x, i)

    def _x0(self, out: torch.Tensor, x: torch.Tensor, i: int) -> torch.Tensor:
        s = self.schedule
        x0 = float(s.x0_x[i]) * _wide(x) + float(s.x0_out[i]) * _wide(out[:, : x.shape[1]])
        return x0 if s.clip is None else x0.clamp(*torch.tensor(s.clip, dtype=x0.dtype, device=x0.device))

    def _mean(self, out: torch.Tensor, x0: torch.Tensor, x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        s: Any = self.schedule
        channels = x.shape[1]
        mean = float(s.mean_x0[i]) * x0 + float(s.mean_x[i]) * _wide(x)
        upper, lower = 2 * float(s.log_std_upper[i]), 2 * float(s.log_std_lower[i])
        if not s.learned or out.shape[1] == channels:
            return mean, torch.full_like(mean, lower)
        frac = _wide((out[:, channels:] + 1) / 2)
        return mean, frac * upper + (1 - frac) * lower

    def _timesteps(self) -> npt.NDArray[Any]:
        """(T,) what the network receives: whole numbers of a diffusion."""
        return self.schedule.timesteps.astype(np.float32 if self.schedule.betas is None else np.int64)

    @torch.no_grad()
    def p_sample_loop(
        self,
        model: Callable[..., torch.Tensor],
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        cond_fn: Callable[..., torch.Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Run all T reverse steps; every step draws ``randn_like(x)``, the last one included.

        Arguments, defaults and random numbers are those of LTH14/mar's loop.

        Args:
            model: ``model(x, t, **model_kwargs)`` with t (N,), int64 of a diffusion, -> (N, C) or (N, 2C).
            shape: (N, C). noise: x_T of that shape; None draws it by the CPU's generator.
            clip_denoised: clip x0 to [-1, 1] at every step. denoised_fn: applied to x0 before that.
            cond_fn: ``cond_fn(x, t, **model_kwargs)``, a gradient that the mean is moved along.
            device: of drawn noise; None is the CPU. progress: show a tqdm bar.

        Example:
            >>> import torch
            >>> from cspd.models import GaussianDiffusion
            >>> from cspd_kernels import Schedule
            >>> diffusion = GaussianDiffusion(Schedule.linear(10, variance="fixed_small"))
            >>> diffusion.p_sample_loop(lambda x, t: torch.zeros_like(x), (3, 4)).shape
            torch.Size([3, 4])
        """
        kwargs = model_kwargs or {}
        x = torch.randn(*shape, device="cpu").to(device or "cpu") if noise is None else noise
        timesteps = self._timesteps().tolist()
        for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            t = torch.full((x.shape[0],), timesteps[i], device=x.device)
            out = model(x, t, **kwargs)
            x0 = self._x0(out, x, i)
            x0 = x0 if denoised_fn is None else denoised_fn(x0)
            mean, log_variance = self._mean(out, x0.clamp(-1, 1) if clip_denoised else x0, x, i)
            drawn = torch.randn_like(x)
            if cond_fn is not None:
                mean = mean + log_variance.exp() * cond_fn(x, t, **kwargs).float()
            x = mean if i == 0 else mean + torch.exp(0.5 * log_variance) * drawn * temperature
        return x

    def random_times(self, rows: int, device: torch.device) -> torch.Tensor:
        """(N,) times to train at: uniform over the steps of a diffusion, over [0, 1) of a flow.

        Example:
            >>> import torch
            >>> from cspd.models import GaussianDiffusion
            >>> from cspd_kernels import Schedule
            >>> times = GaussianDiffusion(Schedule.linear(10)).random_times(3, torch.device("cpu"))
            >>> times.dtype, bool((times < 10).all())
            (torch.int64, True)
        """
        if self.schedule.prediction == "velocity":
            return torch.rand(rows, device=device)
        return torch.randint(0, self.num_timesteps, (rows,), device=device)

    def training_losses(
        self,
        model: Callable[..., torch.Tensor],
        x0: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Per-row loss (N,): MSE of the prediction, plus the variational term (bits per channel) of the variance.

        Args:
            t: (N,) int64 indices into this schedule; of a flow (N,) times, see :func:`velocity_losses`.

        Example:
            >>> import torch
            >>> from cspd.models import GaussianDiffusion
            >>> from cspd_kernels import Schedule
            >>> diffusion = GaussianDiffusion(Schedule.linear(10, variance="fixed_small"))
            >>> diffusion.training_losses(lambda x, t: x, torch.zeros(3, 4), torch.tensor([0, 4, 9])).shape
            torch.Size([3])
        """
        s = self.schedule
        if s.prediction == "velocity":
            return velocity_losses(s, model, x0, t, model_kwargs)
        tables = {
            name: torch.tensor(getattr(s, name), dtype=torch.float32, device=x0.device)[t, None]
            for name in ("alphas_cumprod", "x0_x", "x0_out", "mean_x0", "mean_x", "log_std_upper", "log_std_lower")
        }
        acp = tables["alphas_cumprod"]
        noise = torch.randn_like(x0)
        x_t = acp.sqrt() * x0 + (1 - acp).sqrt() * noise
        out = model(x_t, torch.tensor(self._timesteps(), device=x0.device)[t], **(model_kwargs or {}))
        channels = x0.shape[1]
        first = out[:, :channels]
        v = acp.sqrt() * noise - (1 - acp).sqrt() * x0
        loss = F.mse_loss(first, {"epsilon": noise, "x0": x0, "v": v}[s.prediction], reduction="none").mean(1)
        if not s.learned or out.shape[1] == channels:
            return loss
        # The variance is trained through the variational bound with the mean held fixed.
        x0_hat = tables["x0_x"] * x_t + tables["x0_out"] * first.detach()
        mean = tables["mean_x0"] * x0_hat + tables["mean_x"] * x_t
        true_mean = tables["mean_x0"] * x0 + tables["mean_x"] * x_t
        frac = (out[:, channels:] + 1) / 2
        true_log_variance = 2 * tables["log_std_lower"]
        log_variance = frac * 2 * tables["log_std_upper"] + (1 - frac) * true_log_variance
        squared = (true_mean - mean) ** 2 * torch.exp(-log_variance)
        kl = 0.5 * (log_variance - true_log_variance - 1 + torch.exp(true_log_variance - log_variance) + squared)
        # The last reverse step is a density of x0 itself.
        nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean) ** 2 * torch.exp(-log_variance))
        bound = torch.where(t[:, None] == 0, nll, kl)
        return loss + bound.mean(1) / math.log(2.0)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
