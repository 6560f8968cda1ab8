"""Claims of the pages that say what is exact, what is served, and what was tried."""

from __future__ import annotations

import math

import torch

from figures import Claim
from figures_sources import (
    COMPATIBILITY,
    IMAGES,
    anderson,
    differences,
    hand,
    image,
    only,
    results,
    rounds,
    settled,
    weights,
)
from registry import BOUNDS
from report_pages import experiments

TRAINED = ("digits target, 40 steps", "digits draft, 40 steps", "trained, 100 steps")
HUNDRED = TRAINED[-1]


def small(which: str) -> list[float]:
    return results(COMPATIBILITY)["networks on a cpu"]["small"][which]


def swept(code_base: str, tolerance: float) -> dict:
    rows = results(COMPATIBILITY)["sweeps"]["rows"]
    return only(rows, **{"code base": code_base, "parallel_tol": tolerance})


def both_swept(tolerance: float) -> float:
    """The largest difference in float32 of what was run with sweeps."""
    rows = results(COMPATIBILITY)["sweeps"]["rows"]
    return max(each["float32"] for each in rows if each["parallel_tol"] == tolerance)


def note(table: str, number: str, *keys: str) -> list[float]:
    found = results(COMPATIBILITY)[table]["notes"][number]
    return [found[key] for key in keys]


COMPATIBLE = [
    Claim(
        "in float64 is 2e-5 from its float32 result, and 2e-6 from",
        lambda: note("loops", "1", "float64 from their float32", "float64 from the kernels"),
    ),
    Claim("A change of 1e-7 in each", lambda: note("networks", "2", "change of each output")),
    Claim("its result by 2e-5 to 2e-3", lambda: note("networks", "2", "moves the result by")[0]),
    Claim("the ratio is 0.6 to 1.2 at", lambda: small("width 256, 8 rows")),
    Claim("and 1.1 to 1.7 at", lambda: small("width 256, 64 rows")),
    Claim("it is 0.5 to 0.7 at both", lambda: small("Arinar's groups and Orthus, both")),
    Claim(
        "was 1e-6 and 2e-6 in float32",
        lambda: [swept(name, 1e-6)["float32"] for name in ("LTH14/mar", "MarkXCloud/CSpD")],
    ),
    Claim("3e-2 under autocast", lambda: [swept("LTH14/mar", 1e-6)["autocast"]]),
    Claim(
        "With 1e-3 the largest difference of LTH14/mar was 3e-4",
        lambda: [swept("LTH14/mar", 1e-3)[key] for key in ("parallel_tol", "float32")],
    ),
]


def network_ratios() -> list[float]:
    """With frozen weights, against the network's own forward."""
    rows = results("network-cpu.json")["rows"]
    return [each["ratio"] for each in rows if "frozen" in each["backend"] and each["baseline"].startswith("eager")]


def network_errors() -> list[float]:
    rows = results("network-cpu.json")["rows"]
    return [max(each["error"] for each in rows if each["backend"].endswith(dtype)) for dtype in ("float32", "bfloat16")]


LOOPS = [
    Claim("pays off: 1.1 to 3.7 times", lambda: [min(network_ratios()), max(network_ratios())]),
    Claim("are 2e-6 in float32 and 9e-3 in bfloat16", network_errors),
]


def fewer() -> list[float]:
    """Percent of the sweeps of the best other method that the secant saves: the least and the most."""
    shares = []
    for head in TRAINED:
        sweeps = anderson(head)
        own = sweeps.pop("secant (shipped)")
        shares += [100 * (1 - mine / min(others)) for mine, others in zip(own, zip(*sweeps.values()))]
    return [min(shares), max(shares)]


def frozen_behind() -> list[float]:
    """Rounds by which the frozen guess is behind the best on the trained heads."""
    means = [
        [[each["mean"] for each in rounds(head, guess)] for guess in ("frozen", "linear", "reused")] for head in TRAINED
    ]
    return [max(own - min(others) for case in means for own, *others in zip(*case, *case[:1]))]


def probabilities(toy: str | None) -> list[float]:
    """The least and the largest p of a toy, or of all comparisons of two samples."""
    rows = [each for each in results("experiments-cpu.json")["rows"] if "p" in each]
    found = [each["p"] for each in rows if (each.get("toy") == toy if toy else each.get("toy") != "exact marginal")]
    return [min(found), max(found)]


