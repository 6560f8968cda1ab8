"""The demo's picture and its page: smooth digits, maps of probabilities, a page on its own."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from cspd.demo import run, words
from cspd.demo.colours import CARD, INK, SCALE, TILE, UNJUDGED, acceptance_map, cell, shade
from cspd.demo.page import make_page
from cspd.demo.picture import SIZE, draw_picture, enlarge, kinds_of, map_strip, png, save_picture, small
from cspd.demo.quality import real_digits
from cspd.stats import ACCEPTED, FELL_BACK, PREFILLED, REDRAWN

ROW = {
    "name": "speculative, gamma 4",
    "steps": 16,
    "gamma": 4,
    "seconds": 1.5,
    "seconds_min": 1.25,
    "seconds_max": 1.75,
    "target_calls": 7,
    "draft_calls": 13,
    "raw_acceptance": 0.36,
    "acceptance": 0.98,
    "frechet_distance": 0.66,
}
SETTING = {
    "num_images": 512,
    "timed_images": 128,
    "timed_runs": 3,
    "relaxation": 42.0,
    "threads": 2,
    "command": "cspd demo <&> --seed 0",
    "versions": {"torch": "2.0<b>"},
}


def rows():
    """Of the table: three of the target alone, one of the draft, two that draft."""
    alone = {**ROW, "gamma": None, "acceptance": None, "raw_acceptance": None, "draft_calls": 0}
    named = [{**alone, "name": f"target, {n} steps", "steps": n} for n in (16, 8, 4)]
    named += [{**alone, "name": "draft, 16 steps", "target_calls": 0, "draft_calls": 16}]
    return [*named, ROW, {**ROW, "name": "speculative, gamma 8", "gamma": 8}]


def strips(outcome=REDRAWN):
    plan = [run.Way(row["name"], "target", row["steps"], row["gamma"]) for row in rows()]
    images = real_digits()[0][:20]
    outcomes, probability = torch.full((20, 16), outcome), torch.rand(20, 16)
    made = [run.Drawn(images, row, outcomes, probability) for row in rows()]
    return run.make_strips(plan, made, rows())


def test_digits_are_smooth_and_have_no_halos():
    images, _ = real_digits()
    for pixels, tile in zip(images[:, 0], enlarge(images)):
        assert tile.size == (SIZE, SIZE) == (96, 96)
        ink = np.asarray(tile).astype(float)
        assert (ink >= np.array(TILE)).all() and (ink <= np.array(INK)).all()
        assert np.abs(np.diff(ink[..., 0], axis=0)).max() < 80 > np.abs(np.diff(ink[..., 0], axis=1)).max()
        # Where no pixel within two has ink, there is none: nothing rings.
        near = torch.nn.functional.max_pool2d((pixels[None] + 1), 5, 1, 2)[0]
        far = torch.nn.functional.pad(near, (1, 1, 1, 1)).numpy()[
            (np.arange(96) * 10 // 96)[:, None], np.arange(96) * 10 // 96
        ]
        inner = np.zeros((96, 96), dtype=bool)
        inner[10:-10, 10:-10] = True
        assert (np.abs(ink - np.array(TILE))[(far == 0) & inner] <= 1).all()


def test_the_scale_is_continuous_and_grows_brighter():
    colours = np.array([shade(i / 100) for i in range(101)], dtype=float)
    assert tuple(colours[0]) == SCALE[0] and tuple(colours[-1]) == SCALE[-1]
    assert np.abs(np.diff(colours, axis=0)).max() < 8
    assert (np.diff(colours @ (0.299, 0.587, 0.114)) > 0).all()
    assert shade(float("-1")) == SCALE[0] and shade(2.0) == SCALE[-1]


def test_a_map_is_shaded_by_the_probability_and_marked_by_the_outcome():
    probability = torch.linspace(0, 1, 16)
    plain = np.asarray(acceptance_map(torch.full((16,), ACCEPTED), probability, 96))
    for i in range(16):
        middle = plain[24 * (i // 4) + 12, 24 * (i % 4) + 12].astype(int)
        assert np.abs(middle - np.array(shade(i / 15))).max() <= 2
    cells = [np.asarray(cell(kind, 0.5, 24)).astype(int) for kind in (ACCEPTED, REDRAWN, FELL_BACK, PREFILLED)]
    for i, one in enumerate(cells):
        assert all((np.abs(one - other) > 60).any(-1).sum() > 10 for other in cells[i + 1 :])
    assert np.abs(cells[3][4, 12] - np.array(UNJUDGED)).max() <= 2
    assert np.array_equal(cells[3], np.asarray(cell(PREFILLED, 1.0, 24)))  # it has no probability


def test_the_picture_and_the_small_one(tmp_path):
    save_picture(tmp_path / "d.png", strips(), SETTING)
    save_picture(tmp_path / "s.png", small(strips()), SETTING)
    large, few = (Image.open(tmp_path / name).convert("RGB") for name in ("d.png", "s.png"))
    assert large.width > 10 * 96 and large.height > 9 * 96
    assert few.size[0] == 900 and 5 * 96 < few.size[1] < 700
    assert (tmp_path / "s.png").stat().st_size < 150_000
    assert large.getpixel((0, 0)) == few.getpixel((0, 0)) == CARD
    assert [strip.title for strip in small(strips())] == [
        "real digits", "target, 16 steps", "target, 4 steps", "speculative, gamma 8", "acceptance map"
    ]  # fmt: skip
    assert strips()[0].title == "real digits"
    assert strips()[5].notes == ["7 target + 13 draft calls", "1.50 s (1.25-1.75)", "distance 0.660"]


def test_few_colours_are_enough():
    drawn = draw_picture(strips(ACCEPTED), words.picture_notes(SETTING))
    kept = Image.open(io.BytesIO(png(drawn))).convert("RGB")
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(kept).astype(int)).max(-1)
    assert (difference <= 4).mean() > 0.95 and difference.mean() < 1


def test_a_legend_has_what_occurs():
    assert kinds_of(strips()) == [ACCEPTED, REDRAWN, PREFILLED]
    assert kinds_of([map_strip(ROW, torch.tensor([[FELL_BACK]]), torch.ones(1, 1))]) == [
        ACCEPTED, REDRAWN, FELL_BACK, PREFILLED
    ]  # fmt: skip


class Page(HTMLParser):
    """Checks that tags are closed in order, and gathers attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.found, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("strict", [False, True])
