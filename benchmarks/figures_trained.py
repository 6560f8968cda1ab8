"""Claims of docs/quality.md, docs/parallel.md and docs/choosing.md: what trained models and heads showed."""

from __future__ import annotations

import math
from functools import cache

from cspd.demo import pair as demo
from cspd.demo.drift import load_drift
from cspd_kernels import Schedule

from figures import Claim
from figures_sources import CLOTH, DIGITS, IMAGES, IMAGES_CPU, SWEEPS, image, line, quality, results, row

TARGET, CLOTH_TARGET = "target, 16 steps", "target, 36 steps"
DDIM, DDIM_20 = "target, DDIM, 40 to 5 denoising steps", "target, DDIM, 20 denoising steps"
CONTEXT, STRICT = "2 branches, gamma 4, relaxation by context", "strict, relaxation 42, gamma 4"
WINDOW_4, WINDOW_8 = "window, relaxation 42, gamma 4", "window, relaxation 42, gamma 8"
EXACT, BRANCHES = "exact, gamma 4", "exact, gamma 4, 4 candidates, 2 branches"
ONE_STEP, ALONE = "one-step draft, measured width", "one-step draft alone, 16 steps"


def digits(field: str, *names: str) -> list[float]:
    return [quality(DIGITS, name, field) for name in names]


def cloth(field: str, *names: str) -> list[float]:
    return [quality(CLOTH, name, field) for name in names]


def percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]


def apart(pair: str, name: str) -> float:
    """How far two seeds' figures differ."""
    first, second = row(pair, name=name)["figures"]
    return abs(first - second)


def plain_seconds_of_samplers() -> list[float]:
    """Seconds of the target with 16, 8, 4 and 2 steps in the run of the sampler rows.

    Those rows lie on straight lines between them.
    """
    rows = {name: row(DIGITS, name=name) for name in ("target, DDIM", DDIM_20)}
    points = {name: (each["plain_calls"], each["plain_seconds"]) for name, each in rows.items()}
    low, middle = (
        (each["plain_calls"], each["plain_seconds"])
        for each in (row(DIGITS, name=f"target, {count} denoising steps") for count in (10, 20))
    )
    first = points["target, DDIM"]
    return [first[1], line(8, first, points[DDIM_20]), line(4, low, middle), low[1]]


def ratios_of_speculation() -> list[float]:
    """Of seconds, with diffusion drafts: the least and the most."""
    rows = [each for pair in (DIGITS, CLOTH) for each in results(pair)["rows"]]
    found = [each["seconds_ratio"] for each in rows if each["kind"] in ("window", "strict")]
    return [min(found), max(found)]


def worse_with_fewer() -> list[float]:
    best, *fewer = cloth("figure", CLOTH_TARGET, "target, 18 steps", "target, 9 steps", "target, 4 steps")
    return [figure / best for figure in fewer]


@cache
def stated_widths() -> list[float]:
    """Of a one-step draft: the measured one, and the sigma of the target's last step."""
    target, _ = demo.load_pair()
    return [load_drift().diffloss.std, math.exp(target.diffloss.gen_diffusion.schedule.log_std_lower[0])]


