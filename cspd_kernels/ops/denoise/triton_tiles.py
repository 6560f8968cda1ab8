"""Device functions of the denoising chain that several of its kernels share.

A residual stream h is float32 [M, W]; M counts the rows of both halves under guidance, conditional first. Whole rows
are WP wide, a power of two >= W, with 0 beyond W.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...noise import STREAM_STEP as _STREAM_STEP
from ...triton_noise import normal

STREAM_STEP: tl.constexpr = tl.constexpr(_STREAM_STEP)
GROUP: tl.constexpr = tl.constexpr(8)  # row tiles that share a tile of weights while it is in the cache


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Until the kernel before has ended; from here on the next one may start. See ``triton_layered``."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def called_off(live):
    """Whether there is nothing to do, so that a kernel returns, leaving everything as it is: ``live`` [1] is 0. False
    at compile time where it is None.

    Read behind ``wait_for_previous``, as the kernel in front may have written it."""
    return live is not None and tl.load(live) == 0


@triton.jit
def row_of(token, period, GUIDED: tl.constexpr):
    """Of h, for a token's (conditional) half; int64. ``period`` tokens of one step, then as many of the next: rows of
    the unconditional half lie ``period`` behind."""
    token = token.to(tl.int64)
    return token + token // period * period if GUIDED else token


@triton.jit
def standardised(value, inside, W: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr):
    """(value - mean) / std of whole rows along AXIS, the last one; 0 beyond W."""
    mean = tl.sum(value, AXIS, keep_dims=True) / W
    deviation = tl.where(inside, value - mean, 0.0)
    return deviation * (1.0 / tl.sqrt(tl.sum(deviation * deviation, AXIS, keep_dims=True) / W + EPS))


@triton.jit
def shift_and_scale(mods, valid, W: tl.constexpr):
    """Modulations at pointers to a row's shift, behind which its scale lies; float32, 0 where not valid."""
    shift = tl.load(mods, valid, 0.0).to(tl.float32)
    return shift, tl.load(mods + W, valid, 0.0).to(tl.float32)


@triton.jit
def final_operand(h, mods, row, first_row, k, W: tl.constexpr, EPS: tl.constexpr):
    """LN(h) (1 + scale) + shift of one row before the final layer, whose norm has no weights; 0 beyond W."""
    value = tl.load(h + row * W + k, k < W, 0.0)
    shift, scale = shift_and_scale(mods + (first_row + row) * (2 * W) + k, k < W, W)
    return standardised(value, k < W, W, EPS, 0) * (1.0 + scale) + shift


@triton.jit
def final_weights(weight, bias, channels, k, C: tl.constexpr, W: tl.constexpr, LEARNED: tl.constexpr):
    """Weights and biases of the final layer for some channels: those of eps, then of v, which are the same again where
    the variance is not learned."""
    valid = channels < C
    here = valid[:, None] & (k < W)[None, :]
    at = weight + channels[:, None] * W + k[None, :]
    w, added = tl.load(at, here, 0.0), tl.load(bias + channels, valid, 0.0)
    if LEARNED:
        return w, added, tl.load(at + C * W, here, 0.0), tl.load(bias + C + channels, valid, 0.0)
    else:
        return w, added, w, added


@triton.jit
def network_output(
    h, mods, row, period, first_row, weights, k,
    W: tl.constexpr, EPS: tl.constexpr, GUIDED: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """(eps, v, eps of the unconditional half, ``period`` rows behind) by the final layer, for the channels of
    ``weights``; v is 0 where it is not learned."""
    w, added, w_v, added_v = weights
    a = final_operand(h, mods, row, first_row, k, W, EPS)
    eps = tl.sum(w * a[None, :], 1) + added
    v = tl.sum(w_v * a[None, :], 1) + added_v if LEARNED else tl.zeros_like(eps)
    eps_u = eps
    if GUIDED:
        a = final_operand(h, mods, row + period, first_row, k, W, EPS)
        eps_u = tl.sum(w * a[None, :], 1) + added
    return eps, v, eps_u


@triton.jit
def prefetch_weights(weight, row_tile, cols, W: tl.constexpr):
    """Ask for rows ``cols`` of a weight [W, W] to come into the L2 cache; one of the row tiles that need them does."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    LINES: tl.constexpr = triton.next_power_of_2((W + LINE - 1) // LINE)
    if row_tile == 0:
        start = tl.minimum(tl.arange(0, LINES) * LINE, W - 1)
        address = (weight + tl.minimum(cols, W - 1)[:, None] * W + start[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def tile_of_program(M, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles down, then the next column."""
    row_tiles = (M + BM - 1) // BM
    COL_TILES: tl.constexpr = (W + BN - 1) // BN
    group = tl.program_id(0) // (GROUP * COL_TILES)
    within = tl.program_id(0) % (GROUP * COL_TILES)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def product(
    a, weight, rows, cols, M,
    W: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """a [M, W] @ weight [W, W]^T, one tile [BM, BN] in float32. Beyond M and W it holds the last row or column again:
    loads without masks are the wide ones.

    DOT is the operands' type, or float32 where the interpreter cannot multiply it (bfloat16).
    """
    k = tl.arange(0, BK)
    a_at = a + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * W + k[None, :]
    if W % BN != 0:
        cols = tl.minimum(cols, W - 1)
    w_at = weight + cols[:, None] * W + k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, W, BK, num_stages=STAGES):
        if W % BK == 0:
            x, w = tl.load(a_at + start), tl.load(w_at + start)
        else:
            inside = (start + k < W)[None, :]
            x, w = tl.load(a_at + start, inside, 0.0), tl.load(w_at + start, inside, 0.0)
        acc = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), acc, input_precision="ieee")
    return acc


@triton.jit
def step_noise(noise, noise_step, seed, addresses, step, token, valid, channels, C: tl.constexpr, PHILOX: tl.constexpr):
    """The noise of reverse step ``step`` for channels of one token, stored or addressed."""
    if PHILOX:
        return normal(tl.load(seed), tl.load(addresses + token), step, channels, STREAM_STEP)
    else:
        return tl.load(noise + step.to(tl.int64) * noise_step + token.to(tl.int64) * C + channels, valid, 0.0)


@triton.jit
def step_table(coefficients, step):
    """Of reverse step ``step``: sqrt_recip_acp, sqrt_recipm1_acp, coef1, coef2, and the log std at v = 1 and at
    v = -1 (equal where the variance is fixed)."""
    at = coefficients + step * 8
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def log_std_between(v, upper, lower):
    """Half the log variance: upper at v = 1, lower at v = -1."""
    f = (v + 1.0) * 0.5
    return f * upper + (1.0 - f) * lower


@triton.jit
def reverse_step(x, eps, v, eps_u, z, table, step, scale, temperature, GUIDED: tl.constexpr):
    """(x after reverse step ``step``, log std of that step without the temperature)."""
    recip, recipm1, coef1, coef2, upper, lower = table
    if GUIDED:
        eps = eps_u + scale * (eps - eps_u)
    mean = coef1 * (recip * x - recipm1 * eps) + coef2 * x
    log_std = log_std_between(v, upper, lower)
    return tl.where(step > 0, mean + temperature * tl.exp(log_std) * z, mean), log_std
