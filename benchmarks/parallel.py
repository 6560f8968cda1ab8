"""Sweeps of trained heads: ``python benchmarks/parallel.py [--quick] [--json FILE]``.

A chain in parallel over its steps (docs/parallel.md) beside the same chain step by step, after every sweep. Nothing is
timed, and the sweeps are the definition's, in float32 on the CPU. ``report.py`` writes the tables of docs/parallel.md
and draws its chart from the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cspd.demo.head import digits, held_out, load_head, new_head
from cspd.demo.pair import load_pair
from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.ops.denoise import reference
from cspd_kernels.testing import randomize_

from rows import write_results

DISTANCES = (1e-2, 1e-3, 1e-4, 1e-5)
TOLERANCES = (1e-3, 1e-6)
ROUNDING = 1e-3  # of bfloat16
NEAR = 1e-6  # where nothing more is to be seen


@dataclass
class Case:
    """A chain: its head, and what ``reference.denoise`` takes."""

    name: str
    head: DiffusionHead
    inputs: tuple  # cond, x_T, noise, temperature, cfg_scale
    guess: torch.Tensor | None = None  # (T, N, C)


def cases(images: int) -> Iterator[Case]:
    target, draft = load_pair()
    tokens, labels = digits(target, images)
    cond, module = held_out(target, tokens, labels), load_head(images=1)[0]
    head = DiffusionHead.from_module(module)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(len(cond), head.channels, generator=generator)  # noqa: N806
    noise = torch.randn(head.num_steps, *x_T.shape, generator=generator)
    foreign = torch.cat([cond, cond.roll(1, 0)])  # another digit's in the place of "no class"
    yield Case("100 steps", head, (cond, x_T, noise, 1.0, None))
    yield Case("100 steps, temperature 0", head, (cond, x_T, noise, 0.0, None))
    yield Case("100 steps, temperature 1.5", head, (cond, x_T, noise, 1.5, None))
    yield Case("100 steps, guidance 1.5", head, (foreign, x_T, noise, 1.0, 1.5))
    yield Case("100 steps, guidance 3", head, (foreign, x_T, noise, 1.0, 3.0))
    pair = DiffusionHead.from_module(target.diffloss)
    inputs = (cond, x_T, noise[: pair.num_steps], 1.0, None)
    yield Case("digits pair, 40 steps", pair, inputs)
    similar = denoise(
        DiffusionHead.from_module(draft.diffloss), held_out(draft, tokens, labels), *inputs[1:3], parallel_tol=NEAR
    )
    guess = similar.trajectory.movedim(1, 0)
    yield Case("digits pair, first guess from the draft", pair, inputs, guess)
    yield Case("digits pair, guidance 3", pair, (foreign, *inputs[1:4], 3.0))
    yield Case(
        "another schedule than trained for", DiffusionHead.from_module(_cosine(module)), (cond, x_T, noise, 1.0, None)
    )
    torch.manual_seed(0)
    random = DiffusionHead.from_module(randomize_(new_head(), seed=1).eval())
    yield Case("random weights", random, (cond, x_T, noise, 1.0, None))


def _cosine(module: DiffLoss) -> DiffLoss:
    """The head's weights under the cosine schedule, whose noise levels they were not trained for: tokens diverge."""
    net = module.net
    other = DiffLoss(
        module.in_channels, net.cond_embed.in_features, len(net.res_blocks), net.cond_embed.out_features,
        str(module.gen_diffusion.num_timesteps), schedule="cosine",
    )  # fmt: skip
    other.load_state_dict(module.state_dict())
    return other.eval()


class Settled:
    """The tokens as a call with this tolerance leaves them: each as it was when it settled."""

    def __init__(self, tolerance: float, rows: int):
        self.tolerance, self.mean, self.sweeps = tolerance, None, torch.zeros(rows, dtype=torch.int64)

    def see(self, sweep: reference.Sweep, count: int) -> None:
        open_ = self.sweeps == 0
        self.mean = sweep.mean if self.mean is None else torch.where(open_[:, None], sweep.mean, self.mean)
        self.sweeps[open_ & sweep.settled(self.tolerance, count)] = count

    @property
    def all(self) -> bool:
        return bool((self.sweeps > 0).all())

    def figures(self, exact: torch.Tensor) -> dict:
        largest, median = distance(self.mean, exact)
        row = {"tolerance": self.tolerance, "open": int((self.sweeps == 0).sum()), "sweeps": int(self.sweeps.max())}
        return row | {"median sweeps": int(self.sweeps.median()), "largest": largest, "median": median}


