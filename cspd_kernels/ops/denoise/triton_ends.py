"""What begins and ends a step of the layered chain, around its blocks; see ``triton_layered`` for their order."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    called_off,
    final_weights,
    guidance_scales,
    guided,
    limits_of,
    network_output,
    reverse_step,
    row_of,
    step_noise,
    step_table,
    wait_for_previous,
)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _condition_kernel(y, time_embedding, out, rows, OWN: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """out [K, rows, W] = silu(time_embedding [K, W] + y [rows, W]): what every modulation is a projection of. OWN: of
    one step, whose rows have embeddings of their own [rows, W]."""
    step, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < W
    value = tl.load(time_embedding + (row if OWN else step) * W + cols, inside, 0.0)
    value += tl.load(y + row.to(tl.int64) * W + cols, inside, 0.0).to(tl.float32)
    value = value * tl.sigmoid(value)
    tl.store(out + tl.program_id(0).to(tl.int64) * W + cols, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N", "period"])
def _input_kernel(
    x, weight, bias, h, live, N, period,
    C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """h = x @ weight^T + bias, R tokens and BN columns a program, for every group."""
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    channels = tl.arange(0, CP)
    known = (channels < C)[None, :]
    w = tl.load(weight + cols[:, None] * C + channels[None, :], (cols < W)[:, None] & known, 0.0)
    added = tl.load(bias + cols, cols < W, 0.0)
    tokens = tl.program_id(0) * R + tl.arange(0, R)
    mask = tokens < N
    at = h + row_of(tokens, period, GROUPS)[:, None] * W + cols[None, :]
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(x + tokens[:, None].to(tl.int64) * C + channels[None, :], mask[:, None] & known, 0.0)
    value = tl.sum(value[:, None, :] * w[None, :, :], 2) + added[None, :]
    valid = mask[:, None] & (cols < W)[None, :]
    tl.store(at, value, valid)
    if GROUPS > 1:
        tl.store(at + period.to(tl.int64) * W, value, valid)
    if GROUPS > 2:
        tl.store(at + period.to(tl.int64) * (2 * W), value, valid)


@triton.jit(do_not_specialize=["step", "first_row", "noise_step", "period"])
def _update_kernel(
    h, mods, weight, bias, coefficients, clip, temperature, scale, x, noise, noise_step, seed, addresses, log_std_out,
    path, live, period, step, first_row,
    C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, GROUPS: tl.constexpr,
    LEARNED: tl.constexpr, PHILOX: tl.constexpr, G: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Final layer, guidance, update and noise of reverse step ``step``, in place on x: G channels of one token a
    program. Channels are independent from the final layer on.

    The last step (0) leaves its mean in x and its log std, without the temperature, in log_std_out; every other one
    adds its log std to path.
    """
    k = tl.arange(0, WP)
    channels = tl.program_id(1) * G + tl.arange(0, G)
    valid = channels < C
    weights = final_weights(weight, bias, channels, k, C, W, LEARNED)
    table, limits = step_table(coefficients, step), limits_of(clip, channels, valid, C)
    token = tl.program_id(0)
    row = token.to(tl.int64)
    at = row * C + channels
    wait_for_previous(PDL)
    if called_off(live):
        return
    now = tl.load(x + at, valid, 0.0)
    z = step_noise(noise, noise_step, seed, addresses, step, token, valid, channels, C, PHILOX)
    scales = guidance_scales(scale, token, period, GROUPS)
    v, out, second, third = network_output(
        h, mods, row, period, first_row, weights, k, W, EPS, GROUPS, LEARNED, RMS
    )  # fmt: skip
    out = guided(out, second, third, scales, GROUPS)
    value, log_std = reverse_step(now, out, v, z, table, clip, limits, step, tl.load(temperature), LEARNED)
    tl.store(x + at, value, valid)
    if step > 0:
        tl.store(path + at, tl.load(path + at, valid, 0.0) + log_std, valid)
    else:
        tl.store(log_std_out + at, log_std, valid)


@triton.jit(do_not_specialize=["N", "period"])
def _output_kernel(
    h, mods, weight, bias, out, v_out, live, N, period,
    C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, GROUPS: tl.constexpr,
    LEARNED: tl.constexpr, G: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What the network puts out for all steps at once, as ``_update_kernel`` computes it: G channels of one of the N
    tokens of all steps a program. out [GROUPS, N, C], and v_out [N, C] if LEARNED."""
    k = tl.arange(0, WP)
    channels = tl.program_id(1) * G + tl.arange(0, G)
    valid = channels < C
    weights = final_weights(weight, bias, channels, k, C, W, LEARNED)
    token = tl.program_id(0)
    row = row_of(token, period, GROUPS)
    at = token.to(tl.int64) * C + channels
    wait_for_previous(PDL)
    if called_off(live):
        return
    v, first, second, third = network_output(h, mods, row, period, 0, weights, k, W, EPS, GROUPS, LEARNED, RMS)
    tl.store(out + at, first, valid)
    if LEARNED:
        tl.store(v_out + at, v, valid)
    if GROUPS > 1:
        tl.store(out + N.to(tl.int64) * C + at, second, valid)
    if GROUPS > 2:
        tl.store(out + N.to(tl.int64) * (2 * C) + at, third, valid)
