"""What a device finds out and the host learns later, without waiting for it."""

from __future__ import annotations

import torch


class LateReport:
    """A count on a device, and as much of it as the host knows: the device writes there when it gets so far.

    A count, as several calls may be under way.
    """

    def __init__(self, device: torch.device):
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        self._known = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._told = 0

    def add(self, bad: torch.Tensor) -> None:
        """Count a flag or a number (one element, on the device)."""
        self._count.add_(bad)
        self._known.copy_(self._count, non_blocking=True)

    def news(self) -> bool:
        """Whether something is known that was not at the last call."""
        known = int(self._known)
        told, self._told = self._told, known
        return known != told
