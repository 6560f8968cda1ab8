"""``cspd demo``: handwritten digits by speculative decoding, beside the target with fewer steps and the draft alone."""

from __future__ import annotations

import json
import os
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from cspd_kernels.errors import InvalidInput

from ..files import check_output, write_file
from ..speculative import SpecDecodeRunner
from ..stats import RunStats
from .pair import load_pair
from .picture import COLUMNS, Strip, digit_strip, map_strip, save_picture, small
from .quality import frechet_distance, real_digits
from .words import NOISY, footnotes, glossary, heading, table_line, table_titles, versions

STEPS = 16
RELAXATION, PREFILL = 42.0, 0.15
BATCH = 512
TIMED_RUNS = 3
STRICT = {"verify": "strict", "criterion": "last_step", "relaxation": 1.0, "residual": "closed_form"}
STRICT_GAMMA = 4


class Drawn(NamedTuple):
    """Images of one way to draw them."""

    images: torch.Tensor  # (n, 1, 8, 8)
    figures: dict
    outcome: torch.Tensor  # (n, L), as in RunStats
    probability: torch.Tensor  # (n, L), as in RunStats


class Way(NamedTuple):
    """One way to draw the digits: a row of the table."""

    name: str
    model: str  # "target" or "draft": which one stands in the target's place
    steps: int
    gamma: int | None = None  # None where the model draws everything alone
    options: dict = {}


def generate(
    draft, target, labels: torch.Tensor, steps: int, gamma: int | None, seed: int, first_image: int = 0, **options
) -> Drawn:
    """Draw one digit per label. With gamma None ``target`` draws everything alone."""
    prefill = PREFILL if gamma else 1.0
    runner = SpecDecodeRunner(draft, target, **{"relaxation": RELAXATION, "prefill": prefill, **options})
    images, stats = [], []
    for first in range(0, len(labels), BATCH):
        part = labels[first : first + BATCH]
        drawn = runner.run(len(part), steps, gamma or 1, labels=part, seed=seed, first_image=first_image + first)
        images.append(drawn.images)
        stats.append(runner.stats)
    outcome, probability = (torch.cat([getattr(s, name) for s in stats]) for name in ("outcome", "probability"))
    return Drawn(torch.cat(images), _figures(stats, alone=gamma is None), outcome, probability)


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
        "drafted": drafted,
    }


