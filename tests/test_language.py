"""The language of pages, docstrings, help texts and messages: short sentences, no word twice in a row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prose import docstring, module, page, sentences, split

ROOT = Path(__file__).parents[1]
MOST_WORDS = 30
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PLACES = {
    "pages": [*PAGES, *sorted((ROOT / "docs").rglob("*.md"))],
    "cspd": sorted((ROOT / "python" / "cspd").rglob("*.py")),
    "cspd_kernels": sorted((ROOT / "cspd_kernels").rglob("*.py")),
    "benchmarks": sorted((ROOT / "benchmarks").rglob("*.py")),
}
MAY_BE_TWICE = {"that", "had"}


def found(place: str):
    for path in PLACES[place]:
        yield from ((path.relative_to(ROOT), sentence) for sentence in sentences(path))


@pytest.mark.parametrize("place", PLACES)
def test_no_sentence_is_long(place):
    long = [f"{path}:{s.line}: {s.words} words: {s.text}" for path, s in found(place) if s.words > MOST_WORDS]
    assert not long, "\n".join([f"{len(long)} sentences of more than {MOST_WORDS} words:", *long])


@pytest.mark.parametrize("place", PLACES)
def test_no_word_is_there_twice(place):
    twice = [f"{path}:{s.line}: {word}: {s.text}" for path, s in found(place) for word in doubled(s.text)]
    assert not twice, "\n".join(twice)


def doubled(text: str) -> list[str]:
    """Words that follow themselves."""
    words = re.findall(r"(?<![\w`-])([a-z]{2,}) (?=\1(?![\w`-]))", text.lower())
    return [word for word in words if word not in MAY_BE_TWICE]


# --- that the search finds them ---


def texts(parts) -> list[str]:
    return [sentence for part in sorted(parts) for sentence in split(part.text)]


def test_sentences_of_a_page():
    source = """# A title
A first sentence, e.g. this one. A second
with `code. And more` and [a link.](http://a.b/c.d)

```
no. sentence. at all.
```
- an item
- another. With two

| a cell | another |
<!-- TABLE -->
not this.
<!-- /TABLE -->
the end
"""
    assert texts(page(source)) == [
        "A title", "A first sentence, e.g this one.", "A second with `code` and a link.",
        "an item", "another.", "With two", "a cell", "another", "the end",
    ]  # fmt: skip


def test_sentences_of_a_docstring():
    source = """One thing. ``a. b`` is another, as in::

        x. y. z.

    A second paragraph.

    Args:
        one: the first. Of two.
        two, three: both
            of them.

    Raises:
        ValueError: it is wrong.

    >>> 1 + 1
    2

    The end.

        a command

    word
        Its meaning.
    """
    assert texts(docstring(source.replace("\n    ", "\n"))) == [
        "One thing.", "`code` is another, as in:", "A second paragraph.", "one: the first.", "Of two.",
        "two, three: both of them.", "ValueError: it is wrong.", "The end.", "word Its meaning.",
    ]  # fmt: skip


def test_sentences_of_a_modules_strings():
    source = '''
def f(a, parser):
    """Documented."""
    parser.add_argument("--a", help="how many. Or how few")
    if a:
        raise ValueError(f"expected {a} of "
                         "them, got none" + (a or "what"))
    log.info("said " "twice")
'''
    assert [text for text in texts(module(source)) if " " in text or text == "Documented."] == [
        "Documented.", "how many.", "Or how few", "expected `code` of them, got none`code`", "said twice",
    ]  # fmt: skip


def test_long_sentences_and_words_that_are_twice_are_found(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("\n\nIt is " + "very " * 30 + "long. It is is short.")
    (long, short) = sentences(path)
    assert (long.line, long.words, short.words) == (3, 33, 4)
    assert doubled(short.text) == ["is"]
    assert doubled("`code` code, the then, A-a a-A that that") == []
