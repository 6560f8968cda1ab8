"""``cspd demo``: continuous speculative decoding of handwritten digits beside its honest alternatives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..files import check_output, write_file
from ..speculative import SpecDecodeRunner
from ..stats import RunStats
from .pair import load_pair
from .picture import save_picture
from .quality import frechet_distance

STEPS = 16
BATCH = 512
STRICT = {"verify": "strict", "criterion": "last_step", "relaxation": 1.0, "residual": "closed_form"}
STRICT_GAMMA = 4


def generate(draft, target, labels: torch.Tensor, steps: int, gamma: int | None, seed: int, **options):
    """(images (n, 1, 8, 8), figures of the run); gamma None draws everything with ``target`` alone."""
    prefill = {} if gamma else {"prefill": 1.0}
    runner = SpecDecodeRunner(draft, target, **prefill, **options)
    images, stats = [], []
    for first in range(0, len(labels), BATCH):
        part = labels[first : first + BATCH]
        images.append(runner.run(len(part), steps, gamma or 1, labels=part, seed=seed, first_image=first))
        stats.append(runner.stats)
    return torch.cat(images), _figures(stats, alone=gamma is None), torch.cat([s.outcome for s in stats])


def _figures(stats: list[RunStats], alone: bool) -> dict:
    drafted = sum(s.drafted for s in stats)

    def mean(name: str) -> float | None:
        return None if alone or not drafted else sum(getattr(s, name) * s.drafted for s in stats if s.drafted) / drafted

    return {
        "seconds": sum(s.seconds["total"] for s in stats),
        "target_calls": sum(s.target_calls for s in stats),
        "draft_calls": sum(s.draft_calls for s in stats),
        "raw_acceptance": mean("raw_acceptance"),
        "acceptance": mean("acceptance"),
    }


def run_demo(
    num_images: int,
    gammas: list[int],
    seed: int,
    out: Path,
    json_file: Path | None,
    echo=print,
    *,
    strict: bool = False,
) -> dict:
    """Generate, measure, print the table, and write the picture (and the figures as JSON).

    ``strict``: with two rows more, of the target whose last step adds its noise and of strict verification, which
    draws from its distribution.
    """
    if num_images < 2:
        raise ValueError(f"expected --num-images >= 2 (a distance needs a covariance), got {num_images}")
    if out.suffix.lower() != ".png":
        raise ValueError(f"expected --out with the ending .png, got {out.name}")
    check_output(out, "--out")
    if json_file is not None:
        check_output(json_file, "--json")
        if os.path.realpath(out) == os.path.realpath(json_file):
            raise ValueError(f"expected --json as another file than --out, got {json_file} for both")
    target, draft = load_pair()
    labels = torch.arange(num_images) % 10
    plan = [(f"target, {n} steps", target, n, None, {}) for n in (STEPS, STEPS // 2, STEPS // 4)]
    plan += [(f"draft, {STEPS} steps", draft, STEPS, None, {})]
    plan += [(f"speculative, gamma {g}", target, STEPS, g, {}) for g in gammas]
    if strict:
        plan += [
            (f"target, {STEPS} steps, noise", target, STEPS, None, {"criterion": STRICT["criterion"]}),
            (f"strict, gamma {STRICT_GAMMA}", target, STEPS, STRICT_GAMMA, STRICT),
        ]
    generate(draft, target, labels[:1], STEPS, gammas[0], seed)  # warm up, so that the first row pays no start-up

    echo(f"{num_images} handwritten digits, seed {seed}, {torch.get_num_threads()} CPU threads")
    echo(
        f"{'':22s}{'seconds':>9s}{'target calls':>14s}{'draft calls':>13s}{'raw acc.':>10s}{'acc.':>8s}{'Frechet':>9s}"
    )
    rows, pictures = [], []
    for name, model, steps, gamma, options in plan:
        images, figures, outcome = generate(draft, model, labels, steps, gamma, seed, **options)
        if model is draft:  # alone, the draft stands in the target's place
            figures["target_calls"], figures["draft_calls"] = 0, figures["target_calls"]
        figures["frechet_distance"] = frechet_distance(images)
        rows.append({"name": name, "steps": steps, "gamma": gamma, **figures})
        pictures.append((name, images, outcome if gamma else None))
        echo(_line(rows[-1]))
    echo(
        "raw acc.: mean acceptance probability at relaxation 1; acc.: fraction kept at relaxation 42, as run.\n"
        "Frechet distance to all real digits in the 64 pixel dimensions; it is biased upwards for few images."
    )
    if strict:
        echo(
            "strict: every step is judged given the tokens before it, at relaxation 1; the last denoising step adds\n"
            "its noise. Up to rounding the tokens have exactly the distribution of the row above. The other\n"
            "speculative rows are approximate."
        )
    shown = [pictures[0], *(picture for picture in pictures if picture[2] is not None)]
    save_picture(out, shown, labels)
    echo(f"wrote {out}")
    result = {"num_images": num_images, "steps": STEPS, "seed": seed, "threads": torch.get_num_threads(), "rows": rows}
    if json_file is not None:
        write_file(json_file, (json.dumps(result, indent=2) + "\n").encode())
        echo(f"wrote {json_file}")
    return result


def _line(row: dict) -> str:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}%"

    return (
        f"{row['name']:22s}{row['seconds']:9.2f}{row['target_calls']:14d}{row['draft_calls']:13d}"
        f"{percent(row['raw_acceptance']):>10s}{percent(row['acceptance']):>8s}{row['frechet_distance']:9.3f}"
    )
