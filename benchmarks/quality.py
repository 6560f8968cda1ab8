"""Quality against cost: ``python benchmarks/quality.py [--pair cloth] [--images 2048] [--json FILE] [--docs DIR]``.

Speculative decoding at every relaxation, gamma and way to redraw, beside the target alone with fewer steps, which
is its honest alternative, and beside the draft alone. On the digits pair of the package, or on the cloth pair of
``benchmarks/pairs``. ``--docs`` draws quality.png (quality-cloth.png) and writes the pair's table of quality.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import cspd
from cspd.demo import cloth
from cspd.demo.pair import load_pair
from cspd.demo.quality import frechet_distance
from cspd.demo.run import BATCH, STEPS, generate

from report import write_results

RELAXATIONS, GAMMAS, RESIDUALS = (1, 3, 10, 42), (2, 4, 8, 16), ("rejection", "closed_form")
SIMILARITY = cspd.SimilarityRelaxation(least=1.0, most=42.0)
POLICIES = (
    ("relaxation by similarity, gamma 8", 8, {"inner_temperature": SIMILARITY}),
    ("relaxation 10, adaptive gamma", cspd.AdaptiveDraft(bound=0.8, most=16), {"inner_temperature": 10.0}),
    ("relaxation 42, adaptive gamma", cspd.AdaptiveDraft(bound=0.97, most=16), {"inner_temperature": 42.0}),
)
START, END = "<!-- TABLE -->\n", "<!-- /TABLE -->"


@dataclass(frozen=True)
class Pair:
    """What is measured, and by what."""

    title: str
    load: Callable[[], tuple]  # (target, draft)
    distance: Callable[[torch.Tensor], float]
    real: str  # what the distance is to
    steps: tuple[int, ...]  # of the target alone, most first; speculation has the most
    classes: int
    residuals: tuple[str, ...] = RESIDUALS
    docs: str = ""  # put into the names of its picture and its table's marks

    @property
    def marks(self) -> tuple[str, str]:
        return START.replace("TABLE", f"TABLE{self.docs}"), END.replace("TABLE", f"TABLE{self.docs}")


PAIRS = {
    "digits": Pair("Digits pair", load_pair, frechet_distance, "the real digits", (STEPS, 8, 4, 2), 10),
    "cloth": Pair(
        "Cloth pair", lambda: cloth.load_pair(Path(__file__).parent / "pairs"), cloth.frechet_distance, "the formula",
        (cloth.SIDE**2, 18, 9, 4), 1, RESIDUALS[:1], "-cloth",
    ),
}  # fmt: skip
DIGITS = PAIRS["digits"]


def plan(target, draft, relaxations, gammas, residuals, plain=DIGITS.steps) -> list[tuple]:
    """(kind, name, model that is not the target, steps, gamma, options of the runner) of every row."""
    steps = plain[0]
    rows = [("target", f"target, {n} steps", target, n, None, {}) for n in plain]
    rows += [("draft", f"draft, {steps} steps", draft, steps, None, {})]
    rows += [
        (residual, f"relaxation {r}, gamma {g}", draft, steps, g, {"inner_temperature": float(r), "residual": residual})
        for residual in residuals
        for r in relaxations
        for g in gammas
    ]
    return rows + [("policy", name, draft, steps, gamma, options) for name, gamma, options in POLICIES]


def measure(
    images: int, seed: int, relaxations=RELAXATIONS, gammas=GAMMAS, residuals=RESIDUALS, echo=print, pair=DIGITS
) -> list[dict]:
    """One row of figures for each of :func:`plan`; calls are those of one batch."""
    target, draft = pair.load()
    labels = torch.arange(images) % pair.classes
    batches = -(-images // BATCH)
    generate(draft, target, labels[:BATCH], pair.steps[0], 4, seed)  # the first row pays no start-up
    results = []
    echo(_line(dict.fromkeys(COLUMNS), header=True))
    for kind, name, model, steps, gamma, options in plan(target, draft, relaxations, gammas, residuals, pair.steps):
        made, figures, outcome = generate(
            draft, model if gamma is None else target, labels, steps, gamma, seed, **options
        )
        if kind == "draft":
            figures["target_calls"], figures["draft_calls"] = 0, figures["target_calls"]
        row = {"kind": kind, "name": name, "steps": steps}
        row |= {"gamma": gamma if gamma is None or isinstance(gamma, int) else repr(gamma)}
        row |= {"relaxation": options.get("inner_temperature"), **figures}
        row |= {calls: figures[calls] / batches for calls in ("target_calls", "draft_calls")}
        row |= {"frechet_distance": pair.distance(made), "fell_back": float((outcome == 3).float().mean())}
        if callable(row["relaxation"]):
            row["relaxation"] = repr(row["relaxation"])
        results.append(row)
        echo(_line(row))
    return results


COLUMNS = {
    "kind": "", "name": "", "seconds": ".1f", "target_calls": ".1f", "draft_calls": ".1f", "raw_acceptance": ".1%",
    "acceptance": ".1%", "frechet_distance": ".3f",
}  # fmt: skip


def _cells(row: dict) -> list[str]:
    return ["-" if row[c] is None else format(row[c], form) for c, form in COLUMNS.items()]


def _line(row: dict, header: bool = False) -> str:
    cells = [c.replace("_", " ") for c in COLUMNS] if header else _cells(row)
    return "  ".join(cell.ljust(36 if i == 1 else 16) for i, cell in enumerate(cells)).rstrip()


def markdown(rows: list[dict]) -> str:
    """The table of docs/quality.md."""
    lines = ["| redraw | | seconds | target calls | draft calls | raw acceptance | acceptance | Frechet distance |"]
    lines.append("|---" * len(COLUMNS) + "|")
    for row in rows:
        kind, *cells = _cells(row)
        redraw = {"target": "", "draft": "", "policy": "rejection", "closed_form": "closed form"}.get(kind, kind)
        lines.append("| " + " | ".join([redraw, *(c.replace("%", " %") for c in cells)]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path, pair: Pair = DIGITS) -> None:
    """Frechet distance against target calls and against seconds: the target alone, and a line for every relaxation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), dpi=110, sharey=True)
    for axes, cost in zip(panels, ("target_calls", "seconds")):
        for kept, style in _lines(rows, plt.cm.viridis):
            axes.plot([r[cost] for r in kept], [r["frechet_distance"] for r in kept], **style)
        axes.grid(alpha=0.3)
    panels[0].set_xscale("symlog", base=2, linthresh=2)
    ticks = [0, *sorted(pair.steps)]
    panels[0].set_xticks(ticks, [str(n) for n in ticks])
    panels[0].set_xlabel("target calls (the draft's are not counted)")
    panels[1].set_xlabel("seconds, all models")
    panels[0].set_ylabel(f"Frechet distance to {pair.real}")
    # The fewest steps of the target alone are far off; they must not flatten the rest.
    shown = [r["frechet_distance"] for r in rows if r["kind"] != "target" or r["steps"] > pair.steps[-1]]
    panels[0].set_ylim(min(shown) - 0.02, max(shown) + 0.06)
    figure.suptitle(f"{pair.title}: lower and further left is better; gamma grows from right to left along each line")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote {path}")


