"""The random numbers of :mod:`cspd_kernels.noise` inside Triton kernels: same addresses, same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(word):
    """A uniform in (0, 1] from 32 random bits, float32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33


@triton.jit
def cos_of_quarters(t, quarters):
    """cos(pi/2 (t - quarters)) for t in [0, 4], float32, to about 1e-7.

    By Taylor polynomials around the nearest quarter turn, which leaves t exact; the library's cosine
    carries a path for huge arguments that costs registers and a stack.
    """
    nearest = tl.floor(t + 0.5)
    r = (t - nearest) * 1.5707963267948966
    s = r * r
    sine = r * (1.0 + s * (-1.0 / 6.0 + s * (1.0 / 120.0 + s * (-1.0 / 5040.0 + s * (1.0 / 362880.0)))))
    cosine = 1.0 + s * (-0.5 + s * (1.0 / 24.0 + s * (-1.0 / 720.0 + s * (1.0 / 40320.0 + s * (-1.0 / 3628800.0)))))
    turns = nearest.to(tl.int32) + 4 - quarters
    value = tl.where(turns % 2 == 0, cosine, sine)
    return tl.where((turns + 1) % 4 >= 2, -value, value)


@triton.jit
def normal(seed, row, index, channel, STREAM: tl.constexpr):
    """Standard normals of (seed; row, index, channel); ``row`` int64 and ``channel`` int32 broadcast.

    Every channel computes the Philox call of its group of four and takes one of the four normals:
    more integer arithmetic than one call a group, and no shuffle between threads.
    """
    row, channel = tl.broadcast(row, channel)
    address = channel // 4 | (STREAM << 24)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    index = (tl.zeros_like(channel) + index).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, index, address.to(tl.uint32))
    first = channel % 4 < 2
    radius = tl.sqrt(-2.0 * tl.log(uniform(tl.where(first, w0, w2))))
    # An odd channel takes the sine: the cosine a quarter turn before.
    return radius * cos_of_quarters(4.0 * uniform(tl.where(first, w1, w3)), channel % 2)
