"""Memory that the graphs of one device use in turn."""

from __future__ import annotations

import threading
import weakref

import torch

from .devices import one_a_device


class Scratch:
    """Blocks of memory of one device, shared by users that never run at the same time: the plans of :mod:`graphs`.

    A block lives as long as somebody holds it. There are few: a request is served by the smallest block that is large
    enough. A new block has a power of two bytes, or the caller's limit if that is less. So callers with one limit have
    less than twice the largest block together.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._lock = threading.Lock()
        self._blocks: list[weakref.ref[torch.Tensor]] = []

    def take(self, size: int, at_most: int) -> torch.Tensor:
        """Uninitialised memory (uint8) of at least ``size`` bytes; a new block has no more than ``at_most``, unless the
        size itself is more. Whoever uses it must hold the tensor itself, not just views of it.
        """
        with self._lock:
            blocks = [block for ref in self._blocks if (block := ref()) is not None]
            fitting = [block for block in blocks if len(block) >= size]
            if not fitting:
                rounded = 1 << max(size - 1, 0).bit_length()
                fitting = [torch.empty(max(size, min(rounded, at_most)), dtype=torch.uint8, device=self.device)]
                blocks += fitting
            self._blocks = [weakref.ref(block) for block in blocks]
            return min(fitting, key=len)


@one_a_device
def scratch(device: torch.device) -> Scratch:
    """A device's."""
    return Scratch(device)
