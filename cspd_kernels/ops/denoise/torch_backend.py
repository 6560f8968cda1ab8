"""``denoise`` in torch, with everything that does not depend on x taken out of the chain.

The modulations (shift, scale, gate) depend on the step and the condition alone, so those of many
steps are one GEMM per layer before the steps run: 59 % of MAR-B's head is then read once per chunk
of steps instead of once per step. This is exact. Under guidance the two halves share x, so the
input projection and the first LayerNorm run once for both.
"""

from __future__ import annotations

import math

import torch

from .parallel import Parallel
from .torch_network import embedded, layers_of, modulations, network
from .torch_parallel import in_parallel
from .workspace import in_blocks_of_rows


def denoise(
    head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes, parallel: Parallel | None = None  # noqa: N803
):  # fmt: skip
    """As :func:`cspd_kernels.denoise`; ``cfg_scale`` None means no guidance. Waits for the device in parallel alone."""
    rows, halves = x_T.shape[0], 1 if cfg_scale is None else 2
    # Shift, scale and gate of every block, shift and scale of the last layer, silu(y), and y before it is rounded.
    bytes_per_row = halves * head.width * ((3 * head.depth + 3) * head.dtype.itemsize + 2 * x_T.dtype.itemsize)
    cond = cond.reshape(halves, rows, cond.shape[-1])

    def chain(cond, x, noise, cfg_scale, guess, steps):
        if parallel is None:
            return _sequential(head, cond, x, noise, temperature, cfg_scale, steps)
        own = parallel._replace(guess=guess)
        return in_parallel(head, cond, x, noise, temperature, cfg_scale, own, finish=_sequential)

    if parallel is not None:
        bytes_per_row, guess = head.num_steps * bytes_per_row, parallel.guess
        return in_blocks_of_rows(chain, cond, x_T, noise, cfg_scale, bytes_per_row, workspace_bytes, guess)
    return in_blocks_of_rows(chain, cond, x_T, noise, cfg_scale, bytes_per_row, workspace_bytes)


def _sequential(head, cond, x, noise, temperature, cfg_scale, steps_at_once):
    """cond [G, N, Z] with G = 2 under guidance, x [N, C] -> the fields of Denoised."""
    schedule, channels = head.schedule, head.channels
    layers, path_log_std = layers_of(head), x.new_zeros(x.shape[0])
    y = embedded(head, cond)  # [G, N, W]
    mean = log_std = x
    for stop in range(schedule.num_steps, 0, -steps_at_once):
        start = max(0, stop - steps_at_once)
        block_mods, final_mods = modulations(head, layers, y, start, stop)
        noises = noise[start:stop] if isinstance(noise, torch.Tensor) else noise.steps(start, stop, channels)
        for i in reversed(range(start, stop)):
            k = i - start
            out = network(head, layers, x, [m[:, k] for m in block_mods], final_mods[:, k])
            eps = out[0][:, :channels]
            if cfg_scale is not None:
                eps = out[1] + cfg_scale * (eps - out[1])
            x0 = float(schedule.sqrt_recip_acp[i]) * x - float(schedule.sqrt_recipm1_acp[i]) * eps
            mean = float(schedule.coef1[i]) * x0 + float(schedule.coef2[i]) * x
            if head.learned_variance:
                # log std = (f log_beta + (1 - f) log_posterior) / 2 with f = (v + 1) / 2
                upper, lower = 0.5 * float(schedule.log_beta[i]), 0.5 * float(schedule.log_posterior[i])
                f = (out[0][:, channels:] + 1) / 2
                log_std = f * upper + (1 - f) * lower
            else:
                log_std = torch.full_like(mean, 0.5 * float(schedule.fixed_log_variance[i]))
            if i > 0:
                x = torch.addcmul(mean, torch.exp(log_std), noises[k], value=temperature)
                path_log_std += log_std.sum(dim=1)
        del block_mods, final_mods  # before the next ones are made: the workspace holds one group of steps
    log_temperature = math.log(temperature) if temperature > 0 else -math.inf
    return mean, mean, log_std + log_temperature, path_log_std
