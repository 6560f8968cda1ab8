"""The colours of the demo's pictures, and the acceptance map."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from ..stats import ACCEPTED, FELL_BACK, PREFILLED, REDRAWN

Colour = tuple[int, int, int]

# A dark card, which looks the same on white pages and on dark ones.
CARD: Colour = (16, 19, 30)
TILE: Colour = (27, 32, 48)
INK: Colour = (255, 248, 236)
TEXT: Colour = (236, 239, 246)
QUIET: Colour = (160, 169, 190)
UNJUDGED: Colour = (88, 96, 116)  # of tokens that the target drew alone: they have no probability

# Five points of matplotlib's colour scale "viridis" (CC0): even for the eye, and clear to the colour-blind.
SCALE: tuple[Colour, ...] = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_FINE = 4  # marks are drawn so many times larger, then made smaller: their edges are smooth


def shade(probability: float) -> Colour:
    """The colour of a probability in [0, 1]."""
    place = min(max(probability, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(SCALE[low], SCALE[low + 1]))


def contrast(colour: Colour) -> Colour:
    """Dark on light colours, white on dark ones."""
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128
    return CARD if bright else (255, 255, 255)


def acceptance_map(outcome: torch.Tensor, probability: torch.Tensor, size: int) -> Image.Image:
    """A square of ``size`` pixels with a cell for each token, as :func:`draw_cell` draws it.

    Args:
        outcome, probability: (L,) of one image, as in :class:`cspd.stats.RunStats`; L is a square number.
    """
    side = int(len(outcome) ** 0.5)
    edges = [round(i * size * _FINE / side) for i in range(side + 1)]
    canvas = Image.new("RGB", (size * _FINE, size * _FINE), TILE)
    draw = ImageDraw.Draw(canvas)
    for i, (kind, value) in enumerate(zip(outcome.tolist(), probability.tolist())):
        row, column = divmod(i, side)
        box = (edges[column], edges[row], edges[column + 1] - 1, edges[row + 1] - 1)
        draw_cell(draw, box, kind, value)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def cell(outcome: int, probability: float, size: int) -> Image.Image:
    """One token's cell, for a legend."""
    return acceptance_map(torch.tensor([outcome]), torch.tensor([probability]), size)


def draw_cell(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], outcome: int, probability: float) -> None:
    """One token: accepted, plain; redrawn, with a cross; fell back, with a ring; pre-filled, grey with a stroke."""
    colour = UNJUDGED if outcome == PREFILLED else shade(probability)
    left, top, right, bottom = box
    line = max(1, (right - left) // 24)
    draw.rectangle(box, fill=colour, outline=CARD, width=line)
    if outcome == ACCEPTED:
        return
    inset, mark = (right - left) * 3 // 10, max(2, (right - left) // 10)
    inner = (left + inset, top + inset, right - inset, bottom - inset)
    pen = QUIET if outcome == PREFILLED else contrast(colour)
    if outcome == REDRAWN:
        draw.line(inner, fill=pen, width=mark)
        draw.line((inner[0], inner[3], inner[2], inner[1]), fill=pen, width=mark)
    elif outcome == FELL_BACK:
        draw.ellipse(inner, outline=pen, width=mark)
    else:
        middle = (top + bottom) // 2
        draw.line((inner[0], middle, inner[2], middle), fill=pen, width=mark)
