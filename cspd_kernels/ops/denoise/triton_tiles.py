"""Device functions of the denoising chain that several of its kernels share.

A residual stream h is float32 [M, W]; M counts the rows of all GROUPS under guidance, 1 to 3, the fully conditional
group first. Whole rows are WP wide, a power of two >= W, with 0 beyond W. RMS and SWIGLU: the head's norm and its
MLP, see ``DiffusionHead``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...noise import STREAM_STEP as _STREAM_STEP
from ...triton_noise import normal

STREAM_STEP: tl.constexpr = tl.constexpr(_STREAM_STEP)
GROUP: tl.constexpr = tl.constexpr(8)  # row tiles that share a tile of weights while it is in the cache
MOST_LINES: tl.constexpr = tl.constexpr(4096)  # of weights that a program asks for ahead of time


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended; from here on the next one may start. See ``triton_layered``."""
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
def row_of(token, period, GROUPS: tl.constexpr):
    """Row of h for a token's first group; int64. ``period`` tokens of one step, then as many of the next: rows of the
    next group lie ``period`` behind."""
    token = token.to(tl.int64)
    return token + token // period * period * (GROUPS - 1) if GROUPS > 1 else token


@triton.jit
def moments(value, inside, W: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr, RMS: tl.constexpr):
    """(mean, 1 / std) of whole rows along AXIS, the last one; RMS: about 0, without the mean."""
    if RMS:
        mean, deviation = 0.0, value
    else:
        mean = tl.sum(value, AXIS, keep_dims=True) / W
        deviation = tl.where(inside, value - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(deviation * deviation, AXIS, keep_dims=True) / W + EPS)


@triton.jit
def normalised(value, inside, mean, factor, RMS: tl.constexpr):
    """Normalise by the moments of the rows; 0 beyond W."""
    if RMS:
        return value * factor
    else:
        return tl.where(inside, value - mean, 0.0) * factor


@triton.jit
def standardised(value, inside, W: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr, RMS: tl.constexpr):
    """The norm of whole rows along AXIS, before its weights; 0 beyond W."""
    mean, factor = moments(value, inside, W, EPS, AXIS, RMS)
    return normalised(value, inside, mean, factor, RMS)


@triton.jit
def norm_weights(gain, offset, k, inside, RMS: tl.constexpr):
    """What a norm multiplies by and adds; RMS adds nothing."""
    if RMS:
        return tl.load(gain + k, inside, 0.0), 0.0
    else:
        return tl.load(gain + k, inside, 0.0), tl.load(offset + k, inside, 0.0)


@triton.jit
def shift_and_scale(mods, valid, W: tl.constexpr):
    """Modulations at pointers to a row's shift, behind which its scale lies; float32, 0 where not valid."""
    shift = tl.load(mods, valid, 0.0).to(tl.float32)
    return shift, tl.load(mods + W, valid, 0.0).to(tl.float32)


@triton.jit
def final_operand(h, mods, row, first_row, k, W: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """norm(h) (1 + scale) + shift of one row before the final layer, whose norm has no weights; 0 beyond W."""
    value = tl.load(h + row * W + k, k < W, 0.0)
    shift, scale = shift_and_scale(mods + (first_row + row) * (2 * W) + k, k < W, W)
    return standardised(value, k < W, W, EPS, 0, RMS) * (1.0 + scale) + shift


@triton.jit
def final_weights(weight, bias, channels, k, C: tl.constexpr, W: tl.constexpr, LEARNED: tl.constexpr):
    """Weights and biases of the final layer for some channels: those of out, then of v, which are the same again where
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
    W: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, LEARNED: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """(v, out of the first group, out of the second, of the third) by the final layer, for the channels of ``weights``.

    The groups are ``period`` rows apart. v is 0 where it is not learned, and the first group's out stands for missing
    groups.
    """
    w, added, w_v, added_v = weights
    a = final_operand(h, mods, row, first_row, k, W, EPS, RMS)
    out = tl.sum(w * a[None, :], 1) + added
    v = tl.sum(w_v * a[None, :], 1) + added_v if LEARNED else tl.zeros_like(out)
    second, third = out, out
    if GROUPS > 1:
        a = final_operand(h, mods, row + period, first_row, k, W, EPS, RMS)
        second = tl.sum(w * a[None, :], 1) + added
    if GROUPS > 2:
        a = final_operand(h, mods, row + 2 * period, first_row, k, W, EPS, RMS)
        third = tl.sum(w * a[None, :], 1) + added
    return v, out, second, third


@triton.jit
def guidance_scales(scale, token, tokens, GROUPS: tl.constexpr):
    """Guidance scales of a token, between the first and the second group and between the second and the third; scale
    [., tokens]."""
    first = tl.load(scale + token) if GROUPS > 1 else 0.0
    second = tl.load(scale + tokens + token) if GROUPS > 2 else 0.0
    return first, second


@triton.jit
def guided(first, second, third, scales, GROUPS: tl.constexpr):
    """The groups' values as one."""
    if GROUPS == 1:
        return first
    elif GROUPS == 2:
        return second + scales[0] * (first - second)
    else:
        return third + scales[1] * (second - third) + scales[0] * (first - second)


@triton.jit
def prefetch_weights(weight, row_tile, cols, K: tl.constexpr, N: tl.constexpr):
    """Ask for rows ``cols`` of a weight [N, K] to come into the L2 cache, of long ones the beginning; one of the row
    tiles that need them does."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    ALL: tl.constexpr = triton.next_power_of_2((K + LINE - 1) // LINE)
    MOST: tl.constexpr = MOST_LINES // cols.shape[0]
    LINES: tl.constexpr = ALL if ALL < MOST else MOST
    if row_tile == 0:
        start = tl.minimum(tl.arange(0, LINES) * LINE, K - 1)
        address = (weight + tl.minimum(cols, N - 1)[:, None] * K + start[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def tile_of_program(M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles down, then the next column."""
    row_tiles = (M + BM - 1) // BM
    COL_TILES: tl.constexpr = (N + BN - 1) // BN
    group = tl.program_id(0) // (GROUP * COL_TILES)
    within = tl.program_id(0) % (GROUP * COL_TILES)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def product(
    a, weight, rows, cols, M,
    K: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """a [M, K] @ weight [N, K]^T, one tile [BM, BN] in float32. Beyond M and N it holds the last row or column again:
    loads without masks are the wide ones.

    DOT is the operands' type, or float32 where the interpreter cannot multiply it (bfloat16).
    """
    k = tl.arange(0, BK)
    a_at = a + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * K + k[None, :]
    if N % BN != 0:
        cols = tl.minimum(cols, N - 1)
    w_at = weight + cols[:, None] * K + k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        if K % BK == 0:
            x, w = tl.load(a_at + start), tl.load(w_at + start)
        else:
            inside = (start + k < K)[None, :]
            x, w = tl.load(a_at + start, inside, 0.0), tl.load(w_at + start, inside, 0.0)
        acc = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), acc, input_precision="ieee")
    return acc


