"""Device functions of the denoising chain: one tile of each of its steps.

The layered kernels run one of them a launch, the persistent kernel all of them in turn. A residual
stream h is float32 [M, W]; M counts the rows of both halves under guidance, conditional first. The
LayerNorm of many rows never holds a whole one: who writes h leaves, per row and column tile, its mean and
sum of squared deviations, [2, M, TILES]; who reads h merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import STREAM_STEP as _STREAM_STEP
from ...triton_noise import normal

STREAM_STEP: tl.constexpr = tl.constexpr(_STREAM_STEP)


@triton.jit
def accumulator(BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BY_SUM: tl.constexpr):
    """Zeros for :func:`multiply`."""
    if BY_SUM:
        return tl.zeros([BM, BN, BK], tl.float32)
    else:
        return tl.zeros([BM, BN], tl.float32)


@triton.jit
def multiply(a, w, acc, DOT: tl.constexpr, BY_SUM: tl.constexpr):
    """acc += a [BM, BK] @ w [BN, BK]^T.

    A few rows leave a tensor core idle and make one warp do all the work; there, every thread adds
    up its own products, and the sum over BK is taken once, at the end.

    DOT is the operands' type, or float32 where the interpreter cannot multiply it (bfloat16).
    """
    if BY_SUM:
        return acc + a[:, None, :].to(tl.float32) * w[None, :, :].to(tl.float32)
    else:
        return tl.dot(a.to(DOT), tl.trans(w.to(DOT)), acc, input_precision="ieee")


@triton.jit
def product(acc, BY_SUM: tl.constexpr):
    """[BM, BN] of an accumulator."""
    if BY_SUM:
        return tl.sum(acc, 2)
    else:
        return acc


@triton.jit
def weight_tile(weight, cols, start, W: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] of a weight [W, W], 0 outside."""
    k = start + tl.arange(0, BK)
    return tl.load(weight + cols[:, None] * W + k[None, :], (cols < W)[:, None] & (k < W)[None, :], 0.0)


