"""A small writer of SVG charts: lines, points and bars, legible on light and dark screens.

It knows nothing of what is drawn. Equal input gives equal bytes, whatever else is installed. The background is part of
the chart: a page may be light where the reader's system is dark, and the media query follows the system.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
# (light, dark) of each series: Okabe and Ito's colours, which colour-blind readers can tell apart, darker or lighter
# where the background asks for it. Shapes of points and dashes repeat what the colour says.
COLOURS = [
    ("#0072b2", "#56b4e9"),
    ("#c44e00", "#f0883e"),
    ("#00795a", "#35c9a0"),
    ("#a2478a", "#e6a0cf"),
    ("#8a6100", "#e3c341"),
    ("#6e7781", "#9aa4ae"),
    ("#1f2328", "#e6edf3"),
]
PLAIN = {  # (light, dark)
    "bg": ("fill:#ffffff;stroke:#d0d7de", "fill:#0d1117;stroke:#30363d"),
    "text": ("fill:#1f2328", "fill:#e6edf3"),
    ".dim": ("fill:#57606a", "fill:#9aa4ae"),
    ".grid": ("stroke:#e3e7eb", "stroke:#262c33"),
    ".axis": ("stroke:#8c959f", "stroke:#6e7681"),
    ".on": ("fill:#ffffff", "fill:#0d1117"),
}
NARROW, WIDE = set("iljtfr.,:;'|!()[] *-"), set("mwMW%@")
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus", "circle")


def text_width(text: str, size: float) -> float:
    """Pixels, on the large side: the reader's font is not known."""
    return size * sum(0.38 if c in NARROW else 0.95 if c in WIDE else 0.72 if c.isupper() else 0.63 for c in text)


