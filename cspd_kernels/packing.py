"""Weights of a network's layers in the form of a packed head: shared where they need no change, else copied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn

from .dtypes import stream_dtype
from .parts import BlockParts, TimeParts, norm_weight
from .spec import PACKED_ORDER, HeadSpec, TimeSpec
from .time_embedding import TimeEmbedding

Pair = tuple[torch.Tensor, torch.Tensor]


class Packer:
    """Packs the layers of one network.

    Attributes:
        copies: (packed, weight of the module), or parts of both, of everything that was converted, copied or put
            into another order. Nothing else needs a look when the module changes.
    """

    def __init__(self, spec: HeadSpec, device: torch.device, dtype: torch.dtype):
        self.spec, self.device, self.dtype, self.stream = spec, device, dtype, stream_dtype(dtype)
        self.copies: list[Pair] = []
        self._mods: dict[int, Pair] = {}

    def take(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight as it is."""
        packed = weight.detach().to(self.device, dtype).contiguous()
        if packed.numel() and packed.data_ptr() != weight.data_ptr():
            self.copies.append((packed, weight))
        return packed

    def joined(self, weights: Iterable[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        """Weights below each other, in one tensor of the operands' type; None stands for zeros in the shape of
        ``like``."""
        weights = list(weights)
        rows = [like.shape[0] if weight is None else weight.shape[0] for weight in weights]
        packed = torch.zeros(sum(rows), *like.shape[1:], device=self.device, dtype=self.dtype)
        for part, weight in zip(packed.split(rows), weights):
            if weight is not None and weight.numel():
                part.copy_(weight.detach())
                self.copies.append((part, weight))
        return packed

    def linear(self, layer: nn.Linear, dtype: torch.dtype | None = None) -> Pair:
        """Weight and bias of a layer; zeros where it has none."""
        dtype = self.dtype if dtype is None else dtype
        if layer.bias is None:
            bias = torch.zeros(layer.out_features, device=self.device, dtype=dtype)
        else:
            bias = self.take(layer.bias, dtype)
        return self.take(layer.weight, dtype), bias

    def reordered(self, layer: nn.Linear, order: list[int]) -> Pair:
        """A layer whose outputs are cut into as many equal parts, in another order."""
        if order == sorted(order):
            return self.linear(layer)

        def packed(weight: torch.Tensor) -> torch.Tensor:
            parts = weight.chunk(len(order))
            return self.joined([parts[i] for i in order], parts[0])

        if layer.bias is None:
            return packed(layer.weight), torch.zeros(layer.out_features, device=self.device, dtype=self.dtype)
        return packed(layer.weight), packed(layer.bias)

    def modulation(self, layer: nn.Linear, order: tuple[str, ...]) -> Pair:
        """(3W, W) in the packed order, or (2W, W) of the last layer; the same tensors for a layer met before."""
        if id(layer) not in self._mods:
            wanted = [name for name in PACKED_ORDER if name in order]
            self._mods[id(layer)] = self.reordered(layer, [order.index(name) for name in wanted])
        return self._mods[id(layer)]

    def norm(self, norm: nn.Module) -> Pair:
        """Factors and offsets of a norm in the stream's type; ones and zeros where it has none."""
        weight, bias = norm_weight(norm), getattr(norm, "bias", None)
        return (
            torch.ones(self.spec.width, device=self.device, dtype=self.stream) if weight is None
            else self.take(weight, self.stream),
            torch.zeros(self.spec.width, device=self.device, dtype=self.stream) if bias is None
            else self.take(bias, self.stream),
        )  # fmt: skip

    def mlp(self, block: BlockParts) -> Pair:
        """The first layer of a block's MLP: (H, W), or (2H, W) with the gate's rows first."""
        if len(block.mlp) == 1:
            swapped = block.form == "swiglu" and not self.spec.gate_first
            return self.reordered(block.mlp[0], [1, 0]) if swapped else self.linear(block.mlp[0])
        gate, up = block.mlp
        weight = self.joined([gate.weight, up.weight], gate.weight)
        like = torch.empty(gate.out_features, device="meta")
        return weight, self.joined([gate.bias, up.bias], like)

    def block(self, block: BlockParts) -> tuple[torch.Tensor, ...]:
        """The fields of a ``Block``."""
        return (
            *self.norm(block.norm), *self.mlp(block), *self.linear(block.down),
            *self.modulation(block.modulation, self.spec.modulation),
        )  # fmt: skip

    def time(self, time: TimeParts, spec: TimeSpec) -> TimeEmbedding:
        norm = None if time.norm is None else self.take(norm_weight(time.norm), self.stream)
        return TimeEmbedding(spec, *self.linear(time.fc0, self.stream), *self.linear(time.fc1, self.stream), norm)
