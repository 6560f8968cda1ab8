"""The demo's picture: labelled rows of digits, and where the draft's tokens were kept."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ..files import write_file
from ..stats import OUTCOMES

COLOURS = ((120, 120, 120), (70, 160, 90), (235, 150, 40), (200, 50, 50))  # one for each of OUTCOMES
_CELL, _GAP, _TEXT, _COLUMNS = 64, 6, 16, 20


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 8, 8) in [-1, 1] -> (n, 8, 8) uint8."""
    return ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_picture(path: Path, rows: list[tuple[str, torch.Tensor, torch.Tensor | None]], labels: torch.Tensor) -> None:
    """Write a PNG: for every (name, images, outcome) a row of digits and, where given, their acceptance map.

    Args:
        images: (n, 1, 8, 8) in [-1, 1]; the first 20 are shown. outcome: (n, 16) as in RunStats.
    """
    columns = min(_COLUMNS, len(labels))
    lines = []
    for name, images, outcome in rows:
        lines.append((name, [Image.fromarray(p.numpy()).convert("RGB") for p in to_pixels(images[:columns])]))
        if outcome is not None:
            lines.append((f"{name}: what became of each token", [_map(o) for o in outcome[:columns]]))
    height = _TEXT + sum(_TEXT + _CELL + _GAP for _ in lines) + 2 * _TEXT
    width = max(columns * (_CELL + _GAP) + _GAP, 480)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for i in range(columns):
        draw.text((_GAP + i * (_CELL + _GAP) + _CELL // 2 - 3, 2), str(int(labels[i])), fill="black")
    top = _TEXT
    for name, cells in lines:
        draw.text((_GAP, top + 2), name, fill="black")
        for i, cell in enumerate(cells):
            position = (_GAP + i * (_CELL + _GAP), top + _TEXT)
            canvas.paste(cell.resize((_CELL, _CELL), Image.Resampling.NEAREST), position)
        top += _TEXT + _CELL + _GAP
    left = _GAP
    for name, colour in zip(OUTCOMES, COLOURS):
        draw.rectangle((left, top + 4, left + 12, top + 16), fill=colour)
        draw.text((left + 18, top + 4), name, fill="black")
        left += 110
    png = io.BytesIO()
    canvas.save(png, format="png")
    write_file(path, png.getvalue())


def _map(outcome: torch.Tensor) -> Image.Image:
    side = int(len(outcome) ** 0.5)
    colours = torch.tensor(COLOURS, dtype=torch.uint8)[outcome.long().cpu()]
    return Image.fromarray(colours.view(side, side, 3).numpy())
