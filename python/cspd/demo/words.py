"""What the demo says: the table, and what its rows and columns mean."""

from __future__ import annotations

import platform

from ..stats import ACCEPTED, FELL_BACK, PREFILLED, REDRAWN


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    import numpy
    import torch

    import cspd_kernels

    return {
        "cspd-kernels": cspd_kernels.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def heading(setting: dict) -> str:
    """The first line of what is printed."""
    threads = setting["threads"]
    return (
        f"{setting['num_images']} handwritten digits for each row, seed {setting['seed']}, "
        f"{threads} CPU thread{'s' if threads > 1 else ''}\n"
    )


def table_titles() -> str:
    """The table's first line."""
    return (
        f"{'':24s}{'seconds':>8s}{'(spread)':>14s}{'target calls':>14s}{'draft calls':>13s}{'raw accept.':>13s}"
        f"{'accept.':>9s}{'distance':>10s}"
    )


def table_line(row: dict) -> str:
    """One row of the table."""
    return (
        f"{row['name']:24s}{row['seconds']:8.2f}{spread(row):>14s}{row['target_calls']:14d}{row['draft_calls']:13d}"
        f"{percent(row['raw_acceptance']):>13s}{percent(row['acceptance']):>9s}{row['frechet_distance']:10.3f}"
    )


def spread(row: dict) -> str:
    """The fastest and the slowest run."""
    return f"({row['seconds_min']:.2f}-{row['seconds_max']:.2f})"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def glossary(setting: dict) -> dict[str, str]:
    """A line for each word."""
    return {
        "target": "the model whose images you want. It draws 16 tokens per image, each of 2x2 pixels.",
        "draft": "a smaller, faster model that imitates the target.",
        "speculative": "the draft draws a window of steps, then one call of the target accepts or redraws each token.",
        "gamma": "the most autoregressive steps in a window.",
        "calls": "how often a run calls each model. In large models the target's calls take the time.",
        "seconds": f"the median of {setting['timed_runs']} runs of {setting['timed_images']} images each; in brackets "
        "the fastest and the slowest.",
        "acceptance": "the acceptance rate, the share of drafted tokens that were kept. Strict rows have no "
        f"relaxation. The others have a relaxation of {setting['relaxation']:g}, which keeps more.",
        "raw acceptance": "the mean acceptance probability without relaxation.",
        "distance": f"the Frechet distance of all {setting['num_images']} images to the real digits, in pixels. Lower "
        "is closer. With few images it is larger.",
    }


def footnotes(strict: bool) -> list[str]:
    """What a reader should know before drawing conclusions."""
    notes = ["The speculative rows are approximate: the digits are not exactly those that the target would draw."]
    if strict:
        notes = [
            f"Strict verification is exact: up to rounding, its digits have exactly the distribution of {NOISY!r}.",
            "The other speculative rows are approximate.",
        ]
    return [*notes, "These models are tiny. Look at how it works, not at the time it saves."]


def picture_notes(setting: dict) -> list[str]:
    """What the figures in the picture are."""
    return [
        f"Seconds: median of {setting['timed_runs']} runs of {setting['timed_images']} images (fastest-slowest). "
        f"Distance: to the real digits, over {setting['num_images']} images; lower is closer."
    ]


def kept(row: dict) -> str:
    """The acceptance of a row, in words."""
    return f"Of the drafted tokens of all images, {percent(row['acceptance'])} were kept."


def calls(row: dict) -> str:
    """Of both models, in words."""
    counts = [(row["target_calls"], "target"), (row["draft_calls"], "draft")]
    said = [f"{count} {name}" for count, name in counts if count]
    return " + ".join(said) + (" call" if sum(count for count, _ in counts) == 1 else " calls")


def meaning(row: dict) -> str:
    """What a row is, in plain words."""
    name, steps, gamma = row["name"], row["steps"], row["gamma"]
    if name.startswith("strict"):
        return (
            "Strict verification. The target judges every step given the tokens that were kept before it. What follows "
            "a rejected token is drafted again. Up to rounding, the digits have exactly the distribution of the row "
            "above."
        )
    if gamma:
        return (
            f"The draft draws up to {gamma} steps, a window. One call of the target then verifies all of its tokens: "
            "it keeps those that it finds likely enough, and redraws the others."
        )
    if name.startswith("draft"):
        return "The draft alone. Nobody verifies its tokens."
    if name.endswith("noise"):
        return "The target alone. Its last denoising step adds its noise, which it leaves out otherwise."
    return f"The target alone, in {steps} autoregressive steps." + (
        " Fewer steps draw more tokens at once." if steps < 16 else " This is what the other rows are compared with."
    )


NOISY = "target, 16 steps, noise"  # the row that strict verification equals
INTRODUCTION = (
    "The target is a small image model. It draws a digit token by token: an image has 16 tokens of 2x2 pixels. "
    "The draft is a still smaller model that imitates the target. In speculative decoding the draft draws the tokens "
    "of a window of steps. Then one call of the target accepts or redraws each of them."
)
REAL = "Real digits, scanned at 8x8 pixels. The models learned from such digits."
MAP = (
    "An acceptance map has one cell for each token of the digit above it. The colour is the probability that the "
    "target accepts the drafted token, without relaxation. The mark says what became of the token."
)
# What a mark in the map says, in a word and in a line.
MARKS = {
    ACCEPTED: ("accepted", "the drafted token was kept"),
    REDRAWN: ("redrawn", "the token was rejected and drawn again, so that it fits the target"),
    FELL_BACK: ("fell back", "the token was rejected, and the target's own sample took its place"),
    PREFILLED: ("pre-filled", "the target drew the token alone, before the first window"),
}
