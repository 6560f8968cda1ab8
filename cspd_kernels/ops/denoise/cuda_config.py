"""Whose products the layered CUDA chain takes: the library's, or the extension's own, and those in which tiles.

Not measured yet. The library takes 3.6 us for a product of MAR-B's width at 2 rows, 4.3 at 64, and of MAR-H's 6.0 at 64
and 7.1 at 512 (H100, bfloat16, commit b589fd5), and two further kernels come with every pair of them. The own ones do
without one of these, start before the kernel before them has ended, and read all weights of a block of theirs at once,
but every tile reads its operands through the second-level cache: about 5.5 TB/s on an H100, to which the estimates in
the table belong. Where they do not clearly win, the library keeps the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Of a product's output, which one block makes; the extension has these."""

    rows: int
    columns: int


class Entry(NamedTuple):
    rows: int  # up to
    width: int  # up to
    tile: Tile | None  # None: the library


# The first entry that covers a head's width and a call's rows, in half precision. float32 is the library's.
# Bytes through the second-level cache are tiles * (tile rows + tile columns) * width * 2.
TABLE = (
    Entry(16, 2048, Tile(16, 16)),  # W = 1024 / 1536: 4 / 9 MB, 0.8 / 1.7 us
    Entry(64, 2048, Tile(32, 32)),  # 64 rows: 8 / 19 MB, 1.5 / 3.4 us
    Entry(128, 1280, Tile(64, 32)),  # 128 rows: 13 / 28 MB, 2.3 / 5.1 us, of which the latter is no clear win
)


def tile_for(rows: int, width: int, dtype: torch.dtype, table: tuple[Entry, ...] = TABLE) -> Tile | None:
    """The tile of the own products for so many rows, or None where the library makes them."""
    if dtype == torch.float32:
        return None
    return next((entry.tile for entry in table if rows <= entry.rows and width <= entry.width), None)
