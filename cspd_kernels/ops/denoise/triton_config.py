"""Tile sizes of the Triton chain: the one table to tune."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

BY_SUM_ROWS = 4  # of the layered kernels; beyond, tensor cores


@dataclass(frozen=True)
class Tile:
    """A program's share of a product [M, W] @ [W, W]^T: BM rows, BN columns, BK of the sum at a time."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    by_sum: bool = False  # every thread adds its own products, see triton_tiles.multiply
    registers: int | None = None  # a thread; left out, the assembler may spill to fit two programs on an SM

    @property
    def options(self) -> dict[str, int]:
        """What the kernel is compiled with."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# Largest first. Each compiles without spills for MAR-B, -L and -H on sm_80, sm_90 and sm_100; many neighbours do not.
_FLOAT32 = (
    Tile(32, 64, 32, 4, 2, registers=128), Tile(32, 32, 32, 4, 3, registers=128),
    Tile(16, 32, 64, 4, 3, registers=128), Tile(16, 16, 64, 4, 3, registers=128),
)  # fmt: skip
_HALF = (
    Tile(128, 128, 64, 8, 2, registers=255), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 128, 4, 2),
    Tile(32, 32, 128, 4, 3), Tile(16, 32, 128, 4, 3), Tile(16, 16, 128, 4, 4),
)  # fmt: skip
_MULTIPROCESSORS = 132  # where there is no device to ask: interpreter, compile report


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def block_tile(rows: int, width: int, dtype: torch.dtype, multiprocessors: int = _MULTIPROCESSORS) -> Tile:
    """Tile of the two products of a block: the largest one that still keeps about half the device busy."""
    if rows <= BY_SUM_ROWS:
        bm, bn, whole = power_of_two(rows), 8, power_of_two(width)
        return Tile(bm, bn, whole if bm * bn * whole <= 32768 else 512, 8, 2, True, 255)
    candidates = [t for t in (_HALF if dtype.itemsize == 2 else _FLOAT32) if t.bm <= max(16, power_of_two(rows))]
    for tile in candidates:
        if -(-rows // tile.bm) * -(-width // tile.bn) >= 0.45 * multiprocessors:
            return tile
    return candidates[-1]


@functools.cache
def update_tile(tokens: int, channels: int) -> Tile:
    """Tile of the final layer and of the update: BM tokens, all channels (BN), BK of the sum at a time."""
    bn = max(16, power_of_two(channels))
    if tokens < 256:
        return Tile(1, bn, max(16, 2048 // bn), 8, 4, True, 255)
    return Tile(4, bn, max(16, 1024 // bn), 8, 2, True, 255)


def input_columns(update: Tile, width: int) -> int:
    """Columns of h that an input projection of the same tokens makes at a time."""
    return max(16, min(power_of_two(width), (16384 if update.bm == 1 else 8192) // (update.bm * update.bn)))


@functools.cache
def persistent_tile(rows: int, width: int, multiprocessors: int = _MULTIPROCESSORS) -> Tile:
    """Tile of the persistent chain: all rows, and so many columns that every program has a multiprocessor."""
    bn = 8
    while -(-width // bn) > multiprocessors:
        bn *= 2
    bm, bk = power_of_two(rows), power_of_two(width)
    if bm * bn * bk > 8192:  # products, 32 a thread
        bk = max(16, min((4096 if bm <= 8 else 2048) // (bm * bn), 128))
    return Tile(bm, bn, bk, 8, 2 if bm <= 8 else 1, True, 255)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
