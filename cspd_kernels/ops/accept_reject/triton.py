"""``accept_reject`` in Triton: accept test and redraw in one launch, no token waiting for another's tries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...devices import on
from ...triton_launch import launch
from ..density_ratio.triton import operands, row_log_ratio, why_unsupported
from ..density_ratio.triton_terms import load, load_line, path_term
from .candidates import one_of, without_sample
from .triton_candidates import later_candidates, operands_of_candidates
from .triton_redraw import by_rejection, in_closed_form, uniform_of

__all__ = ["accept_reject", "why_unsupported"]
OPTIONS = {"enable_fp_fusion": False, "num_warps": 1}


@triton.jit(do_not_specialize=["N", "seed_low", "seed_high", "max_tries"])
def _accept_reject_kernel(
    x, mean_q, log_q, path_q, mean_p, log_p, path_p, relaxation, sample, rows,
    token, accepted, candidate, tries, log_ratio, seeds, N, seed_low, seed_high, max_tries,
    x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
    log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row, sample_row, sample_channel, rows_row,
    x_next, mean_q_next, log_q_next, mean_p_next, log_p_next, path_q_next, path_p_next, relaxation_next,
    C: tl.constexpr, BG: tl.constexpr, R: tl.constexpr, K: tl.constexpr, CANDIDATES: tl.constexpr,
    PER_TOKEN: tl.constexpr, RELEASED: tl.constexpr, CLOSED_FORM: tl.constexpr,
):  # fmt: skip
    """One warp: judges R rows together, then redraws the rejected ones one after another, K tries at a time. R is 1
    where there are several candidates: their loop needs the registers, with many channels those of a second warp.

    The seed is the one at ``seeds`` or, where that is None, the two words. Strides ``_next`` lead from one candidate to
    the next; where there is one, they are None, and so is ``candidate`` unless it is asked for.
    """
    seed = (seed_high.to(tl.uint32).to(tl.uint64) << 32) | seed_low.to(tl.uint32).to(tl.uint64)
    if seeds is not None:
        seed = tl.load(seeds).to(tl.uint64)
    start = tl.program_id(0).to(tl.int64) * R
    row = start + tl.arange(0, R)
    inside = row < N
    ratio, value = row_log_ratio(
        x, mean_q, log_q, path_q, mean_p, log_p, path_p, relaxation, row, inside,
        x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
        log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row, C, 4 * BG, PER_TOKEN, RELEASED,
    )  # fmt: skip
    address = load_line(rows, row, rows_row, inside, 0)
    keep = tl.log(uniform_of(seed, address, 0)) <= ratio
    channel = tl.arange(0, 4 * BG)[None, :]
    valid = channel < C
    tl.store(log_ratio + row * CANDIDATES, ratio, inside)
    if CANDIDATES > 1:
        tl.store(token + row[:, None] * C + channel, value, (inside & keep)[:, None] & valid)
        chosen, log_c = later_candidates(
            x, mean_q, log_q, path_q, mean_p, log_p, path_p, relaxation, token, log_ratio, seed, address, row, inside,
            keep, x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
            log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row,
            x_next, mean_q_next, log_q_next, mean_p_next, log_p_next, path_q_next, path_p_next, relaxation_next,
            C, 4 * BG, R, CANDIDATES, PER_TOKEN, RELEASED,
        )  # fmt: skip
        keep = chosen >= 0
        tl.store(candidate + row, chosen, inside)
    elif candidate is not None:
        tl.store(candidate + row, keep.to(tl.int32) - 1, inside)
    tl.store(accepted + row, keep, inside)
    tl.store(tries + row, tl.zeros([R], tl.int32), inside & keep)
    if CANDIDATES == 1:
        tl.store(token + row[:, None] * C + channel, value, (inside & keep)[:, None] & valid)
    rejected = tl.sum(tl.where(inside & ~keep, 1 << tl.arange(0, R), 0), 0)
    for r in range(R):
        if (rejected >> r) & 1:
            at = start + r
            draft_mean = load(mean_q, at, mean_q_row, channel, mean_q_channel, valid, C)
            target_mean = load(mean_p, at, mean_p_row, channel, mean_p_channel, valid, C)
            target_log = load(log_p, at, log_p_row, channel, log_p_channel, valid, C)
            path = path_term(path_q, path_p, at, path_q_row, path_p_row, at < N, RELEASED)
            if CANDIDATES > 1:
                path = path.to(tl.float64) - tl.sum(tl.where(tl.arange(0, R) == r, log_c, 0.0), 0)
            own = load_line(rows, at, rows_row, at < N, 0)
            kept = 0
            if CLOSED_FORM:
                kept, y, index = in_closed_form(
                    seed, own, max_tries, draft_mean, target_mean, target_log, path, valid, BG
                )
                tl.store(token + at * C + channel, y, valid & (index == kept)[:, None])
            else:
                draft_log = load(log_q, at, log_q_row, channel, log_q_channel, valid, C)
                first = 1
                while (kept == 0) & (first <= max_tries):
                    kept, y, index = by_rejection(
                        seed, own, first, max_tries, draft_mean, draft_log, target_mean, target_log,
                        path.to(tl.float32), valid, BG, K,
                    )  # fmt: skip
                    tl.store(token + at * C + channel + 0 * index[:, None], y, valid & (index == kept)[:, None])
                    first += K
            if kept == 0:
                drawn = load(sample, at, sample_row, channel, sample_channel, valid, C)
                tl.store(token + at * C + channel, drawn, valid)
                kept = -1
            tl.store(tries + at, kept)


def accept_reject(x, draft, target, seed, rows, relaxation, sigma, max_tries, residual):
    """Like :func:`cspd_kernels.accept_reject`."""
    named, device = x.dim() == 3, x.device
    n, channels, candidates = x.shape[0], x.shape[-1], x.shape[1] if named else 1
    token = torch.empty(n, channels, dtype=torch.float32, device=device)
    accepted = torch.empty(n, dtype=torch.bool, device=device)
    candidate = torch.empty(n, dtype=torch.int32, device=device) if named else None
    tries = torch.empty(n, dtype=torch.int32, device=device)
    log_ratio = torch.empty(*x.shape[:-1], dtype=torch.float32, device=device)
    if n:
        if named and candidates == 1:
            x, draft, target, relaxation = (one_of(v, 0) for v in (x, without_sample(draft), target, relaxation))
        sample = target.sample
        others = (sample, rows, token, accepted, *((candidate,) if named else ()), tries, log_ratio)
        seeds, seed = ((seed,), 0) if isinstance(seed, torch.Tensor) else ((), seed)
        between = (None,) * 8
        if candidates > 1:
            tensors, strides, between, key = operands_of_candidates(x, draft, target, relaxation, rows, others, seeds)
        else:
            tensors, strides, key = operands(x, draft, target, relaxation, *others, *seeds)
            if sample.is_contiguous() and rows.is_contiguous():
                strides = (*strides, None, None, None)
                key = (key, sample.dtype, len(seeds), named) if key else None
            else:
                strides, key = (*strides, *sample.stride(), rows.stride(0)), None
        groups = 1 << max(-(-channels // 4) - 1, 0).bit_length()  # of four channels
        rows_at_once = 1 if candidates > 1 else max(1, min(4, 64 // groups))
        constants = {
            "C": channels, "BG": groups, "R": rows_at_once, "K": max(4, 32 // groups), "CANDIDATES": candidates,
            "PER_TOKEN": isinstance(relaxation, torch.Tensor), "RELEASED": sigma == "released",
            "CLOSED_FORM": residual == "closed_form",
        }  # fmt: skip
        # One warp has not the registers for the loop over candidates of more than 128 channels.
        options = OPTIONS | {"num_warps": 2} if candidates > 1 and groups > 32 else OPTIONS
        outputs = (token, accepted, candidate, tries, log_ratio)
        numbers = (*(seeds or (None,)), n, _signed(seed), _signed(seed >> 32), max_tries)
        with on(device):
            launch(
                _accept_reject_kernel, -(-n // rows_at_once),
                (*tensors, sample, rows, *outputs, *numbers, *strides, *between), constants, options, key,
            )  # fmt: skip
    return (token, accepted, candidate, tries, log_ratio) if named else (token, accepted, tries, log_ratio)


def _signed(word: int) -> int:
    """The low 32 bits as a signed number: a larger one would be another type, and another compilation."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