def all_guessed() -> list[float]:
    """Mean rounds with all steps guessed, and sweeps at 1e-3: the least and the most of the trained heads."""
    found = [[rounds(head)[-1]["mean"] for head in TRAINED], [settled(head)[0] for head in TRAINED]]
    return [bound(each) for each in found for bound in (min, max)]


def slowest(head: str) -> list[float]:
    """Rounds and sweeps of the slowest token."""
    return [rounds(head)[-1]["most"], settled(head)[1]]


def rows_a_token() -> float:
    found = [each for each in experiments("step speculation")[HUNDRED] if each["method"] == "frozen"]
    return found[-1]["network rows"]


EXPERIMENTS = [
    Claim(
        "are within 1e-2 / 1e-3 / 1e-4 / 1e-5 of",
        lambda: results("experiments-cpu.json")["settings"]["anderson"]["accuracies"],
    ),
    Claim("the secant needs 30 to 45 % fewer", fewer),
    Claim(
        "they need 6 and 2 sweeps for 1e-5",
        lambda: (
            [anderson(f"random weights, {name}, 100 steps")["Anderson, eps"][-1] for name in ("linear", "cosine")]
            + [1e-5]
        ),
    ),
    Claim("is within 0.3 rounds of", frozen_behind),
    Claim("p between 0.51 and 0.97 for", lambda: probabilities("exact marginal")),
    Claim("It was between 0.04 and 1.", lambda: probabilities(None)),
    Claim("The 0.04 is of the random", lambda: probabilities(None)[:1]),
    Claim("0.39, 0.04, 0.80 and 0.07 with", lambda: hand("lossless speculation, other seeds")["1,000"]),
    Claim("and 0.31, 0.73 and 0.37 with", lambda: hand("lossless speculation, other seeds")["4,000"]),
    Claim("the network for 182 rows", lambda: [rows_a_token()]),
    Claim("so 7.0 sweeps take 700", lambda: [settled(HUNDRED)[0], 100 * settled(HUNDRED)[0]]),
    Claim("it takes 4.2 to 5.5 on average, against 6.2 to 7.0 sweeps at 1e-3", lambda: [*all_guessed(), 1e-3]),
    Claim("is no faster: 7 against 7 sweeps on the pair", lambda: slowest(TRAINED[0])),
    Claim("11 against 8 on the head", lambda: slowest(HUNDRED)),
]


def less_damage() -> list[float]:
    """Percent, least and most of all cases of the table."""
    found = hand("context relaxation on the digits")
    kept = [column[0][0] for what, columns in found.items() for column in columns if isinstance(column[0], list)]
    return [100 * (1 - max(kept)), 100 * (1 - min(kept))]


STRICT = [
    Claim("is 0.999 at a token a step and 0.997 at two", lambda: hand("context relaxation, median cosine")),
    Claim("gains little: 2 to 13 % less", less_damage),
    Claim("(0.99 to 1.03)", lambda: hand("context relaxation, scale 0.1")),
    Claim("is 0.17 and 0.07.", lambda: hand("context relaxation, first rule")["correlation"]),
    Claim(
        "it did 8 to 39 % more",
        lambda: [100 * share for share in hand("context relaxation, first rule")["more damage"]],
    ),
    Claim("log r is +0.43.", lambda: [hand("entropy draft, correlation")]),
    Claim("(0.91 both)", lambda: hand("entropy draft, relaxation 8")[:1]),
]
METHOD = [
    Claim("these are 59 % of", lambda: [100 * weights("MAR-B")["modulations"] / weights("MAR-B")["all"]]),
    Claim("needs 12 sweeps for 1e-3 on", lambda: [min(
        anderson(HUNDRED)[name][1] for name in ("Anderson, x0", "Anderson, eps")), 1e-3]),
    Claim("The secant needs 8,", lambda: [anderson(HUNDRED)["secant (shipped)"][1]]),
    Claim("5.5 with all steps guessed, against 7.0 sweeps", lambda: [rounds(HUNDRED)[-1]["mean"], settled(HUNDRED)[0]]),
    Claim("its slowest token takes 11 against 8", lambda: slowest(HUNDRED)),
    Claim("about 2.5 / D tries", lambda: [math.sqrt(2 * math.pi)]),
    Claim("where Q is 1e-9", lambda: [math.erfc(6 / math.sqrt(2)) / 2]),
]  # fmt: skip


def errors_of_images() -> list[float]:
    return [image(IMAGES, model, "whole bfloat16")["error"] for model in ("MAR-B", "MAR-H")]


