"""Definition of ``denoise``: one network call a step, nothing hoisted, nothing fused."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def denoise(head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes=None, *, dtype=torch.float32):  # noqa: N803
    """As :func:`cspd_kernels.denoise`, every operand converted to ``dtype`` (float32 or float64) first.

    ``cfg_scale`` None means no guidance; otherwise cond has 2N rows, conditional first.
    """
    head, schedule = head.to(torch.float64) if dtype == torch.float64 else head.to(torch.float32), head.schedule
    x, cond = x_T.to(dtype), cond.to(dtype)
    c = F.linear(cond, head.cond_weight, head.cond_bias)
    path_log_std = x.new_zeros(x.shape[0])
    for i in reversed(range(schedule.num_steps)):
        rows = x if cfg_scale is None else torch.cat([x, x])
        out = network(head, rows, head.time_embedding[i] + c)
        eps, v = out[:, : head.channels], out[: len(x), head.channels :]
        if cfg_scale is not None:
            eps_c, eps_u = eps.chunk(2)
            eps = eps_u + cfg_scale * (eps_c - eps_u)
        x0 = float(schedule.sqrt_recip_acp[i]) * x - float(schedule.sqrt_recipm1_acp[i]) * eps
        mean = float(schedule.coef1[i]) * x0 + float(schedule.coef2[i]) * x
        if head.learned_variance:
            f = (v + 1) / 2
            logvar = f * float(schedule.log_beta[i]) + (1 - f) * float(schedule.log_posterior[i])
        else:
            logvar = torch.full_like(mean, float(schedule.fixed_log_variance[i]))
        if i > 0:
            step_noise = noise[i] if isinstance(noise, torch.Tensor) else noise.step(i, head.channels)
            x = mean + temperature * torch.exp(0.5 * logvar) * step_noise.to(dtype)
            path_log_std += 0.5 * logvar.sum(dim=1)
    log_temperature = math.log(temperature) if temperature > 0 else -math.inf
    return mean, mean, 0.5 * logvar + log_temperature, path_log_std


def network(head, x, y):
    """(eps, v) of rows x (N, C) with embedded time and condition y (N, W)."""

    def norm(h, weight=None, bias=None):
        return F.layer_norm(h, (head.width,), weight, bias, head.norm_eps)

    h = F.linear(x, head.input_weight, head.input_bias)
    y = F.silu(y)
    for b in head.blocks:
        shift, scale, gate = F.linear(y, b.mod_weight, b.mod_bias).chunk(3, dim=-1)
        a = norm(h, b.norm_weight, b.norm_bias) * (1 + scale) + shift
        a = F.silu(F.linear(a, b.weight0, b.bias0))
        h = h + gate * F.linear(a, b.weight1, b.bias1)
    shift, scale = F.linear(y, head.final_mod_weight, head.final_mod_bias).chunk(2, dim=-1)
    return F.linear(norm(h) * (1 + scale) + shift, head.final_weight, head.final_bias)
