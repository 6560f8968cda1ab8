"""The head's network in torch, of one step or of many at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...products import Product


class Layers(NamedTuple):
    """The head's products but for the narrow ones, at x, and the condition's, which run once a call."""

    blocks: list[tuple[Product, Product]]  # mlp0, mlp1
    mods: list[Product]
    final_mod: Product


def layers_of(head) -> Layers:
    """As the head's weights are now."""
    layers = head.shared.get("layers")
    if layers is None:
        layers = head.shared["layers"] = Layers(
            [(Product(b.weight0, b.bias0), Product(b.weight1, b.bias1)) for b in head.blocks],
            [Product(b.mod_weight, b.mod_bias) for b in head.blocks],
            Product(head.final_mod_weight, head.final_mod_bias),
        )
    elif head.watched:
        for product in (*layers.mods, layers.final_mod, *(p for both in layers.blocks for p in both)):
            product.look()
    return layers


def modulations(head, layers: Layers, y, start, stop):
    """Steps start..stop-1: per block [3, K, G, N, W] (shift, 1 + scale, gate), last layer [2, K, G, N, W]."""
    s = F.silu(head.time_embedding[start:stop, None, None] + y).to(head.dtype)  # [K, G, N, W]

    def project(product):
        out = product(s).unflatten(-1, (-1, head.width))
        out[..., 1, :] += 1
        return out.movedim(-2, 0)

    return [project(product) for product in layers.mods], project(layers.final_mod)


def network(head, layers: Layers, x, block_mods, final_mod):
    """x [..., N, C] -> [all outputs of the first group of rows], and of every other the first C.

    Modulations are [3 or 2, ..., G, N, W].
    """
    dtype, width = head.dtype, (head.width,)
    h = F.linear(x, head.input_weight, head.input_bias).unsqueeze(-3)  # [..., 1, N, W], shared by all groups
    for b, (mlp0, mlp1), (shift, scale, gate) in zip(head.blocks, layers.blocks, block_mods):
        a = F.layer_norm(h, width, b.norm_weight, b.norm_bias, head.norm_eps)
        a = torch.addcmul(shift, a, scale).to(dtype)  # [..., G, N, W] from here on
        h = torch.addcmul(h, gate, mlp1(mlp0(a, "silu")))
    shift, scale = final_mod
    a = torch.addcmul(shift, F.layer_norm(h, width, None, None, head.norm_eps), scale)
    out = [F.linear(a[..., 0, :, :], head.final_weight, head.final_bias)]
    weight, bias = head.final_weight[: head.channels], head.final_bias[: head.channels]
    return [*out, *(F.linear(a[..., g, :, :], weight, bias) for g in range(1, a.shape[-3]))]