@triton.jit
def row_statistics(
    stats, rows, mask, M, EPS: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, TILES_P2: tl.constexpr
):
    """(mean, 1 / std) [BM] of rows of h, merged from those of its column tiles of width TILE.

    Chan's formula: no difference of large squares. Cached past L1, where another SM's writes do not show.
    """
    TILES: tl.constexpr = (W + TILE - 1) // TILE
    tile = tl.arange(0, TILES_P2)
    count = tl.maximum(tl.minimum(W - tile * TILE, TILE), 0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * TILES + tile[None, :]
    valid = mask[:, None] & (tile < TILES)[None, :]
    means = tl.load(stats + at, valid, 0.0, cache_modifier=".cg")
    squares = tl.load(stats + M.to(tl.int64) * TILES + at, valid, 0.0, cache_modifier=".cg")
    mean = tl.sum(means * count, 1) / W
    deviation = means - mean[:, None]
    variance = tl.sum(squares + count * deviation * deviation, 1) / W
    return mean, 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def store_statistics(stats, tile, rows, mask, cols, h, M, W: tl.constexpr, TILE: tl.constexpr):
    """Leave the mean and the squared deviations of one column tile of h for :func:`row_statistics`."""
    TILES: tl.constexpr = (W + TILE - 1) // TILE
    inside = (cols < W)[None, :]
    count = tl.minimum(W - tile * TILE, TILE).to(tl.float32)
    mean = tl.sum(tl.where(inside, h, 0.0), 1) / count
    deviation = tl.where(inside, h - mean[:, None], 0.0)
    at = stats + rows.to(tl.int64) * TILES + tile
    tl.store(at, mean, mask)
    tl.store(at + M.to(tl.int64) * TILES, tl.sum(deviation * deviation, 1), mask)


@triton.jit
def own_statistics(value, inside, EPS: tl.constexpr, W: tl.constexpr):
    """(mean, 1 / std) [BM] of whole rows [BM, BK] of h, BK >= W, 0 beyond W."""
    mean = tl.sum(value, 1) / W
    deviation = tl.where(inside[None, :], value - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / W + EPS)


@triton.jit
def modulation_inputs(h, mods, mod_stride, rows, mask, k, W: tl.constexpr):
    """(h, scale, shift), each [BM, BK] float32, 0 outside."""
    valid = mask[:, None] & (k < W)[None, :]
    row = rows[:, None].to(tl.int64)
    value = tl.load(h + row * W + k[None, :], valid, 0.0, cache_modifier=".cg")
    at = mods + row * mod_stride + k[None, :]
    shift = tl.load(at, valid, 0.0).to(tl.float32)
    return value, tl.load(at + W, valid, 0.0).to(tl.float32), shift


@triton.jit
def mlp0_operand(
    h, mods, norm_weight, norm_bias, rows, mask, start, mean, rstd,
    W: tl.constexpr, EPS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LN(h) (1 + scale) + shift, [BM, BK] float32, 0 beyond W: there gain, offset and shift are.

    Where BK covers a whole row, its statistics are its own, and mean and rstd are not looked at.
    """
    k = start + tl.arange(0, BK)
    value, scale, shift = modulation_inputs(h, mods, 3 * W, rows, mask, k, W)
    gain = tl.load(norm_weight + k, k < W, 0.0)[None, :]
    offset = tl.load(norm_bias + k, k < W, 0.0)[None, :]
    if BK >= W:
        mean, rstd = own_statistics(value, k < W, EPS, W)
    return ((value - mean[:, None]) * rstd[:, None] * gain + offset) * (1.0 + scale) + shift


@triton.jit
def mlp0_tile(
    row_tile, col_tile, h, stats, mods, norm_weight, norm_bias, weight, bias, out, w, M,
    W: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr, TILES_P2: tl.constexpr, DOT: tl.constexpr,
    BY_SUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRELOADED: tl.constexpr,
):  # fmt: skip
    """out [M, W] = silu((LN(h) (1 + scale) + shift) @ weight^T + bias), one tile BM x BN.

    PRELOADED: ``w`` is the tile's first :func:`weight_tile`, loaded before h was ready. Where BK
    covers a whole row, that is all of it: every load is on its way before the first is needed.
    """
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    mask = rows < M
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    mean, rstd = None, None
    if BK < W:
        mean, rstd = row_statistics(stats, rows, mask, M, EPS, W, TILE, TILES_P2)
    acc = accumulator(BM, BN, BK, BY_SUM)
    FIRST: tl.constexpr = BK if PRELOADED else 0
    if PRELOADED:
        a = mlp0_operand(h, mods, norm_weight, norm_bias, rows, mask, 0, mean, rstd, W, EPS, BK)
        acc = multiply(a.to(weight.dtype.element_ty), w, acc, DOT, BY_SUM)
    for start in tl.range(FIRST, W, BK, num_stages=STAGES):
        tile = weight_tile(weight, cols, start, W, BK)
        a = mlp0_operand(h, mods, norm_weight, norm_bias, rows, mask, start, mean, rstd, W, EPS, BK)
        acc = multiply(a.to(weight.dtype.element_ty), tile, acc, DOT, BY_SUM)
    value = product(acc, BY_SUM) + added
    value = value * tl.sigmoid(value)
    at = out + rows[:, None].to(tl.int64) * W + cols[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask[:, None] & (cols < W)[None, :])


@triton.jit
def mlp1_operand(a, rows, mask, start, W: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] of the activations between the layers, 0 beyond W."""
    k = start + tl.arange(0, BK)
    at = a + rows[:, None].to(tl.int64) * W + k[None, :]
    return tl.load(at, mask[:, None] & (k < W)[None, :], 0.0, cache_modifier=".cg")


@triton.jit
def gate_and_residual(mods, h, rows, cols, mask, W: tl.constexpr):
    """(gate, h) of one tile, [BM, BN] float32."""
    valid = mask[:, None] & (cols < W)[None, :]
    row = rows[:, None].to(tl.int64)
    gate = tl.load(mods + row * (3 * W) + 2 * W + cols[None, :], valid, 0.0).to(tl.float32)
    return gate, tl.load(h + row * W + cols[None, :], valid, 0.0, cache_modifier=".cg")


@triton.jit
def mlp1_tile(
    row_tile, col_tile, a, mods, weight, bias, h, stats, w, M,
    W: tl.constexpr, DOT: tl.constexpr, BY_SUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRELOADED: tl.constexpr,
):  # fmt: skip
    """h += gate * (a @ weight^T + bias), one tile BM x BN, with the statistics of the tile's columns."""
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    mask = rows < M
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    if BY_SUM:  # few rows wait for memory, so everything is asked for first; many would fill the registers
        gate, residual = gate_and_residual(mods, h, rows, cols, mask, W)
    acc = accumulator(BM, BN, BK, BY_SUM)
    FIRST: tl.constexpr = BK if PRELOADED else 0
    if PRELOADED:
        acc = multiply(mlp1_operand(a, rows, mask, 0, W, BK), w, acc, DOT, BY_SUM)
    for start in tl.range(FIRST, W, BK, num_stages=STAGES):
        tile = weight_tile(weight, cols, start, W, BK)
        acc = multiply(mlp1_operand(a, rows, mask, start, W, BK), tile, acc, DOT, BY_SUM)
    if not BY_SUM:
        gate, residual = gate_and_residual(mods, h, rows, cols, mask, W)
    value = residual + gate * (product(acc, BY_SUM) + added)
    valid = mask[:, None] & (cols < W)[None, :]
    tl.store(h + rows[:, None].to(tl.int64) * W + cols[None, :], value, valid)
    store_statistics(stats, col_tile, rows, mask, cols, value, M, W, BN)


@triton.jit
def input_weights(weight, bias, col_tile, channels, C: tl.constexpr, W: tl.constexpr, BN: tl.constexpr):
    """(weight [BN, CP], bias [BN]) of one column tile of the input projection."""
    cols = col_tile * BN + tl.arange(0, BN)
    valid = (cols < W)[:, None] & (channels < C)[None, :]
    w = tl.load(weight + cols[:, None] * C + channels[None, :], valid, 0.0)
    return w, tl.load(bias + cols, cols < W, 0.0)


@triton.jit
def input_tile(
    x, w, bias, col_tile, tokens, mask, h, stats, N, M, W: tl.constexpr, GUIDED: tl.constexpr, BN: tl.constexpr
):
    """h = x @ w^T + bias for x [R, CP], one column tile, written for both halves under guidance."""
    cols = col_tile * BN + tl.arange(0, BN)
    value = tl.sum(x[:, None, :] * w[None, :, :], 2) + bias[None, :]
    valid = mask[:, None] & (cols < W)[None, :]
    at = h + tokens[:, None].to(tl.int64) * W + cols[None, :]
    tl.store(at, value, valid)
    store_statistics(stats, col_tile, tokens, mask, cols, value, M, W, BN)
    if GUIDED:
        tl.store(at + N.to(tl.int64) * W, value, valid)
        store_statistics(stats, col_tile, tokens + N, mask, cols, value, M, W, BN)


@triton.jit
def output_tile(
    first, tokens, mask, h, stats, mods, weight, bias, N, M,
    C: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr, TILES_P2: tl.constexpr,
    GUIDED: tl.constexpr, LEARNED: tl.constexpr, BY_SUM: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Channels first..first+BN-1 of the final layer for R tokens: (eps_c, v, eps_u), each [R, BN].

    One pass over W for all three. Without guidance eps_u is eps_c; with a fixed variance v is 0.
    """
    channels = first + tl.arange(0, BN)
    inside = channels < C
    mean, rstd = row_statistics(stats, tokens, mask, M, EPS, W, TILE, TILES_P2)
    eps = accumulator(R, BN, BK, BY_SUM)
    v = accumulator(R, BN, BK, BY_SUM)
    eps_u = accumulator(R, BN, BK, BY_SUM)
    if GUIDED:
        mean_u, rstd_u = row_statistics(stats, N + tokens, mask, M, EPS, W, TILE, TILES_P2)
    for start in tl.range(0, W, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        valid = inside[:, None] & (k < W)[None, :]
        at = weight + channels[:, None] * W + k[None, :]
        w = tl.load(at, valid, 0.0)
        value, scale, shift = modulation_inputs(h, mods, 2 * W, tokens, mask, k, W)
        # Beyond W the weights are 0.
        a = (value - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
        eps = multiply(a, w, eps, tl.float32, BY_SUM)
        if LEARNED:
            v = multiply(a, tl.load(at + C * W, valid, 0.0), v, tl.float32, BY_SUM)
        if GUIDED:
            value, scale, shift = modulation_inputs(h, mods, 2 * W, N + tokens, mask, k, W)
            a = (value - mean_u[:, None]) * rstd_u[:, None] * (1.0 + scale) + shift
            eps_u = multiply(a, w, eps_u, tl.float32, BY_SUM)
    offset = tl.load(bias + channels, inside, 0.0)[None, :]
    eps = product(eps, BY_SUM) + offset
    v = product(v, BY_SUM)
    if LEARNED:
        v += tl.load(bias + C + channels, inside, 0.0)[None, :]
    eps_u = product(eps_u, BY_SUM) + offset if GUIDED else eps
    return eps, v, eps_u


@triton.jit
def step_noise(
    noise, noise_step, seed, addresses, step, tokens, mask, channels, valid, C: tl.constexpr, PHILOX: tl.constexpr
):
    """The noise of reverse step ``step``, [R, CP], stored or addressed."""
    if PHILOX:
        row = tl.load(addresses + tokens, mask, 0)
        z = normal(tl.load(seed), row[:, None], step, channels[None, :], STREAM_STEP)
    else:
        at = noise + step.to(tl.int64) * noise_step + tokens[:, None].to(tl.int64) * C + channels[None, :]
        z = tl.load(at, valid, 0.0)
    return z


@triton.jit
def step_table(coefficients, step):
    """Of reverse step ``step``: sqrt_recip_acp, sqrt_recipm1_acp, coef1, coef2, and the log std at v = 1 and at
    v = -1 (equal where the variance is fixed)."""
    at = coefficients + step * 8
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def reverse_step(x, eps, v, eps_u, z, table, step, scale, temperature, GUIDED: tl.constexpr):
    """(x after reverse step ``step``, log std of that step without the temperature), each [R, CP]."""
    recip, recipm1, coef1, coef2, upper, lower = table
    if GUIDED:
        eps = eps_u + scale[:, None] * (eps - eps_u)
    mean = coef1 * (recip * x - recipm1 * eps) + coef2 * x
    f = (v + 1.0) * 0.5
    log_std = f * upper + (1.0 - f) * lower
    return tl.where(step > 0, mean + temperature * tl.exp(log_std) * z, mean), log_std
