"""The line and point charts of the pages: latency against tokens, quality against cost, sweeps against distance."""

from __future__ import annotations

import math

from report_plots import AMBER, BLUE, CHAINS, GREEN, GREY, ORANGE, PURPLE, device, footer, source
from report_svg import Canvas, panel
from report_tables import load

HEADS = {"MAR-B": (6, 1024), "MAR-L": (8, 1280), "MAR-H": (12, 1536)}  # blocks, width
GAMMA = "\N{GREEK SMALL LETTER GAMMA}"
CHANNELS, CONDITION = 16, {"MAR-B": 768, "MAR-L": 1024, "MAR-H": 1280}


def tokens_of(size: str) -> int:
    return int(size.partition("N=")[2].split()[0])


def chains(names: list[str]) -> dict[str, dict[str, dict[int, float]]]:
    """Milliseconds by model, contender and tokens. Where files overlap, the first is shown."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name in names:
        for row in load(name)["rows"]:
            if row["op"] != "denoise":
                continue
            lines, tokens = found.setdefault(row["size"].split()[0], {}), tokens_of(row["size"])
            if row["ratio"] is not None:  # a wrong one shows no speed
                lines.setdefault(row["backend"], {}).setdefault(tokens, 1e3 * row["seconds"])
            lines.setdefault(row["baseline"], {}).setdefault(tokens, 1e3 * row["baseline_seconds"])
            if row.get("floor_seconds"):
                name = f"floor {row['backend'].split()[-1]}"
                lines.setdefault(name, {}).setdefault(tokens, 1e3 * row["floor_seconds"])
    return found


def floor(model: str, tokens: int, ceilings: dict, steps: int = 100, size: int = 2) -> float:
    """Milliseconds: the larger of two times. What every step must read are the two matrices of each block, and those
    of the first and the last layer; the modulations are made for all steps at once. Operations: two for each weight
    and token."""
    blocks, width = HEADS[model]
    each = blocks * 2 * width**2 + 3 * CHANNELS * width
    once = blocks * 3 * width**2 + 2 * width**2 + (CONDITION[model] + width + 256) * width
    read = size * (steps * each + once) / (1e12 * ceilings["copy TB/s"])
    work = 2 * tokens * steps * (each + blocks * 3 * width**2 + 2 * width**2)
    return 1e3 * max(read, work / (1e12 * ceilings["dense bf16 TFLOP/s"]))


def latency_h100() -> str:
    names = ["kernels-h100.json", "denoise-h100.json"]
    found, ceilings = chains(names), load("profile-h100.json")["ceilings"]
    canvas = Canvas(860, 520, "Milliseconds for 100 denoising steps of N tokens. NVIDIA H100, bfloat16", (
        "Two log-log charts, MAR-B and MAR-H: milliseconds of a call of the head against the number of tokens. "
        "There are lines for eager code, the eager loop in one CUDA graph, torch.compile, the library's products alone "
        "and this package's kernels. A dashed line is the time to read the weights, or to do the operations, at "
        "measured rates."
    ))  # fmt: skip
    for model, left in (("MAR-B", 56), ("MAR-H", 480)):
        most = max(tokens for line in found[model].values() for tokens in line)
        y = {"log": True, "label": "milliseconds"} | dict(
            zip(("low", "high"), (0.7, 205) if model == "MAR-B" else (3, 410))
        )
        x = {"low": 0.8, "high": 1.3 * most, "log": True, "label": "tokens N"}
        x["ticks"] = [1, 2, 4, 8, 16, 64] + ([512] if most > 64 else [])
        drawn = panel(canvas, (left, 96, left + 350, 390), x, y, f"The head of {model}")
        for name, (_, slot) in CHAINS.items():
            points = sorted(found[model].get(name, {}).items())
            drawn.series(points, slot, dash=name.startswith("library"))
        told = sorted(found[model].get("floor bfloat16", {}).items())
        counts = [2**power for power in range(int(math.log2(most)) + 1)]
        told = told or [(n, floor(model, n, ceilings)) for n in counts]
        drawn.series(told, GREY, points_too=False, dash=True)
    entries = [(slot, name, "line") for name, slot in CHAINS.values()]
    y = canvas.legend(24, 446, [*entries, (GREY, "weights or operations at measured rates", "dash")], 840)
    copy, work = ceilings["copy TB/s"], ceilings["dense bf16 TFLOP/s"]
    notes = [
        f"Weights or operations: the blocks' matrices read once a step at {copy:.0f} TB/s (a copy), or all operations",
        f"at {work} TFLOP/s, whichever takes longer (profile-h100.json). MAR-B's blocks fit the 50 MB of cache, so",
        "that line is no strict bound. Library products alone: the matrix products, in one CUDA graph.",
        f"{source(names[0])}; {source(names[1])}.",
    ]
    footer(canvas, y + 2, *notes)
    canvas.height = y + 66
    return canvas.svg()


def latency_cpu() -> str:
    found, result = chains(["kernels-cpu.json"])["MAR-B"], load("kernels-cpu.json")
    canvas = Canvas(640, 460, f"Milliseconds for 100 denoising steps of N tokens. {device(result)}", (
        "A log-log chart for MAR-B's head: milliseconds of a call against the number of tokens, for eager code and "
        "for this package, in float32 and with bfloat16 operands."
    ))  # fmt: skip
    low, high = (f(v for line in found.values() for v in line.values()) for f in (min, max))
    counts = sorted({tokens for line in found.values() for tokens in line})
    x = {"low": 0.8 * counts[0], "high": 1.25 * counts[-1], "log": True, "ticks": counts, "label": "tokens N"}
    y = {"low": 0.7 * low, "high": 1.4 * high, "log": True, "label": "milliseconds"}
    drawn = panel(canvas, (70, 96, 620, 340), x, y, "The head of MAR-B")
    names = {
        "eager float32": ("eager, float32 (baseline)", GREY, "line"),
        "eager autocast bfloat16": ("eager, autocast bfloat16 (baseline)", AMBER, "line"),
        "torch.compile float32": ("torch.compile, float32", PURPLE, "line"),
        "torch.compile bfloat16": ("torch.compile, bfloat16", ORANGE, "line"),
        "torch float32": ("this package, float32", BLUE, "line"),
        "torch bfloat16": ("this package, bfloat16", GREEN, "line"),
        "floor float32": ("floor, float32", BLUE, "dash"),
        "floor bfloat16": ("floor, bfloat16", GREEN, "dash"),
    }
    names = {name: how for name, how in names.items() if name in found}
    for name, (_, slot, kind) in names.items():
        drawn.series(sorted(found[name].items()), slot, points_too=kind == "line", dash=kind == "dash")
    y = canvas.legend(24, 396, [(slot, name, kind) for name, slot, kind in names.values()], 620)
    note = "No floor was measured on this machine."
    if result.get("rates"):
        note = "Floor: bytes or operations at rates measured in the same run, whichever takes longer."
    footer(canvas, y + 2, note, f"{source('kernels-cpu.json')}.")
    canvas.height = y + 34
    return canvas.svg()


# What quality's charts show, by name of the row: the other rows are in the tables.
SHOWN = {
    "window, relaxation 42": ("window, relaxation 42 (default)", ORANGE),
    "strict, relaxation 42": ("strict, relaxation 42", PURPLE),
    "exact": ("strict, exact", BLUE),
}


def quality_calls() -> str:
    """Two panels: the figure against target calls, with the gammas at the points."""
    canvas = Canvas(860, 480, "Quality against target calls: further left and lower is better", (
        "Two charts, digits and cloth: the Frechet distance against passes of the target that follow each other. "
        "There are points for the target alone with fewer steps, and for windows, strict and exact verification with "
        "their gammas. The draft alone is a line."
    ))  # fmt: skip
    above = []
    for pair, left, high in (("digits", 60, 0.62), ("cloth", 484, 5.6)):
        result = load(f"quality-{pair}-cpu.json")
        rows = {row["name"]: row for row in result["rows"]}
        plain = [row for row in result["rows"] if row["kind"] == "target"]
        most, least = max(row["target_calls"] for row in plain), min(row["figure"] for row in plain)
        x = {"low": 0, "high": 1.12 * most, "label": "target calls, one after the other, of an image"}
        y = {"low": 0.95 * least, "high": high, "label": result["figure"]}
        drawn = panel(canvas, (left, 96, left + 350, 390), x, y, f"The {pair}: {result['plain_steps'][0]} steps")
        within = [row for row in plain if row["figure"] <= high]
        above += [f"{pair}, {row['steps']} steps: {row['figure']:.2f}" for row in plain if row not in within]
        points = [(row["target_calls"], row["figure"]) for row in within]
        drawn.series(points, GREY)
        drawn.series([points[-1], leaving(points[-1], plain[len(within)], high)], GREY, points_too=False)
        draft = next(row["figure"] for row in result["rows"] if row["kind"] == "draft")
        drawn.series([(0, draft), (1.12 * most, draft)], AMBER, points_too=False, dash=True)
        marked = []
        for start, (_, slot) in SHOWN.items():
            for gamma in (2, 4, 8):
                if row := rows.get(f"{start}, gamma {gamma}"):
                    drawn.series([(row["target_calls"], row["figure"])], slot)
                    marked.append(((row["target_calls"], row["figure"]), f"{start.split(',')[0]}, {GAMMA}={gamma}"))
        for point, row in zip(points, within):
            marked.append((point, f"{row['steps']} steps"))
        for point, text in marked:
            drawn.label(point, text)
    entries = [(GREY, "target alone, fewer steps (baseline)", "line")]
    entries += [(slot, name, "point") for name, slot in SHOWN.values()]
    y = canvas.legend(24, 448, [*entries, (AMBER, "draft alone, no target calls", "dash")], 840)
    names = "; ".join(source(f"quality-{pair}-cpu.json") for pair in ("digits", "cloth"))
    note = f"{GAMMA}: gamma, the steps of a window. Calls of the draft are not counted."
    notes = f"{note} A strict pass has a row for every drafted step.", f"Above the frame: {'; '.join(above)}. {names}."
    footer(canvas, y + 2, *notes)
    canvas.height = y + 34
    return canvas.svg()


def leaving(point: tuple[float, float], row: dict, high: float) -> tuple[float, float]:
    """Where the line to a row above the frame leaves it."""
    share = (high - point[1]) / (row["figure"] - point[1])
    return point[0] + share * (row["target_calls"] - point[0]), high


def quality_seconds() -> str:
    """The digits: the figure against seconds of a batch, for samplers of the head and ways to speculate."""
    result = load("quality-digits-cpu.json")
    canvas = Canvas(760, 520, "Quality against seconds on the digits: further left and lower is better", (
        "The Frechet distance against seconds for a batch of 512 digits on one CPU thread. There are points for the "
        "target with fewer autoregressive steps, with fewer ancestral denoising steps and with DDIM. Windows, exact "
        "verification and the draft alone stand beside them."
    ))  # fmt: skip
    x = {"low": 1.6, "high": 27, "log": True, "ticks": [2, 3, 4, 5, 7, 10, 15, 20], "label": "seconds a batch"}
    y = {"low": 0.42, "high": 0.86, "label": result["figure"]}
    drawn = panel(canvas, (60, 96, 740, 420), x, y, f"{result['batch']} digits, one CPU thread")
    plain = [row for row in result["rows"] if row["kind"] == "target"]
    drawn.series([(row["seconds"], row["figure"]) for row in plain], GREY)
    marked = [((row["seconds"], row["figure"]), f"{row['steps']} steps") for row in plain]
    kinds: dict[tuple[str, int], list] = {("target alone, fewer steps (baseline)", GREY): []}
    for row in result["rows"]:
        kind = sampler_kind(row)
        if kind is None or not y["low"] < row["figure"] < y["high"]:
            continue
        kinds.setdefault(kind, []).append(row)
        drawn.series([(row["seconds"], row["figure"])], kind[1])
        marked.append(((row["seconds"], row["figure"]), short(row)))
    for point, text in marked:
        drawn.label(point, text)
    entries = [(slot, name, "line" if slot == GREY else "point") for name, slot in kinds]
    y = canvas.legend(24, 478, entries, 740)
    own = next(row for row in result["rows"] if row["options"] == {"sampler": "ddim"})["plain_seconds"]
    notes = [
        f"{GAMMA}: gamma, the steps of a window. Ancestral rows with 10 denoising steps lie above the frame.",
        "The samplers were measured in a run of their own.",
        f"There the target alone took {own:.2f} s with all of its steps, here {plain[0]['seconds']:.2f} s. "
        f"{source('quality-digits-cpu.json')}.",
    ]
    footer(canvas, y + 2, *notes)
    canvas.height = y + 50
    return canvas.svg()


def sampler_kind(row: dict) -> tuple[str, int] | None:
    options = row["options"]
    if row["kind"] == "sampler" and "eta" not in options:
        return ("target, DDIM", BLUE) if "sampler" in options else ("target, ancestral, fewer denoising steps", GREEN)
    if row["name"].startswith("window, relaxation 42, gamma") and isinstance(row["gamma"], int):
        return "window, relaxation 42 (default)", ORANGE
    if row["name"] in ("exact, gamma 2", "exact, gamma 4"):
        return "strict, exact", PURPLE
    return ("draft alone", AMBER) if row["kind"] == "draft" else None


def short(row: dict) -> str:
    if row["kind"] == "sampler":
        return str(row["options"].get("sampling_steps", "40")).strip("()").replace(", ", " to ") + " denoising steps"
    return f"{GAMMA}={row['gamma']}" if row["gamma"] else f"{row['steps']} steps"


DRAWN = {  # cases of ``parallel.py``: the others are in the tables
    "100 steps": BLUE,
    "100 steps, guidance 3": ORANGE,
    "digits pair, 40 steps": GREEN,
    "another schedule than trained for": PURPLE,
    "random weights": GREY,
}


def parallel() -> str:
    rows = load("parallel-cpu.json")["rows"]
    canvas = Canvas(860, 480, "How fast sweeps converge to the tokens of the step-by-step chain", (
        "Two charts: the largest distance of a token from the step-by-step chain's, against sweeps, with the slopes of "
        "this package on the left, without them (Picard iteration) on the right."
    ))  # fmt: skip
    for kind, left, title in (
        ("secant", 64, "Secant slopes, this package"),
        ("plain", 488, "Slopes 0: Picard (baseline)"),
    ):
        x = {"low": 0, "high": 40, "label": "sweeps"}
        y = {"low": 1e-8, "high": 100, "log": True, "ticks": [1e-7, 1e-5, 1e-3, 1e-1, 10]}
        y["label"] = "largest distance of a token, of the largest value"
        drawn = panel(canvas, (left, 96, left + 350, 390), x, y, title)
        for row in rows:
            if row["kind"] == kind and row["case"] in DRAWN:
                drawn.series(list(enumerate(row["largest"], start=1)), DRAWN[row["case"]])
    y = canvas.legend(24, 446, [(slot, name, "line") for name, slot in DRAWN.items()], 840)
    footer(canvas, y + 2, f"48 tokens a case, float32, CPU. {source('parallel-cpu.json')}.")
    canvas.height = y + 18
    return canvas.svg()