def test_the_page_is_whole_and_refers_to_nothing(strict):
    html = make_page(strips(), {**SETTING, "rows": rows()}, strict)
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [] and html.startswith("<!DOCTYPE html>\n<html lang=")
    images = [attrs for tag, attrs in page.found if tag == "img"]
    assert len(images) == len(strips()) + 3  # and the legend's marks
    assert all(attrs["src"].startswith("data:image/png;base64,") and "alt" in attrs for attrs in images)
    without = re.sub(r'src="data:[^"]*"', "", html)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link", without)
    assert "prefers-color-scheme: dark" in html and "color-scheme: light dark" in html
    text = "".join(page.text)
    assert "cspd demo <&> --seed 0" in text and "2.0<b>" in text  # escaped in the page, whole for the reader
    assert all(row["name"] in text for row in rows())
    assert all(f"{row['frechet_distance']:.3f}" in text for row in rows())
    assert "Its licence" not in text and "CC BY 4.0" in text
    assert ("exactly the distribution" in text) == strict


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_said_is_short(strict):
    said = [*words.glossary(SETTING).values(), *words.footnotes(strict), words.INTRODUCTION, words.MAP, words.REAL]
    said += [
        words.meaning(row) for row in [*rows(), {**ROW, "name": "strict, gamma 4"}, {**rows()[0], "name": words.NOISY}]
    ]
    for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(said)):
        assert len(sentence.split()) <= 30, sentence
