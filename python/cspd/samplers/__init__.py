"""Samplers that are no diffusion object's: heads whose ``sample`` is a loop of its own, stood in for by the kernels.

One file a code base, of what differs between them: an :class:`Adapter`. Any that its head is not seen to agree with on
a small copy is omitted.
"""

from __future__ import annotations

import torch.nn as nn

from ..errors import WrongType
from .adapter import Adapter, Draws, Reading
from .bitdance import BitDance
from .flow_mar import FlowMar
from .nextstep import NextStep
from .rectified_flow import RectifiedFlow

__all__ = ["Adapter", "Draws", "Reading", "adapter_of", "register"]

ADAPTERS: list[Adapter] = [NextStep(), BitDance(), FlowMar(), RectifiedFlow()]


def register(adapter: Adapter) -> None:
    """Have :func:`cspd.patch` know one more sampler, before those that it knows already.

    Example:
        >>> from cspd import samplers
        >>> class Mine(samplers.Adapter):
        ...     source = "my project"
        ...     attributes = ("my_solver",)
        ...
        ...     def sample(self, head, z, cfg=1.0):  # the arguments of the head's own method
        ...         return samplers.Reading(head.my_schedule, z)
        >>> samplers.register(Mine())
        >>> print(samplers.ADAPTERS.pop(0))  # and forgotten again
        my project
    """
    if not isinstance(adapter, Adapter):
        raise WrongType(f"register expected an Adapter, got {type(adapter).__name__}")
    for name in adapter.methods:
        if not callable(getattr(adapter, name, None)):
            raise WrongType(f"register expected {type(adapter).__name__} to read {name}, which it has no method for")
    ADAPTERS.insert(0, adapter)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that knows how a module samples, or None.

    Example:
        >>> from cspd import samplers
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> print(samplers.adapter_of(model.diffloss))  # its loop is a diffusion object's
        None
    """
    return next((adapter for adapter in ADAPTERS if adapter.recognises(module)), None)
