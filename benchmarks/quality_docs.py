"""The tables of docs/quality.md and its plot, from the result files of ``benchmarks/quality.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

START, END = "<!-- TABLE {} -->\n", "<!-- /TABLE -->"
HEADER = (
    "| | seconds a batch | target calls | steps a round | raw acceptance | acceptance | figure (each seed) "
    "| plain seconds, equal quality | ratio | ratio of target calls |"
)
COLOURS = {
    "target": "#555555", "target with noise": "#e377c2", "draft": "#999999", "window": "#1f77b4", "strict": "#d62728",
    "one step": "#2ca02c", "sampler": "#9467bd",
}  # fmt: skip


def markdown(result: dict) -> str:
    """One pair's table."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form).replace("%", " %")

    lines = [HEADER, "|---" * HEADER.count(" |") + "|"]
    for row in result["rows"]:
        spread = f"{row['seconds']:.2f} ({row['seconds_p20']:.2f}–{row['seconds_p80']:.2f})"  # noqa: RUF001
        figures = f"{row['figure']:.3f} ({', '.join(format(f, '.3f') for f in row['figures'])})"
        calls = [show(row["target_calls"], ".1f"), show(row["steps_per_round"], ".2f")]
        accepted = [show(row[name], ".1%") for name in ("raw_acceptance", "acceptance")]
        plain = [show(row["plain_seconds"], ".2f")]
        plain += [show(row[name], ".2f") for name in ("seconds_ratio", "calls_ratio")]
        if row["kind"] == "target":
            plain = ["-"] * 3
        lines.append("| " + " | ".join([row["name"], spread, *calls, *accepted, figures, *plain]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict], path: Path) -> None:
    """Figure against target calls and against seconds, a row of panels for every pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(results), 2, figsize=(11, 4.4 * len(results)), dpi=110, squeeze=False)
    for line, result in zip(panels, results):
        for axes, (cost, label) in zip(line, (("target_calls", "target calls"), ("seconds", "seconds a batch"))):
            _panel(axes, result["rows"], cost)
            axes.set_xlabel(label)
        line[0].set_ylabel(result["figure"])
        line[0].set_title(f"{result['pair']}: the draft's calls are not counted", fontsize=9)
        line[1].set_title(f"{result['pair']}: all models, one CPU thread", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False)
    figure.suptitle("Lower and further left is better; below the dark line speculation beats fewer steps")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    plt.close(figure)
    print(f"wrote {path}")


def _panel(axes, rows: list[dict], cost: str) -> None:
    alone = [row for row in rows if row["kind"] == "target"]
    for kind, colour in COLOURS.items():
        kept = [row for row in rows if row["kind"] == kind]
        style = {"marker": "o", "linestyle": "-" if kind == "target" else "", "color": colour, "markersize": 5}
        name = {
            "target": "target, fewer steps",
            "target with noise": "noise in the last step",
            "draft": "draft alone",
        }.get(kind, kind)
        axes.plot([r[cost] for r in kept], [r["figure"] for r in kept], label=name, **style)
        for row in kept:
            if isinstance(row["gamma"], int):
                axes.annotate(row["gamma"], (row[cost], row["figure"]), fontsize=6, xytext=(3, 2),
                              textcoords="offset points")  # fmt: skip
    # The worst plain points are far off; they must not flatten the rest.
    shown = sorted(row["figure"] for row in rows)
    axes.set_ylim(0.9 * shown[0], 1.15 * max(alone[-2]["figure"], shown[int(0.8 * len(shown))]))
    axes.grid(alpha=0.3)


def check_docs(folder: Path, files: list[Path]) -> None:
    """Raise, before anything is written, where the page could not be."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--docs draws with matplotlib: pip install matplotlib, or the extra `dev`")
    if not files:
        raise SystemExit("expected --docs DIR FILE ...: the results that the page is to show")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise SystemExit(f"expected result files, found no {', '.join(missing)}: measure with --json first")
    page = folder / "quality.md"
    text = page.read_text() if page.is_file() else ""
    if text.count(START.partition("{}")[0]) != len(files) or text.count(END) != len(files):
        raise SystemExit(
            f"expected {page} to exist and to hold a mark {START.format('PAIR').strip()} and {END} for every file"
        )


def write_docs(folder: Path, results: list[dict]) -> None:
    """The plot, and every table in its place in quality.md."""
    page = folder / "quality.md"
    text = page.read_text()
    for result in results:
        start = START.format(result["pair"])
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"expected {page} to hold the mark {start.strip()}, found none")
        text = before + start + markdown(result) + END + rest.partition(END)[2]
    page.write_text(text)
    print(f"wrote {page}")
    plot(results, folder / "quality.png")
