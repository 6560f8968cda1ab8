"""Docstrings name objects as Sphinx does, ``:func:`cspd.patch```, and pages as files; the site links both."""

from __future__ import annotations

import re
from pathlib import Path

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")
PAGE = re.compile(r"\bdocs/(\w+)\.md\b")
REFERENCE = Path(__file__).parents[1] / "reference"


def documented() -> set[str]:
    """What the reference has a heading for."""
    pages = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    return set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.M))


class Roles(griffe.Extension):
    """Rewrites roles as links of the site, or as code where the site has no such heading. Pages are named by file."""

    def __init__(self) -> None:
        self.known = documented()

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(self.link, obj.docstring.value)
            obj.docstring.value = PAGE.sub(r"[docs/\1.md](../\1.md)", text)

    def link(self, match: re.Match) -> str:
        name = match.group(2)
        return f"[`{name}`][{name}]" if name in self.known else f"`{name}`"
