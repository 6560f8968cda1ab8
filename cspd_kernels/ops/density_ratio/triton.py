"""``log_density_ratio`` in Triton: one pass over the operands."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...devices import on
from ...triton_launch import aligned, launch
from ...triton_support import why_unsupported_here
from .shared import why_too_wide
from .triton_terms import judged, load, load_line, path_term, residuals, sum_of_channels

# Fused products would round x - mean differently from the definition, for kernels that wait for memory anyway.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
# Of one program, chosen by `python benchmarks/tune_verdict.py`: so many programs that the last ones to start do not
# leave the device half empty, five loads of 16 bytes a thread under way.
ELEMENTS = 512
_CONTIGUOUS = (None,) * 13  # strides


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
    value = load(x, at, x_row, channel, x_channel, valid, C)
    difference, total, log_scale = residuals(
        value,
        load(mean_q, at, mean_q_row, channel, mean_q_channel, valid, C),
        load(log_q, at, log_q_row, channel, log_q_channel, valid, C),
        load(mean_p, at, mean_p_row, channel, mean_p_channel, valid, C),
        load(log_p, at, log_p_row, channel, log_p_channel, valid, C),
    )
    if PER_TOKEN:
        width = load_line(relaxation, row, relaxation_row, inside, 1.0).to(tl.float32)[:, None]
        width = tl.where(width > 0, width, float("nan"))
        term = 0.5 * (difference / width) * (total / width) - log_scale
    else:
        term = 0.5 * (difference / relaxation) * (total / relaxation) - log_scale
    path = path_term(path_q, path_p, row, path_q_row, path_p_row, inside, RELEASED)
    return judged(sum_of_channels(term) + path), value


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


def operands(x, draft, target, relaxation, *others) -> tuple[tuple, tuple, tuple | None]:
    """(what :func:`row_log_ratio` reads, its strides, the call's key for :func:`cspd_kernels.triton_launch.launch`).

    The key is None where an operand is not contiguous or not aligned, or one of the ``others`` is not aligned.
    """
    matrices = (x, draft.mean, draft.log_std, target.mean, target.log_std)
    lines = (draft.path_log_std, target.path_log_std)
    tensors = (x, draft.mean, draft.log_std, lines[0], target.mean, target.log_std, lines[1], relaxation)
    if isinstance(relaxation, torch.Tensor):
        lines = (*lines, relaxation)
    read = (*matrices, *lines)
    if all([v.is_contiguous() for v in read]):
        key = (x.device, *[v.dtype for v in read], x.shape[0] < 2**31) if aligned(*read, *others) else None
        return tensors, _CONTIGUOUS, key
    strides = [s for v in matrices for s in ((None, None) if v.is_contiguous() else v.stride())]
    strides += [None if v.is_contiguous() else v.stride(0) for v in lines]
    return tensors, (*strides, *_CONTIGUOUS[len(strides) :]), None


def log_density_ratio(x, draft, target, relaxation, sigma):
    """Like :func:`cspd_kernels.log_density_ratio`."""
    n, channels = x.shape
    device = x.device
    out = torch.empty(n, dtype=torch.float32, device=device)
    if n:
        tensors, strides, key = operands(x, draft, target, relaxation, out)
        block = 1 << max(channels - 1, 0).bit_length()
        rows = max(1, ELEMENTS // block)
        constants = {
            "C": channels, "BC": block, "R": rows,
            "PER_TOKEN": isinstance(relaxation, torch.Tensor), "RELEASED": sigma == "released",
        }  # fmt: skip
        with on(device):
            launch(_log_density_ratio_kernel, -(-n // rows), (*tensors, out, n, *strides), constants, OPTIONS, key)
    return out