NOISE = "noise in the last"
SPECULATIVE = {"op": "run", "backend": "target alone bfloat16"}
QUALITY = [
    Claim("differ by about 0.01 on the digits and 0.06 on the cloth", lambda: [
        apart(DIGITS, TARGET), apart(CLOTH, CLOTH_TARGET)]),
    Claim("in that run: 7.01, 5.78, 5.61 and 5.09 for", plain_seconds_of_samplers),
    Claim("own sampler: 0.484 beside 0.483.", lambda: digits("figure", DDIM, TARGET)),
    Claim("It takes 4.81 s where the target alone needs 6.96 s, so it is 1.45 times as fast", lambda: [
        quality(DIGITS, DDIM, field) for field in ("seconds", "plain_seconds", "seconds_ratio")]),
    Claim("have 0.489 in 4.56 s, which is 1.48 times", lambda: [
        quality(DIGITS, DDIM_20, field) for field in ("figure", "seconds", "seconds_ratio")]),
    Claim("by DDIM have 0.449 in", lambda: digits("figure", "target, DDIM")),
    Claim("the same figure: 0.483.", lambda: digits("figure", "target, DDIM, eta 1")),
    Claim("too few (0.705)", lambda: digits("figure", "target, DDIM, 10 denoising steps")),
    Claim("20 steps have 0.624, and (40, 5) has 0.597. The target with 4 autoregressive steps has 0.594", lambda: [
        20, *digits("figure", "target, 20 denoising steps"), 40, 5,
        *digits("figure", "target, 40 to 5 denoising steps"), 4, *digits("figure", "target, 4 steps")]),
    Claim("they are 1.11 and 1.16 times", lambda: digits(
        "seconds_ratio", "target, 20 denoising steps", "target, 40 to 5 denoising steps")),
    Claim("ratios of seconds are 0.1 to 0.81", ratios_of_speculation),
    Claim("gamma 4: 10.8 calls instead of 16, at", lambda: [4, *digits("target_calls", EXACT, TARGET)]),
    Claim("4 candidates and 2 branches it takes 10.5.", lambda: [4, 2, *digits("target_calls", BRANCHES)]),
    Claim("7 calls, at a figure for which the target alone needs 12", lambda: [
        quality(DIGITS, STRICT, field) for field in ("target_calls", "plain_calls")]),
    Claim("worse: 0.506, strict 0.496", lambda: digits("figure", WINDOW_4, STRICT)),
    Claim("It is 0.484 and 0.486 on the digits, 3.447 and 3.456 on the cloth", lambda: [
        *digits("figure", EXACT, f"{TARGET}, {NOISE}"), *cloth("figure", EXACT, f"{CLOTH_TARGET}, {NOISE}")]),
    Claim("the figure is 1.12, 1.39 and 2.3 times", worse_with_fewer),
    Claim("probability 0.17 only. An exact round keeps 1.2 steps", lambda: [
        *cloth("raw_acceptance", "exact, gamma 2"), *cloth("steps_per_round", EXACT)]),
    Claim("rises from 0.45 to 0.53 on the digits and from 0.17 to 0.25 on the cloth", lambda: [
        part for pair in (digits, cloth)
        for part in pair("acceptance", "exact, gamma 2", "exact, gamma 2, 4 candidates")]),
    Claim("10.5 calls instead of 10.8 on the digits, 30.5 instead of 31.4 on", lambda: [
        *digits("target_calls", BRANCHES, EXACT), *cloth("target_calls", BRANCHES, EXACT)]),
    Claim("2 branches: 7.1 calls at 0.493 on", lambda: [
        2, *digits("target_calls", CONTEXT), *digits("figure", CONTEXT)]),
    Claim("42 without the tree has 0.496 at 7 calls", lambda: [
        42, *digits("figure", STRICT), *digits("target_calls", STRICT)]),
    Claim("it accepts 73 %, where 42 accepts 99 %. Its figure is 4.33, where 42 has 4.96", lambda: [
        *percent(cloth("acceptance", CONTEXT)), 42, *percent(cloth("acceptance", STRICT)),
        *cloth("figure", CONTEXT), 42, *cloth("figure", STRICT)]),
    Claim("as good at 13.3 calls, and this takes 15.6", lambda: [
        quality(CLOTH, CONTEXT, field) for field in ("plain_calls", "target_calls")]),
    Claim("measured width is 0.42", lambda: stated_widths()[:1]),
    Claim("and 0.1 % of the tokens", lambda: percent(digits("acceptance", f"{ONE_STEP}, exact, gamma 2"))),
    Claim("last step, 0.03, 19 % are accepted", lambda: [
        stated_widths()[1], *percent(digits("acceptance", "one-step draft, the target's sigma, exact, gamma 2"))]),
    Claim("The diffusion draft reaches 45 %", lambda: percent(digits("acceptance", EXACT))),
    Claim("stays in the image: 3.464", lambda: digits("figure", f"{ONE_STEP}, window, relaxation 42, gamma 4")),
    Claim("It has 0.592 in 0.93 s a batch, and the target needs 5.17 s", lambda: [
        quality(DIGITS, ALONE, field) for field in ("figure", "seconds", "plain_seconds")]),
    Claim("The draft alone has 0.501 in 2.09 s", lambda: [
        quality(DIGITS, "draft, 16 steps", field) for field in ("figure", "seconds")]),
    Claim("needs 2.17 s for", lambda: [alone()["seconds"]]),
    Claim("in 256 steps, with", lambda: [256]),
    Claim("takes about 8 ms for", lambda: [1e3 * alone()["seconds"] / 256]),
    Claim("A pair that accepts 45 % of", lambda: percent(digits("acceptance", EXACT))),
    Claim("One that accepts 17 % saves", lambda: percent(cloth("acceptance", "exact, gamma 2"))),
]  # fmt: skip


def alone() -> dict:
    """MAR-H's images without speculation; two rows of speculation have it as their baseline."""
    return row(IMAGES, op="run", backend="target alone bfloat16")