def number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Axis:
    """Values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False, ticks: Sequence = ()):
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log
        self.ticks = list(ticks) or (self._decades() if log else self._round())

    def __call__(self, value: float) -> float:
        low, high, at = (map(math.log10, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def _decades(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        within = (1, 2, 5) if self.high / self.low < 300 else (1,)
        ticks = [times * 10.0**power for power in decades for times in within]
        return [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]

    def _round(self) -> list[float]:
        rough = (self.high - self.low) / 5
        step = 10.0 ** math.floor(math.log10(rough))
        step *= next(times for times in (1, 2, 5, 10) if times * step >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def label(self, tick: float) -> str:
        if self.log and self.ticks[0] < 1e-2:
            return "10" + str(round(math.log10(tick))).translate(RAISED)
        return f"{tick:,.6g}"


class Canvas:
    """What is drawn, in its order, and where its texts stand."""

    def __init__(self, width: float, height: float, title: str, description: str):
        self.width, self.height, self.title, self.description = width, height, title, description
        self.parts: list[str] = []
        self.taken: list[tuple[float, float, float, float]] = []  # boxes that no label may cover
        self.text(16, 26, title, size=15, bold=True)

    def svg(self) -> str:
        plain = {scheme: "".join(f"{k}{{{v[scheme]}}}" for k, v in PLAIN.items()) for scheme in (0, 1)}
        series = {
            scheme: "".join(f".c{n}{{fill:{c[scheme]};stroke:{c[scheme]}}}" for n, c in enumerate(COLOURS))
            for scheme in (0, 1)
        }
        light, dark = ((plain[scheme] + series[scheme]).replace("bg{", ".bg{") for scheme in (0, 1))
        last = ".line{fill:none;stroke-width:2}.thin{stroke-width:1}.dash{stroke-dasharray:5 4}.open{fill-opacity:0}"
        width, height = number(self.width), number(self.height)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="t d">\n'
            f'<title id="t">{escape(self.title)}</title>\n<desc id="d">{escape(self.description)}</desc>\n'
            f"<style>text{{font-family:{FONT};font-size:12px}}{light}{last}\n"
            f"@media (prefers-color-scheme: dark){{{dark}{last}}}</style>\n"
            f'<rect class="bg" x=".5" y=".5" width="{number(self.width - 1)}" height="{number(self.height - 1)}" '
            f'rx="6"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )

    def text(self, x: float, y: float, text: str, *, size=12, anchor="start", style="", bold=False) -> None:
        width = text_width(text, size) * (1.12 if bold else 1)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        self.taken.append((left, y - 0.8 * size, left + width, y + 0.25 * size))
        extra = f' font-size="{size}" style="font-size:{size}px"' if size != 12 else ""
        extra += f' text-anchor="{anchor}"' if anchor != "start" else ""
        extra += f' class="{style}"' if style else ""
        extra += ' font-weight="bold"' if bold else ""
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}"{extra}>{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        at = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.parts.append(f'<polyline class="{style}" points="{at}"/>')

    def keep_clear(self, points: Sequence[tuple[float, float]]) -> None:
        """No label stands on this line."""
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / 4))
            for n in range(count + 1):
                x, y = x0 + (x1 - x0) * n / count, y0 + (y1 - y0) * n / count
                self.taken.append((x - 2, y - 2, x + 2, y + 2))

    def box(self, x: float, y: float, width: float, height: float, style: str) -> None:
        at = zip(("x", "y", "width", "height"), map(number, (x, y, width, height)))
        self.parts.append(f'<rect class="{style}" ' + " ".join(f'{k}="{v}"' for k, v in at) + "/>")

    def point(self, x: float, y: float, slot: int) -> None:
        """The shape of a series, 8 pixels wide."""
        self.taken.append((x - 5, y - 5, x + 5, y + 5))
        shape, style = SHAPES[slot], f"c{slot}"
        if shape == "circle":
            self.parts.append(f'<circle class="{style}" cx="{number(x)}" cy="{number(y)}" r="4"/>')
            return
        paths = {
            "square": "h7v7h-7z",
            "triangle": "l4.5 8h-9z",
            "diamond": "l4.8 4.8l-4.8 4.8l-4.8 -4.8z",
            "cross": "l8 8m0 -8l-8 8",
            "plus": "v9m-4.5 -4.5h9",
        }
        starts = {
            "square": (-3.5, -3.5),
            "triangle": (0, -4.5),
            "diamond": (0, -4.8),
            "cross": (-4, -4),
            "plus": (0, -4.5),
        }
        style += " line" if shape in ("cross", "plus") else ""
        at = (number(value + by) for value, by in zip((x, y), starts.get(shape, (0, -4.5))))
        self.parts.append(f'<path class="{style}" d="M{" ".join(at)}{paths[shape]}"/>')

    def label(self, x: float, y: float, text: str, frame: tuple[float, float, float, float], size=11) -> None:
        """A text near a point: at the first place, by distance, where it covers nothing."""
        width, height = text_width(text, size), size
        for far in (8, 14, 22, 32, 44, 58):
            places = [(far, 0.35 * height, "start"), (0, -far, "middle"), (0, far + 0.7 * height, "middle")]
            places += [(0.7 * far, -0.7 * far, "start"), (0.7 * far, 0.7 * far + 0.7 * height, "start")]
            places += [(-0.7 * far, -0.7 * far, "end"), (-0.7 * far, 0.7 * far + 0.7 * height, "end")]
            for dx, dy, anchor in [*places, (-far, 0.35 * height, "end")]:
                left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
                box = (left - 1, y + dy - 0.8 * height, left + width + 1, y + dy + 0.25 * height)
                inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
                tip = x + 0.8 * dx, y + 0.8 * (dy - 0.35 * height)
                way = [(x + n / 8 * (tip[0] - x), y + n / 8 * (tip[1] - y)) for n in range(9)] if far > 14 else []
                clear = [(a - 1, b - 1, a + 1, b + 1) for a, b in way if math.hypot(a - x, b - y) > 8]
                if inside and not any(overlap(one, other) for one in (box, *clear) for other in self.taken):
                    if way:
                        self.line([(x, y), tip], "axis thin")
                    return self.text(x + dx, y + dy, text, size=size, anchor=anchor)
        raise ValueError(f"found no room for the label {text!r}")

    def legend(self, x: float, y: float, entries: Sequence[tuple[int, str, str]], right: float) -> float:
        """(slot, name, "point", "line", "dash" or "box") in rows; returns the y of the next row."""
        at = x
        for slot, name, kind in entries:
            width = 24 + text_width(name, 12) + 18
            if at > x and at + width - 18 > right:
                at, y = x, y + 20
            if kind == "box":
                self.box(at + 3, y - 9, 13, 10, f"c{slot}")
            else:
                if kind != "point":
                    self.line([(at, y - 4), (at + 19, y - 4)], f"c{slot} line" + (" dash" if kind == "dash" else ""))
                if kind != "dash":
                    self.point(at + 9.5, y - 4, slot)
            self.text(at + 25, y, name)
            at += width
        return y + 20


def overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


class Panel:
    """A pair of axes, with grid and labels."""

    def __init__(self, canvas: Canvas, box: tuple, x: Axis, y: Axis, title: str, x_label: str, y_label: str):
        self.canvas, self.x, self.y = canvas, x, y
        self.frame = left, top, right, bottom = box
        canvas.text(left, top - 26, title, size=13, bold=True)
        canvas.text(left, top - 9, y_label, style="dim")
        for tick in y.ticks:
            canvas.line([(left, y(tick)), (right, y(tick))], "grid")
            canvas.text(left - 6, y(tick) + 4, y.label(tick), anchor="end", style="dim", size=11)
        for tick in x.ticks:
            canvas.line([(x(tick), top), (x(tick), bottom)], "grid")
            canvas.text(x(tick), bottom + 15, x.label(tick), anchor="middle", style="dim", size=11)
        canvas.line([(left, top), (left, bottom), (right, bottom)], "axis line thin")
        canvas.text((left + right) / 2, bottom + 32, x_label, anchor="middle", style="dim")

    def at(self, point: tuple[float, float]) -> tuple[float, float]:
        return self.x(point[0]), self.y(point[1])

    def series(self, points: Sequence[tuple[float, float]], slot: int, line=True, points_too=True, dash=False) -> None:
        places = [self.at(point) for point in points]
        if line and len(places) > 1:
            self.canvas.line(places, f"c{slot} line" + (" dash" if dash else ""))
            self.canvas.keep_clear(places)
        for x, y in places if points_too else ():
            self.canvas.point(x, y, slot)

    def label(self, point: tuple[float, float], text: str) -> None:
        self.canvas.label(*self.at(point), text, self.frame)


def panel(canvas: Canvas, box: tuple, x: dict, y: dict, title: str) -> Panel:
    """Axes as ``dict(low=, high=, log=, ticks=, label=)`` within (left, top, right, bottom)."""
    left, top, right, bottom = box
    x, y = dict(x), dict(y)
    labels = x.pop("label"), y.pop("label")
    return Panel(canvas, box, Axis(**x, start=left, end=right), Axis(**y, start=bottom, end=top), title, *labels)


def bars(
    canvas: Canvas, y: float, rows: Sequence[tuple], left: float, right: float, high: float | None = None
) -> float:
    """Horizontal bars from zero: (name, value or None, what is written behind it, slot); returns the y below them."""
    scale = (right - left) / max(value for _, value, _, _ in rows if value is not None)
    top = y
    for name, value, text, slot in rows:
        canvas.text(left - 8, y + 14, name, anchor="end")
        end = left + (scale * value if value is not None else 0)
        if value is not None:
            canvas.box(left, y + 3, max(1.5, end - left), 14, f"c{slot}")
        canvas.text(end + 6, y + 14, text, style="" if value is not None else "dim")
        y += 21
    canvas.line([(left, top), (left, y)], "axis line thin")
    return y


def stacks(canvas: Canvas, y: float, rows: Sequence[tuple], left: float, right: float) -> float:
    """Horizontal bars of equal length in parts: (name, [(value, slot)], what is written behind it)."""
    for name, parts, text in rows:
        canvas.text(left - 8, y + 15, name, anchor="end")
        whole, at = sum(value for value, _ in parts), left
        for value, slot in parts:
            width = (right - left) * value / whole
            canvas.box(at, y + 2, width, 18, f"c{slot}")
            share = f"{100 * value / whole:.0f} %"
            if width > text_width(share, 11) + 6:
                canvas.text(at + width / 2, y + 15, share, anchor="middle", style="on", size=11)
            at += width
        canvas.text(right + 6, y + 15, text)
        y += 25
    return y
