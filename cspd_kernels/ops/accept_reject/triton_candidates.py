"""The later candidates of R tokens in Triton, see ``candidates.py`` for the mathematics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...noise import CANDIDATE_STRIDE as _CANDIDATE_STRIDE
from ...triton_launch import aligned
from ..density_ratio.triton import row_log_ratio
from ..density_ratio.triton_terms import load, path_term, sum_of_channels
from .triton_redraw import SHORTEST, difference, survival, uniform_of

CANDIDATE_STRIDE: tl.constexpr = tl.constexpr(_CANDIDATE_STRIDE)


@triton.jit
def later_candidates(
    x, mean_q, log_q, path_q, mean_p, log_p, path_p, relaxation, token, log_ratio, seed, address, row, inside, keep,
    x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
    log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row,
    x_next, mean_q_next, log_q_next, mean_p_next, log_p_next, path_q_next, path_p_next, relaxation_next,
    C: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, CANDIDATES: tl.constexpr,
    PER_TOKEN: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    """(number of the accepted candidate [R] or -1, log c_K [R] float64), given whether the first one is. Stores the log
    ratios and the accepted candidate's token; ``_next`` are strides from one candidate to the next."""
    chosen = tl.where(inside & ~keep, -1, 0)
    log_c = tl.zeros([R], tl.float64)
    channel = tl.arange(0, BC)[None, :]
    valid = inside[:, None] & (channel < C)
    zero = tl.sum(row, 0) * 0
    for i in range(1, CANDIDATES):
        k = zero + i  # int64
        mean_q_k, mean_p_k, log_p_k = mean_q + k * mean_q_next, mean_p + k * mean_p_next, log_p + k * log_p_next
        path_q_k, path_p_k = path_q + k * path_q_next, path_p + k * path_p_next
        relaxation_k = relaxation + k * relaxation_next if PER_TOKEN else relaxation
        ratio, value = row_log_ratio(
            x + k * x_next, mean_q_k, log_q + k * log_q_next, path_q_k, mean_p_k, log_p_k, path_p_k, relaxation_k, row,
            inside, x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
            log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row, C, BC, PER_TOKEN, RELEASED,
        )  # fmt: skip
        tl.store(log_ratio + row * CANDIDATES + k, ratio, inside)
        if tl.min(chosen, 0) < 0:
            d = difference(
                load(mean_q_k, row[:, None], mean_q_row, channel, mean_q_channel, valid, C),
                load(mean_p_k, row[:, None], mean_p_row, channel, mean_p_channel, valid, C),
                load(log_p_k, row[:, None], log_p_row, channel, log_p_channel, valid, C),
                valid,
            )
            path = path_term(path_q_k, path_p_k, row, path_q_row, path_p_row, inside, RELEASED).to(tl.float64)
            log_mass = log_mass_above(log_c, tl.sqrt(sum_of_channels(d * d)), path)
            u = uniform_of(seed, address + k * CANDIDATE_STRIDE, 0).to(tl.float64)
            of_q = ratio.to(tl.float64)
            excess = of_q + tl.log(1.0 - tl.exp(log_c - of_q))  # log (r - c)
            taken = (chosen < 0) & (of_q > log_c) & (tl.log(u) <= excess - log_mass)
            chosen = tl.where(taken, i, chosen)
            tl.store(token + row[:, None] * C + channel, value, taken[:, None] & valid)
            larger = tl.maximum(log_c, log_mass)
            log_c = larger + tl.log(1.0 + tl.exp(-tl.abs(log_c - log_mass)))
    return chosen, log_c


@triton.jit
def log_mass_above(log_c, distance, path):
    """log Z(c), float64; -inf where an operand is not finite."""
    apart = tl.maximum(distance, SHORTEST)
    t = (log_c - path) / apart - 0.5 * apart
    log_mass = path + tl.log(survival(t, apart, log_c - path))
    return tl.where((distance < float("inf")) & (log_mass == log_mass), log_mass, float("-inf"))


def operands_of_candidates(x, draft, target, relaxation, rows, others, seeds) -> tuple[tuple, tuple, tuple, object]:
    """(what the kernel reads of K > 1 candidates, strides of rows and channels, strides between candidates, key).

    Strides are in the order of the kernel's parameters; those between candidates are 0 for what they share. The key is
    that of the call's compilation, and None where an operand is not aligned.
    """
    matrices = (x, draft.mean, draft.log_std, target.mean, target.log_std)
    lines = (draft.path_log_std, target.path_log_std)
    tensors = (x, draft.mean, draft.log_std, lines[0], target.mean, target.log_std, lines[1], relaxation)
    if isinstance(relaxation, torch.Tensor):
        lines = (*lines, relaxation)
    read = (*matrices, *lines)
    strides = [s for v in matrices for s in (v.stride(0), v.stride(2))] + [v.stride(0) for v in lines]
    between = [v.stride(1) if v.shape[1] > 1 else 0 for v in read]
    if not isinstance(relaxation, torch.Tensor):
        strides.append(None)
        between.append(None)
    sample = target.sample
    strides += [sample.stride(0), sample.stride(2), rows.stride(0)]
    key = None
    if aligned(*read, *others, *seeds):
        sizes = [None if s is None else (s == 1, s % 16 == 0, -(2**31) <= s < 2**31) for s in (*strides, *between)]
        key = (x.device, *[v.dtype for v in read], sample.dtype, x.shape[0] < 2**31, len(seeds), *sizes)
    return tensors, tuple(strides), tuple(between), key
