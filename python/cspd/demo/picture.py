"""The demo's picture: a row of digits for each way of drawing them, and how likely each drafted token was kept."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..files import write_file
from ..stats import ACCEPTED, FELL_BACK, PREFILLED, REDRAWN
from . import words
from .colours import CARD, INK, QUIET, TEXT, TILE, UNJUDGED, Colour, acceptance_map, cell, shade

SIZE, GAP, COLUMNS = 96, 8, 10
_FEW = 6  # columns of the small picture
_CAPTION, _MARGIN, _LEGEND = 236, 20, 64
_LEAST = 900  # pixels wide: the legend needs them
_FONT = 15
_MIDDLE, _SLOPE = 0.45, 9.0  # of the contrast curve


class Strip(NamedTuple):
    """A row of the picture."""

    title: str
    notes: list[str]  # lines below the title
    tiles: list[Image.Image]
    row: dict | None = None  # of the table; None for real digits
    kinds: frozenset[int] | None = None  # of a map: the outcomes in it

    @property
    def is_map(self) -> bool:
        return self.kinds is not None


def digit_strip(row: dict | None, images: torch.Tensor) -> Strip:
    """Digits (n, 1, 8, 8) of a row of the table, or real ones."""
    if row is None:
        return Strip("real digits", ["8x8 pixels, enlarged"], enlarge(images))
    notes = [words.calls(row), f"{row['seconds']:.2f} s {words.spread(row)}", f"distance {row['frechet_distance']:.3f}"]
    return Strip(row["name"], notes, enlarge(images), row)


def map_strip(row: dict, outcome: torch.Tensor, probability: torch.Tensor) -> Strip:
    """The acceptance maps of a row's digits; outcome, probability: (n, L) as in :class:`cspd.stats.RunStats`."""
    notes = [f"{words.percent(row['acceptance'])} accepted", f"raw acceptance {words.percent(row['raw_acceptance'])}"]
    tiles = [acceptance_map(o, p, SIZE) for o, p in zip(outcome.cpu(), probability.cpu())]
    return Strip("acceptance map", notes, tiles, row, frozenset(outcome.unique().tolist()))


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 8, 8) in [-1, 1] -> (n, 8, 8) uint8."""
    return ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def enlarge(images: torch.Tensor, size: int = SIZE) -> list[Image.Image]:
    """Smooth digits of ``size`` pixels for the eye: (n, 1, 8, 8) in [-1, 1] -> n images.

    A margin of one pixel, bicubic interpolation, and a contrast curve that gives strokes clear edges. Sharper filters
    would draw halos around the strokes.
    """
    pixels = torch.nn.functional.pad((images.float().clamp(-1, 1) + 1) / 2, (1, 1, 1, 1))[:, 0].cpu().numpy()
    ends = _curve(np.array([0.0, 1.0]))
    tiles = []
    for digit in pixels:
        smooth = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
        ink = (_curve(smooth.clip(0, 1)) - ends[0]) / (ends[1] - ends[0])
        colours = np.array(TILE) + (np.array(INK) - np.array(TILE)) * ink[..., None]
        tiles.append(Image.fromarray(colours.round().astype(np.uint8)))
    return tiles


def _curve(ink: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-_SLOPE * (ink - _MIDDLE)))


def small(strips: list[Strip]) -> list[Strip]:
    """Fewer columns, and of the rows the real digits, the target, the target with few steps, the last that drafts."""
    last = max(i for i, strip in enumerate(strips) if strip.is_map)
    chosen = [strips[0], strips[1], strips[3], strips[last - 1], strips[last]]
    return [strip._replace(tiles=strip.tiles[:_FEW]) for strip in chosen]


def save_picture(path: Path, strips: list[Strip], setting: dict) -> None:
    """Write a PNG: the strips below each other, their captions at the left, the legend, and what the figures are of."""
    write_file(path, png(draw_picture(strips, words.picture_notes(setting))))


def draw_picture(strips: list[Strip], footer: list[str]) -> Image.Image:
    """Like :func:`save_picture` writes it."""
    columns = max(len(strip.tiles) for strip in strips)
    width = 2 * _MARGIN + _CAPTION + columns * (SIZE + GAP) - GAP
    rows = 2 * _MARGIN + len(strips) * (SIZE + GAP) - GAP
    canvas = Image.new("RGB", (max(width, _LEAST), rows + _LEGEND + len(footer) * (_FONT + 5)), CARD)
    draw = ImageDraw.Draw(canvas)
    title, note = ImageFont.load_default(_FONT + 4), ImageFont.load_default(_FONT)
    for i, strip in enumerate(strips):
        top = _MARGIN + i * (SIZE + GAP)
        draw.text((_MARGIN, top + 4), strip.title, fill=TEXT, font=title)
        for j, line in enumerate(strip.notes):
            draw.text((_MARGIN, top + 32 + j * (_FONT + 5)), line, fill=QUIET, font=note)
        for j, tile in enumerate(strip.tiles):
            canvas.paste(tile, (_MARGIN + _CAPTION + j * (SIZE + GAP), top))
    _draw_legend(canvas, draw, rows, note, kinds_of(strips))
    for i, line in enumerate(footer):
        draw.text((_MARGIN, rows + _LEGEND - _MARGIN + i * (_FONT + 5)), line, fill=QUIET, font=note)
    return canvas


def kinds_of(strips: list[Strip]) -> list[int]:
    """The outcomes that a legend explains: those that may always be, and the others where they are."""
    found = {ACCEPTED, REDRAWN, PREFILLED}.union(*(strip.kinds or () for strip in strips))
    return [kind for kind in (ACCEPTED, REDRAWN, FELL_BACK, PREFILLED) if kind in found]


def _draw_legend(canvas: Image.Image, draw: ImageDraw.ImageDraw, top: int, font, kinds: list[int]) -> None:
    left, length = _MARGIN, 180
    draw.text((left, top + 3), "raw acceptance probability", fill=QUIET, font=font)
    left += _CAPTION - 18
    draw.text((left, top + 3), "0", fill=QUIET, font=font)
    for i in range(length):
        draw.line((left + 18 + i, top, left + 18 + i, top + 23), fill=shade(i / (length - 1)))
    draw.text((left + 26 + length, top + 3), "1", fill=QUIET, font=font)
    left += length + 60
    for kind in kinds:
        name = words.MARKS[kind][0]
        canvas.paste(cell(kind, 0.5, 24), (left, top))
        draw.text((left + 32, top + 3), name, fill=QUIET, font=font)
        left += 52 + round(draw.textlength(name, font=font))


def side_by_side(tiles: list[Image.Image]) -> Image.Image:
    """The tiles of a row in one image, on the card's colour."""
    size = tiles[0].height
    canvas = Image.new("RGB", (len(tiles) * (size + GAP) - GAP, size), CARD)
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i * (size + GAP), 0))
    return canvas


def png(image: Image.Image) -> bytes:
    """As a PNG file of 256 colours: those of the digits, of the scale and of the text."""
    data = io.BytesIO()
    image.quantize(palette=_palette(), dither=Image.Dither.NONE).save(data, format="png", optimize=True)
    return data.getvalue()


@cache
def _palette() -> Image.Image:
    def between(low: Colour, high: Colour, count: int) -> list[Colour]:
        return [tuple(round(a + (b - a) * i / (count - 1)) for a, b in zip(low, high)) for i in range(count)]

    colours = [*between(TILE, INK, 80), *(shade(i / 99) for i in range(100)), UNJUDGED, (255, 255, 255)]
    colours += [*between(CARD, TEXT, 24), *between(CARD, QUIET, 24), *between(UNJUDGED, QUIET, 8)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in colours for value in colour])
    return palette
