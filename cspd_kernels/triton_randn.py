"""The normals of PyTorch's CUDA generator in Triton, bit for bit; the layout is told in csrc/include/cspd/randn.cuh."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_support import INTERPRETED

if not INTERPRETED:  # the interpreter has none of it
    from triton.language.extra import libdevice

THREADS = tl.constexpr(256)
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# cuRAND's products and sums are fused where the kernel says fma, and nowhere else.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _radius(word, INTERPRETED: tl.constexpr):
    u = tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33
    if INTERPRETED:
        return tl.sqrt(-2.0 * tl.log(u))
    else:
        return tl.sqrt_rn(-2.0 * libdevice.log(u))


@triton.jit
def _sine_cosine(word, INTERPRETED: tl.constexpr):
    """Sine and cosine of a uniform in (0, 2 pi], as the special function unit approximates them."""
    # 2^-32 and 2^-33 times 2 pi in float32
    angle = tl.fma(word.to(tl.float32), 1.4629181199765634e-09, 7.314590599882817e-10)
    if INTERPRETED:
        return tl.sin(angle), tl.cos(angle)
    else:
        sine = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        cosine = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        return sine, cosine


@triton.jit
def _store(out, element, numel, normal, first, FIRST: tl.constexpr):
    # PyTorch multiplies by a standard deviation of 1 and adds a mean of 0, so that no zero is negative.
    normal = normal + 0.0
    if tl.float32 != FIRST:
        normal = tl.where(first, normal.to(FIRST).to(tl.float32), normal)
    tl.store(out + element, normal.to(out.dtype.element_ty), element < numel)


@triton.jit(
    do_not_specialize=["numel", "calls", "grid", "rounds", "newest_first", "seed_low", "seed_high", "low", "high"]
)
def _randn_kernel(
    out, numel, calls, grid, rounds, newest_first, seed_low, seed_high, low, high,
    FIRST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of PyTorch's threads, in one of its rounds. Seed and counter are words, signed."""
    turn, block = tl.program_id(0) // grid, tl.program_id(0) % grid
    call, round = turn // rounds, turn % rounds
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    counter = ((high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)) + turn
    thread = block * THREADS + tl.arange(0, THREADS)
    zero = thread * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        (counter & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32),
        ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32),
        thread.to(tl.uint32),
        zero.to(tl.uint32),
    )
    stride = grid.to(tl.int64) * THREADS
    element = thread + 4 * stride * round
    to = out + tl.where(newest_first != 0, calls - 1 - call, call).to(tl.int64) * numel
    first = call == 0
    radius = _radius(w0, INTERPRETED)
    sine, cosine = _sine_cosine(w1, INTERPRETED)
    _store(to, element, numel, radius * sine, first, FIRST)
    if numel > stride:
        _store(to, element + stride, numel, radius * cosine, first, FIRST)
        radius = _radius(w2, INTERPRETED)
        sine, cosine = _sine_cosine(w3, INTERPRETED)
        _store(to, element + 2 * stride, numel, radius * sine, first, FIRST)
        _store(to, element + 3 * stride, numel, radius * cosine, first, FIRST)


def _signed(word: int) -> int:
    """32 bits as an int of 32 bits: the kernel is compiled once, not for every width of a number."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def randn(
    out: torch.Tensor, seed: int, counter: int, grid: int, rounds: int, first: torch.dtype, newest_first: bool
) -> None:
    """Fill ``out`` (calls, ...), contiguous, with the normals of so many calls; see :func:`released_noise.layout`."""
    calls, numel = len(out), out.numel() // len(out)
    _randn_kernel[(calls * rounds * grid,)](
        out, numel, calls, grid, rounds, int(newest_first),
        _signed(seed), _signed(seed >> 32), _signed(counter), _signed(counter >> 32),
        FIRST=_TYPES[first], INTERPRETED=INTERPRETED, **OPTIONS,
    )  # fmt: skip
