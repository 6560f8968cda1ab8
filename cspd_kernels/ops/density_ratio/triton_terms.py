"""Device functions of the log density ratio, for all kernels that judge tokens.

A chain's last step is two tensors (mean, log sigma) of its channels, which broadcast with the token's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import expm1


@triton.jit
def load(base, row, row_stride, channel, channel_stride, valid, C: tl.constexpr):
    """Float32 values at (row, channel), 0 where not valid. Any floating type, any strides; those of contiguous rows of
    C channels are None, which leaves room for wide loads."""
    at = row * C + channel if row_stride is None else row * row_stride + channel.to(tl.int64) * channel_stride
    return tl.load(base + at, valid, 0.0).to(tl.float32)


@triton.jit
def load_line(base, row, stride, inside, otherwise):
    """Values at (row), of contiguous ones where the stride is None; ``otherwise`` where not inside."""
    at = row if stride is None else row * stride
    return tl.load(base + at, inside, otherwise)


@triton.jit
def sum_of_channels(values):
    """The sum over the last axis, a power of two up to 256: [R, BC] -> [R].

    Neighbours in pairs, then pairs of pairs. A sum of two has the same bits in either order. So the bits of the whole
    do not depend on the number of rows, nor on how the compiler lays the block out over threads. That layout follows
    the operands' types, strides and alignment.
    """
    for _ in tl.static_range(8):
        if values.shape[1] > 1:
            values = tl.sum(tl.reshape(values, [values.shape[0], values.shape[1] // 2, 2]), 2)
    return tl.reshape(values, [values.shape[0]])


@triton.jit
def inverse_std(log_std):
    """1 / sigma, finite: where it is not, the largest float."""
    return tl.minimum(tl.exp(-log_std), 3.4028234663852886e38)


@triton.jit
def residuals(x, mean_q, log_q, mean_p, log_p):
    """(b - a, a + b, log sigma_p - log sigma_q), a and b the residuals of x in sigmas of the target and the draft.

    The last is NaN where an operand is not finite.

    The exponents' difference is (b - a) (b + a) / 2. Where the scales are close, b - a is formed from the small
    differences of the models themselves, as the definition (``reference.py``) explains.
    """
    log_scale, inverse_q = log_p - log_q, inverse_std(log_q)
    a, b = (x - mean_p) * inverse_std(log_p), (x - mean_q) * inverse_q
    close = (mean_p - mean_q) * inverse_q + a * expm1(log_scale)
    poison = 0.0 * x + 0.0 * mean_q + 0.0 * mean_p + 0.0 * log_q + 0.0 * log_p
    return tl.where(tl.abs(log_scale) < 0.5, close, b - a), a + b, log_scale + poison


@triton.jit
def path_term(path_q, path_p, row, path_q_stride, path_p_stride, inside, RELEASED: tl.constexpr):
    """L_q - L_p, or its negative as the released code has it; NaN where it is not finite."""
    q = load_line(path_q, row, path_q_stride, inside, 0.0).to(tl.float32)
    p = load_line(path_p, row, path_p_stride, inside, 0.0).to(tl.float32)
    path = p - q if RELEASED else q - p
    return path + 0.0 * path


@triton.jit
def judged(log_ratio):
    """A row that cannot be judged, NaN, is -inf: never accepted."""
    return tl.where(log_ratio == log_ratio, log_ratio, float("-inf"))
