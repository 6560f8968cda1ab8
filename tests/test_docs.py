"""The pages hold together. Every page is in the site, and every link leads somewhere. Every public name is in the
reference. Every message that the troubleshooting page quotes is one that the code has.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import cspd
import cspd_kernels
from cspd import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = ROOT / "mkdocs.yml"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES]  # those beside the site, too
REFERENCE = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))


def prose(text: str) -> str:
    """Without code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S))


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead. A picture may be the text of a link."""
    found = re.findall(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)[^)]*\)", prose(text))
    found += re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", prose(text))
    return found + re.findall(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"", text)


def anchors(text: str) -> set[str]:
    """Of a page's headings, as a code host and the site name them; those of the reference are the names."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S), flags=re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading)))
    return found | set(re.findall(r"^::: (\S+)", text, flags=re.M)) | set(re.findall(r"\bid=\"([^\"]+)\"", text))


def in_the_site() -> list[str]:
    """The pages of the site's navigation."""
    nav = SITE.read_text().split("\nnav:\n")[1]
    return re.findall(r"^ *- (?:[^:\n]+: )?(\S+\.md)$", nav, flags=re.M)


def test_every_page_is_in_the_site_once():
    assert sorted(in_the_site()) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_the_site_loads_nothing_from_elsewhere():
    settings = SITE.read_text()
    assert re.search(r"^ *font: false\b", settings, flags=re.M)
    assert not re.search(r"^ *(repo_url|extra_javascript|analytics)\b", settings, flags=re.M)
    assert not re.search(r"https?://", settings.replace("https://squidfunk", ""))


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in links(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert target.suffix == ".md", f"{link}: an anchor of no page"
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_lists_are_lists_on_the_site_too(page):
    """Its Markdown wants a blank line before a list, and four spaces before an item within an item."""
    before = ""
    for line in re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.M | re.S).splitlines():
        item = re.match(r"( *)(?:[-*]|\d+\.) \S", line)
        assert not item or len(item[1]) % 4 == 0, f"an item of {len(item[1])} spaces: {line}"
        follows = not before.strip() or re.match(r" *(?:[-*]|\d+\.) |  |<!--", before)
        assert not item or follows, f"no blank line before the list: {line}"
        before = line


def test_links_are_found():
    text = '[a](b.md#c) ![d](e.png) [![f](g.svg)](h.md) `[no](no.md)` <img src="i.png">\n```\n[no](no.md)\n```\n'
    assert set(links(text)) == {"b.md#c", "e.png", "g.svg", "h.md", "i.png"}
    assert anchors("# A `b`, c\n## [D](e.md) f\n::: g.h\n") == {"a-b-c", "d-f", "g.h"}


@pytest.mark.parametrize("package", [cspd, cspd_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    documented = set(re.findall(r"^::: (\S+)$", REFERENCE, flags=re.M))
    errors = {name for name in package.__all__ if f"cspd.{name}" in documented and package is cspd_kernels}
    wanted = {f"{package.__name__}.{name}" for name in package.__all__ if name not in errors}
    assert wanted <= documented, wanted - documented


def test_what_the_reference_names_is_there():
    for name in re.findall(r"^::: (\S+)$", REFERENCE, flags=re.M):
        first, *rest = name.split(".")
        value = {"cspd": cspd, "cspd_kernels": cspd_kernels}[first]
        for part in rest:
            value = getattr(value, part)
        assert value.__doc__, f"{name} has no docstring"


def messages() -> str:
    """Every string of the code, with dots where something is put in."""
    found = []
    for path in [*(ROOT / "python").rglob("*.py"), *(ROOT / "cspd_kernels").rglob("*.py"), ROOT / "csrc" / "compile.py",
                 ROOT / "setup.py"]:  # fmt: skip
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_are_the_codes():
    rows = re.findall(r"^\| (.+?) \| ", (DOCS / "troubleshooting.md").read_text(), flags=re.M)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row) if " " in quote]
    assert len(quoted) > 25
    known = messages()
    foreign = ("torch._dynamo hit config.cache_size_limit", "cspd info")  # PyTorch's own; a command
    for quote in quoted:
        parts = [part.strip(" :") for part in quote.split("...")]
        missing = [part for part in parts if part and part not in known]
        assert not missing or quote in foreign, f"{quote!r}: no message has {missing}"


def blocks(text: str, language: str) -> list[str]:
    """A page's blocks of code in a language, "" for those that name none."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, flags=re.M | re.S)
    return [textwrap.dedent(code) for _, name, code in found if name == language]


def refused(code: str) -> list[str]:
    """Calls of this package's functions in a block whose keywords these do not have."""
    methods = {"run": cspd.SpecDecodeRunner.run, "sample_tokens": cspd.models.MAR.sample_tokens}
    found = []
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        function = methods.get(name.rpartition(".")[2])
        if re.fullmatch(r"(cspd|cspd_kernels)(\.\w+)+", name):
            function = getattr({"cspd": cspd, "cspd_kernels": cspd_kernels}[name.split(".")[0]], name.split(".")[1])
            function = functools.reduce(getattr, name.split(".")[2:], function)
        if function is not None:
            try:
                given = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
                inspect.signature(function).bind_partial(**given)
            except TypeError as error:
                found.append(f"{name}: {error}")
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_calls_have_arguments_that_there_are(page):
    for code in blocks(page.read_text(), "python"):
        assert not refused(code)


def test_a_call_with_another_keyword_is_found():
    assert refused("cspd.patch(model, whole=True)\nrunner.run(2, gamma=4)") == []
    assert len(refused("cspd.patch(model, hole=True)\nrunner.run(2, gama=4)")) == 2


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_options_that_there_are(page, capsys):
    text = "\n".join(blocks(page.read_text(), "")).replace("\\\n", " ")
    for line in re.findall(r"^(?:.*(?:&& |-m ))?cspd ([a-z]+(?: .*)?)$", text, flags=re.M):
        command = shlex.split(line, comments=True)
        try:
            cli._parser().parse_args(command)
        except SystemExit:
            pytest.fail(f"cspd {line}: {capsys.readouterr().err}")