@triton.jit
def two_products(
    a, weight, rows, cols, M,
    K: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Like ``product``, with a weight [2 N, K]: the tile of its first N columns and the same one of the others, which
    read the rows once."""
    k = tl.arange(0, BK)
    a_at = a + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * K + k[None, :]
    if N % BN != 0:
        cols = tl.minimum(cols, N - 1)
    first_at = weight + cols[:, None] * K + k[None, :]
    second_at = first_at + N * K
    first, second = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        if K % BK == 0:
            x, w, w_2 = tl.load(a_at + start), tl.load(first_at + start), tl.load(second_at + start)
        else:
            inside = (start + k < K)[None, :]
            x = tl.load(a_at + start, inside, 0.0)
            w, w_2 = tl.load(first_at + start, inside, 0.0), tl.load(second_at + start, inside, 0.0)
        first = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), first, input_precision="ieee")
        second = tl.dot(x.to(DOT), tl.trans(w_2.to(DOT)), second, input_precision="ieee")
    return first, second


@triton.jit
def silu(value):
    return value * tl.sigmoid(value)


@triton.jit
def step_noise(noise, noise_step, seed, addresses, step, token, valid, channels, C: tl.constexpr, PHILOX: tl.constexpr):
    """The noise of reverse step ``step`` for channels of one token, stored or addressed."""
    if PHILOX:
        return normal(tl.load(seed), tl.load(addresses + token), step, channels, STREAM_STEP)
    else:
        return tl.load(noise + step.to(tl.int64) * noise_step + token.to(tl.int64) * C + channels, valid, 0.0)


@triton.jit
def step_table(coefficients, step):
    """The table of reverse step ``step``: x0_x, x0_out, mean_x0, mean_x, and the log std at v = 1 and at v = -1."""
    at = coefficients + step * 8
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def log_std_between(v, upper, lower, LEARNED: tl.constexpr):
    """Upper at v = 1, lower at v = -1, where it is learned; else lower, which may be -inf (a step without noise)."""
    if LEARNED:
        f = (v + 1.0) * 0.5
        return f * upper + (1.0 - f) * lower
    else:
        return lower + tl.zeros_like(v)


@triton.jit
def limits_of(clip, channels, valid, C: tl.constexpr):
    """What x0 of some channels is limited to; clip [2, C], or None: nothing to do, known at compile time."""
    if clip is None:
        return 0.0, 0.0
    else:
        return tl.load(clip + channels, valid, 0.0), tl.load(clip + C + channels, valid, 0.0)


@triton.jit
def limited(x0, clip, limits):
    """x0 within its limits; NaN stays NaN."""
    if clip is None:
        return x0
    else:
        return tl.where(x0 < limits[0], limits[0], tl.where(x0 > limits[1], limits[1], x0))


@triton.jit
def reverse_step(x, out, v, z, table, clip, limits, step, temperature, LEARNED: tl.constexpr):
    """(x after reverse step ``step``, log std of that step without the temperature), of the guided ``out``."""
    x0_x, x0_out, mean_x0, mean_x, upper, lower = table
    mean = mean_x0 * limited(x0_x * x + x0_out * out, clip, limits) + mean_x * x
    log_std = log_std_between(v, upper, lower, LEARNED)
    return tl.where(step > 0, mean + temperature * tl.exp(log_std) * z, mean), log_std
