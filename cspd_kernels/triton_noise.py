"""The random numbers of :mod:`cspd_kernels.noise` inside Triton kernels: same addresses, same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(word):
    """A uniform in (0, 1] from 32 random bits, float32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33


@triton.jit
def cos_sin_of_quarters(t):
    """(cos, sin) of pi/2 t for t in [0, 4], float32, to about 1e-7.

    By Taylor polynomials around the nearest quarter turn, which leaves t exact; the library's cosine
    carries a path for huge arguments that costs registers and a stack.
    """
    nearest = tl.floor(t + 0.5)
    r = (t - nearest) * 1.5707963267948966
    s = r * r
    sine = r * (1.0 + s * (-1.0 / 6.0 + s * (1.0 / 120.0 + s * (-1.0 / 5040.0 + s * (1.0 / 362880.0)))))
    cosine = 1.0 + s * (-0.5 + s * (1.0 / 24.0 + s * (-1.0 / 720.0 + s * (1.0 / 40320.0 + s * (-1.0 / 3628800.0)))))
    turns = nearest.to(tl.int32)
    even = turns % 2 == 0
    x, y = tl.where(even, cosine, sine), tl.where(even, sine, cosine)
    # A half turn changes both signs, a quarter turn exchanges them and changes the cosine's.
    return tl.where((turns + 1) % 4 >= 2, -x, x), tl.where(turns % 4 >= 2, -y, y)


@triton.jit
def words(seed, row, index, group, STREAM: tl.constexpr):
    """Like :func:`cspd_kernels.noise.words`: the four words of a Philox call. Row (int64), index and group
    broadcast."""
    zero = (row + index + group) * 0  # of the common shape
    row, index = row + zero, (index + zero).to(tl.uint32)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, index, ((group + zero) | (STREAM << 24)).to(tl.uint32))


@triton.jit
def normal(seed, row, index, channel, STREAM: tl.constexpr):
    """Standard normals of (seed; row, index, channel), which broadcast; ``row`` int64.

    Every channel computes the Philox call of its group of four and takes one of the four normals.
    That is more integer arithmetic than one call a group (:func:`normals`), but no shuffle between threads.
    """
    w0, w1, w2, w3 = words(seed, row, index, channel // 4, STREAM)
    first = channel % 4 < 2
    radius = tl.sqrt(-2.0 * tl.log(uniform(tl.where(first, w0, w2))))
    cosine, sine = cos_sin_of_quarters(4.0 * uniform(tl.where(first, w1, w3)))
    return radius * tl.where(channel % 2 == 0, cosine, sine)


@triton.jit
def normals(seed, row, index, group, STREAM: tl.constexpr):
    """Standard normals [K, 4 G] of one row (int64) at indices [K, 1], for the groups [1, G] of four channels."""
    w0, w1, w2, w3 = words(seed, row, index, group, STREAM)
    first, second = tl.sqrt(-2.0 * tl.log(uniform(w0))), tl.sqrt(-2.0 * tl.log(uniform(w2)))
    cosine, sine = cos_sin_of_quarters(4.0 * uniform(w1))
    other_cosine, other_sine = cos_sin_of_quarters(4.0 * uniform(w3))
    # [K, G, 2, 2]: pair, then cosine or sine.
    pairs = tl.join(tl.join(first * cosine, second * other_cosine), tl.join(first * sine, second * other_sine))
    return tl.reshape(pairs, [pairs.shape[0], 4 * pairs.shape[1]])