def reached(case: str, kind: str, accuracy: str) -> int:
    return row("parallel-cpu.json", case=case, kind=kind)["reached"][accuracy]


def heads(kind: str) -> list[dict]:
    return [each for each in results("parallel-cpu.json")["rows"] if each["kind"] == kind]


def farthest(which: int) -> float:
    """Of all tokens from the step-by-step chain's, at the first or the second tolerance."""
    return max(each["settled"][which]["largest"] for each in heads("secant"))


def stops() -> list[int]:
    """Sweeps of a call at the finer tolerance: the least and the most."""
    sweeps = [each["settled"][1]["sweeps"] for each in heads("secant")]
    return [min(sweeps), max(sweeps)]


def rounding() -> float:
    """How much farther the sweeps are from float64 than the steps, with bfloat16 operands."""
    rows = heads("bfloat16")
    return max(
        own / steps for each in rows for own, steps in zip(each["parallel, float64"], each["sequential, float64"])
    )


@cache
def schedule(name: str) -> Schedule:
    return getattr(Schedule, name)(100)


def left() -> float:
    """Percent of an error of the noise end after 20 steps of the linear schedule."""
    return 100 * math.prod(float(each) for each in schedule("linear").mean_x[-20:])


def slowest(case: str) -> int:
    """Sweeps of the slowest token with bfloat16 operands."""
    return row("parallel-cpu.json", case=case, kind="bfloat16")["sweeps"]


def as_long_as_steps() -> float:
    """Sweeps of a guided token of MAR-B that take as long as its steps on the H100."""
    rows = [each for each in results(SWEEPS)["rows"] if each["size"] == "MAR-B N=1 T=100 guided"]
    rows = [each for each in rows if not each["backend"].startswith("torch")]
    few, many = (min(each["seconds"] for each in rows if f" {count} sweeps " in each["backend"]) for count in (10, 27))
    return line(min(each["baseline_seconds"] for each in rows), (few, 10), (many, 27))


UNGUIDED = ("100 steps", "100 steps, temperature 0", "100 steps, temperature 1.5", "digits pair, 40 steps")
OTHER, RANDOM = "another schedule than trained for", "random weights"
GUIDED = ("100 steps, guidance 3", "digits pair, guidance 3")
ACCURACIES = [1e-2, 1e-3, 1e-4, 1e-5]
PARALLEL = [
    Claim(": 157 for the", lambda: [float(schedule("linear").x0_x[-1])]),
    Claim("100 steps, 20,291 for", lambda: [100, float(schedule("cosine").x0_x[-1])]),
    Claim("16 % are left after 20 steps", lambda: [left(), 20]),
    Claim("up to 2e-3 of the largest token at tolerance 1e-3, and up to 1e-6 at tolerance 1e-6", lambda: [
        farthest(0), 1e-3, farthest(1), 1e-6]),
    Claim("is within 1e-2 / 1e-3 / 1e-4 / 1e-5 The", lambda: [
        float(accuracy) for accuracy in row("parallel-cpu.json", case="100 steps", kind="secant")["reached"]]),
    Claim("within 1e-3 of the step-by-step chain's after 8 sweeps, and within 1e-5 after 10", lambda: [
        1e-3, reached("100 steps", "secant", "1e-03"), 1e-5, reached("100 steps", "secant", "1e-05")]),
    Claim("save 6 or 7 of 14 to 17 sweeps", lambda: [
        *(reached("100 steps", "plain", each) - reached("100 steps", "secant", each) for each in ("1e-03", "1e-05")),
        *(reached("100 steps", "plain", each) for each in ("1e-03", "1e-05"))]),
    Claim("needs 14 sweeps for 1e-3 and 17 for 1e-5", lambda: [
        reached("100 steps", "plain", "1e-03"), 1e-3, reached("100 steps", "plain", "1e-05"), 1e-5]),
    Claim("tokens reach 178. It needs 14 sweeps for 1e-3, and plain iteration needs 27. Random weights reach 709 and "
          "need 17, plain iteration 28", lambda: [
        row("parallel-cpu.json", case=OTHER, kind="secant")["size"], reached(OTHER, "secant", "1e-03"), 1e-3,
        reached(OTHER, "plain", "1e-03"), row("parallel-cpu.json", case=RANDOM, kind="secant")["size"],
        reached(RANDOM, "secant", "1e-03"), reached(RANDOM, "plain", "1e-03")]),
    Claim("At tolerance 1e-6 a call stops after 9 to 25 sweeps", lambda: [1e-6, *stops()]),
    Claim("factor of 1.5, for", lambda: [rounding()], at_most=True),
    Claim("the slowest of 48 tokens took 27 sweeps", lambda: [
        row("parallel-cpu.json", case=GUIDED[0], kind="bfloat16")[field] for field in ("tokens", "sweeps")]),
    Claim("after 10 and 16 sweeps there", lambda: [
        row("parallel-cpu.json", case=case, kind="bfloat16")["median sweeps"] for case in GUIDED]),
    Claim("times of 10 and 27 sweeps", lambda: [10, 27]),
    Claim("settles within 10 sweeps", lambda: [max(map(slowest, UNGUIDED))], at_most=True),
    Claim("At guidance 3 half of the tokens settle after 10 sweeps, and the slowest of 48 after 27.", lambda: [
        3, *(row("parallel-cpu.json", case=GUIDED[0], kind="bfloat16")[field]
             for field in ("median sweeps", "tokens", "sweeps"))]),
    Claim("So 8 tokens count with 27 sweeps", lambda: [8, slowest(GUIDED[0])]),
    Claim("that needs 19 sweeps or", lambda: [as_long_as_steps()]),
]  # fmt: skip
HEAD = {"size": "MAR-B N=1 T=100", "backend": "triton 10 sweeps bfloat16"}


