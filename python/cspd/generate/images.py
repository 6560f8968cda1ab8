"""PNG files: made, looked at, put together."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRID, _CELL = 64, 64


def to_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def read_png(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 from a PNG file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def is_whole_png(data: bytes, height: int, width: int) -> bool:
    """Whether this is an RGB PNG of that size that nobody has cut or changed: every chunk is there, with its CRC."""
    header = struct.pack(">IIBB", width, height, 8, 2)
    if data[:8] != _SIGNATURE or data[16:26] != header:
        return False
    at, pixels = 8, False
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data) or data[end - 4 : end] != struct.pack(">I", zlib.crc32(data[at + 4 : end - 4])):
            return False
        if kind == b"IEND":
            return pixels and end == len(data)
        at, pixels = end, pixels or kind == b"IDAT"
    return False


def grid(images: list[np.ndarray]) -> bytes:
    """The first 64 images in rows as a PNG file, at most 8 in a row; small ones are enlarged pixel by pixel."""
    shown = images[:_GRID]
    height, width = shown[0].shape[:2]
    scale = max(1, _CELL // max(height, width))
    columns = min(8, math.ceil(math.sqrt(len(shown))))
    gap = 2
    rows = math.ceil(len(shown) / columns)
    cell_h, cell_w = scale * height + gap, scale * width + gap
    canvas = np.full((rows * cell_h - gap, columns * cell_w - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(shown):
        top, left = i // columns * cell_h, i % columns * cell_w
        canvas[top : top + scale * height, left : left + scale * width] = image.repeat(scale, 0).repeat(scale, 1)
    return to_png(canvas)
