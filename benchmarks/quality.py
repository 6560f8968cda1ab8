"""Quality against cost: ``python benchmarks/quality.py [--pair digits] [--images 2048] [--seeds 0 1] [--json FILE]``.

Every way to speculate on a trained pair, beside the honest alternative, the target alone with fewer steps.
``report.py`` writes the tables of docs/quality.md and draws its charts from the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from cspd import SpecDecodeRunner
from cspd.stats import RunStats

from quality_equal import with_ratios
from quality_pairs import PAIRS, Pair, load
from quality_settings import Setting, settings
from rows import write_results


class Measured:
    """What was made and measured of one setting, batch by batch."""

    def __init__(self, pair: Pair, setting: Setting):
        self.pair, self.setting = pair, setting
        models = {"target": pair.target, "draft": pair.draft, **pair.one_step}
        drafts, alone = models[setting.model], setting.gamma is None
        self.runner = SpecDecodeRunner(
            drafts,
            drafts if alone else pair.target,
            **({"prefill": 1.0} if alone else {}),
            **setting.options,
        )
        self.images: dict[int, list[torch.Tensor]] = {}
        self.stats = []

    def run(self, labels: torch.Tensor, seed: int, first: int) -> None:
        """One batch, kept."""
        made = self.draw(labels, seed, first)
        self.images.setdefault(seed, []).append(made)
        self.stats.append(self.runner.stats)

    def draw(self, labels: torch.Tensor, seed: int, first: int) -> torch.Tensor:
        gamma = 1 if self.setting.gamma is None else self.setting.gamma
        return self.runner.run(
            len(labels), self.setting.steps, gamma, labels=labels, cfg=self.pair.cfg, seed=seed, first_image=first
        )

    def row(self) -> dict:
        """Medians over the batches, and the quality figure of every seed."""
        seconds = [s.seconds["total"] for s in self.stats]
        # A twin's is put in its place.
        figures = [] if self.setting.twin else [self.pair.figure(torch.cat(i)) for i in self.images.values()]
        row = self.setting.describe() | {
            "seconds": float(np.median(seconds)),
            "seconds_p20": float(np.quantile(seconds, 0.2)),
            "seconds_p80": float(np.quantile(seconds, 0.8)),
            "figure": float(np.mean(figures)) if figures else None,
            "figures": figures,
        }
        for name in ("draft_calls", "target_rows"):
            row[name] = float(np.mean([getattr(s, name) for s in self.stats]))
        row["target_calls"] = float(np.mean([_calls(s, self.setting.steps) for s in self.stats]))
        rounds = [s.steps_per_round for s in self.stats if s.steps_per_round is not None]
        row["steps_per_round"] = float(np.mean(rounds)) if rounds else None
        if self.setting.model != "target" and self.setting.gamma is None:  # alone, a draft stands in the target's place
            row["target_calls"], row["draft_calls"], row["target_rows"] = 0.0, row["target_calls"], 0.0
        drafted = sum(s.drafted for s in self.stats)
        for name in ("acceptance", "raw_acceptance", "fallback"):
            known = [(getattr(s, name), s.drafted) for s in self.stats if s.drafted]
            row[name] = sum(value * n for value, n in known) / drafted if drafted else None
        return row


def _calls(stats: RunStats, steps: int) -> float:
    """Target passes of an image: of a strict run's the mean, as its images end at different rounds."""
    if stats.verify != "strict" or not stats.rounds:
        return stats.target_calls
    prefilled = stats.target_calls - stats.rounds
    return prefilled + (steps - prefilled) / stats.steps_per_round


def with_twins(rows: list[dict], chosen: list[Setting]) -> list[dict]:
    """The rows, those of the same tokens with the figures of their twins."""
    named = {row["name"]: row for row in rows}
    for row, setting in zip(rows, chosen, strict=True):
        if setting.twin is not None:
            row |= {name: named[setting.twin][name] for name in ("figure", "figures")}
    return rows


def measure(pair: Pair, images: int, seeds: list[int], chosen: list[Setting], echo=print, keep=None) -> list[dict]:
    """A row for every setting. They take turns batch by batch, so that drift of the machine hits all alike.

    Args:
        keep: told of the rows so far after every turn.
    """
    made = [Measured(pair, setting) for setting in chosen]
    labels = pair.labels(images)
    for one in made:
        one.draw(labels[: min(8, images)], seeds[0], 0)  # no row pays for start-up
    rows: list[dict] = []
    for seed in seeds:
        for first in range(0, images, pair.batch):
            for one in made:
                if one.setting.twin is None or (seed, first) == (seeds[0], 0):
                    one.run(labels[first : first + pair.batch], seed, first)
            echo(f"seed {seed}: {min(first + pair.batch, images)} of {images} images")
            done = first + pair.batch >= images
            if done:  # figures are of all images of a seed
                rows = with_ratios(with_twins([one.row() for one in made], chosen))
                if keep is not None:
                    keep(rows)
    return rows


def added(before: list[dict], rows: list[dict]) -> list[dict]:
    """Rows of an earlier run, and of this one those that it had not."""
    names = {row["name"] for row in before}
    return before + [row for row in rows if row["name"] not in names]


COLUMNS = {
    "name": "", "seconds": ".2f", "target_calls": ".1f", "steps_per_round": ".2f", "target_rows": ".0f",
    "raw_acceptance": ".1%", "acceptance": ".1%", "figure": ".3f", "seconds_ratio": ".2f", "calls_ratio": ".2f",
}  # fmt: skip


def line(row: dict) -> str:
    """Of the printed table."""
    cells = ["-" if row[c] is None else format(row[c], form) for c, form in COLUMNS.items()]
    return "  ".join(cell.ljust(50 if i == 0 else 15) for i, cell in enumerate(cells)).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=sorted(PAIRS), default="digits")
    parser.add_argument("--images", type=int, default=2048, help="per setting and seed (default 2048)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--only", metavar="TEXT", help="settings whose name holds this, and the target alone; --json adds them"
    )
    parser.add_argument("--quick", action="store_true", help="a few settings: a check, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.images < 2:
        parser.error(f"expected --images >= 2 (a distance needs a covariance), got {args.images}")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"expected a folder for {args.json} to exist, found none")
    pair = load(args.pair)
    denoising = pair.target.diffloss.gen_diffusion.num_timesteps
    chosen = settings(pair.steps, pair.fewer, tuple(pair.one_step), denoising)
    if args.quick:
        chosen = [setting for setting in chosen if setting.quick]
    if args.only:
        chosen = [setting for setting in chosen if args.only in setting.name or setting.kind == "target"]
    names = {setting.name for setting in chosen}
    chosen = [setting for setting in chosen if setting.twin is None or setting.twin in names]
    torch.set_num_threads(1)  # tensors are small; two runs beside each other do not slow each other
    print(f"{pair.name}: {args.images} images a seed, seeds {args.seeds}, one CPU thread, batches of {pair.batch}")
    extra = {"pair": pair.name, "images": args.images, "seeds": args.seeds, "threads": 1, "batch": pair.batch}
    extra |= {"figure": pair.figure_name, "plain_steps": [pair.steps, *pair.fewer]}

    before = json.loads(args.json.read_text())["rows"] if args.only and args.json and args.json.is_file() else []

    def keep(rows: list[dict]) -> None:
        if args.json:
            write_results(args.json, added(before, rows), **extra)

    rows = measure(pair, args.images, args.seeds, chosen, keep=keep)
    print("  ".join(name.replace("_", " ").ljust(50 if i == 0 else 15) for i, name in enumerate(COLUMNS)))
    for row in rows:
        print(line(row))
    if args.json:
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
