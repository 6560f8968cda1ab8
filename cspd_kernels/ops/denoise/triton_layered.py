"""The kernels of the layered chain.

Few rows: two kernels a block, each program with all rows of its operand (``triton_few``). More rows: ``_norm_kernel``
writes the operand of a block's first product once. Two products follow, ``_mlp0_kernel`` and ``_mlp1_kernel``, each
with what comes behind it. Behind a product of the library stand ``_bias_silu_kernel`` or ``_bias_swiglu_kernel``, and
``_residual_kernel`` (with the next block's norm). In front of the blocks of a step stands ``_input_kernel``, behind
them ``_update_kernel`` (``triton_ends``). In parallel over all steps the same kernels run on the rows of all of them,
with ``_output_kernel`` at the end, and ``triton_sweep`` has what follows.

Each kernel may start before the one in front of it has ended (programmatic dependent launch, PDL, from compute
capability 9.0 on). That hides its launch and the loads of its weights. Three rules make it safe:

- Before ``wait_for_previous`` a program reads only weights and the coefficients of the schedule, and writes nothing.
  Nothing in a chain writes those; what did, before the chain, is several kernels away from any that reads them.
- Every program of every kernel waits before it reads or writes anything else. The wait lasts until the kernel in front
  has ended, all of whose programs have waited in turn: so everything before it has ended, too, and may be overwritten.
- A program lets the next kernel start only after its own wait. So when a kernel starts, all but the one in front of it
  have ended, and that one writes no weights.

A kernel whose flag ``live`` is 0 returns at once, behind the wait. Who reads the flag knows that its writer has ended,
so the rules hold for such a kernel, too. ``live`` None is known at compile time, and costs nothing.

Kernels of others between ours (library products, copies), and ``_condition_kernel``, wait for the end of everything
before them. Waiting for the end of one of them is the same wait.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    called_off,
    norm_weights,
    prefetch_weights,
    product,
    shift_and_scale,
    silu,
    standardised,
    tile_of_program,
    two_products,
    wait_for_previous,
)  # fmt: skip


@triton.jit(do_not_specialize=["first_row"])
def _norm_kernel(
    h, mods, norm_weight, norm_bias, out, live, first_row,
    W: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = norm(h) (1 + scale) + shift, one row a program: the operand of a block."""
    k = tl.arange(0, WP)
    inside = k < W
    gain, offset = norm_weights(norm_weight, norm_bias, k, inside, RMS)
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = tl.load(h + row * W + k, inside, 0.0)
    shift, scale = shift_and_scale(mods + (first_row + row) * (3 * W) + k, inside, W)
    value = (standardised(value, inside, W, EPS, 0, RMS) * gain + offset) * (1.0 + scale) + shift
    tl.store(out + row * W + k, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def _mlp0_kernel(
    a, weight, bias, out, live, M,
    W: tl.constexpr, H: tl.constexpr, SWIGLU: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, H] = silu(a [M, W] @ weight^T + bias), one tile a program; with SWIGLU a second half of the weight and
    the bias makes what it is multiplied by."""
    row_tile, col_tile = tile_of_program(M, H, BM, BN)
    rows, cols = row_tile * BM + tl.arange(0, BM), col_tile * BN + tl.arange(0, BN)
    if PDL:
        prefetch_weights(weight, row_tile, cols, W, H)
        if SWIGLU:
            prefetch_weights(weight + H * W, row_tile, cols, W, H)
    added = tl.load(bias + cols, cols < H, 0.0)[None, :].to(tl.float32)
    if SWIGLU:
        added_up = tl.load(bias + H + cols, cols < H, 0.0)[None, :].to(tl.float32)
    wait_for_previous(PDL)
    if called_off(live):
        return
    if SWIGLU:
        value, up = two_products(a, weight, rows, cols, M, W, H, DOT, BM, BN, BK, STAGES)
        value = silu(value + added) * (up + added_up)
    else:
        value = silu(product(a, weight, rows, cols, M, W, H, DOT, BM, BN, BK, STAGES) + added)
    valid = (rows < M)[:, None] & (cols < H)[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * H + cols[None, :], value.to(out.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["M", "first_row"])
def _mlp1_kernel(
    a, mods, weight, bias, h, live, M, first_row,
    W: tl.constexpr, H: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h += gate * (a [M, H] @ weight^T + bias), one tile a program. EARLY: gate and h are asked for before the
    product."""
    row_tile, col_tile = tile_of_program(M, W, BM, BN)
    rows, cols = row_tile * BM + tl.arange(0, BM), col_tile * BN + tl.arange(0, BN)
    if PDL:
        prefetch_weights(weight, row_tile, cols, H, W)
    added = tl.load(bias + cols, cols < W, 0.0)[None, :].to(tl.float32)
    valid = (rows < M)[:, None] & (cols < W)[None, :]
    row = rows[:, None].to(tl.int64)
    gate_at, at = mods + (first_row + row) * (3 * W) + 2 * W + cols[None, :], h + row * W + cols[None, :]
    wait_for_previous(PDL)
    if called_off(live):
        return
    if EARLY:
        gate, residual = tl.load(gate_at, valid, 0.0), tl.load(at, valid, 0.0)
    value = product(a, weight, rows, cols, M, H, W, DOT, BM, BN, BK, STAGES) + added
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
    value = silu(tl.load(at, inside, 0.0).to(tl.float32) + added)
    tl.store(at, value.to(x.dtype.element_ty), inside)


@triton.jit
def _bias_swiglu_kernel(x, bias, out, live, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [M, H] = silu(x + bias) of the first half of x [M, 2 H] times that of the second without silu: BLOCK columns
    of one row a program."""
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < H
    added, added_up = tl.load(bias + k, inside, 0.0).to(tl.float32), tl.load(bias + H + k, inside, 0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    at = x + row * (2 * H) + k
    wait_for_previous(PDL)
    if called_off(live):
        return
    value = silu(tl.load(at, inside, 0.0).to(tl.float32) + added)
    value *= tl.load(at + H, inside, 0.0).to(tl.float32) + added_up
    tl.store(out + row * H + k, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["first_row"])
def _residual_kernel(
    x, bias, mods, h, next_mods, norm_weight, norm_bias, out, live, first_row,
    W: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h += gate * (x + bias), one row a program; with NORM also the operand of the next block, as ``_norm_kernel``."""
    k = tl.arange(0, WP)
    inside = k < W
    added = tl.load(bias + k, inside, 0.0).to(tl.float32)
    if NORM:
        gain, offset = norm_weights(norm_weight, norm_bias, k, inside, RMS)
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
        value = (standardised(value, inside, W, EPS, 0, RMS) * gain + offset) * (1.0 + scale) + shift
        tl.store(out + row * W + k, value.to(out.dtype.element_ty), inside)
