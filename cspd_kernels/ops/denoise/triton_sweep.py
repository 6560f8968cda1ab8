"""The kernels of a chain in parallel over its steps, behind its network: see ``reference.sweeps`` and
``parallel_chain``. They keep the rules of ``triton_layered`` for an early start."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    called_off,
    guidance_scales,
    guided,
    limited,
    limits_of,
    log_std_between,
    step_noise,
    step_table,
    wait_for_previous,
)  # fmt: skip

SETTLED_AT_ONCE = 1024  # values of tokens and channels


@triton.jit
def _compose(factor, offset, next_factor, next_offset):
    """d -> factor d + offset, then the next one."""
    return factor * next_factor, next_factor * offset + next_offset


@triton.jit
def _slope(change, moved, first):
    """Slope of x0, by the secant through two sweeps, limited to [0, 1]; 0 in the first one, for NaN, and where x has
    not moved."""
    secant = change / tl.where(moved == 0.0, 1.0, moved)
    return tl.where((secant > 0.0) & (moved != 0.0) & (first == 0), tl.minimum(secant, 1.0), 0.0)


@triton.jit
def _x0_of_group(out, x0_before, now, moved, x0_x, x0_out, valid, first):
    """(x0, slope) of one group, from what the network puts out and x0 of the sweep before."""
    x0 = x0_x * now + x0_out * tl.load(out, valid, 0.0)
    return x0, _slope(x0 - tl.load(x0_before, valid, 0.0), moved, first)


@triton.jit
def _of_step(values, chosen):
    """The one row of a block [BT, G] that is chosen [BT, 1], as [1, G]."""
    return tl.sum(tl.where(chosen, values, 0.0), 0, keep_dims=True)


@triton.jit
def _largest(values, valid):
    """[1, G] of a block [BT, G]; infinite if any is NaN."""
    values = tl.where(valid, tl.where(values == values, tl.abs(values), float("inf")), 0.0)
    return tl.max(values, 0, keep_dims=True)


@triton.jit(do_not_specialize=["N", "T", "noise_step"])
def _sweep_kernel(
    out, v, x_T, noise, noise_step, seed, addresses, scale, temperature, coefficients, clip,
    x, before, x0_before, mean_out, log_std_out, path, change, size, settled, done, live, N, T,
    C: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, GROUPS: tl.constexpr, BEGIN: tl.constexpr,
    GUESSED: tl.constexpr, PHILOX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One sweep over all T steps of a token, G channels a program, in place on x, before and x0; nothing at all for a
    token that has settled. BEGIN: the inputs x of the first sweep, as if the network put out x0 = 0 and v = -1; of a
    guess only that of step T-1, which is x_T.

    A row of a block is a step, T-1 first. With F_i the step from the inputs X_i and d_i = Y_i - X_i the recursion is

        d_i-1 = (F_i - X_i-1) + (mean_x0 slope_i + mean_x) d_i,      Y_i-1 = F_i + (mean_x0 slope_i + mean_x) d_i

    so that everything but d is computed for all steps at once, and d by a scan. Where sweeps converge d is rounding,
    and a scan, which adds up in another order, loses nothing. A step that is not finite spoils those behind it, and
    the next sweep has one step less of them, as in the recursion from step to step.
    """
    token = tl.program_id(0)
    place = tl.arange(0, BT)[:, None]
    step = T - 1 - place
    channels = (tl.program_id(1) * G + tl.arange(0, G))[None, :]
    known = channels < C
    valid = (step >= 0) & known
    x0_x, x0_out, mean_x0, mean_x, upper, lower = step_table(coefficients, tl.maximum(step, 0))
    limits = limits_of(clip, channels, known, C)
    of_token = token.to(tl.int64) * C + channels
    to_next = N.to(tl.int64) * C
    at = step.to(tl.int64) * to_next + of_token
    not_last = valid & (step > 0)
    wait_for_previous(PDL)
    if not BEGIN and (tl.load(live) == 0) | (tl.load(settled + token) != 0):
        return
    if BEGIN:
        start = tl.load(x_T + of_token, known, 0.0)
        if GUESSED:
            tl.store(x + (T - 1).to(tl.int64) * to_next + of_token, start, known)
            return
    z = step_noise(noise, noise_step, seed, addresses, step, token, not_last, channels, C, PHILOX)
    if BEGIN:
        now, x0, slope, log_std = tl.zeros_like(z), tl.zeros_like(z), tl.zeros_like(z), lower + tl.zeros_like(z)
        first_d, following = start, tl.zeros_like(z)
    else:
        now = tl.load(x + at, valid, 0.0)
        following = tl.load(x + at - to_next, not_last, 0.0)
        moved = now - tl.load(before + at, valid, 0.0)
        first = tl.load(done) == 0
        to_group = T.to(tl.int64) * to_next
        scales = guidance_scales(scale, token, N, GROUPS)
        x0_1, slope_1 = _x0_of_group(out + at, x0_before + at, now, moved, x0_x, x0_out, valid, first)
        x0_2, slope_2, x0_3, slope_3 = x0_1, slope_1, x0_1, slope_1
        if GROUPS > 1:
            at_2 = to_group + at
            x0_2, slope_2 = _x0_of_group(out + at_2, x0_before + at_2, now, moved, x0_x, x0_out, valid, first)
        if GROUPS > 2:
            at_3 = 2 * to_group + at
            x0_3, slope_3 = _x0_of_group(out + at_3, x0_before + at_3, now, moved, x0_x, x0_out, valid, first)
        x0, slope = guided(x0_1, x0_2, x0_3, scales, GROUPS), guided(slope_1, slope_2, slope_3, scales, GROUPS)
        if clip is not None:
            free = x0
            x0 = limited(free, clip, limits)
            slope = tl.where(x0 == free, slope, 0.0)
        if v is not None:
            log_std = log_std_between(tl.load(v + at, valid, 0.0), upper, lower, True)
        else:
            log_std = lower + tl.zeros_like(z)
        first_d = tl.zeros_like(tl.load(x_T + of_token, known, 0.0))
        mean_before = tl.load(mean_out + of_token, known, 0.0)
    to = mean_x0 * x0 + mean_x * now
    to = tl.where(step > 0, to + tl.load(temperature) * tl.exp(log_std) * z, to)
    factor = mean_x0 * slope + mean_x
    offset = to - following
    offset = tl.where(place == 0, offset + factor * first_d, offset)
    _, d = tl.associative_scan((factor, offset), 0, _compose)  # of the step behind: d_i-1 beside F_i
    d = tl.gather(d, tl.maximum(place, 1) - 1 + tl.zeros_like(d).to(tl.int32), 0)
    value = to + factor * tl.where(place == 0, first_d, d)  # Y_i-1; of step 0 the mean
    tl.debug_barrier()  # everything has been read before anything is written
    if BEGIN:
        tl.store(x + at, start + tl.zeros_like(z), valid & (place == 0))
    else:
        is_last = step == 0
        mean = _of_step(value, is_last)
        tl.store(mean_out + of_token, mean, known)
        tl.store(log_std_out + of_token, _of_step(log_std, is_last), known)
        tl.store(path + of_token, tl.sum(tl.where(not_last, log_std, 0.0), 0, keep_dims=True), known)
        changed = value - tl.where(is_last, mean_before, following)
        tl.store(change + of_token, _largest(changed, valid), known)
        largest = tl.maximum(_largest(value, valid), _largest(now, valid & (place == 0)))
        tl.store(size + of_token, largest, known)
        tl.store(before + at, now, valid)
        tl.store(x0_before + at, x0_1, valid)
        if GROUPS > 1:
            tl.store(x0_before + to_group + at, x0_2, valid)
        if GROUPS > 2:
            tl.store(x0_before + 2 * to_group + at, x0_3, valid)
    tl.store(x + at - to_next, value, not_last)


