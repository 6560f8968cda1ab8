"""``denoise`` in torch, with everything that does not depend on x taken out of the chain.

The modulations (shift, scale, gate) depend on the step and the condition alone, so those of many
steps are one GEMM per layer before the steps run. This is exact. 59 % of MAR-B's head is then read
once per chunk of steps instead of once per step. Under guidance the groups of rows share x, so the
input projection and the first LayerNorm run once for all.
"""

from __future__ import annotations

import torch

from .parallel import Parallel
from .reference import guided, limits_of, log_of
from .torch_network import embedded, layers_of, modulations, network
from .torch_parallel import in_parallel
from .workspace import in_blocks_of_rows


def denoise(
    head, cond, x_T, noise, temperature, scales, workspace_bytes, parallel: Parallel | None = None  # noqa: N803
):  # fmt: skip
    """Like :func:`cspd_kernels.denoise`, with G - 1 guidance ``scales``. Waits for the device in parallel alone."""
    rows, groups = x_T.shape[0], 1 + len(scales)
    # Shift, scale and gate of the blocks, shift and scale of the last layer, silu(y), and y before it is rounded.
    mods = 3 * len(set(head.modulation_of)) + 3
    bytes_per_row = groups * head.width * (mods * head.dtype.itemsize + 2 * x_T.dtype.itemsize)
    cond = cond.reshape(groups, rows, cond.shape[-1])

    def chain(cond, x, noise, scales, guess, steps):
        if parallel is None:
            return _sequential(head, cond, x, noise, temperature, scales, steps)
        own = parallel._replace(guess=guess)
        return in_parallel(head, cond, x, noise, temperature, scales, own, finish=_sequential)

    if parallel is not None:
        bytes_per_row, guess = head.num_steps * bytes_per_row, parallel.guess
        return in_blocks_of_rows(chain, cond, x_T, noise, scales, bytes_per_row, workspace_bytes, guess)
    return in_blocks_of_rows(chain, cond, x_T, noise, scales, bytes_per_row, workspace_bytes)


def _sequential(head, cond, x, noise, temperature, scales, steps_at_once):
    """cond [G, N, Z], x [N, C] -> the fields of Denoised."""
    schedule, channels = head.schedule, head.channels
    layers, path_log_std, limits = layers_of(head), x.new_zeros(x.shape[0]), limits_of(head, x)
    y = embedded(head, cond)  # [G, N, W]
    mean = log_std = x
    for stop in range(schedule.num_steps, 0, -steps_at_once):
        start = max(0, stop - steps_at_once)
        block_mods, final_mods = modulations(head, layers, y, start, stop)
        noises = noise[start:stop] if isinstance(noise, torch.Tensor) else noise.steps(start, stop, channels)
        for i in reversed(range(start, stop)):
            k = i - start
            first, *others = network(head, layers, x, [m[:, k] for m in block_mods], final_mods[:, k])
            out = guided([first[:, :channels], *others], scales)
            x0 = float(schedule.x0_x[i]) * x + float(schedule.x0_out[i]) * out
            if limits is not None:
                x0 = x0.clamp(*limits)
            mean = float(schedule.mean_x0[i]) * x0 + float(schedule.mean_x[i]) * x
            if head.learned_variance:
                f = (first[:, channels:] + 1) / 2
                log_std = f * float(schedule.log_std_upper[i]) + (1 - f) * float(schedule.log_std_lower[i])
            else:
                log_std = torch.full_like(mean, float(schedule.log_std_lower[i]))
            if i > 0:
                x = _moved(mean, log_std, noises[k], temperature)
                path_log_std += log_std.sum(dim=1)
        del block_mods, final_mods  # before the next ones are made: the workspace holds one group of steps
    return mean, mean, log_std + log_of(temperature), path_log_std


def _moved(mean, log_std, noise, temperature):
    """mean + temperature exp(log_std) noise."""
    if isinstance(temperature, torch.Tensor):
        return torch.addcmul(mean, temperature * torch.exp(log_std), noise)
    return torch.addcmul(mean, torch.exp(log_std), noise, value=temperature)
