"""Where the claims of ``figures_claims.py`` take their numbers from: rows of result files, and sizes of heads."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from registry import CHANNELS, HEADS
from report_pages import experiments
from report_tables import load

COMPATIBILITY, DIGITS, CLOTH = "compatibility-cpu.json", "quality-digits-cpu.json", "quality-cloth-cpu.json"
IMAGES, IMAGES_CPU, SWEEPS = "generate-h100.json", "generate-cpu.json", "in-parallel-h100.json"


@cache
def results(name: str) -> dict:
    return load(name)


def only(rows: Iterable[dict], **fields: object) -> dict:
    """The one of some rows with these fields.

    Raises:
        LookupError: none has them, or several have.
    """
    found = [each for each in rows if all(each.get(key) == value for key, value in fields.items())]
    if len(found) != 1:
        raise LookupError(f"expected one row with {fields}, got {len(found)}")
    return found[0]


def row(file: str, /, **fields: object) -> dict:
    """The one row of a file with these fields."""
    return only(results(file)["rows"], **fields)


def hand(name: str) -> float | list | dict:
    """The value of an entry of ``by-hand.json``."""
    return row("by-hand.json", name=name)["value"]


def quality(pair: str, name: str, field: str) -> float:
    return row(pair, name=name)[field]


def differences(noted: int | None) -> list[float]:
    """Those of public code bases that have a footnote, or none."""
    parts = [
        part
        for table in ("loops", "networks")
        for each in results(COMPATIBILITY)[table]["rows"]
        for part in each["difference"]
    ]
    return [part["value"] for part in parts if part.get("note") == noted]


def image(name: str, model: str, way: str) -> dict:
    """A row of whole images, e.g. of ("MAR-B", "whole bfloat16"); each file has one case of a model and way."""
    rows = [each for each in results(name)["rows"] if each["size"].startswith(f"{model} ")]
    return only(rows, op="sample_tokens", backend=way)


def weights(model: str) -> dict[str, float]:
    """Weights of MAR's head without the biases: all, those of modulations, and those of blocks."""
    depth, width, condition = HEADS[model]
    modulations, blocks = (3 * depth + 2) * width**2, 2 * depth * width**2
    times = 256 * width + width**2  # the embedding of a time has 256 numbers
    ends = CHANNELS * width + 2 * CHANNELS * width
    return {
        "all": modulations + blocks + times + ends + condition * width,
        "modulations": modulations,
        "blocks": blocks,
    }


def megabytes(model: str) -> list[float]:
    """Of 16-bit weights."""
    return [2e-6 * count for count in weights(model).values()]


def anderson(head: str) -> dict[str, list[int]]:
    """Sweeps of each method's best setting, by accuracy."""
    return {each["method"]: each["sweeps"] for each in experiments("anderson")[head] if each.get("best setting")}


def rounds(head: str, guess: str = "frozen") -> list[dict[str, float]]:
    """Of step speculation with 4, 8, 16 and all steps guessed."""
    return [each["rounds"] for each in experiments("step speculation")[head] if each["method"] == guess]


def settled(head: str, accuracy: str = "1e-03") -> tuple[float, int]:
    """Sweeps until a token settles: the mean, and the most."""
    return only(experiments("step speculation")[head], method="sweeps")["sweeps"][accuracy]


def line(x: float, first: tuple[float, float], second: tuple[float, float]) -> float:
    """A straight line through two points."""
    return first[1] + (x - first[0]) * (second[1] - first[1]) / (second[0] - first[0])
