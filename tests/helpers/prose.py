"""Sentences of pages, docstrings, help texts and messages, with the line where each stands or begins."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CODE = "`code`"  # stands for code, a link's address, a value that is filled in; counts as one word
_ABBREVIATIONS = r"\b(e\.g|i\.e|cf|vs|resp|al|Fig|fig|eq|Eq|No|approx)\.(?=\s)"
_ITEM = re.compile(r"^\s*([-*+]|\d+[.)])\s+")
_ENTRY = re.compile(r"\s+[*\w][\w*.,/\s]*(\([^)]*\))?: ")  # of Args, Raises, Attributes
_SECTION = re.compile(r"(Args|Arguments|Attributes|Raises|Returns|Yields|Example|Examples|Note|Source|Sources):$")
_HELP = ("help", "description", "epilog")


class Sentence(NamedTuple):
    line: int
    text: str

    @property
    def words(self) -> int:
        return sum(bool(re.search(r"\w", word)) for word in self.text.split())


class _Text(NamedTuple):
    """A paragraph, an item, a table's cell, an entry or a message."""

    line: int
    text: str


def sentences(path: Path) -> list[Sentence]:
    """Of a page (.md) or a module (.py)."""
    source = path.read_text(encoding="utf-8")
    texts = page(source) if path.suffix == ".md" else module(source)
    return [Sentence(text.line, sentence) for text in sorted(texts) for sentence in split(text.text)]


def split(text: str) -> list[str]:
    """The sentences of one text."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(_ABBREVIATIONS, r"\1", text)
    found = re.split(r"(?<=[.!?])[\"'”)*_]*\s+(?=[\"'“(*_]*[\w`<\[])", text)
    return [sentence for sentence in found if re.search(r"\w", sentence)]


# --- pages ---


def page(source: str) -> Iterator[_Text]:
    """Without code, comments and what is written between two marks by a program."""
    source = re.sub(r"\A---\n.*?\n---\n", _blank, source, flags=re.S)
    source = re.sub(r"^( *)(```|~~~).*?^\1\2", _blank, source, flags=re.S | re.M)
    source = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", _blank, source, flags=re.S)
    source = re.sub(r"<!--.*?-->|<(style|script|svg)\b.*?</\1>", _blank, source, flags=re.S)
    source = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", lambda m: CODE + "\n" * m.group().count("\n"), source, flags=re.S)
    source = re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\](\([^)]*\)|\[[^\]]*\])", r"\1", source)
    source = re.sub(r"</?[a-zA-Z][^<>]*>|https?://\S+", CODE, source)
    for line, paragraph in _paragraphs(source, lambda line: bool(_ITEM.match(line)) or line.lstrip()[:1] in "|#>!:="):
        if paragraph.lstrip().startswith("|"):
            yield from (_Text(line, cell) for cell in re.split(r"(?<!\\)\|", paragraph))
        elif not paragraph.lstrip().startswith(":::"):
            yield _Text(line, re.sub(r"^[\s>#]*|^\s*(!!!|\?\?\?\+?)\s+\w+", "", _ITEM.sub("", paragraph, count=1)))


def _blank(match: re.Match) -> str:
    """Nothing, of as many lines, which ends a paragraph."""
    return "\n" * max(2, match.group().count("\n")) if "\n" in match.group() else " "


def _paragraphs(source: str, begins) -> Iterator[tuple[int, str]]:
    """(number of its first line, its text)."""
    first, lines = 0, []
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        if lines and (not line.strip() or begins(line) or lines[-1].lstrip().startswith("#")):
            yield first, "\n".join(lines)
            lines = []
        if line.strip():
            first = first if lines else number
            lines.append(line)


# --- modules ---


def module(source: str) -> Iterator[_Text]:
    """Its docstrings, and its other strings: messages, help texts, what is printed."""
    tree, documented = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                documented.add(first.value)
                yield from docstring(ast.get_docstring(node), first.lineno)
    yield from _strings(tree, documented)


def docstring(text: str, first: int = 1) -> Iterator[_Text]:
    """Its paragraphs, items and entries, without code."""
    text = re.sub(r"::\n\n(?:(?:    .*)?\n)*(?:    .*)?", lambda m: ":" + "\n" * max(2, m.group().count("\n")), text)
    text = re.sub(r"^ *>>> .*(?:\n *\S.*)*", _blank, text + "\n\n", flags=re.M)
    text = re.sub(r"^( *)```.*?^\1```", _blank, text, flags=re.S | re.M)
    text = re.sub(r"(:[\w:]+:)?(`+)[^`]+\2", lambda m: CODE + "\n" * m.group().count("\n"), text)
    text = _literal(text)
    inside = False

    def begins(line: str) -> bool:
        nonlocal inside
        if _SECTION.match(line):
            inside = True
        elif line.strip() and not line.startswith(" "):
            inside = False
        return bool(_ITEM.match(line) or _SECTION.match(line) or (inside and _ENTRY.match(line)))

    for line, paragraph in _paragraphs(text, begins):
        yield _Text(first + line - 1, re.sub(rf"^(?:{_SECTION.pattern[:-1]})", "", _ITEM.sub("", paragraph, count=1)))


def _literal(text: str) -> str:
    """Without indented blocks behind an empty line, but for those of a section: commands, as a rule."""
    kept, code, section = [], False, False
    for before, line in zip(["", *text.split("\n")], text.split("\n")):
        if line.strip():
            section = bool(_SECTION.match(line)) or (section and line.startswith(" "))
            code = line.startswith("    ") and not section and (code or not before.strip())
        kept.append("" if code else line)
    return "\n".join(kept)


def _strings(tree: ast.AST, documented: set) -> Iterator[_Text]:
    seen = set(documented)
    for node in ast.walk(tree):
        if node in seen or not isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            continue
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Add):
            continue
        text = _constant(node)
        if text is None:
            continue
        seen.update(ast.walk(node))
        if re.search(r"\{ .*; \}|</\w+>", text):  # a style or a page
            continue
        for line, paragraph in _paragraphs(text, lambda line: bool(_ITEM.match(line))):
            yield _Text(node.lineno + line - 1, paragraph)


def _constant(node: ast.AST) -> str | None:
    """The text of a string as far as it is known; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(CODE if isinstance(value, ast.FormattedValue) else value.value for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = _constant(node.left), _constant(node.right)
        return "".join(CODE if side is None else side for side in sides) if any(sides) else None
    return None


if __name__ == "__main__":  # python tests/helpers/prose.py FILE...
    for name in sys.argv[1:]:
        for sentence in sentences(Path(name)):
            if sentence.words > 30:
                print(f"{name}:{sentence.line}: {sentence.words} words: {sentence.text}")
