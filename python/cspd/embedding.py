"""Conditions that a network embeds by more than a linear layer: its own modules make what is added to the time's part.

The kernels go on from there. Two ways are known. One is the network's ``cond_embed``, whatever module that is, such
as attention pooling in OpenMotionLab/MotionGPT3. The other adds a further input beside it, through a module of its own:
as a sum (yuhuUSTC/FAR) or in further channels (4DVLab/Freqpolicy).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

if TYPE_CHECKING:
    from cspd_kernels.spec import HeadSpec

_MOST = 6  # assignments of inputs to modules


@dataclass(frozen=True)
class Way:
    """How the condition is embedded.

    Attributes:
        first: name of the network's module that the condition goes through.
        more: (input of the network, name of its module) of further inputs.
        how: ``"add"``, or ``"last"`` or ``"first"``, of the further channels.
    """

    first: str
    more: tuple[tuple[str, str], ...] = ()
    how: str = "add"

    def embed(self, net: nn.Module, cond: torch.Tensor, extra: dict[str, torch.Tensor]) -> torch.Tensor:
        """(rows, ..., W), by the network's own modules under the caller's autocast."""
        parts = [_through(net.get_submodule(self.first), cond)]
        parts += [_through(net.get_submodule(path), extra[name]) for name, path in self.more]
        if len(parts) == 1:
            return parts[0]
        most = max(part.dim() for part in parts)
        parts = [part.reshape(len(part), *(1,) * (most - part.dim()), *part.shape[1:]) for part in parts]
        if self.how == "add":
            return sum(parts[1:], start=parts[0])
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        parts = [part.expand(*shape, part.shape[-1]) for part in parts]
        return torch.cat(parts if self.how == "last" else parts[::-1], dim=-1)


def _through(module: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """A module's result. Without autocast it is given what is of its weights' type, as forks that convert do."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    autocast = torch.amp.is_autocast_available(value.device.type) and torch.is_autocast_enabled(value.device.type)
    if weight is not None and value.is_floating_point() and value.dtype != weight.dtype and not autocast:
        value = value.to(weight.dtype)
    return module(value)


def ways_of(net: nn.Module, spec: HeadSpec, extra: Iterable[str]) -> list[Way | None]:
    """The ways that a network with these further inputs may embed its condition; None: by a layer that is packed."""
    names, extra = spec.parts.names, list(extra)
    first = names[id(spec.parts.cond)].removeprefix("net.")
    if not extra:
        return [None if spec.condition == "linear" else Way(first)]
    known = {name.removeprefix("net.").partition(".")[0].partition("[")[0] for name in names.values()}
    others = [name for name, _ in net.named_children() if name not in known]
    found = []
    for modules in itertools.islice(itertools.permutations(others, len(extra)), _MOST):
        found += [Way(first, tuple(zip(extra, modules)), how) for how in ("add", "last", "first")]
    return found
