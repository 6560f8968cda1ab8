"""Links of the pages that leave ``docs/`` (to README.md, to a source file): right on a code host, not on the site.

With ``extra: source`` in mkdocs.yml, the address of the tree, they lead there; without, the text stays and the link
goes. (``repo_url`` would make every page ask the code host for its stars.)
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s#]+)(#[^)\s]+)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    folder = PurePosixPath(config.docs_dir).name / PurePosixPath(page.file.src_uri).parent

    def elsewhere(match: re.Match) -> str:
        text, path, anchor = match.group(1), match.group(2), match.group(3) or ""
        parts: list[str] = []
        for part in (folder / path).parts:  # resolved by hand: the file need not be there
            if part == "..":
                parts.pop()
            elif part != ".":
                parts.append(part)
        if parts[0] == folder.parts[0]:  # another page, by way of the parent folder
            return match.group(0)
        if "source" in config.extra:
            return f"[{text}]({config.extra['source'].rstrip('/')}/{'/'.join(parts)}{anchor})"
        return text

    return LINK.sub(elsewhere, markdown)
