"""Definition of ``denoise``: one network call a step, nothing hoisted, nothing fused; and of the same in parallel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F


def denoise(head, cond, x_T, noise, temperature, scales, workspace_bytes=None, *, dtype=torch.float32):  # noqa: N803
    """Like :func:`cspd_kernels.denoise`, every operand converted to ``dtype`` (float32 or float64) first.

    ``scales``: G - 1 guidance scales in a tuple, where cond has G N rows. Each is a number or a tensor (1 or N, 1). One
    alone needs no tuple, and None is (), no guidance. ``temperature``: a number or a tensor of one element.
    """
    head, schedule = head.to(torch.float64) if dtype == torch.float64 else head.to(torch.float32), head.schedule
    x, cond, scales = x_T.to(dtype), cond.to(dtype), as_scales(scales)
    c, limits = embedded(head, cond), limits_of(head, x)
    path_log_std = x.new_zeros(x.shape[0])
    for i in reversed(range(schedule.num_steps)):
        out = network(head, torch.cat([x] * (1 + len(scales))), head.time_embedding[i] + c)
        v = out[: len(x), head.channels :]
        out = guided(out[:, : head.channels].unflatten(0, (1 + len(scales), len(x))), scales)
        x0 = float(schedule.x0_x[i]) * x + float(schedule.x0_out[i]) * out
        if limits is not None:
            x0 = x0.clamp(*limits)
        mean = float(schedule.mean_x0[i]) * x0 + float(schedule.mean_x[i]) * x
        if head.learned_variance:
            f = (v + 1) / 2
            log_std = f * float(schedule.log_std_upper[i]) + (1 - f) * float(schedule.log_std_lower[i])
        else:
            log_std = torch.full_like(mean, float(schedule.log_std_lower[i]))
        if i > 0:
            step_noise = noise[i] if isinstance(noise, torch.Tensor) else noise.step(i, head.channels)
            x = mean + temperature * torch.exp(log_std) * step_noise.to(dtype)
            path_log_std += log_std.sum(dim=1)
    return mean, mean, log_std + log_of(temperature), path_log_std


def as_scales(scales) -> tuple:
    """One scale, or none, as backends take them."""
    if scales is None:
        return ()
    return scales if isinstance(scales, tuple) else (scales,)


def guided(groups, scales: tuple):
    """``out_G-1 + sum_g scales[g] (out_g - out_g+1)`` of G groups of rows, the fully conditional first."""
    out = groups[-1]
    for g in reversed(range(len(scales))):
        out = out + scales[g] * (groups[g] - groups[g + 1])
    return out


def limits_of(head, like: torch.Tensor) -> tuple | None:
    """The schedule's limits of x0: two numbers, or two (C,) of the type and on the device of ``like``, kept with it."""
    clip = head.schedule.clip
    if clip is None or clip.ndim == 1:
        return None if clip is None else tuple(clip.tolist())
    kept = head.schedule.__dict__.setdefault("_limits", {})
    key = (like.device, like.dtype)
    if key not in kept:
        kept[key] = tuple(torch.tensor(clip, dtype=like.dtype, device=like.device))
    return kept[key]


def log_of(temperature) -> float | torch.Tensor:
    """-inf of 0."""
    if isinstance(temperature, torch.Tensor):
        return torch.log(temperature)
    return math.log(temperature) if temperature > 0 else -math.inf


class Sweep(NamedTuple):
    """What is known after a sweep over all steps. Nothing of it is written to later."""

    x: torch.Tensor  # (T, N, C) input of every step, for the next sweep
    mean: torch.Tensor  # (N, C) of the last step: the tokens
    log_std: torch.Tensor  # (N, C), without the temperature
    path_log_std: torch.Tensor  # (N,)
    change: torch.Tensor  # (N,) largest change of x and mean since the sweep before
    size: torch.Tensor  # (N,) largest |x| and |mean|

    def settled(self, tolerance: float, sweeps: int) -> torch.Tensor:
        """(N,) which rows are done after so many sweeps.

        A first sweep has nothing to compare with. After T sweeps every step has been computed from the input it has.
        """
        near = (self.change <= tolerance * self.size) & (sweeps > 1)
        return torch.isfinite(self.size) & (near | (sweeps >= len(self.x)))


