"""The head's network in torch, of one step or of many at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def modulations(head, y, start, stop):
    """Steps start..stop-1: per block [3, K, G, N, W] (shift, 1 + scale, gate), last layer [2, K, G, N, W]."""
    s = F.silu(head.time_embedding[start:stop, None, None] + y).to(head.dtype)  # [K, G, N, W]

    def project(weight, bias):
        out = F.linear(s, weight, bias).unflatten(-1, (-1, head.width))
        out[..., 1, :] += 1
        return out.movedim(-2, 0)

    return [project(b.mod_weight, b.mod_bias) for b in head.blocks], project(head.final_mod_weight, head.final_mod_bias)


def network(head, x, block_mods, final_mod):
    """x [..., N, C] -> [(eps, v) of the conditional rows] and, under guidance, [eps of the unconditional rows].

    Modulations are [3 or 2, ..., G, N, W].
    """
    dtype, width = head.dtype, (head.width,)
    h = F.linear(x, head.input_weight, head.input_bias).unsqueeze(-3)  # [..., 1, N, W], shared by both halves
    for b, (shift, scale, gate) in zip(head.blocks, block_mods):
        a = F.layer_norm(h, width, b.norm_weight, b.norm_bias, head.norm_eps)
        a = torch.addcmul(shift, a, scale).to(dtype)  # [..., G, N, W] from here on
        a = F.silu(F.linear(a, b.weight0, b.bias0), inplace=True)
        h = torch.addcmul(h, gate, F.linear(a, b.weight1, b.bias1))
    shift, scale = final_mod
    a = torch.addcmul(shift, F.layer_norm(h, width, None, None, head.norm_eps), scale)
    out = [F.linear(a[..., 0, :, :], head.final_weight, head.final_bias)]
    if a.shape[-3] == 2:
        channels = head.channels
        out.append(F.linear(a[..., 1, :, :], head.final_weight[:channels], head.final_bias[:channels]))
    return out