def distance(tokens: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest and median distance of a token's channels, relative to the largest value of all tokens."""
    off = (tokens.double() - exact.double()).abs().amax(1) / exact.double().abs().max()
    return float(off.max()), float(off.median())


def measure(case: Case) -> Iterator[dict]:
    """A row with secants, one without, as after every sweep."""
    exact, wide = (
        reference.denoise(case.head, *case.inputs, dtype=dtype)[0] for dtype in (torch.float32, torch.float64)
    )
    limit = reference.most_sweeps(case.head.num_steps)
    for slopes in (True, False):
        errors, states = [], [Settled(tolerance, len(exact)) for tolerance in TOLERANCES]
        made = reference.sweeps(case.head, *case.inputs, case.guess, slopes=slopes)
        for count, sweep in zip(range(1, limit + 1), made):
            errors.append(distance(sweep.mean, exact))
            for state in states:
                state.see(sweep, count)
            if errors[-1][0] <= NEAR and all(state.all for state in states):
                break
        reached, median_reached = ({f"{d:.0e}": _first(errors, which, d) for d in DISTANCES} for which in (0, 1))
        yield {
            "case": case.name, "kind": "secant" if slopes else "plain", "tokens": len(exact),
            "steps": case.head.num_steps, "size": float(exact.abs().max()), "reached": reached,
            "median reached": median_reached,
            "settled": [state.figures(exact) for state in states],
            "float64": {"sequential": distance(exact, wide)[0], "parallel": distance(states[-1].mean, wide)[0]},
            "largest": [e[0] for e in errors], "median": [e[1] for e in errors],
        }  # fmt: skip


def _first(errors: list[tuple[float, float]], which: int, bound: float) -> int | None:
    return next((sweep for sweep, error in enumerate(errors, start=1) if error[which] <= bound), None)


def measure_rounded(case: Case, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The torch backend with operands of another type: its sweeps beside its steps, and both beside float64."""
    head, (cond, x_T, noise, temperature, scale) = case.head.to(dtype), case.inputs  # noqa: N806
    options = {"temperature": temperature, "cfg_scale": 1.0 if scale is None else scale, "backend": "torch"}
    steps = denoise(head, cond, x_T, noise, **options, parallel_tol=None)
    sweeps = denoise(head, cond, x_T, noise, **options, parallel_tol=ROUNDING)
    wide = reference.denoise(head, *case.inputs, dtype=torch.float64)[0]
    limit = reference.most_sweeps(head.num_steps)
    return {
        "case": case.name, "kind": str(dtype).removeprefix("torch."), "tokens": len(wide), "steps": head.num_steps,
        "tolerance": ROUNDING, "open": int((sweeps.sweeps > limit).sum()),
        "sweeps": int(sweeps.sweeps[sweeps.sweeps <= limit].max()), "median sweeps": int(sweeps.sweeps.median()),
        "apart": distance(sweeps.sample, steps.sample),
        "sequential, float64": distance(steps.sample, wide), "parallel, float64": distance(sweeps.sample, wide),
    }  # fmt: skip


def run(images: int, names: list[str] | None = None) -> list[dict]:
    rows = []
    for case in cases(images):
        if names is None or case.name in names:
            made = [*measure(case), *([measure_rounded(case)] if case.guess is None else [])]
            rows += made
            for row in made:
                print(_line(row), flush=True)
    return rows


def _line(row: dict) -> str:
    if "reached" in row:
        settled = ", ".join(f"{s['tolerance']:.0e}: {_sweeps(s)} ({s['largest']:.0e})" for s in row["settled"])
        text = f"within {', '.join(DISTANCE_NAMES)} after {_join(row['reached'])} sweeps; settled at {settled}"
    else:
        text = f"settled after {_sweeps(row)}, {row['apart'][0]:.0e} from the steps'"
    return f"{row['case']:42s}{row['kind']:10s}{text}"


DISTANCE_NAMES = [f"{d:.0e}" for d in DISTANCES]


def _join(reached: dict) -> str:
    return " / ".join("-" if k is None else str(k) for k in reached.values())


def _sweeps(settled: dict) -> str:
    return f"{settled['sweeps']}" + (f", {settled['open']} do not" if settled["open"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where it counts: on a CPU")
    parser.add_argument("--images", type=int, default=16, help="three tokens each (default 16)")
    parser.add_argument("--quick", action="store_true", help="two cases of six tokens: a check, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"expected --images >= 1, got {args.images}")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"expected a folder for {args.json} to exist, found none")
    rows = run(2, ["100 steps", "digits pair, guidance 3"]) if args.quick else run(args.images)
    if args.json:
        write_results(args.json, rows, threads=torch.get_num_threads())
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
