"""The two kernels of a block of a few rows.

Those leave a tensor core idle: every program has all rows and a few columns, and every thread adds up its own products
of the three-dimensional [rows, columns, BK].

BK of the sum at a time, a power of two: whole rows where those fit a program's registers, which MAR's do. They keep the
rules of ``triton_layered`` for an early start; of rows in parts the weights of the first are loaded before the wait.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    called_off,
    moments,
    norm_weights,
    normalised,
    shift_and_scale,
    silu,
    wait_for_previous,
)  # fmt: skip


@triton.jit
def _weights(weight, cols, k, N: tl.constexpr, K: tl.constexpr):
    """Some columns of a weight [N, K], at the part k of their sums."""
    return tl.load(weight + cols[None, :, None] * K + k, (k < K) & (cols < N)[None, :, None], 0.0)


@triton.jit
def _operand(
    value, mods, row, mask, k, mean, factor, gain, offset, W: tl.constexpr, RMS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """norm(h) (1 + scale) + shift of the part k, rounded as the tensor cores' operand."""
    shift, scale = shift_and_scale(mods + row * (3 * W) + k, mask & (k < W), W)
    a = (normalised(value, k < W, mean, factor, RMS) * gain + offset) * (1.0 + scale) + shift
    return a.to(TYPE).to(tl.float32)


@triton.jit(do_not_specialize=["M", "first_row"])
def _few_mlp0_kernel(
    h, mods, norm_weight, norm_bias, weight, bias, out, live, M, first_row,
    W: tl.constexpr, WP: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, SWIGLU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, H] = silu((norm(h) (1 + scale) + shift) @ weight^T + bias), all rows and BN columns a program.

    With SWIGLU, a second half of the weight and the bias makes what that is multiplied by.

    ``first_row`` is the step's first row of mods.
    """
    k = tl.arange(0, BK)[None, None, :]
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    w = _weights(weight, cols, k, H, W)
    gain, offset = norm_weights(norm_weight, norm_bias, k, k < W, RMS)
    added = tl.load(bias + cols, cols < H, 0.0)[None, :].to(tl.float32)
    if SWIGLU:
        w_up = _weights(weight + H * W, cols, k, H, W)
        added_up = tl.load(bias + H + cols, cols < H, 0.0)[None, :].to(tl.float32)
    rows = tl.arange(0, BM)
    mask = rows < M
    at_rows = mask[:, None, None]
    row = rows[:, None, None].to(tl.int64)
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(h + row * W + k, at_rows & (k < W), 0.0)
    if BK < W:
        whole = tl.arange(0, WP)[None, None, :]
        mean, factor = moments(tl.load(h + row * W + whole, at_rows & (whole < W), 0.0), whole < W, W, EPS, 2, RMS)
    else:
        mean, factor = moments(value, k < W, W, EPS, 2, RMS)
    TYPE: tl.constexpr = weight.dtype.element_ty
    a = _operand(value, mods, first_row + row, at_rows, k, mean, factor, gain, offset, W, RMS, TYPE)
    value = tl.sum(a * w.to(tl.float32), 2)
    if SWIGLU:
        up = tl.sum(a * w_up.to(tl.float32), 2)
    if BK < W:
        for start in tl.range(BK, W, BK):
            part = start + k
            gain, offset = norm_weights(norm_weight, norm_bias, part, part < W, RMS)
            now = tl.load(h + row * W + part, at_rows & (part < W), 0.0)
            a = _operand(now, mods, first_row + row, at_rows, part, mean, factor, gain, offset, W, RMS, TYPE)
            value += tl.sum(a * _weights(weight, cols, part, H, W).to(tl.float32), 2)
            if SWIGLU:
                up += tl.sum(a * _weights(weight + H * W, cols, part, H, W).to(tl.float32), 2)
    value = silu(value + added)
    if SWIGLU:
        value *= up + added_up
    at = out + rows[:, None].to(tl.int64) * H + cols[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask[:, None] & (cols < H)[None, :])


@triton.jit(do_not_specialize=["M", "first_row"])
def _few_mlp1_kernel(
    a, mods, weight, bias, h, live, M, first_row,
    W: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h += gate * (a [M, H] @ weight^T + bias), all rows and BN columns a program."""
    k = tl.arange(0, BK)[None, None, :]
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    w = _weights(weight, cols, k, W, H)
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    rows = tl.arange(0, BM)
    mask = rows < M
    valid = mask[:, None] & (cols < W)[None, :]
    row = rows[:, None].to(tl.int64)
    at = h + row * W + cols[None, :]
    wait_for_previous(PDL)
    if called_off(live):
        return
    a_at = a + rows[:, None, None].to(tl.int64) * H
    value = tl.load(a_at + k, mask[:, None, None] & (k < H), 0.0)
    gate = tl.load(mods + (first_row + row) * (3 * W) + 2 * W + cols[None, :], valid, 0.0).to(tl.float32)
    residual = tl.load(at, valid, 0.0)
    value = tl.sum(value.to(tl.float32) * w.to(tl.float32), 2)
    if BK < H:
        for start in tl.range(BK, H, BK):
            part = start + k
            now = tl.load(a_at + part, mask[:, None, None] & (part < H), 0.0)
            value += tl.sum(now.to(tl.float32) * _weights(weight, cols, part, W, H).to(tl.float32), 2)
    tl.store(at, residual + gate * (value + added), valid)
