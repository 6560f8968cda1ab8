"""What a sampler gives the network again at every step: its condition, and one timestep for all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...live import fingerprint, same
from ...time_embedding import embed


class KeptCondition:
    """What was made of the last condition, by its values: the CPU's alone, as looking at a device's would wait for it.

    No version counter shows what a replayed graph or foreign code has written into a tensor. The weights, too, are
    compared by their values, unless the head is one that does not follow its module.
    """

    def __init__(self):
        self._last: tuple | None = None  # replaced at once: another thread may be about to read it

    def get(self, head, cond: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``make()``, or what it returned for the same values."""
        if cond.device.type != "cpu" or head.cond_weight is None:
            return make()
        weights = (head.cond_weight, head.cond_bias) if head.watched else ()
        prints = [fingerprint(weight) for weight in weights]
        if self._last is not None:
            before, printed, made = self._last
            if cond.dtype == before.dtype and torch.equal(cond, before) and all(map(same, prints, printed)):
                return made
        made = make()
        self._last = cond.detach().clone(), prints, made
        return made


def embed_few(head, timesteps: torch.Tensor) -> torch.Tensor:
    """(M, W) or (1, W), as :func:`embed`: on the CPU each distinct timestep once."""
    if timesteps.device.type != "cpu" or len(timesteps) < 2:
        return embed(head.time, timesteps)
    values, which = torch.unique(timesteps, dim=0, return_inverse=True)
    made = embed(head.time, values)
    return made if len(values) == 1 else made[which]
