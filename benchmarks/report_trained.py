"""The tables of docs/quality.md and docs/parallel.md: what ``quality.py`` and ``parallel.py`` measured."""

from __future__ import annotations

from report_tables import load, table

QUALITY = [
    "", "seconds a batch", "target calls", "steps a round", "raw acceptance", "acceptance", "figure (each seed)",
    "plain seconds, equal quality", "ratio", "ratio of target calls",
]  # fmt: skip


def quality(pair: str) -> str:
    return quality_table(load(f"quality-{pair}-cpu.json")["rows"])


def quality_table(rows: list[dict]) -> str:
    """One pair's settings, a line each."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form).replace("%", " %")

    lines = []
    for row in rows:
        spread = f"{row['seconds']:.2f} ({row['seconds_p20']:.2f}–{row['seconds_p80']:.2f})"  # noqa: RUF001
        figures = f"{row['figure']:.3f} ({', '.join(format(f, '.3f') for f in row['figures'])})"
        calls = [show(row["target_calls"], ".1f"), show(row["steps_per_round"], ".2f")]
        accepted = [show(row[name], ".1%") for name in ("raw_acceptance", "acceptance")]
        plain = [show(row["plain_seconds"], ".2f")]
        plain += [show(row[name], ".2f") for name in ("seconds_ratio", "calls_ratio")]
        if row["kind"] == "target":
            plain = ["-"] * 3
        lines.append([row["name"], spread, *calls, *accepted, figures, *plain])
    return table(QUALITY, lines)


def _join(reached: dict) -> str:
    return " / ".join("-" if k is None else str(k) for k in reached.values())


def _sweeps(settled: dict) -> str:
    return f"{settled['sweeps']}" + (f", {settled['open']} do not" if settled["open"] else "")


def reached(rows: list[dict]) -> str:
    """Sweeps until tokens are within some distances of the step-by-step chain's."""
    secant, plain = ({r["case"]: r for r in rows if r["kind"] == kind} for kind in ("secant", "plain"))
    lines = [
        [name, f"{row['size']:.3g}", *map(_join, (row["reached"], row["median reached"], plain[name]["reached"]))]
        for name, row in secant.items()
    ]
    return table(["", "largest value", "secant", "its median token", "plain"], lines)


def settled(rows: list[dict]) -> str:
    """Sweeps of a call, by tolerance, and how far its tokens are from the step-by-step chain's."""
    lines = []
    for row in (row for row in rows if row["kind"] == "secant"):
        cells = [text for s in row["settled"] for text in (_sweeps(s), f"{s['largest']:.0e}")]
        lines.append([row["case"], *cells, *(f"{row['float64'][way]:.0e}" for way in ("sequential", "parallel"))])
    head = [text for bound in ("1e-3", "1e-6") for text in (f"tolerance {bound}: sweeps", "distance")]
    return table(["", *head, "float64: steps", "sweeps"], lines)


def rounded(rows: list[dict]) -> str:
    """The same with bfloat16 operands."""
    keys, lines = ("apart", "sequential, float64", "parallel, float64"), []
    for row in (row for row in rows if "apart" in row):
        cells = ["{:.0e} ({:.0e})".format(*row[key]) for key in keys]
        lines.append([row["case"], f"{_sweeps(row)} ({row['median sweeps']})", *cells])
    return table(
        ["", "sweeps (median)", "from the steps' tokens", "steps, from float64", "sweeps, from float64"], lines
    )


def sweeps_of_heads(part) -> str:
    return part(load("parallel-cpu.json")["rows"])
