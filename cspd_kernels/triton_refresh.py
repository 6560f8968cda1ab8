"""Converted weights brought up to date on the device, in Triton: what has not changed is read once and not written.

Every block of a weight has a hash of its bits on the device. A launch hashes the blocks as they are now, and converts
and stores those whose hash is another one. It costs one read of the weights, the host waits for nothing, and it may be
captured in a CUDA graph: a replay then sees weights that have changed since.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from .devices import on

BLOCK = 4096  # elements of one program
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
_BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}
_COLUMNS = 3  # of the table: where a block is, where its copy is, how many elements it has


@triton.jit
def _refresh_kernel(
    table, hashes,
    SOURCE: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one weight. Every position has an odd factor of its own in the hash: one changed element always
    shows, and an exchange of two does."""
    entry = table + tl.program_id(0) * 3
    source = tl.load(entry).to(tl.pointer_type(SOURCE))
    packed = tl.load(entry + 1).to(tl.pointer_type(PACKED))
    index = tl.arange(0, BLOCK)
    inside = index < tl.load(entry + 2)
    value = tl.load(source + index, inside, 0.0)
    factor = 2 * index.to(tl.int64) + 1
    bits = value.to(BITS, bitcast=True).to(tl.int64)
    if WIDE:  # what changes in all of them must not add up to nothing beyond 64 bits
        bits = bits ^ (bits >> 32)
    now = tl.sum(bits * factor, 0)
    if now != tl.load(hashes + tl.program_id(0)):
        tl.store(packed + index, value.to(PACKED), inside)
        tl.store(hashes + tl.program_id(0), now)


class Refresh:
    """Brings copies up to date with what they were made from, on the current stream.

    Args:
        copies: (packed, source) pairs of equal shape, whose memory stays where it is.
    """

    def __init__(self, copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]):
        self.device = copies[0][0].device
        self.plain = [(packed, source) for packed, source in copies if not source.is_contiguous()]
        dense = sorted((pair for pair in copies if pair[1].is_contiguous()), key=_key)
        self.launches = [_Launch(list(pairs)) for _, pairs in itertools.groupby(dense, key=_key)]
        self()  # the hashes, and the kernel is compiled before a caller captures one

    def __call__(self) -> None:
        for packed, source in self.plain:
            packed.copy_(source.detach())
        with on(self.device):
            for launch in self.launches:
                launch()


def _key(pair) -> tuple[str, str]:
    packed, source = pair
    return str(source.dtype), str(packed.dtype)


class _Launch:
    """All weights of one type that have copies of one type."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]):
        packed, source = pairs[0]
        self.types = {
            "SOURCE": _TYPES[source.dtype],
            "BITS": _BITS[source.element_size()],
            "WIDE": source.element_size() == 8,
            "PACKED": _TYPES[packed.dtype],
        }
        entries = [
            (
                source.data_ptr() + first * source.element_size(),
                packed.data_ptr() + first * packed.element_size(),
                min(BLOCK, source.numel() - first),
            )
            for packed, source in pairs
            for first in range(0, source.numel(), BLOCK)
        ]
        table = torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, _COLUMNS)
        on_device = packed.device.type == "cuda"
        self.table = table.pin_memory().to(packed.device, non_blocking=True) if on_device else table.to(packed.device)
        self.hashes = torch.zeros(len(entries), dtype=torch.int64, device=packed.device)

    def __call__(self) -> None:
        _refresh_kernel[(len(self.hashes),)](self.table, self.hashes, **self.types, BLOCK=BLOCK, num_warps=4)