def _lines(rows: list[dict], colour_map) -> Iterator[tuple[list[dict], dict]]:
    """The rows of every line of the plot, and how it is drawn."""
    alone = [r for r in rows if r["kind"] == "target"]
    yield alone, dict(color="k", marker="o", label="target alone, fewer and fewer steps")
    relaxations = sorted({r["relaxation"] for r in rows if r["kind"] in RESIDUALS})
    for kind, line, marker in (("rejection", "-", "s"), ("closed_form", "--", "^")):
        for i, relaxation in enumerate(relaxations):
            kept = [r for r in rows if (r["kind"], r["relaxation"]) == (kind, relaxation)]
            style = dict(color=colour_map(0.85 * i / max(1, len(relaxations) - 1)), linestyle=line, marker=marker)
            label = f"relaxation {relaxation:g}, {kind.replace('_', ' ')}"
            yield kept, style | dict(markersize=5, linewidth=1, label=label)
    for row, marker in zip((r for r in rows if r["kind"] == "policy"), itertools.cycle("DPX*")):
        yield [row], dict(color="tab:red", marker=marker, markersize=8, linestyle="", label=row["name"])
    draft = [r for r in rows if r["kind"] == "draft"]
    yield draft, dict(color="grey", marker="v", markersize=8, linestyle="", label="draft alone")


def check_docs(folder: Path, pair: Pair = DIGITS) -> None:
    """Raise, before the long measuring, where the results could not be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--docs draws with matplotlib: pip install matplotlib, or the extra `dev`")
    page, (start, end) = folder / "quality.md", pair.marks
    if not page.is_file() or page.read_text().count(start) != 1 or page.read_text().count(end) != 1:
        raise SystemExit(f"expected {page} to exist and to hold the marks {start.strip()} and {end} once each")


def write_docs(folder: Path, rows: list[dict], pair: Pair = DIGITS) -> None:
    """The plot, and the table in its place in quality.md."""
    plot(rows, folder / f"quality{pair.docs}.png", pair)
    page, (start, end) = folder / "quality.md", pair.marks
    before, _, rest = page.read_text().partition(start)
    page.write_text(before + start + markdown(rows) + end + rest.partition(end)[2])
    print(f"wrote {page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=list(PAIRS), default="digits")
    parser.add_argument("--images", type=int, default=2048, help="per row (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two relaxations and gammas: a check, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="where quality.png and the table of quality.md go")
    args = parser.parse_args()
    pair = PAIRS[args.pair]
    if args.images < 2:
        parser.error(f"expected --images >= 2 (a distance needs a covariance), got {args.images}")
    if args.docs:
        check_docs(args.docs, pair)
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"expected a folder for {args.json} to exist, found none")
    threads = torch.get_num_threads()
    print(f"{pair.title}: {args.images} images, seed {args.seed}, {threads} CPU threads, batches of {BATCH}")
    settings = [(1, 42), (2, 4, 8)] if args.quick else [RELAXATIONS, GAMMAS]
    rows = measure(args.images, args.seed, *settings, pair.residuals, pair=pair)
    extra = {"pair": args.pair, "images": args.images, "seed": args.seed, "threads": threads}
    if args.json:
        write_results(args.json, rows, **extra)
        print(f"wrote {args.json}")
    if args.docs:
        write_docs(args.docs, rows, pair)


if __name__ == "__main__":
    main()
