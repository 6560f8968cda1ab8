"""The layered chain: one kernel a layer. Safe at every size, and what a CUDA graph replays.

Per reverse step: for each block ``_mlp0_kernel`` (LayerNorm and modulation in front, SiLU behind) and
``_mlp1_kernel`` (gate and residual behind, leaving the next LayerNorm's statistics), then
``_update_kernel`` (final layer, guidance, posterior, noise, and the next step's input projection).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    input_tile,
    input_weights,
    mlp0_tile,
    mlp1_tile,
    output_tile,
    reverse_step,
    step_noise,
    step_table,
    weight_tile,
)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _condition_kernel(y, time_embedding, out, rows, W: tl.constexpr, BLOCK: tl.constexpr):
    """out [K, rows, W] = silu(time_embedding [K, W] + y [rows, W]): what every modulation is a projection of."""
    step, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < W
    value = tl.load(time_embedding + step * W + cols, inside, 0.0)
    value += tl.load(y + row.to(tl.int64) * W + cols, inside, 0.0).to(tl.float32)
    value = value * tl.sigmoid(value)
    tl.store(out + tl.program_id(0).to(tl.int64) * W + cols, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N", "M"])
def _input_kernel(
    x, weight, bias, h, stats, N, M,
    C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr, GUIDED: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h of the first step. Grid: (token tiles, column tiles)."""
    tokens = tl.program_id(0) * R + tl.arange(0, R)
    channels = tl.arange(0, CP)
    mask = tokens < N
    valid = mask[:, None] & (channels < C)[None, :]
    value = tl.load(x + tokens[:, None].to(tl.int64) * C + channels[None, :], valid, 0.0)
    w, added = input_weights(weight, bias, tl.program_id(1), channels, C, W, BN)
    input_tile(value, w, added, tl.program_id(1), tokens, mask, h, stats, N, M, W, GUIDED, BN)


@triton.jit(do_not_specialize=["M", "first_row"])
def _mlp0_kernel(
    h, stats, mods, norm_weight, norm_bias, weight, bias, out, M, first_row,
    W: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr, TILES_P2: tl.constexpr, DOT: tl.constexpr,
    BY_SUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """First layer of a block. Grid: (column tiles, row tiles); ``first_row`` is the step's first row of mods."""
    w = None
    if BK >= W:
        w = weight_tile(weight, tl.program_id(0) * BN + tl.arange(0, BN), 0, W, BK)
    mlp0_tile(
        tl.program_id(1), tl.program_id(0), h, stats, mods + first_row.to(tl.int64) * (3 * W), norm_weight, norm_bias,
        weight, bias, out, w, M, W, EPS, TILE, TILES_P2, DOT, BY_SUM, BM, BN, BK, STAGES, BK >= W,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "first_row"])
def _mlp1_kernel(
    a, mods, weight, bias, h, stats, M, first_row,
    W: tl.constexpr, DOT: tl.constexpr, BY_SUM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Second layer of a block. Grid as above."""
    w = None
    if BK >= W:
        w = weight_tile(weight, tl.program_id(0) * BN + tl.arange(0, BN), 0, W, BK)
    mlp1_tile(
        tl.program_id(1), tl.program_id(0), a, mods + first_row.to(tl.int64) * (3 * W), weight, bias, h, stats, w,
        M, W, DOT, BY_SUM, BM, BN, BK, STAGES, BK >= W,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "step", "first_row", "noise_step"])
def _update_kernel(
    h, stats, mods, weight, bias, input_weight, input_bias, input_stats, coefficients, temperature, scale,
    x, noise, noise_step, seed, addresses, log_std_out, path, N, M, step, first_row,
    C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr, TILES_P2: tl.constexpr,
    GUIDED: tl.constexpr, LEARNED: tl.constexpr, PHILOX: tl.constexpr, BY_SUM: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """End of reverse step ``step`` and the next step's input projection, R tokens a program, in place on x.

    The last step (0) leaves its mean in x and its log std, without the temperature, in log_std_out.
    """
    tokens = tl.program_id(0) * R + tl.arange(0, R)
    channels = tl.arange(0, CP)
    mask = tokens < N
    valid = mask[:, None] & (channels < C)[None, :]
    at = tokens[:, None].to(tl.int64) * C + channels[None, :]
    # What does not wait for the final layer comes first.
    now = tl.load(x + at, valid, 0.0)
    z = step_noise(noise, noise_step, seed, addresses, step, tokens, mask, channels, valid, C, PHILOX)
    table = step_table(coefficients, step)
    strength = tl.load(temperature)
    guidance = tl.load(scale + tokens, mask, 0.0) if GUIDED else None
    before = tl.load(path + tokens, mask, 0.0)
    w, added = input_weights(input_weight, input_bias, 0, channels, C, W, BN)
    eps, v, eps_u = output_tile(
        0, tokens, mask, h, stats, mods + first_row.to(tl.int64) * (2 * W), weight, bias, N, M,
        C, W, EPS, TILE, TILES_P2, GUIDED, LEARNED, BY_SUM, R, CP, BK, STAGES,
    )  # fmt: skip
    value, log_std = reverse_step(now, eps, v, eps_u, z, table, step, guidance, strength, GUIDED)
    value = tl.where(valid, value, 0.0)
    tl.store(x + at, value, valid)
    if step > 0:
        tl.store(path + tokens, before + tl.sum(tl.where(valid, log_std, 0.0), 1), mask)
        input_tile(value, w, added, 0, tokens, mask, h, input_stats, N, M, W, GUIDED, BN)
        for tile in tl.range(1, (W + BN - 1) // BN):
            w, added = input_weights(input_weight, input_bias, tile, channels, C, W, BN)
            input_tile(value, w, added, tile, tokens, mask, h, input_stats, N, M, W, GUIDED, BN)
    else:
        tl.store(log_std_out + at, log_std, valid)
