"""The kernels of the layered chain.

Few rows: two kernels a block, ``_few_mlp0_kernel`` and ``_few_mlp1_kernel``, each program with whole rows of its
operand. More rows: ``_norm_kernel`` writes the operand of a block's first product once, then two products with what
comes behind them, ``_mlp0_kernel`` and ``_mlp1_kernel``; where a product is the library's, ``_bias_silu_kernel`` and
``_residual_kernel`` (with the next block's norm) stand behind it. In front of the blocks of a step stands
``_input_kernel``, behind them ``_update_kernel`` (``triton_ends``). In parallel over all steps the same kernels run on
the rows of all of them, with ``_output_kernel`` at the end, and ``triton_sweep`` has what follows.

Each kernel may start before the one in front of it has ended (programmatic dependent launch, PDL, from compute
capability 9.0 on), which hides its launch and the loads of its weights. It is safe by three rules:

- Before ``wait_for_previous`` a program reads only weights and the coefficients of the schedule, and writes nothing.
  Nothing in a chain writes those; what did, before the chain, is several kernels away from any that reads them.
- Every program of every kernel waits before it reads or writes anything else. The wait lasts until the kernel in front
  has ended, all of whose programs have waited in turn: so everything before it has ended, too, and may be overwritten.
- A program lets the next kernel start only after its own wait. So when a kernel starts, all but the one in front of it
  have ended, and that one writes no weights.

A kernel with a flag ``live`` that is 0 returns at once, behind the wait: who reads the flag knows that its writer has
ended, and the rules hold for it as for any other. ``live`` None is known at compile time, and costs nothing.

Kernels of others between ours (library products, copies), and ``_condition_kernel``, wait for the end of everything
before them, and the wait for the end of one of them is the same wait.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    called_off,
    prefetch_weights,
    product,
    shift_and_scale,
    standardised,
    tile_of_program,
    wait_for_previous,
)  # fmt: skip

# --- a few rows ---


@triton.jit(do_not_specialize=["M", "first_row"])
def _few_mlp0_kernel(
    h, mods, norm_weight, norm_bias, weight, bias, out, live, M, first_row,
    W: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, W] = silu((LN(h) (1 + scale) + shift) @ weight^T + bias), all rows and BN columns a program.

    A few rows leave a tensor core idle; every thread adds up its own products of the three-dimensional [BM, BN, WP].
    ``first_row`` is the step's first row of mods.
    """
    k = tl.arange(0, WP)[None, None, :]
    inside = k < W
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    w = tl.load(weight + cols[None, :, None] * W + k, inside & (cols < W)[None, :, None], 0.0)
    gain, offset = tl.load(norm_weight + k, inside, 0.0), tl.load(norm_bias + k, inside, 0.0)
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    rows = tl.arange(0, BM)
    mask = rows < M
    valid = mask[:, None, None] & inside
    row = rows[:, None, None].to(tl.int64)
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(h + row * W + k, valid, 0.0)
    shift, scale = shift_and_scale(mods + (first_row + row) * (3 * W) + k, valid, W)
    a = (standardised(value, inside, W, EPS, 2) * gain + offset) * (1.0 + scale) + shift
    a = a.to(weight.dtype.element_ty).to(tl.float32)  # as the tensor cores' operand
    value = tl.sum(a * w.to(tl.float32), 2) + added
    value = value * tl.sigmoid(value)
    at = out + rows[:, None].to(tl.int64) * W + cols[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask[:, None] & (cols < W)[None, :])


