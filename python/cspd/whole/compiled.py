"""A transformer block under ``torch.compile``, where it is asked for: one compilation serves all blocks of a model."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .weights import Block


def run_block(b: Block, stream, delta, mask, dtype, backend) -> tuple[torch.Tensor, torch.Tensor]:
    """Like :func:`cspd.whole.passes.run_block`, on a device, for any number of rows and tokens."""
    products = (b.qkv, b.proj, b.fc1, b.fc2)
    weights = [w for product in products for w in product.plain()]
    delta = torch.zeros_like(stream, dtype=dtype) if delta is None else delta  # else it would be compiled once more
    norms = (b.norm1.weight, b.norm1.bias, b.norm2.weight, b.norm2.bias)
    return _compiled()(stream, delta, mask, dtype, b.heads, b.norm1.eps, b.norm2.eps, *norms, *weights)


@functools.cache
def _compiled():
    return torch.compile(block, dynamic=True, fullgraph=True)


def block(
    stream, delta, mask, dtype: torch.dtype, heads: int, eps1: float, eps2: float, norm1, shift1, norm2, shift2,
    qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias,
):  # fmt: skip
    """The block of tensors: stream (R, S, E) and the branch to be added to it -> both behind the block."""
    rows, length, width = stream.shape
    stream = stream + delta
    x = F.layer_norm(stream, (width,), norm1, shift1, eps1).to(dtype)
    q, k, v = F.linear(x, qkv, qkv_bias).view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(rows, length, width)
    stream = stream + F.linear(x, proj, proj_bias)
    x = F.layer_norm(stream, (width,), norm2, shift2, eps2).to(dtype)
    return stream, F.linear(F.gelu(F.linear(x, fc1, fc1_bias)), fc2, fc2_bias)
