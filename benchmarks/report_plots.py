"""The bar charts of the pages: seconds an image, the head alone, and where the time goes."""

from __future__ import annotations

import math

from report_svg import Canvas, bars, stacks
from report_tables import BASELINES, KERNELS, batch_of, cpu, load, milliseconds, time

GREY, AMBER, BLUE, GREEN, ORANGE, PURPLE = 5, 4, 0, 2, 1, 3
WAYS = {  # a contender of ``generate.py``: its name in a chart, and its colour
    "eager loop": ("your loop, eager (baseline)", GREY),
    "torch.compile": ("torch.compile", AMBER),
    "patched": ("cspd.patch", BLUE),
    "whole": ("cspd.patch, whole=True", GREEN),
    "whole, step by step": ("whole=True, parallel_tol=None", GREEN),
}
CHAINS = {  # a contender of ``kernels.py``, likewise
    "eager autocast bfloat16": ("eager autocast (baseline)", GREY),
    "eager loop in one CUDA graph bfloat16": ("eager, in one CUDA graph", ORANGE),
    "torch.compile reduce-overhead bfloat16": ("torch.compile", AMBER),
    "library products alone bfloat16": ("library products alone", PURPLE),
    "triton bfloat16": ("triton layered", GREEN),
    "cuda bfloat16": ("cuda layered", BLUE),
    "cuda persistent bfloat16": ("cuda persistent", 6),
}
SCALED = "* Measured on some of the steps of an image, and scaled to all of them."
WIDTH, LEFT, RIGHT = 760, 232, 590


def device(result: dict) -> str:
    environment = result["environment"]
    gpus = environment["gpus"]
    return " ".join(gpus[0]["name"].split()[:2]) if gpus else cpu(environment["cpu threads"])


def source(name: str) -> str:
    return f"{name} at commit {load(name)['commit'].removesuffix('-dirty')}"


def footer(canvas: Canvas, y: float, *lines: str) -> None:
    for line in lines:
        canvas.text(16, y, line, size=11, style="dim")
        y += 16


def case(size: str, dtype: str, result: dict) -> str:
    """Such as "MAR-B, one image of 256 steps, guidance 3. NVIDIA H100, bfloat16"."""
    model, steps, _, _, batch, *rest = size.split()
    images = "one image" if int(batch) == 1 else f"an image of {batch}"
    guidance = f", guidance {rest[1]}" if rest[:1] == ["cfg"] else ""
    return f"{model}, {images} of {steps} steps{guidance}. {device(result)}, {dtype}"