@triton.jit(do_not_specialize=["M", "first_row"])
def _few_mlp1_kernel(
    a, mods, weight, bias, h, live, M, first_row,
    W: tl.constexpr, WP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h += gate * (a @ weight^T + bias), all rows and BN columns a program."""
    k = tl.arange(0, WP)[None, None, :]
    inside = k < W
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    w = tl.load(weight + cols[None, :, None] * W + k, inside & (cols < W)[None, :, None], 0.0)
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    rows = tl.arange(0, BM)
    mask = rows < M
    valid = mask[:, None] & (cols < W)[None, :]
    row = rows[:, None].to(tl.int64)
    at = h + row * W + cols[None, :]
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(a + rows[:, None, None].to(tl.int64) * W + k, mask[:, None, None] & inside, 0.0)
    gate = tl.load(mods + (first_row + row) * (3 * W) + 2 * W + cols[None, :], valid, 0.0).to(tl.float32)
    residual = tl.load(at, valid, 0.0)
    value = tl.sum(value.to(tl.float32) * w.to(tl.float32), 2) + added
    tl.store(at, residual + gate * value, valid)


# --- more rows ---


@triton.jit(do_not_specialize=["first_row"])
def _norm_kernel(
    h, mods, norm_weight, norm_bias, out, live, first_row,
    W: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = LN(h) (1 + scale) + shift, one row a program: the operand of a block."""
    k = tl.arange(0, WP)
    inside = k < W
    gain, offset = tl.load(norm_weight + k, inside, 0.0), tl.load(norm_bias + k, inside, 0.0)
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(h + row * W + k, inside, 0.0)
    shift, scale = shift_and_scale(mods + (first_row + row) * (3 * W) + k, inside, W)
    value = (standardised(value, inside, W, EPS, 0) * gain + offset) * (1.0 + scale) + shift
    tl.store(out + row * W + k, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def _mlp0_kernel(
    a, weight, bias, out, live, M,
    W: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = silu(a @ weight^T + bias), one tile a program."""
    row_tile, col_tile = tile_of_program(M, W, BM, BN)
    rows, cols = row_tile * BM + tl.arange(0, BM), col_tile * BN + tl.arange(0, BN)
    if PDL:
        prefetch_weights(weight, row_tile, cols, W)
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = product(a, weight, rows, cols, M, W, DOT, BM, BN, BK, STAGES) + added
    value = value * tl.sigmoid(value)
    valid = (rows < M)[:, None] & (cols < W)[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * W + cols[None, :], value.to(out.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["M", "first_row"])
def _mlp1_kernel(
    a, mods, weight, bias, h, live, M, first_row,
    W: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h += gate * (a @ weight^T + bias), one tile a program. EARLY: gate and h are asked for before the product."""
    row_tile, col_tile = tile_of_program(M, W, BM, BN)
    rows, cols = row_tile * BM + tl.arange(0, BM), col_tile * BN + tl.arange(0, BN)
    if PDL:
        prefetch_weights(weight, row_tile, cols, W)
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    valid = (rows < M)[:, None] & (cols < W)[None, :]
    row = rows[:, None].to(tl.int64)
    gate_at, at = mods + (first_row + row) * (3 * W) + 2 * W + cols[None, :], h + row * W + cols[None, :]
    wait_for_previous(PDL)
    if called_off(live):
        return
    if EARLY:
        gate, residual = tl.load(gate_at, valid, 0.0), tl.load(at, valid, 0.0)
    value = product(a, weight, rows, cols, M, W, DOT, BM, BN, BK, STAGES) + added
    if not EARLY:
        gate, residual = tl.load(gate_at, valid, 0.0), tl.load(at, valid, 0.0)
    tl.store(at, residual + gate.to(tl.float32) * value, valid)


# --- behind products of the library ---


@triton.jit
def _bias_silu_kernel(x, bias, live, W: tl.constexpr, WP: tl.constexpr, PDL: tl.constexpr):
    """x = silu(x + bias), one row a program, in place."""
    k = tl.arange(0, WP)
    inside = k < W
    added = tl.load(bias + k, inside, 0.0).to(tl.float32)
    at = x + tl.program_id(0).to(tl.int64) * W + k
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(at, inside, 0.0).to(tl.float32) + added
    value = value * tl.sigmoid(value)
    tl.store(at, value.to(x.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["first_row"])
def _residual_kernel(
    x, bias, mods, h, next_mods, norm_weight, norm_bias, out, live, first_row,
    W: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h += gate * (x + bias), one row a program; with NORM also the operand of the next block, as ``_norm_kernel``."""
    k = tl.arange(0, WP)
    inside = k < W
    added = tl.load(bias + k, inside, 0.0).to(tl.float32)
    if NORM:
        gain, offset = tl.load(norm_weight + k, inside, 0.0), tl.load(norm_bias + k, inside, 0.0)
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(x + row * W + k, inside, 0.0).to(tl.float32) + added
    gate = tl.load(mods + (first_row + row) * (3 * W) + 2 * W + k, inside, 0.0).to(tl.float32)
    value = tl.load(h + row * W + k, inside, 0.0) + gate * value
    if NORM:
        shift, scale = shift_and_scale(next_mods + (first_row + row) * (3 * W) + k, inside, W)
    tl.store(h + row * W + k, value, inside)
    if NORM:
        value = (standardised(value, inside, W, EPS, 0) * gain + offset) * (1.0 + scale) + shift
        tl.store(out + row * W + k, value.to(out.dtype.element_ty), inside)
