"""Whose products the layered CUDA chain takes: the library's, or the extension's own, and those in which tiles.

Estimates: whole chains were measured with them, no tile beside another. On an H100 in bfloat16 (commit b589fd5) a
product of the library takes, at MAR-B's width, 3.6 us for 2 rows and 4.3 us for 64. At MAR-H's width it takes 6.0 us
for 64 rows and 7.1 us for 512. Two more kernels come with every pair of products. The products of the extension do
without one of them. They start before the kernel in front of them has ended, and have 96 KiB of operands on their way
at once.

Every tile reads (rows + columns) * width * 2 bytes of operands through the second-level cache. All multiprocessors
together get about 5.5 TB/s from it, and one gets about 50 bytes a cycle. The longer of the two times is in the table.
Where that does not clearly win, the library keeps the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The tile of a product that one block makes; the extension has these. A swiglu layer gives half as many
    columns."""

    rows: int
    columns: int


class Entry(NamedTuple):
    rows: int  # up to
    width: int  # up to, of the network and of its blocks
    tile: Tile | None  # None: the library


# The first entry that covers a head's width and a call's rows, in half precision. float32 is the library's.
TABLE = (
    Entry(16, 2048, Tile(16, 16)),  # W = 1024 / 1536: 64 / 96 tiles, 0.8 / 1.7 us
    Entry(64, 2048, Tile(32, 32)),  # 64 rows: 64 / 96 tiles, 1.5 / 3.4 us
    Entry(128, 1280, Tile(64, 32)),  # 128 rows of W = 1024 / 1280: 64 / 80 tiles, 2.3 / 3.6 us
    Entry(128, 2048, Tile(64, 64)),  # 128 rows of W = 1536: 48 tiles, 4.5 us
    Entry(240, 1024, Tile(64, 64)),  # 240 rows: 64 tiles, 3.1 us
)


# Of all rows and widths, for what must not be the library's.
OWN = (*TABLE, Entry(2**31, 2**31, Tile(64, 64)))

SWIGLU = (Tile(16, 16), Tile(32, 32), Tile(64, 64))  # tiles that the extension has of a swiglu layer


def tile_for(
    rows: int, width: int, dtype: torch.dtype, table: tuple[Entry, ...] = TABLE, swiglu: bool = False
) -> Tile | None:
    """The tile of the own products for so many rows, or None where the library makes them.

    ``width``: of the network or of its blocks, the larger one.
    """
    if dtype == torch.float32:
        return None
    fitting = (entry.tile for entry in table if rows <= entry.rows and width <= entry.width)
    return next((tile for tile in fitting if not swiglu or tile is None or tile in SWIGLU), None)
