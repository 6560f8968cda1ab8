"""Packed weights that follow their module's, whatever changes those: a fused optimiser, ``.data``, a broadcast.

None of these moves a version counter, so values are looked at, all of them, at every call. What a head shares with
its module is read there and needs no look; what it had to convert or copy does, and so does the time embedding.

On the CPU every such weight has a fingerprint, read at the speed of memory, and what changed is copied again. On a
device the host must not wait for an answer: there a kernel compares and copies (:mod:`cspd_kernels.triton_refresh`),
or everything is copied where it cannot run.
"""

from __future__ import annotations

import torch

from .backends import interpreting, why_unavailable
from .head import DiffusionHead
from .logs import log_once
from .time_embedding import embed_schedule

_LANES = 4093  # a prime: rows and columns of a matrix fall on other lanes, so their order counts
_SMALL = 1 << 14  # elements; below, a copy is compared


class LiveWeights:
    """What of one head, packed by :meth:`DiffusionHead.from_network`, and of those that share its weights, must follow
    the module."""

    def __init__(self, head: DiffusionHead):
        self.copies, self.device = head.copies, head.device
        self._time = [weight for time in head.time for weight in time.tensors()]
        self._on_device = None
        if self.device.type == "cpu":
            self._prints = [fingerprint(source) for _, source in self.copies]
            self._time_prints = None  # of no use to a head that is only evaluated
            if head.schedule is not None:
                self._time_prints = [fingerprint(weight) for weight in self._time]
        elif self.copies:
            self._on_device = copier(self.copies, self.device)

    @torch.no_grad()
    def refresh(self, heads: list[DiffusionHead]) -> None:
        """Bring what was converted up to date, and the time embeddings of these heads that share it. Never waits.

        On the CPU they must be all of them: a change is noticed once.
        """
        if self.device.type == "cpu":
            self._compare(heads)
        else:
            if self._on_device is not None:
                self._on_device()
            self._embed(heads)

    def _compare(self, heads: list[DiffusionHead]) -> None:
        for i, (packed, source) in enumerate(self.copies):
            now = fingerprint(source)
            if not same(now, self._prints[i]):
                packed.copy_(source)
                self._prints[i] = now
        if all(head.schedule is None for head in heads):
            return
        now = [fingerprint(weight) for weight in self._time]
        if self._time_prints is None or not all(map(same, now, self._time_prints)):
            self._embed(heads)
            self._time_prints = now

    def _embed(self, heads: list[DiffusionHead]) -> None:
        for head in heads:
            if head.schedule is not None:
                head.time_embedding.copy_(embed_schedule(head.time, head.schedule))


def fingerprint(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Integers that tell two states of a weight apart: its bits, or sums of them over lanes.

    A single changed bit always shows. So does another order of rows or columns, except for an exchange of values that
    lie a multiple of 4093 words of 8 bytes apart.
    """
    flat = weight.detach()
    flat = (flat if flat.is_contiguous() else flat.contiguous()).view(-1)
    size = flat.element_size()
    if flat.numel() > _SMALL and flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        words = flat.view(torch.int64)
        if size == 8:  # what changes in all of them must not add up to nothing beyond 64 bits
            words = words ^ (words >> 32)
        whole = len(words) // _LANES * _LANES
        return words[:whole].view(-1, _LANES).sum(dim=0), words[whole:].clone()
    return (flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).clone(),)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    """Whether two fingerprints are equal."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def copier(copies, device: torch.device):
    """A function that queues the update of all copies on a device."""
    reason = f"no kernels for {device.type}" if device.type != "cuda" else why_unavailable("triton")
    if reason is None and interpreting():
        reason = "TRITON_INTERPRET is set"
    if reason is None:
        from .triton_refresh import Refresh

        return Refresh(copies)
    log_once(
        f"weights are converted again at every call, because they cannot be compared on the device: {reason}",
        slow_on=device,
        cause=reason,
    )
    packed, sources = zip(*copies)
    return lambda: torch._foreach_copy_(packed, [source.detach() for source in sources])
