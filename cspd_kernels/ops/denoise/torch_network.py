"""The head's network in torch, of one step or of many at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...products import PlainProduct, Product


class Layers(NamedTuple):
    """The head's products, except the narrow ones at x and the condition's, which run once a call."""

    blocks: list[tuple[Product, Product]]  # mlp0, mlp1; or of PlainProduct, like the others
    mods: list[Product]  # each once, however many blocks use it
    final_mod: Product


def layers_of(head) -> Layers:
    """The layers with the head's present weights."""
    layers = head.shared.get("layers")
    if layers is None:
        layers = head.shared["layers"] = _layers(head, Product)
    elif head.watched:
        for product in (*layers.mods, layers.final_mod, *(p for both in layers.blocks for p in both)):
            product.look()
    return layers


def plain_layers_of(head) -> Layers:
    """Layers that read the head's weights where they are, at every call."""
    layers = head.shared.get("plain layers")
    if layers is None:
        layers = head.shared["plain layers"] = _layers(head, PlainProduct)
    return layers


def _layers(head, product) -> Layers:
    mods = {id(b.mod_weight): product(b.mod_weight, b.mod_bias) for b in head.blocks}
    return Layers(
        [(product(b.weight0, b.bias0), product(b.weight1, b.bias1)) for b in head.blocks],
        list(mods.values()),
        product(head.final_mod_weight, head.final_mod_bias),
    )


def embedded(head, cond):
    """The condition's part of y, [..., W] in the stream's type."""
    stream = head.input_weight.dtype
    if head.cond_weight is None:
        return cond.to(stream)
    return F.linear(cond.to(head.dtype), head.cond_weight, head.cond_bias).to(stream)


def modulations(head, layers: Layers, y, start, stop):
    """Steps start..stop-1: per block [3, K, G, N, W] (shift, 1 + scale, gate), last layer [2, K, G, N, W]."""
    return modulations_of(head, layers, head.time_embedding[start:stop, None, None] + y)


def modulations_of(head, layers: Layers, y):
    """The same of embedded time and condition y [..., W]."""
    s = F.silu(y).to(head.dtype)  # [K, G, N, W]

    def project(product):
        out = product(s).unflatten(-1, (-1, head.width))
        out[..., 1, :] += 1
        return out.movedim(-2, 0)

    made = [project(product) for product in layers.mods]
    return [made[i] for i in head.modulation_of], project(layers.final_mod)


def normed(head, h, weight=None, bias=None):
    """The head's norm of h [..., W]."""
    if head.norm == "layer":
        return F.layer_norm(h, (head.width,), weight, bias, head.norm_eps)
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + head.norm_eps)
    return h if weight is None else h * weight


def multiplied(head, mlp0: Product, mlp1: Product, a):
    """The MLP of a block."""
    if head.mlp == "silu":
        return mlp1(mlp0(a, "silu"))
    gate, up = mlp0(a).chunk(2, dim=-1)
    return mlp1(F.silu(gate) * up)


def network(head, layers: Layers, x, block_mods, final_mod):
    """x [..., N, C] -> [all outputs of the first group of rows], and of every other the first C.

    Modulations are [3 or 2, ..., G, N, W].
    """
    dtype = head.dtype
    h = F.linear(x, head.input_weight, head.input_bias).unsqueeze(-3)  # [..., 1, N, W], shared by all groups
    for b, (mlp0, mlp1), (shift, scale, gate) in zip(head.blocks, layers.blocks, block_mods):
        a = normed(head, h, b.norm_weight, b.norm_bias)
        a = torch.addcmul(shift, a, scale).to(dtype)  # [..., G, N, W] from here on
        h = torch.addcmul(h, gate, multiplied(head, mlp0, mlp1, a))
    shift, scale = final_mod
    a = torch.addcmul(shift, normed(head, h), scale)
    out = [F.linear(a[..., 0, :, :], head.final_weight, head.final_bias)]
    weight, bias = head.final_weight[: head.channels], head.final_bias[: head.channels]
    return [*out, *(F.linear(a[..., g, :, :], weight, bias) for g in range(1, a.shape[-3]))]