@triton.jit(do_not_specialize=["N", "T", "limit"])
def _settle_kernel(
    change, size, settled, sweeps, tolerance, count, done, live, left, N, T, limit,
    C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr, BEGIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Which of the N tokens have settled, BN at a time in one program, and the flags. BEGIN: those beyond the call's
    own."""
    channels = tl.arange(0, CP)[None, :]
    wait_for_previous(PDL)
    if not BEGIN and called_off(live):
        return
    number = tl.load(count)
    sweep = 0 if BEGIN else tl.load(done) + 1
    open_tokens = 0
    for start in range(0, N, BN):
        tokens = start + tl.arange(0, BN)
        inside = tokens < N
        if BEGIN:
            was, now = tokens < 0, tokens >= number
        else:
            at = tokens[:, None].to(tl.int64) * C + channels
            valid = inside[:, None] & (channels < C)
            changed, largest = tl.max(tl.load(change + at, valid, 0.0), 1), tl.max(tl.load(size + at, valid, 0.0), 1)
            was = tl.load(settled + tokens, inside, 1) != 0
            near = (changed <= tl.load(tolerance) * largest) & (sweep > 1)
            now = was | ((largest < float("inf")) & (near | (sweep >= T)))
        tl.debug_barrier()  # everything has been read before anything is written
        tl.store(settled + tokens, now.to(tl.int32), inside)
        tl.store(sweeps + tokens, tl.zeros_like(tokens) + sweep, inside & (was == 0))
        open_tokens += tl.sum((inside & (now == 0)).to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(done, sweep)
    tl.store(left, (open_tokens > 0).to(tl.int32))
    tl.store(live, ((open_tokens > 0) & (sweep < limit)).to(tl.int32))
