"""Docstrings are written for Python's ``help``; here they become Markdown.

They name objects as Sphinx does, ``:func:`cspd.patch```, and pages as files: the site links both.
"""

from __future__ import annotations

import re
from pathlib import Path

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([\w.]+)`")
REFERENCE = Path(__file__).parents[1] / "reference"
CHANGES = [
    (re.compile(r"\bdocs/(\w+)\.md\b"), r"[docs/\1.md](../\1.md)"),
    (re.compile(r"^Example:$", re.M), "Examples:"),  # under that name doctests are code
    (re.compile(r" ?::$", re.M), ":"),  # before a block of code
    (re.compile(r"^( +\w[\w, ]*: )>", re.M), r"\1\\>"),  # an argument > 0, and no quotation
]


def documented() -> set[str]:
    """What the reference has a heading for."""
    pages = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    return set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.M))


class Roles(griffe.Extension):
    """Rewrites every docstring. A name without a heading on the site is code, and no link."""

    def __init__(self) -> None:
        self.known = documented()

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is None:
            return
        text = ROLE.sub(self.link, obj.docstring.value)
        for pattern, replacement in CHANGES:
            text = pattern.sub(replacement, text)
        obj.docstring.value = text

    def link(self, match: re.Match) -> str:
        name = match.group(1)
        return f"[`{name}`][{name}]" if name in self.known else f"`{name}`"