def step_by_step(way: str) -> list[float]:
    return [image(IMAGES, model, f"{way} bfloat16")["seconds"] for model in ("MAR-B", "MAR-H")]


def passes(kind: str) -> list[float]:
    found = hand("transformer passes")[kind]
    return [min(found), max(found)]


WHOLE = [
    Claim("takes 1.3 to 1.4 ms on an H100, and 17 to 19 ms", lambda: [*passes("graph"), *passes("eager")]),
    Claim(
        "takes 0.93 s, and 4.3 s with",
        lambda: [image(IMAGES, "MAR-B", f"{way} bfloat16")["seconds"] for way in ("whole", "patched")],
    ),
    Claim(
        "take 1.02 and 0.95 s instead of 0.93 and 0.87",
        lambda: [*step_by_step("whole, step by step"), *step_by_step("whole")],
    ),
    Claim("| 2.5e-7 (three", lambda: [hand("whole image of LTH14/mar")]),
    Claim("| 2.7e-6 (MAR-B), 6.4e-6 (MAR-H)", lambda: hand("whole images in float32 on a GPU")),
    Claim("On the H100 2e-2 (MAR-B) and 3e-2 (MAR-H)", errors_of_images),
]


def bounds() -> list[float]:
    return [BOUNDS[dtype] for dtype in (torch.float32, torch.bfloat16)]


EXACTNESS = [
    Claim(
        '| `cspd.patch`, float32 | exact | 6e-6 | | `cspd.patch(whole=True)`, float32 | exact | 2.5e-7 | '
        '| `cspd.patch(loop="own")`, float32 | exact | 6e-6 |',
        lambda: [max(differences(None)), hand("whole image of LTH14/mar"), max(differences(None))],
    ),
    Claim("| 2e-6 at 1e-6, 3e-4 at 1e-3 |", lambda: [both_swept(1e-6), 1e-6, both_swept(1e-3), 1e-3]),
    Claim("| `cspd.vae` | exact | 5e-6 |", lambda: [max(hand("decoder of pictures"))]),
    Claim("code bases was 6e-6", lambda: [max(differences(None))]),
    Claim("limits by channel: 2e-5", lambda: [max(differences(1))]),
    Claim("ODE solvers: 6e-4", lambda: [max(differences(2))]),
    Claim("image was 2.5e-7 (CPU", lambda: [hand("whole image of LTH14/mar")]),
    Claim("- At 1e-6 in float32", lambda: [1e-6]),
    Claim("CSpD was 2e-6, as without", lambda: [both_swept(1e-6)]),
    Claim("At 1e-3 it was 3e-4 from", lambda: [1e-3, swept("LTH14/mar", 1e-3)["float32"]]),
    Claim("agree within 1e-5 relative. bfloat16 and float16 agree within 2e-2", bounds),
    Claim("class by 1.2e-6 of the largest value (float32, 256 and 512 px). With peaked attention it was 5e-6",
        lambda: [hand("decoder of pictures")[0], 256, 512, hand("decoder of pictures")[1]]),
]  # fmt: skip
CONTRIBUTING = [Claim("float32 within 1e-5 relative; - bfloat16 and float16 within 2e-2 of", bounds)]

CLAIMS = {
    "docs/compatibility.md": COMPATIBLE,
    "docs/loops.md": LOOPS,
    "docs/experiments.md": EXPERIMENTS,
    "docs/strict.md": STRICT,
    "docs/method.md": METHOD,
    "docs/whole.md": WHOLE,
    "docs/exactness.md": EXACTNESS,
    "CONTRIBUTING.md": CONTRIBUTING,
}
SETTINGS = {
    "docs/experiments.md": ["has p below 1e-6 (", "2 or 5 sweeps of memory"],
    "docs/strict.md": [
        "Brackets hold 95 % of",
        "(scales 1, 0.1 and 0.01)",
        "factor 0.9 and memory 0.8",
        "for tau = 0.05, 0.2 and 1",
    ],
    "docs/method.md": ["Below D = 1e-6 the shape no longer changes, and 1e-6 is used"],
    "docs/whole.md": ["as many steps as fit into 256 MB", "The tests allow 1e-5 on a CPU and 1e-4 on a GPU"],
    "docs/exactness.md": ["Rounding is 1e-3 for the bfloat16"],
    "CONTRIBUTING.md": ["3.6 needs numpy below 2.4"],
}
