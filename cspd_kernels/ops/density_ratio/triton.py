"""``log_density_ratio`` in Triton: one pass over the operands."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...devices import on
from ...triton_support import why_unsupported_here
from .shared import why_too_wide
from .triton_terms import judged, load, path_term, residuals

# Fused products would round x - mean differently from the definition, for kernels that wait for memory anyway.
OPTIONS = {"enable_fp_fusion": False}
_ELEMENTS = 2048  # of one program: five loads of 16 each by 128 threads are in flight together


def why_unsupported(x: torch.Tensor) -> str | None:
    """None when the kernels cover tokens like x (N, C), else the limit they exceed."""
    return why_too_wide(x) or why_unsupported_here(x.device)


@triton.jit
def row_log_ratio(
    x, mean_q, log_q, path_q, mean_p, log_p, path_p, relaxation, row, inside,
    x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
    log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row,
    C: tl.constexpr, BC: tl.constexpr, PER_TOKEN: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    """(log ratio [R], x [R, BC]) of the rows [R] (int64)."""
    at, channel = row[:, None], tl.arange(0, BC)[None, :]
    valid = inside[:, None] & (channel < C)
    value = load(x, at, x_row, channel, x_channel, valid)
    difference, total, log_scale = residuals(
        value,
        load(mean_q, at, mean_q_row, channel, mean_q_channel, valid),
        load(log_q, at, log_q_row, channel, log_q_channel, valid),
        load(mean_p, at, mean_p_row, channel, mean_p_channel, valid),
        load(log_p, at, log_p_row, channel, log_p_channel, valid),
    )
    if PER_TOKEN:
        width = tl.load(relaxation + row * relaxation_row, inside, 1.0).to(tl.float32)[:, None]
        width = tl.where(width > 0, width, float("nan"))
        term = 0.5 * (difference / width) * (total / width) - log_scale
    else:
        term = 0.5 * (difference / relaxation) * (total / relaxation) - log_scale
    path = path_term(path_q, path_p, row, path_q_row, path_p_row, inside, RELEASED)
    return judged(tl.sum(term, 1) + path), value


@triton.jit(do_not_specialize=["N"])
def _log_density_ratio_kernel(
    x, mean_q, log_q, path_q, mean_p, log_p, path_p, relaxation, out, N,
    x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
    log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row,
    C: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, PER_TOKEN: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    """R rows a program."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < N
    log_ratio, _ = row_log_ratio(
        x, mean_q, log_q, path_q, mean_p, log_p, path_p, relaxation, row, inside,
        x_row, x_channel, mean_q_row, mean_q_channel, log_q_row, log_q_channel, mean_p_row, mean_p_channel,
        log_p_row, log_p_channel, path_q_row, path_p_row, relaxation_row, C, BC, PER_TOKEN, RELEASED,
    )  # fmt: skip
    tl.store(out + row, log_ratio, inside)


def operands(x, draft, target, relaxation) -> tuple[tuple, tuple]:
    """What :func:`row_log_ratio` reads, and the strides it reads it with."""
    per_token = isinstance(relaxation, torch.Tensor)
    fields = (x, draft.mean, draft.log_std, draft.path_log_std, target.mean, target.log_std, target.path_log_std)
    strides = (s for v in (x, draft.mean, draft.log_std, target.mean, target.log_std) for s in v.stride())
    paths = (*draft.path_log_std.stride(), *target.path_log_std.stride())
    return (*fields, relaxation), (*strides, *paths, relaxation.stride(0) if per_token else 0)


def log_density_ratio(x, draft, target, relaxation, sigma):
    """As :func:`cspd_kernels.log_density_ratio`."""
    n, channels = x.shape
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        tensors, strides = operands(x, draft, target, relaxation)
        block = triton.next_power_of_2(max(channels, 1))
        rows = max(1, _ELEMENTS // block)  # not fewer for few rows: a row's sum does not depend on its batch
        with on(x.device):
            _log_density_ratio_kernel[(triton.cdiv(n, rows),)](
                *tensors, out, n, *strides, C=channels, BC=block, R=rows,
                PER_TOKEN=isinstance(relaxation, torch.Tensor), RELEASED=sigma == "released", num_warps=4, **OPTIONS,
            )  # fmt: skip
    return out