def most_sweeps(num_steps: int) -> int:
    """After so many sweeps, rows that have not settled are left to the sequential chain."""
    return min(num_steps, 16 + num_steps // 4)


def denoise_in_parallel(
    head, cond, x_T, noise, temperature, scales, tolerance, guess=None, *, dtype=torch.float32  # noqa: N803
):  # fmt: skip
    """Like :func:`denoise`, by sweeps, also (N,) dependent network calls of each row, and (N, T, C) inputs of all
    steps.

    A row is left as it is from the sweep on at which it settles.
    """
    rows, limit = len(x_T), most_sweeps(head.num_steps)
    guess = None if guess is None else guess.movedim(1, 0)
    done, result, x = torch.zeros(rows, dtype=torch.bool, device=x_T.device), None, None
    counts = torch.zeros(rows, dtype=torch.int32, device=x_T.device)
    for count, sweep in enumerate(sweeps(head, cond, x_T, noise, temperature, scales, guess, dtype=dtype), start=1):
        now = [sweep.mean, sweep.log_std, sweep.path_log_std]
        result = now if result is None else [_where(done, old, new) for old, new in zip(result, now)]
        x = sweep.x if x is None else torch.where(done[:, None], x, sweep.x)
        counts[~done] = count
        done |= sweep.settled(tolerance, count)
        if done.all() or count == limit:
            break
    mean, log_std, path_log_std = result
    log_std = log_std + log_of(temperature)
    if not done.all():
        sequential = denoise(head, cond, x_T, noise, temperature, scales, dtype=dtype)[1:]
        mean, log_std, path_log_std = (
            _where(done, a, b) for a, b in zip((mean, log_std, path_log_std), sequential)
        )  # fmt: skip
        counts[~done] += head.num_steps
    return mean, mean, log_std, path_log_std, counts, x.movedim(0, 1)


def sweeps(
    head, cond, x_T, noise, temperature, scales, guess=None, *, dtype=torch.float32, slopes=True  # noqa: N803
) -> Iterator[Sweep]:  # fmt: skip
    """Sweeps over all T steps at once, without end; the tokens converge to those of :func:`denoise`.

    A sweep calls the network at the inputs X_i of all steps. Then it runs the recursion of the chain with x0 of every
    step taken as linear around X_i, each channel by itself::

        x0_i(x) = x0_i + slope_i (x - X_i),      x0_i = x0_x[i] X_i + x0_out[i] out_i
        slope_i = the secant through this sweep and the one before, limited to [0, 1]; 0 in the first
        Y_i-1   = mean_x0[i] x0_i(Y_i) + mean_x[i] Y_i + temperature exp(log_std_i) noise[i],     Y_T-1 = x_T

    and Y are the inputs of the next sweep. Where Y = X this is the sequential chain. Steps T-1..T-k are exact after k
    sweeps, whatever the slopes. Under guidance the x0 of every group of rows has secants of its own. What
    comes of them is limited to the schedule's clip, with a slope of 0 where it was outside.

    Args:
        guess: (T, N, C) inputs of the first sweep; None: those of a chain whose x0 is 0.
        slopes: False leaves them 0 (Picard iteration).

    Sources: arXiv 2305.16317 (sweeps), 2402.09970 (triangular systems), 2309.12252 (Newton's method for recurrences).
    """
    head, schedule = head.to(torch.float64) if dtype == torch.float64 else head.to(torch.float32), head.schedule
    steps, channels, rows, scales = schedule.num_steps, head.channels, len(x_T), as_scales(scales)
    x_T, cond, like = x_T.to(dtype), cond.to(dtype), dict(dtype=dtype, device=x_T.device)  # noqa: N806

    def table(name):  # (T, 1, 1)
        return torch.tensor(getattr(schedule, name), **like)[:, None, None]

    x0_x, x0_out, mean_x0, mean_x, lower, upper = map(
        table, ("x0_x", "x0_out", "mean_x0", "mean_x", "log_std_lower", "log_std_upper")
    )
    z = noise if isinstance(noise, torch.Tensor) else noise.steps(0, steps, channels)
    z, limits = z.to(dtype), limits_of(head, x_T)
    c = embedded(head, cond)
    y = (head.time_embedding[:, None] + c).flatten(0, 1)  # [T G N, W]

    def evaluate(x):
        """x0 [G, T, N, C] at the inputs x, and log std."""
        out = network(head, torch.cat([x] * (1 + len(scales)), 1).flatten(0, 1), y).view(steps, -1, rows, len_out)
        first, v = out[..., :channels].movedim(1, 0), out[:, 0, :, channels:]
        if not head.learned_variance:
            return x0_x * x + x0_out * first, lower.expand_as(x)
        f = (v + 1) / 2
        return x0_x * x + x0_out * first, f * upper + (1 - f) * lower

    def recursion(x, x0, slope, log_std):
        """(Y, mean of the last step): the chain, with x0 linear around the inputs x."""
        now, inputs = x_T, [x_T] * steps
        for i in reversed(range(steps)):
            inputs[i] = now
            mean = mean_x0[i] * (x0[i] + slope[i] * (now - x[i])) + mean_x[i] * now
            now = mean + temperature * torch.exp(log_std[i]) * z[i]
        return torch.stack(inputs), mean

    len_out = head.final_weight.shape[0]
    none = torch.zeros(steps, rows, channels, **like)
    if guess is None:
        x, mean = recursion(none, none, none, lower.expand_as(none))
    else:
        x, mean = torch.cat([guess.to(dtype)[:-1], x_T[None]]), None
    before = None
    while True:
        x0, log_std = evaluate(x)
        slope = torch.zeros_like(x0)
        if before is not None and slopes:
            moved = x - before[0]
            secant = (x0 - before[1]) / moved
            slope = torch.where((secant > 0) & (moved != 0), secant.clamp(max=1), 0)  # 0 for NaN, too
        before = x, x0
        mixed, slope = limited(guided(x0, scales), guided(slope, scales), limits)
        inputs, last = x, mean
        x, mean = recursion(inputs, mixed, slope, log_std)
        last = torch.full_like(mean, math.inf) if last is None else last
        change = torch.maximum((x - inputs).abs().amax((0, 2)), (mean - last).abs().amax(1))
        size = torch.maximum(x.abs().amax((0, 2)), mean.abs().amax(1))
        yield Sweep(x, mean, log_std[0], log_std[1:].sum((0, 2)), change, size)


def limited(x0: torch.Tensor, slope: torch.Tensor, limits) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 within the limits, and its slope, 0 where it was outside."""
    if limits is None:
        return x0, slope
    inside = x0.clamp(*limits)
    return inside, torch.where(inside == x0, slope, 0)


def _where(done, old, new):
    return torch.where(done.view(-1, *[1] * (old.dim() - 1)), old, new)


def embedded(head, cond):
    """The condition's part of y, (N, W), of conditions (N, Z); or those that are given embedded."""
    return cond if head.cond_weight is None else F.linear(cond, head.cond_weight, head.cond_bias)


def network(head, x, y):
    """Outputs (N, O), such as (eps, v), of rows x (N, C) with embedded time and condition y (N, W)."""

    def norm(h, weight=None, bias=None):
        if head.norm == "layer":
            return F.layer_norm(h, (head.width,), weight, bias, head.norm_eps)
        h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + head.norm_eps)
        return h if weight is None else h * weight

    h = F.linear(x, head.input_weight, head.input_bias)
    y = F.silu(y)
    for b in head.blocks:
        shift, scale, gate = F.linear(y, b.mod_weight, b.mod_bias).chunk(3, dim=-1)
        a = norm(h, b.norm_weight, b.norm_bias) * (1 + scale) + shift
        a = F.linear(a, b.weight0, b.bias0)
        if head.mlp == "silu":
            a = F.silu(a)
        else:
            a, up = a.chunk(2, dim=-1)
            a = F.silu(a) * up
        h = h + gate * F.linear(a, b.weight1, b.bias1)
    shift, scale = F.linear(y, head.final_mod_weight, head.final_mod_bias).chunk(2, dim=-1)
    return F.linear(norm(h) * (1 + scale) + shift, head.final_weight, head.final_bias)
