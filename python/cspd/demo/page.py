"""The demo's page: one HTML file with the pictures, the table, and what all of it means. It refers to nothing else."""

from __future__ import annotations

import base64
from html import escape

from PIL import Image

from . import words
from .colours import CARD, SCALE, cell
from .picture import Strip, kinds_of, png, side_by_side

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2330; --quiet: #5a6478; --line: #d9dee8; --soft: #f4f6fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1018; --text: #e8ebf2; --quiet: #9aa4b8; --line: #2b3245; --soft: #171b28; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6em; }
h2 { font-size: 1.35rem; margin: 2.2em 0 .6em; }
h3 { font-size: 1.08rem; margin: 0; }
p { margin: .4em 0 .8em; max-width: 72ch; }
.quiet { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding-bottom: 8px; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--quiet); font-weight: 600; }
tbody th { font-weight: 600; }
td small { color: var(--quiet); }
.way { margin: 0 0 28px; }
figure { margin: 8px 0 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 8px; border: 8px solid CARD; background: CARD; }
figcaption { color: var(--quiet); font-size: .92rem; margin-top: 4px; }
.legend { background: var(--soft); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px; }
.scale { display: flex; align-items: center; gap: 10px; max-width: 520px; }
.scale span { flex: 1; height: 18px; border-radius: 4px; background: linear-gradient(to right, SCALE); }
.legend ul { list-style: none; margin: 14px 0 0; padding: 0; display: grid; gap: 8px; }
.legend li { display: flex; gap: 12px; align-items: center; }
.legend img { border-radius: 4px; flex: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 8px 20px; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; background: var(--soft);
  border: 1px solid var(--line); border-radius: 5px; padding: .1em .4em; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 10px; } }
"""
_SOURCE = (
    "The real digits are from “Optical Recognition of Handwritten Digits” by E. Alpaydin and C. Kaynak (1998), "
    "UCI Machine Learning Repository, doi:10.24432/C50P49, licence CC BY 4.0."
)


def make_page(strips: list[Strip], result: dict, strict: bool) -> str:
    """The page.

    Args:
        strips: the rows of the picture. result: what ``--json`` writes. strict: whether it has the strict rows.
    """
    style = _STYLE.replace("CARD", _css(CARD)).replace("SCALE", ", ".join(map(_css, SCALE)))
    body = [
        "<h1>Handwritten digits by speculative decoding</h1>",
        _paragraph(words.INTRODUCTION),
        *[_paragraph(note, quiet=True) for note in words.footnotes(strict)],
        "<h2>The figures</h2>",
        _table(result),
        "<h2>How to read the acceptance maps</h2>",
        _legend(kinds_of(strips)),
        "<h2>The digits</h2>",
        *map(_strip, strips),
        "<h2>What the words mean</h2>",
        _definitions(words.glossary(result)),
        "<h2>How this page was made</h2>",
        f"<p><code>{escape(result['command'])}</code> draws the same digits again.</p>",
        _definitions({**result["versions"], "CPU threads": str(result["threads"])}),
        _paragraph(_SOURCE, quiet=True),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>cspd demo: handwritten digits</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _paragraph(text: str, quiet: bool = False) -> str:
    kind = ' class="quiet"' if quiet else ""
    return f"<p{kind}>{escape(text)}</p>"


def _definitions(terms: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in terms.items()) + "</dl>"


def _table(result: dict) -> str:
    titles = ("seconds", "target calls", "draft calls", "raw acceptance", "acceptance", "distance")
    head = "".join(f'<th scope="col">{title}</th>' for title in ("way to draw", *titles))
    rows = []
    for row in result["rows"]:
        cells = (
            f"{row['seconds']:.2f} <small>{escape(words.spread(row))}</small>",
            str(row["target_calls"]),
            str(row["draft_calls"]),
            words.percent(row["raw_acceptance"]),
            words.percent(row["acceptance"]),
            f"{row['frechet_distance']:.3f}",
        )
        rows.append(
            f'<tr><th scope="row">{escape(row["name"])}</th>' + "".join(f"<td>{text}</td>" for text in cells) + "</tr>"
        )
    caption = (
        f"Seconds and calls are of runs of {result['timed_images']} images, acceptance and distance of all "
        f"{result['num_images']}. The fastest and the slowest run are in brackets."
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _strip(strip: Strip) -> str:
    image = _img(side_by_side(strip.tiles), _alt(strip))
    if strip.is_map:
        caption = f"Acceptance maps of these digits. {words.kept(strip.row)}"
        return f'<section class="way"><figure>{image}<figcaption>{escape(caption)}</figcaption></figure></section>'
    text = words.REAL if strip.row is None else words.meaning(strip.row)
    figures = "" if strip.row is None else _paragraph(", ".join(strip.notes), quiet=True)
    words_of_it = f"<h3>{escape(strip.title)}</h3>{figures}{_paragraph(text)}"
    return f'<section class="way">{words_of_it}<figure>{image}</figure></section>'


def _alt(strip: Strip) -> str:
    return f"acceptance maps of {strip.row['name']}" if strip.is_map else f"digits 0 to 9: {strip.title}"


def _legend(kinds: list[int]) -> str:
    marks = []
    for kind in kinds:
        name, text = words.MARKS[kind]
        marks.append(f"<li>{_img(cell(kind, 0.5, 24), '')}<span><b>{escape(name)}</b>: {escape(text)}</span></li>")
    return (
        f'<div class="legend"><p>{escape(words.MAP)}</p><div class="scale">0 <span></span> 1</div>'
        f"<ul>{''.join(marks)}</ul></div>"
    )


def _img(image: Image.Image, alt: str) -> str:
    data = base64.b64encode(png(image)).decode()
    return f'<img alt="{escape(alt)}" width="{image.width}" height="{image.height}" src="data:image/png;base64,{data}">'
