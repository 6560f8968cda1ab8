"""``add_norm`` in one launch, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...devices import on
from ...triton_launch import aligned, launch

_WIDEST = 8192
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _add_norm_kernel(stream, delta, weight, bias, out, eps, W: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < W
    value = tl.load(stream + row * W + k, inside, 0.0)
    if delta is not None:
        value += tl.load(delta + row * W + k, inside, 0.0).to(tl.float32)
        tl.store(stream + row * W + k, value, inside)
    mean = tl.sum(value, 0) / W
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / W + eps)
    w, b = tl.load(weight + k, inside, 0.0), tl.load(bias + k, inside, 0.0)
    tl.store(out + row * W + k, (centred * scale * w + b).to(out.dtype.element_ty), inside)


def why_unsupported(stream: torch.Tensor) -> str | None:
    """None where the kernel covers streams like this one."""
    if stream.dtype != torch.float32 or stream.shape[-1] > _WIDEST:
        return f"its kernel covers float32 streams up to {_WIDEST} wide, and this one is {stream.dtype}"
    return None


def add_norm(stream, delta, weight, bias, eps, dtype):
    """Like :func:`cspd_kernels.ops.add_norm.add_norm`."""
    width = stream.shape[-1]
    out = torch.empty(stream.shape, dtype=dtype, device=stream.device)
    rows = stream.numel() // width
    if not rows:
        return out
    block = triton.next_power_of_2(width)
    tensors = (stream, weight, bias, out) if delta is None else (stream, delta, weight, bias, out)
    key = None
    if aligned(*tensors):
        key = (stream.device, None if delta is None else delta.dtype, dtype)
    with on(stream.device):
        launch(
            _add_norm_kernel, rows, (stream, delta, weight, bias, out, eps), {"W": width, "BLOCK": block},
            {"enable_fp_fusion": True, "num_warps": max(1, min(8, block // 256))}, key,
        )  # fmt: skip
    return out
