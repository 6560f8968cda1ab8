"""Copies of a network with random weights, cut to a small width: the released weights are never copied."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

from cspd_kernels.parts import torchs_rms
from cspd_kernels.spec import HeadSpec

WIDTH = 32
SEED = 20240617
_ROLES = ("weight", "bias", "alpha")


class Cut:
    """What a copy of ``net`` has in place of its weights.

    Args:
        cut: to a small width W, and the blocks' MLPs with it; else as wide as it is.

    Attributes:
        memo: of :func:`copy.deepcopy`, for what is copied beside the network.
    """

    def __init__(self, net: nn.Module, spec: HeadSpec, *, cut: bool):
        self.net, self.spec, self.memo = net, spec, {}
        self._generator = torch.Generator("cpu").manual_seed(SEED)
        sizes = spec.sizes()
        if cut:
            small = min(spec.width, WIDTH)
            sizes["H"] = small if spec.hidden == spec.width else min(spec.hidden, small * 3 // 2)
            sizes["W"] = small
        self.width = sizes["W"]
        self._layers, self._sizes = [], []
        for _, layer, (m, rows), (n, columns) in spec.layers():
            fan_in, fan_out = n * sizes[columns], m * sizes[rows]
            self._fresh(layer.weight, fan_out, fan_in, scale=fan_in**-0.5)
            self._fresh(layer.bias, fan_out, scale=0.1)
            self._layers.append(layer)
            self._sizes.append((fan_in, fan_out))
        self._norms = [norm for _, norm in spec.norms()]
        for norm in self._norms:
            for role in _ROLES:
                around = 0.0 if role == "bias" else 1.0
                self._fresh(getattr(norm, role, None), self.width, scale=0.1, around=around)
        for parameter in net.parameters():  # of parts that are not known: they may be trained to anything later
            if parameter.is_floating_point():
                self._fresh(parameter, *parameter.shape, scale=0.5)

    def _fresh(self, parameter: torch.Tensor | None, *shape: int, scale: float, around: float = 0.0) -> None:
        if parameter is not None and id(parameter) not in self.memo:
            values = around + scale * torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
            self.memo[id(parameter)] = nn.Parameter(values.to(parameter.device), requires_grad=False)

    def make(self) -> nn.Module:
        """The copy."""
        net, layers, norms = copy.deepcopy((self.net, self._layers, self._norms), self.memo)
        for layer, size in zip(layers, self._sizes):
            layer.in_features, layer.out_features = size
        for norm in norms:
            if isinstance(norm, (nn.LayerNorm, *torchs_rms())):
                norm.normalized_shape = (self.width,)
        return net
