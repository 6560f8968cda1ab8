"""Whole images, this package beside what users run today: ``python benchmarks/generate.py [--json FILE]``.

Random weights (time does not depend on their values), classes, guidance. All contenders of a case take turns on the
same seeds. A loop that takes too long is measured on steps spread over the image, and the row says so. Speed is told
only beside the difference of the images from the eager loop's with the same seed. That is an image of 8 steps in the
type that is timed; of this package also one in float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cspd_kernels.testing import relative_error

import images
import spent
from common import spread
from images import NAMES, Case, Contender
from rows import Report, Row

ONLY = ("eager", "compile", "patched", "whole", "speculative")
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}  # the two round a stream of bfloat16 in different places
COMPARED_STEPS = 8
GAMMAS = (32, 8)
SPECULATIVE = ("b", "h", 256)  # draft, target, steps
# What a GPU runs without options: model, steps, batch; the first things first.
CASES = (("b", 256, 1), ("h", 64, 1), ("h", 64, 64), ("b", 64, 1), ("h", 64, 8))
SPECULATIVE_BATCHES = (1, 8)  # the first behind the first of the cases, the others in the end
COMPILED = ("b", 64, 1)  # it takes a minute a model


@dataclass
class ImageRow(Row):
    """A row with what else is known of the images."""

    details: dict = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        exact = self.details.get("float32_error")
        return self.error <= self.bound and (exact is None or exact <= BOUNDS[torch.float32])


class Bench:
    """One run: its options, its models, its rows."""

    def __init__(self, device: torch.device, seconds: float, budget: float, only: tuple[str, ...], report: Report):
        self.device, self.seconds, self.only, self.report = device, seconds, only, report
        self.until = time.monotonic() + budget
        self.models: dict[str, torch.nn.Module] = {}
        self.float32_errors: dict[tuple[str, str], float] = {}
        self.eager_images: dict[Case, torch.Tensor] = {}

    def model(self, name: str) -> torch.nn.Module:
        if name not in self.models:
            self.models[name] = images.build(name, self.device)
        return self.models[name]

    def out_of_time(self, what: str) -> bool:
        over = time.monotonic() > self.until
        if over:
            print(f"left out, the time of --budget is up: {what}", flush=True)
        return over

    def made(self, case: Case, name: str, make: Callable[[], Contender]) -> list[Contender]:
        """The contender in a list, which is empty where it cannot be made."""
        with self.report.trying("sample_tokens", str(case), name):
            return [make()]
        return []

    def sampled(self, case: Case, compile_too: bool) -> None:
        """The rows of a case of ``sample_tokens``."""
        model = self.model(case.model)
        contenders = [images.eager(model)]
        if "patched" in self.only:
            contenders += self.made(case, "patched", lambda: images.patched(model))
        if "whole" in self.only and images.has_whole():
            contenders += self.made(case, "whole", lambda: images.whole(model))
            if self.device.type == "cuda" and case.batch == 1:  # where "auto" may choose sweeps over all steps
                name = "whole, step by step"
                contenders += self.made(case, name, lambda: images.whole(model, name, parallel_tol=None))
        if "compile" in self.only and compile_too:
            contenders += self.made(case, "torch.compile", lambda: images.compiled(model, case.dtype))
        every, first, errors = {}, {}, {}
        for contender in list(contenders):
            name = contender.name
            try:
                every[name], first[name] = spent.prepare(contender, case, self.seconds / 2)
                errors[name] = self.differences(contender, contenders[0], case)
            except Exception as error:  # noqa: BLE001  (of whatever kind: the others go on)
                self.report.failed("sample_tokens", str(case), name, error)
                contenders.remove(contender)
                if name == "eager loop":
                    return  # nothing to compare with
        taken = spent.in_turns(
            contenders, every, case, self.seconds, lambda *a: self.report.failed("sample_tokens", str(case), *a)
        )
        if not (baseline := taken.get("eager loop")):
            return
        scale = {name: images.share_of(case, model.seq_len, n) for name, n in every.items()}
        base = spread([scale["eager loop"] * value for value in baseline])
        for contender in contenders:
            name = contender.name
            if name not in taken:
                continue
            own = spread([scale[name] * value for value in taken[name]])
            details = self.details(case, own[0], first[name], scale[name])
            details |= errors[name][1]
            with self.report.trying("sample_tokens", str(case), f"{name}: where its time goes"):
                details["seconds"] = self.phases(contender, case, every[name], scale[name], own[0])
                details |= self.launches(contender, case, own[0])
            self.add("sample_tokens", case, name, "eager loop", own, base, len(taken[name]), errors[name][0], details)

    def differences(self, contender: Contender, eager: Contender, case: Case) -> tuple[float, dict]:
        """(difference in the case's type, that in float32 where it is this package's)."""
        short = replace(case, steps=min(case.steps, COMPARED_STEPS))
        if contender is eager:
            return 0.0, {}
        error = relative_error(self.as_timed(contender, short), self.expected(eager, short))
        key = (case.model, contender.name)
        if case.dtype == torch.float32 or contender.name not in ("patched", "whole"):
            return error, {}
        if key not in self.float32_errors:  # once a model, with the first batch
            exact = replace(short, dtype=torch.float32)
            self.float32_errors[key] = relative_error(self.as_timed(contender, exact), self.expected(eager, exact))
        return error, {"float32_error": self.float32_errors[key]}

    @staticmethod
    def as_timed(contender: Contender, case: Case) -> torch.Tensor:
        """An image by the graphs that the first calls make."""
        for _ in range(contender.warm_ups):
            contender(case, 7)
        return contender(case, 7)

    def expected(self, eager: Contender, case: Case) -> torch.Tensor:
        """The eager loop's image, made once."""
        if case not in self.eager_images:
            self.eager_images[case] = eager(case, 7)
        return self.eager_images[case]

    @staticmethod
    def details(case: Case, seconds: float, first: float, scale: float) -> dict:
        found = {"images_per_second": case.batch / seconds, "first_calls_seconds": first}
        if scale > 1:
            found["measured"] = f"{round(case.steps / scale)} of {case.steps} steps, scaled"
        return found

    def phases(self, contender: Contender, case: Case, every: int, scale: float, seconds: float) -> dict[str, float]:
        if contender.splits:
            return {name: scale * value for name, value in spent.split(contender, case, every).items()}
        full = contender.model.diffloss.gen_diffusion.num_timesteps
        short = images.whole(images.short_of(self.model(case.model), case.model))
        spent.prepare(short, case, self.seconds)
        fewer = spread([spent.seconds_of(short, case) for _ in range(3 if short.warm_ups else 1)])[0]
        return spent.split_by_head(seconds, fewer, full, short.model.diffloss.gen_diffusion.num_timesteps)

    def launches(self, contender: Contender, case: Case, seconds: float) -> dict:
        """Of a few steps where single ones can be run, else of an image; on a GPU, one image at a time."""
        if self.device.type != "cuda" or case.batch > 1:
            return {}
        every = max(1, case.steps // 2) if contender.skips else 1
        scale = images.share_of(case, contender.model.seq_len, every)
        found = spent.on_the_device(contender, case, every, round(case.steps / scale))
        per_step = {f"{name}_per_step": found[name] for name in ("launches", "copies")}
        return per_step | {"device_idle": 1 - scale * found["busy"] / seconds}

    def speculated(self, draft: str, case: Case) -> None:
        """The rows of speculation: windows beside the target alone, both this package's."""
        plain = images.alone(self.model(case.model), case.dtype)
        made = {plain.name: (plain, None)}
        for gamma in GAMMAS:
            contender, runner = images.speculative(self.model(draft), self.model(case.model), case.dtype, gamma)
            made[contender.name] = (contender, runner)
        contenders = [contender for contender, _ in made.values()]
        first = {contender.name: spent.prepare(contender, case, self.seconds)[1] for contender in contenders}
        taken = spent.in_turns(
            contenders, dict.fromkeys(made, 1), case, self.seconds, lambda *a: self.report.failed("run", str(case), *a)
        )
        base = spread(taken[plain.name])
        for name, values in taken.items():
            contender, runner = made[name]
            again, own = [contender(case, 7) for _ in range(2)], spread(values)
            details = self.details(case, own[0], first[name], 1)
            if runner is not None:
                stats = runner.stats
                details |= {"draft": NAMES[draft], "acceptance": stats.acceptance}
                details |= {"raw_acceptance": stats.raw_acceptance, "target_calls": stats.target_calls}
                details["seconds"] = dict(stats.seconds)
            with self.report.trying("run", str(case), f"{name}: its launches"):
                details |= self.launches(contender, case, own[0])
            error = relative_error(again[0], again[1])
            self.add("run", case, name, plain.name, own, base, len(values), error, details, "the same seed again")

    def add(self, op, case, name, baseline, own, base, runs, error, details, accuracy="of max, eager") -> None:
        kind = str(case.dtype).removeprefix("torch.")
        bound = BOUNDS[case.dtype] if op == "sample_tokens" else 0.0
        row = (op, str(case), f"{name} {kind}", f"{baseline} {kind}", *own, *base, runs, error, bound, accuracy)
        self.report.add(ImageRow(*row, details=details))
        print(
            "    " + "; ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in details.items()), flush=True
        )


def shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(own)}" for name, own in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cases_of(args: argparse.Namespace, device: torch.device) -> list[tuple[str, int, int]]:
    """Those asked for; without options the ones that fit into the time."""
    if args.models is args.steps is args.batch is None:
        return list(CASES) if device.type == "cuda" and not args.quick else [("b", 64, 1)]
    lists = ((args.models or ["b"]), (args.steps or [64]), (args.batch or [1]))
    return [(model, steps, batch) for model in lists[0] for batch in lists[2] for steps in lists[1]]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    def listed(kind: Callable, among: tuple = ()) -> Callable[[str], list]:
        def parse(text: str) -> list:
            values = [kind(value) for value in text.split(",")]
            if among and not set(values) <= set(among):
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(among)}, got {text}")
            return values

        return parse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=listed(str, tuple(images.MODELS)), help="b,l,h")
    parser.add_argument("--steps", type=listed(int), help="steps an image: 64,256")
    parser.add_argument("--batch", type=listed(int), help="images at once: 1,8,64")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance (default 3; 1 is none)")
    parser.add_argument("--dtype", type=listed(str, ("float32", "bfloat16")), help="default: bfloat16; on a CPU both")
    parser.add_argument("--only", type=listed(str, ONLY), help=f"contenders beside the eager loop: {','.join(ONLY)}")
    parser.add_argument("--quick", action="store_true", help="MAR-B, 64 steps, batch 1, some minutes on two cores")
    parser.add_argument(
        "--seconds", "--min-seconds", type=float, help="of runs for each contender (default 3; 60 on a CPU)"
    )
    parser.add_argument("--budget", type=float, help="begin no case after so many seconds (default 200 on a GPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    seconds = args.seconds or (3.0 if on_gpu else 10.0 if args.quick else 60.0)
    only = tuple(args.only or (ONLY if on_gpu else ("eager", "patched", "whole")))
    kinds = args.dtype or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    batches = args.batch or (SPECULATIVE_BATCHES if on_gpu else (1,))
    bench = Bench(device, seconds, args.budget or (200.0 if on_gpu else 1e9), only, Report(args.json))
    if "whole" in only and not images.has_whole():
        print("left out: cspd.patch of this version has no whole=True", flush=True)
    asked = bool(args.models or args.steps or args.batch)
    for kind in kinds:
        dtype = getattr(torch, kind)
        speculative = [Case(SPECULATIVE[1], (args.steps or SPECULATIVE[2:])[-1], n, args.cfg, dtype) for n in batches]
        for model, steps, batch in cases_of(args, device) if set(only) != {"speculative"} else ():
            case = Case(model, steps, batch, args.cfg, dtype)
            if not bench.out_of_time(str(case)):
                bench.sampled(case, asked or (model, steps, batch) == COMPILED)
            if len(speculative) == len(batches) and not asked:
                speculation(bench, speculative.pop(0))
        for case in speculative:
            speculation(bench, case)
    bench.report.finish()


def speculation(bench: Bench, case: Case) -> None:
    if "speculative" in bench.only and not bench.out_of_time(f"speculation, {case}"):
        with bench.report.trying("run", str(case)):
            bench.speculated(SPECULATIVE[0], case)


if __name__ == "__main__":
    main()
