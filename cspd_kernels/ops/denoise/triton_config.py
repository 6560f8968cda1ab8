"""How the Triton chain divides its work: the one table to tune."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

FEW_ROWS = 4  # up to here every program has whole rows of its operand, and no tensor core
FEW_COLUMNS = 8  # of a program, then
_MULTIPROCESSORS = 132  # where there is no device to ask: interpreter, compile report


@dataclass(frozen=True)
class Tile:
    """A program's share of a product [M, K] @ [N, K]^T: BM rows, BN columns, BK of the sum at a time."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk}/{self.stages}"

    @property
    def options(self) -> dict[str, int]:
        """What the kernel is compiled with."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Products(NamedTuple):
    """What makes the two products of a block: a kernel with this tile, or the library (None)."""

    first: Tile | None
    second: Tile | None


# What there is to choose from. Each compiles without spills for MAR-B, -L and -H on sm_80, sm_90 and sm_100.
HALF_TILES = (
    Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 8, 4), Tile(64, 128, 64, 8, 4),
    Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3), Tile(64, 32, 128, 4, 3), Tile(32, 64, 128, 4, 3),
    Tile(32, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4), Tile(16, 32, 128, 4, 4), Tile(16, 16, 128, 4, 4),
    Tile(16, 16, 256, 4, 3),
)  # fmt: skip
# Tiles of so many elements spill on sm_100 where a kernel may be called off. Square weights keep them: what was
# measured on sm_90, where they do not, had them.
SPILLING = 128 * 128
FLOAT32_TILES = (Tile(64, 64, 32, 8, 3), Tile(32, 32, 32, 4, 4), Tile(16, 32, 64, 4, 3), Tile(16, 16, 64, 4, 3))


def halved(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """The tile for two products at once, with half as many columns each, so a program holds as much as before."""
    return tuple(dict.fromkeys(replace(tile, bn=tile.bn // 2) for tile in tiles if tile.bn >= 32))


# (compute capability, width, bytes of an element) -> (up to how many rows, None for any; who makes the products),
# ascending. Empty, as nothing has been timed: `python benchmarks/tiles.py` on the device prints its entries. What is
# not here is chosen by reasoning (`_by_reasoning`), of which nothing has been timed either. Of heads whose blocks are
# as wide inside as outside, and have no SwiGLU.
TILES: dict[tuple[tuple[int, int], int, int], tuple[tuple[int | None, Products], ...]] = {}


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def row_warps(width: int) -> int:
    """Warps of a program that holds whole rows: 8 elements a thread, up to width 4096."""
    return 4 if width <= 1024 else 8 if width <= 2048 else 16


class FewTile(NamedTuple):
    """How the kernels for a few rows divide a product."""

    bk: int  # of the sum at a time
    warps: int


def few_tile(sum_of: int, width: int, two: bool = False) -> FewTile:
    """The tile of a product over ``sum_of`` elements in a head of this width, or of two products at once.

    It takes whole rows where the registers hold a program's weights, else 32 elements a thread.
    """
    warps = min(8, row_warps(width))
    whole = power_of_two(sum_of)
    fits = whole <= 256 * warps and not two
    return FewTile(whole if fits else min(whole, 128 * warps), warps)


class Shape(NamedTuple):
    """What the products of a head's blocks depend on."""

    width: int
    hidden: int
    swiglu: bool

    @property
    def plain(self) -> bool:
        """Whether both products are of one square weight."""
        return self.width == self.hidden and not self.swiglu


@functools.cache
def products(rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Products | None:
    """What makes the products of a block; None up to :data:`FEW_ROWS` rows, which have kernels of their own."""
    if rows <= FEW_ROWS:
        return None
    measured = TILES.get((_capability(device), shape.width, dtype.itemsize), ()) if shape.plain else ()
    chosen = next((choice for limit, choice in measured if limit is None or rows <= limit), None)
    return chosen or _by_reasoning(rows, shape, dtype, _multiprocessors(device))


LIBRARY_ROWS = 1024  # from here on the library's 16-bit products are expected to win by more than is fused to ours


def _by_reasoning(rows: int, shape: Shape, dtype: torch.dtype, multiprocessors: int) -> Products:
    """The tile that should take the fewest cycles, or the library for float32, where no tensor core helps.

    On an H100 the CUDA chain, with the library's products, took half the time of an earlier Triton chain with its own.
    """
    if dtype.itemsize == 4 or rows >= LIBRARY_ROWS:
        return Products(None, None)
    return _fastest_tiles(rows, shape, dtype, multiprocessors)


@functools.cache
def own_products(rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Products:
    """The tiles of a block's products where the library is not to make any, whatever the number of rows."""
    tiles = _fastest_tiles(rows, shape, dtype, _multiprocessors(device))
    chosen = products(rows, shape, dtype, device) or (None, None)
    return Products(*(of_table or tile for of_table, tile in zip(chosen, tiles)))


def _fastest_tiles(rows: int, shape: Shape, dtype: torch.dtype, multiprocessors: int) -> Products:
    width, hidden, swiglu = shape

    def fastest(columns: int, sum_of: int, times: int) -> Tile:
        tiles = FLOAT32_TILES if dtype.itemsize == 4 else HALF_TILES
        tiles = halved(tiles) if times == 2 else tiles
        if not shape.plain:
            tiles = tuple(tile for tile in tiles if tile.bm * tile.bn < SPILLING)
        candidates = [tile for tile in tiles if tile.bm <= max(16, power_of_two(rows))]
        work = columns, sum_of, times, dtype.itemsize, multiprocessors
        return min(candidates, key=lambda tile: _cycles(tile, rows, *work))

    return Products(fastest(hidden, width, 1 + swiglu), fastest(width, hidden, 1))


def _cycles(
    tile: Tile, rows: int, columns: int, sum_of: int, times: int, itemsize: int, multiprocessors: int
) -> tuple[float, float]:
    """Cycles of a product, or of two at once, and of their reads, by which equal ones are told apart.

    An SM reads 64 bytes a cycle, multiplies, and waits for one multiplication after another: the longest of these
    counts. The tiles of one SM share the first two. Where it waits, the tile that reads least is the best.
    """
    programs = -(-rows // tile.bm) * -(-columns // tile.bn)
    each = -(-programs // multiprocessors)
    read = (tile.bm + times * tile.bn) * sum_of * itemsize / 64
    rate = 128 if itemsize == 4 else 1200 if tile.bm >= 64 else 600  # scalar; a warpgroup's instructions; a warp's
    multiplied = times * tile.bm * tile.bn * sum_of / rate
    waited = sum_of * 4 if itemsize == 4 else sum_of / 16 * 33
    return max(each * read, each * multiplied, -(-each // 2) * waited), each * read


@functools.cache
def update_channels(tokens: int, channels: int) -> int:
    """Channels of a token for a program of the update kernel: one, until there are two programs for each multiprocessor
    of a large device; then more share the token's norm."""
    group = 1
    while group < min(4, channels) and tokens * channels > 2 * group * _MULTIPROCESSORS:
        group *= 2
    return group


def sweep_tile(steps: int, channels: int) -> tuple[int, int]:
    """(channels, warps) of a program of the sweep, which has all steps of one token: four elements a thread."""
    padded = power_of_two(steps)
    channels = max(1, min(4, power_of_two(channels), 512 // padded))
    return channels, max(1, min(16, padded * channels // 128))


@functools.cache
def input_tile(tokens: int, channels: int) -> tuple[int, int]:
    """Tokens and columns of h for a program of the input projection."""
    return 1 if tokens <= 16 else 4, max(16, 1024 // max(16, power_of_two(channels)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