def images(result: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """Of ``generate.py``: (size, dtype) -> contender -> row."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in result["rows"]:
        if row["op"] == "sample_tokens":
            name, dtype = row["backend"].rsplit(" ", 1)
            found.setdefault((row["size"], dtype), {})[name] = row
    return found


def image_bar(row: dict | None, name: str, slot: int) -> tuple:
    if row is None:
        return name, None, "not measured", slot
    if row["ratio"] is None:
        return name, None, "wrong: no speed is shown", slot
    seconds, star = row["seconds"] / batch_of(row), "*" if "measured" in row["details"] else ""
    ratio = "" if row["backend"] == row["baseline"] else f"  ({row['ratio']:.3g}x)"
    return name, seconds, f"{time(seconds)}{star}{ratio}", slot


def image_bars(canvas: Canvas, y: float, rows: dict[str, dict], all_ways: bool = False) -> float:
    ways = [way for way in WAYS if way in rows or way in ("torch.compile", "patched", "whole")]
    ways = ways if all_ways else [way for way in ways if way != "whole, step by step"]
    return bars(canvas, y, [image_bar(rows.get(way), *WAYS[way]) for way in ways], LEFT, RIGHT)


def head_bars(canvas: Canvas, y: float, size: str) -> float:
    """The head alone: baselines, and the fastest kernels of this package."""
    rows = [row for row in load("kernels-h100.json")["rows"] if row["op"] == "denoise" and row["size"] == size]
    median = {row["baseline"]: row["baseline_seconds"] for row in rows if row["baseline"] in BASELINES}
    own = {row["backend"]: row["seconds"] for row in rows if row["backend"] in KERNELS and row["ratio"] is not None}
    base, fastest = median["eager autocast bfloat16"], min(own, key=own.get)
    lines = []
    for name in BASELINES:
        if name not in median:
            lines.append((CHAINS[name][0], None, "not measured", CHAINS[name][1]))
            continue
        ratio = "" if median[name] == base else f"  ({base / median[name]:.3g}x)"
        if name.startswith("library"):
            ratio = ", matrix products and nothing else"
        lines.append((CHAINS[name][0], median[name], f"{milliseconds(median[name])} ms{ratio}", CHAINS[name][1]))
    shown = f"{milliseconds(own[fastest])} ms  ({base / own[fastest]:.3g}x)"
    lines.append((f"this package ({KERNELS[fastest]})", own[fastest], shown, GREEN))
    return bars(canvas, y, lines, LEFT, RIGHT)


def seconds() -> str:
    """For the README: a whole image on a GPU and on a CPU, and the head alone."""
    canvas = Canvas(WIDTH, 470, "Seconds an image, and the head alone. Shorter is better", (
        "Bars from zero, shorter is better. The eager loop, torch.compile, cspd.patch and cspd.patch with whole=True "
        "for one image of MAR-B on an NVIDIA H100 and on a CPU; and 100 denoising steps of the head alone. Ratios are "
        "to the eager code, the first bar."
    ))  # fmt: skip
    y = 54
    for result in map(load, ("generate-h100.json", "generate-cpu.json")):
        (size, dtype), rows = next(iter(images(result).items()))
        canvas.text(16, y, case(size, dtype, result) + " (seconds)", bold=True)
        y = image_bars(canvas, y + 6, rows) + 26
    canvas.text(
        16, y, "The head alone: MAR-B, 2 tokens, 100 denoising steps. NVIDIA H100, bfloat16 (milliseconds)", bold=True
    )
    y = head_bars(canvas, y + 6, "MAR-B N=2 T=100") + 22
    footer(
        canvas, y, f"{SCALED} Ratios are to the first bar of each group.",
        "Eager code on the H100 is launch-bound, so compare with torch.compile as well. Random weights.",
        f"{source('generate-h100.json')}; {source('generate-cpu.json')};", f"{source('kernels-h100.json')}.",
    )  # fmt: skip
    canvas.height = y + 60
    return canvas.svg()


def seconds_images() -> str:
    """Every case of ``generate.py``, then what speculation adds."""
    results = [load("generate-h100.json"), load("generate-cpu.json")]
    canvas = Canvas(WIDTH, 0, "Seconds an image. Shorter is better", (
        "Bars from zero, shorter is better: every way to make an image, in every case that was measured, and "
        "speculative decoding beside the target alone."
    ))  # fmt: skip
    y = 54
    for result in results:
        for (size, dtype), rows in images(result).items():
            canvas.text(16, y, case(size, dtype, result) + " (seconds)", bold=True)
            y = image_bars(canvas, y + 6, rows, all_ways=True) + 24
    for result in results:
        speculated: dict[str, list[dict]] = {}
        for row in result["rows"]:
            if row["op"] == "run":
                speculated.setdefault(row["size"], []).append(row)
        for size, rows in speculated.items():
            drafts = {row["details"]["draft"] for row in rows if "draft" in row["details"]}
            title = f"Speculative, draft {', '.join(sorted(drafts))}. " + case(size, "bfloat16", result)
            canvas.text(16, y, f"{title} (seconds)", bold=True)
            rows.sort(key=lambda row: row["details"].get("target_calls", math.inf), reverse=True)
            y = bars(canvas, y + 6, [speculative_bar(row) for row in rows], LEFT, RIGHT) + 24
    footer(
        canvas, y, f"{SCALED} Ratios are to the first bar of each group.",
        "Random weights: no drafted token was accepted, so all of them were drawn again.",
        f"{source('generate-h100.json')}; {source('generate-cpu.json')}.",
    )  # fmt: skip
    canvas.height = y + 44
    return canvas.svg()


def speculative_bar(row: dict) -> tuple:
    name = row["backend"].rsplit(" ", 1)[0]
    _, value, text, _ = image_bar(row, name, GREY)
    if row["backend"] == row["baseline"]:
        return f"{name} (baseline)", value, text, GREY
    details = row["details"]
    text += f"  {details['target_calls']} target calls"
    return name, value, text, BLUE


PARTS = {"transformer": BLUE, "transformer and rest": GREEN, "head": ORANGE, "rest": GREY}
HEAD_PARTS = {  # parts of a call of the head: how the names of their kernels begin
    "products of the blocks": BLUE,
    "products for the modulations": AMBER,
    "residual and activation": PURPLE,
    "first layer, update of the token, other": GREY,
}


def time_split() -> str:
    """Shares of transformer, head and rest, and of the kernels in a call of the head."""
    canvas = Canvas(WIDTH, 0, "Where the time goes", (
        "Bars of equal length, split by share. Above: transformer, head and rest of an image. Below: kernels of one "
        "call of MAR-H's head for 512 tokens."
    ))  # fmt: skip
    y = 54
    for name in ("generate-h100.json", "generate-cpu.json"):
        result = load(name)
        for (size, dtype), rows in images(result).items():
            canvas.text(16, y, case(size, dtype, result), bold=True)
            lines = []
            for way in (way for way in WAYS if "seconds" in rows.get(way, {"details": ()})["details"]):
                spent = rows[way]["details"]["seconds"]
                parts = [(spent[part], slot) for part, slot in PARTS.items() if part in spent]
                lines.append((WAYS[way][0].removesuffix(" (baseline)"), parts, time(spent["total"])))
            y = stacks(canvas, y + 8, lines, LEFT, RIGHT) + 20
    y = canvas.legend(16, y - 2, [(slot, name, "box") for name, slot in PARTS.items()], WIDTH - 16) + 18
    canvas.text(16, y, "One call of the head: MAR-H, 512 tokens, 100 denoising steps. NVIDIA H100, bfloat16", bold=True)
    y = stacks(canvas, y + 8, head_stacks(), LEFT, RIGHT) + 16
    y = canvas.legend(16, y, [(slot, name, "box") for name, slot in HEAD_PARTS.items()], WIDTH - 16) + 8
    notes = [
        "Seconds are of the run that was split, which is not the timed one. With whole=True the transformer cannot be",
        "told from the rest: the head's part is what a longer chain of denoising steps adds, times its length.",
        "At commit 3093537 the activation counts as other.",
        f"{source('generate-h100.json')}; {source('generate-cpu.json')}; profile-h100.json.",
    ]
    footer(canvas, y, *notes)
    canvas.height = y + 60
    return canvas.svg()


def head_stacks() -> list[tuple]:
    profile = load("profile-h100.json")
    lines = []
    for made in (profile, profile["later"]):
        for chain in made["chains"]:
            if (chain["model"], chain["rows"], chain["dtype"]) == ("MAR-H", 512, "bfloat16"):
                name = f"{chain['backend']} layered, commit {made['commit']}"
                lines.append((name, head_parts(chain), time(chain["device_ms"] / 1e3)))
    return lines


def head_parts(chain: dict, depth: int = 12, steps: int = 100) -> list[tuple[float, int]]:
    """Microseconds by kind. Library products are told apart by their number: two for every block and step, or fewer."""
    spent = dict.fromkeys(HEAD_PARTS, 0.0)
    blocks, modulations, between, other = HEAD_PARTS
    for kernel in chain["kernels"]:
        name = kernel["name"]
        if name.startswith("nvjet"):
            kind = blocks if kernel["launches"] == 2 * depth * steps else modulations
        elif name.startswith("_mlp"):
            kind = blocks
        else:
            kind = between if "residual" in name or "silu" in name else other
        spent[kind] += kernel["total_us"]
    spent[other] += 1e3 * chain["device_ms"] - sum(spent.values())
    return [(spent[kind], slot) for kind, slot in HEAD_PARTS.items() if spent[kind] > 0]