def ways(gammas: list[int], strict: bool) -> list[Way]:
    """The rows of the table."""
    rows = [Way(f"target, {n} steps", "target", n) for n in (STEPS, STEPS // 2, STEPS // 4)]
    rows += [Way(f"draft, {STEPS} steps", "draft", STEPS)]
    rows += [Way(f"speculative, gamma {g}", "target", STEPS, g) for g in dict.fromkeys(gammas)]
    if strict:
        noisy = {"criterion": STRICT["criterion"]}
        rows += [
            Way(NOISY, "target", STEPS, None, noisy),
            Way(f"strict, gamma {STRICT_GAMMA}", "target", STEPS, STRICT_GAMMA, STRICT),
        ]
    return rows


def parts(num_images: int) -> list[range]:
    """The images of each run: first a run that warms up, then :data:`TIMED_RUNS` of one size, which are timed."""
    timed = num_images // (TIMED_RUNS + 1)
    stops = [num_images - (TIMED_RUNS - i) * timed for i in range(TIMED_RUNS + 1)]
    return [range(start, stop) for start, stop in zip([0, *stops], stops)]


def run_demo(
    num_images: int,
    gammas: list[int],
    seed: int,
    out: Path,
    json_file: Path | None = None,
    html_file: Path | None = None,
    echo=print,
    *,
    strict: bool = False,
    brief: bool = False,
) -> dict:
    """Draw and measure the digits, print the table, and write the picture. Returns what ``json_file`` holds.

    The ways to draw take turns, so that a busy moment of the machine meets all of them.

    Args:
        num_images: images of each way to draw them, at least 4: the first quarter warms up, the others are timed.
        gammas: one row for each of them.
        html_file: a page with the pictures, the table and what all of it means.
        strict: two more rows, of the target whose last step adds its noise and of strict verification, which draws
            from its distribution.
        brief: a small picture, with fewer columns and the main rows.
    """
    if num_images <= TIMED_RUNS:
        raise InvalidInput(f"expected --num-images >= {TIMED_RUNS + 1} (one to warm up, three timed), got {num_images}")
    if not 0 <= seed < 1 << 64:
        raise InvalidInput(f"expected --seed in [0, 2^64), got {seed}")
    if out.suffix.lower() != ".png":
        raise InvalidInput(f"expected --out with the ending .png, got {out.name}")
    _check_outputs({"--out": out, "--json": json_file, "--html": html_file})
    models = dict(zip(("target", "draft"), load_pair()))
    plan, runs = ways(gammas, strict), parts(num_images)
    setting = {
        "num_images": num_images,
        "timed_images": len(runs[-1]),
        "timed_runs": TIMED_RUNS,
        "steps": STEPS,
        "seed": seed,
        "relaxation": RELAXATION,
        "prefill": PREFILL,
        "threads": torch.get_num_threads(),
        "command": _command(num_images, gammas, seed, strict),
        "versions": versions(),
    }
    echo(heading(setting))
    made = draw(models, plan, runs, seed)
    result = {**setting, "rows": [_row(way, drawn) for way, drawn in zip(plan, made)]}

    echo(table_titles())
    for row in result["rows"]:
        echo(table_line(row))
    echo("")
    for term, meaning in glossary(setting).items():
        echo(textwrap.fill(f"{term}: {meaning}", 110, subsequent_indent="  "))
    for note in footnotes(strict):
        echo(note)
    strips = make_strips(plan, made, result["rows"])
    save_picture(out, small(strips) if brief else strips, setting)
    echo(f"\nwrote {out}")
    if html_file is not None:
        from .page import make_page

        write_file(html_file, make_page(strips, result, strict).encode())
        echo(f"wrote {html_file}")
    if json_file is not None:
        write_file(json_file, (json.dumps(result, indent=2) + "\n").encode())
        echo(f"wrote {json_file}")
    return result


def _check_outputs(files: dict[str, Path | None]) -> None:
    seen: dict[str, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        check_output(path, option)
        other = seen.setdefault(os.path.realpath(path), option)
        if other != option:
            raise InvalidInput(f"expected {option} as another file than {other}, got {path} for both")


def draw(models: dict, plan: list[Way], runs: list[range], seed: int) -> list[Drawn]:
    """All images of every way. The seconds are the median of the timed runs; seconds_min and seconds_max beside it."""
    made: list[list[Drawn]] = [[] for _ in plan]
    with tqdm(total=len(plan) * runs[-1].stop, unit="img", disable=None, leave=False) as bar:
        for images in runs:
            labels = torch.tensor(images) % 10
            for way, so_far in zip(plan, made):
                bar.set_description(way.name, refresh=False)
                kept = _mean(so_far, "acceptance")
                bar.set_postfix_str("" if kept is None else f"accepted {100 * kept:.1f} %")
                target = models[way.model]
                so_far.append(
                    generate(models["draft"], target, labels, way.steps, way.gamma, seed, images.start, **way.options)
                )
                bar.update(len(images))
    return [_together(way, drawn) for way, drawn in zip(plan, made)]


def _mean(drawn: list[Drawn], name: str) -> float | None:
    """Over the drafted tokens."""
    counted = [d.figures for d in drawn if d.figures[name] is not None]
    tokens = sum(figures["drafted"] for figures in counted)
    return sum(figures[name] * figures["drafted"] for figures in counted) / tokens if tokens else None


def _together(way: Way, drawn: list[Drawn]) -> Drawn:
    timed = [d.figures for d in drawn[1:]]
    seconds = [figures["seconds"] for figures in timed]
    calls = {
        name: statistics.median_low(figures[name] for figures in timed) for name in ("target_calls", "draft_calls")
    }
    if way.model == "draft":  # alone, the draft stands in the target's place
        calls = {"target_calls": 0, "draft_calls": calls["target_calls"]}
    figures = {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        **calls,
        "raw_acceptance": _mean(drawn, "raw_acceptance"),
        "acceptance": _mean(drawn, "acceptance"),
    }
    images, outcome, probability = (torch.cat([d[i] for d in drawn]) for i in (0, 2, 3))
    return Drawn(images, {**figures, "frechet_distance": frechet_distance(images)}, outcome, probability)


def _row(way: Way, drawn: Drawn) -> dict:
    return {"name": way.name, "steps": way.steps, "gamma": way.gamma, **drawn.figures}


def make_strips(plan: list[Way], made: list[Drawn], rows: list[dict]) -> list[Strip]:
    """The rows of the picture: real digits, then those of every way, with its acceptance map where it drafts."""
    strips = [digit_strip(None, real_digits()[0][:COLUMNS])]
    for way, drawn, row in zip(plan, made, rows):
        strips.append(digit_strip(row, drawn.images[:COLUMNS]))
        if way.gamma:
            strips.append(map_strip(row, drawn.outcome[:COLUMNS], drawn.probability[:COLUMNS]))
    return strips


def _command(num_images: int, gammas: list[int], seed: int, strict: bool) -> str:
    """What makes the same digits again."""
    gamma = " ".join(map(str, gammas))
    return f"cspd demo --num-images {num_images} --gamma {gamma} --seed {seed}" + (" --strict" if strict else "")
