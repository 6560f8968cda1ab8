"""Figures in prose, and where they come from: ``python benchmarks/figures.py`` names those that come from nowhere.

Tables and plots are written from the files in ``results`` by ``report.py``. A figure in a sentence is typed by a
person. So each has a claim in ``figures_claims.py``: the words around it, and how it follows from a result file. A
number that no measurement gave (a tolerance, a setting, a size) is listed there as a setting.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**/*.md")
DIGITS = r"(?<![\w.,\[/-])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?"
NUMBER = rf"{DIGITS}(?!\w)"
UNIT = r"(?:ms|us|s|seconds?|minutes?|%|times|sweeps|calls|passes|rounds|kB|MB|GB|TB|GB/s|TB/s|TFLOP/s)(?![\w/])"
# A number with a unit, alone or in a list ("1.02 and 0.95 s"); one in powers of ten; one with decimals.
FIGURE = re.compile(
    rf"{NUMBER}(?:(?:,| to| and| or|,? and) {NUMBER})*\s?{UNIT}"
    r"|(?<![\w.-])\d(?:\.\d+)?e-?\d+"
    r"|(?<![\w.,/-])-?\d+\.\d+x?(?!\w|\.\d)"
    r"|(?<![\w.,/-])\d+x(?!\w)"
)
CODE = r"```.*?```|`[^`]*`"
GENERATED = r"<!-- ([A-Z0-9-]+) -->.*?<!-- /\1 -->|<!--.*?-->"
ADDRESS = r"\]\([^)]*\)|https?://\S+"
NAMES = "arXiv|PyTorch|Triton|Python|CUDA|nvcc|NumPy|Pillow|capability"
VERSION = rf"\b(?:{NAMES}) [\d.]*\d(?:(?:,| and| or| to|,? and) [\d.]*\d)*"
NOT_PROSE = re.compile("|".join((CODE, GENERATED, ADDRESS, VERSION)), re.S)


@dataclass(frozen=True)
class Claim:
    """The numbers of some words, in their order.

    Attributes:
        words: as they stand in the page, on one line. Every number in them is checked, so they are best short.
        values: what the numbers are, from result files.
        at_most: the words give a bound; a value may lie below by up to a fifth.
    """

    words: str
    values: Callable[[], Iterable[float]]
    at_most: bool = False

    def wrong(self) -> list[str]:
        """What of the words does not follow."""
        try:
            shown, values = numbers(self.words), list(self.values())
        except LookupError as error:  # the file has no such row
            return [f"{self.words!r}: {error}"]
        if len(shown) != len(values):
            return [f"{self.words!r} has {len(shown)} numbers, and its source gives {len(values)}: {values}"]
        return [
            f"{self.words!r}: {text}, and its source says {value:.6g}"
            for text, value in zip(shown, values)
            if not agrees(text, value, self.at_most)
        ]


def numbers(words: str) -> list[str]:
    """All numbers of some words, with and without a unit."""
    return re.findall(rf"{DIGITS}(?=x?(?!\w))", prose(words))


def agrees(shown: str, value: float, at_most: bool = False) -> bool:
    """Whether a number rounds to what is shown, to as many digits as are shown."""
    plain = shown.replace(",", "")
    mantissa, _, exponent = plain.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    if at_most and value < float(plain):
        return value >= 0.8 * float(plain)
    return abs(float(plain) - value) <= 0.5 * last * (1 + 1e-9)


def prose(text: str) -> str:
    """A page's sentences on one line, without code, generated blocks and addresses."""
    return re.sub(r"\s+", " ", NOT_PROSE.sub(lambda found: "`" if found[0].startswith("`") else " ", text))


def unclaimed(text: str, words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(figures of a page that none of the words holds, words that the page does not hold exactly once)."""
    page, missing = prose(text), []
    held = bytearray(len(page))
    for known in words:
        known = prose(known).strip()
        start = page.find(known)
        if start < 0 or page.count(known) > 1:
            missing.append(known)
        else:
            held[start : start + len(known)] = b"1" * len(known)
    return [_shown(page, found) for found in FIGURE.finditer(page) if not all(held[slice(*found.span())])], missing


def _shown(page: str, found: re.Match) -> str:
    return f"...{page[max(0, found.start() - 40) : found.end() + 20]}..."


def pages() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for glob in PAGES for path in sorted(ROOT.glob(glob))}


def problems() -> list[str]:
    """Everything that is wrong, a line each."""
    from figures_claims import CLAIMS, SETTINGS

    found, texts = [], pages()
    found += [f"{page}: no such page" for page in sorted({*CLAIMS, *SETTINGS} - {*texts})]
    for page, text in texts.items():
        claims = CLAIMS.get(page, [])
        left, missing = unclaimed(text, [*(claim.words for claim in claims), *SETTINGS.get(page, [])])
        found += [f"{page}: {figure} comes from no result file" for figure in left]
        found += [f"{page}: it does not hold {words!r} once" for words in missing]
        found += [f"{page}: {wrong}" for claim in claims for wrong in claim.wrong()]
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