def whole_or_patched(name: str, dtype: str) -> dict[str, float]:
    return {way: image(name, "MAR-B", f"{way} {dtype}")["seconds"] for way in ("patched", "whole")}


CHOOSING = [
    Claim("took 4.33 s for an image, and 0.93 s with", lambda: whole_or_patched(IMAGES, "bfloat16").values()),
    Claim("40.5 s in place of 68.4 s (", lambda: reversed(whole_or_patched(IMAGES_CPU, "float32").values())),
    Claim("It was 1.45 times as fast", lambda: digits("seconds_ratio", DDIM)),
    Claim("On the digits it is 45 %, and", lambda: percent(digits("raw_acceptance", EXACT))),
    Claim("cloth pair it is 16 %, and", lambda: percent(cloth("acceptance", EXACT))),
    Claim("The best had 0.81 times", lambda: ratios_of_speculation()[1:]),
    Claim("gamma 4 has 7 passes and distance 0.506, and gamma 8 has 5 passes and 0.526", lambda: [
        4, *digits("target_calls", WINDOW_4), *digits("figure", WINDOW_4),
        8, *digits("target_calls", WINDOW_8), *digits("figure", WINDOW_8)]),
    Claim("42 keeps 98.7 % of the tokens in windows of 4", lambda: [42, *percent(digits("acceptance", WINDOW_4)), 4]),
    Claim("4 candidates lift acceptance from 45 % to 53 %", lambda: [
        4, *percent(digits("acceptance", "exact, gamma 2", "exact, gamma 2, 4 candidates"))]),
    Claim("2 branches go from 10.8 to 10.5 passes", lambda: [2, *digits("target_calls", EXACT, BRANCHES)]),
    Claim("1 and gamma 4 have distance 0.551 on the digits, and with relaxation 42 they have 0.506", lambda: [
        1, 4, *digits("figure", "window, relaxation 1, gamma 4"), 42, *digits("figure", WINDOW_4)]),
    Claim("has 10.8 target passes with gamma 4 in place of 16", lambda: [
        *digits("target_calls", EXACT), 4, *digits("target_calls", TARGET)]),
    Claim("took 1.41 ms in place of 2.78 ms there (random weights, 10 sweeps)", lambda: [
        *(1e3 * row(SWEEPS, **HEAD)[field] for field in ("seconds", "baseline_seconds")), 10]),
    Claim("20 of 40 steps have distance 0.624, the full 40 have 0.483", lambda: [
        20, 40, *digits("figure", "target, 20 denoising steps"), 40, *digits("figure", TARGET)]),
    Claim("The draft alone has distance 0.501", lambda: digits("figure", "draft, 16 steps")),
]  # fmt: skip

CLAIMS = {"docs/quality.md": QUALITY, "docs/parallel.md": PARALLEL, "docs/choosing.md": CHOOSING}
SETTINGS = {
    "docs/parallel.md": [
        "and of the sweeps at tolerance 1e-6. ###",
        "torch backend at tolerance 1e-3",
        "Guidance 1.5 costs one",
        "operands and tolerance 1e-3**",
    ],
    "docs/choosing.md": ["| `prefill` | 0.15 |", "At 1.0 nothing is drafted"],
}
