"""Whether torch has a device on this machine."""

from __future__ import annotations

import torch

from .cli_support import one_line
from .errors import InvalidInput


def usable_device(device: torch.device | str, expected: str) -> torch.device:
    """The device, after a first tensor on it.

    Args:
        expected: how the message begins, such as ``"load_mar expected a device"``.

    Raises:
        InvalidInput: torch has no such device here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without that device asserts
        raise InvalidInput(f"{expected} that torch has on this machine, got {device}: {one_line(error)}") from error
    return found
