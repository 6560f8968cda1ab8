"""Tables of the kernels' and the images' seconds, from the files in ``results``."""

from __future__ import annotations

import json
import math
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BASELINES = {  # as the rows name them, and as the head of a column does
    "eager autocast bfloat16": "eager autocast",
    "eager loop in one CUDA graph bfloat16": "eager in one CUDA graph",
    "torch.compile reduce-overhead bfloat16": "`torch.compile`",
    "library products alone bfloat16": "library products alone",
}
KERNELS = {
    "triton bfloat16": "triton layered",
    "cuda bfloat16": "cuda layered",
    "cuda persistent bfloat16": "cuda persistent",
}
NONE = "–"  # noqa: RUF001


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def table(head: list[str], lines: list[list[str]]) -> str:
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])
        .replace("| --- ", "|---")
        .replace("|  |", "| |")
    )


def duration(seconds: float) -> tuple[float, str, int]:
    """(factor, unit, digits) to show a time of this size by."""
    if seconds >= 0.1:
        return 1, "s", 2 if seconds < 10 else 0
    if seconds >= 1e-3:
        return 1e3, "ms", 1
    return 1e6, "us", 1 if seconds < 1e-5 else 0


def milliseconds(seconds: float) -> str:
    """Three digits, and no more than three behind the point."""
    value = 1e3 * seconds
    return f"{value:.{3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def time(seconds: float) -> str:
    """Three digits."""
    value, unit = (seconds, "s") if seconds >= 0.1 else (1e3 * seconds, "ms")
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"


def timed(row: dict, which: str = "") -> str:
    """A median with its spread; ``which`` is "" or "baseline_"."""
    median = row[f"{which}seconds"]
    low, high = (row[f"baseline_{p}" if which else f"seconds_{p}"] for p in ("p20", "p80"))
    factor, unit, digits = duration(median)
    return f"{median * factor:.{digits}f} {unit} ({low * factor:.{digits}f}–{high * factor:.{digits}f})"  # noqa: RUF001


def on_the_cpu(rows: list[dict], first: str, last: str) -> str:
    """Row by row; ``last`` names what the error is."""
    rows = [row for row in rows if row["op"] != "denoise in parallel" and not row["baseline"].startswith("sum")]
    shares = any(row.get("share") for row in rows)
    lines = []
    for row in rows:
        name = row["backend"].removeprefix("torch").strip().replace("closed_form", "closed form")
        name = f"`{row['op']}` {row['size']}{', ' if name else ''}{name}"
        compared = f"{row['baseline']} {timed(row, 'baseline_')}"
        ratio = NONE if row["ratio"] is None else f"{row['ratio']:.2f}x"
        share = [NONE if row.get("share") is None else f"{100 * row['share']:.0f} %"] if shares else []
        lines.append([name, timed(row) if row["ratio"] else "wrong", compared, ratio, *share, f"{row['error']:.0e}"])
    return table([first, "this package", "baseline", "ratio", *["share of the floor's speed"] * shares, last], lines)


def chains(rows: list[dict]) -> str:
    """Milliseconds of the chains with bfloat16 operands: a line a case, a column a contender."""
    rows = [row for row in rows if row["op"] == "denoise"]
    median, errors = {}, {}
    for row in rows:
        median[row["size"], row["baseline"]] = row["baseline_seconds"]
        if row["ratio"] is not None:  # a wrong one shows no speed
            median[row["size"], row["backend"]] = row["seconds"]
        if row["backend"] in KERNELS:
            errors[row["size"]] = max(errors.get(row["size"], 0.0), row["error"])
    names = {name: short for name, short in (BASELINES | KERNELS).items() if any(key[1] == name for key in median)}
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        fastest = min((name for name in KERNELS if (size, name) in median), key=lambda name: median[size, name])
        cells = [size.removesuffix(" T=100")]
        for name in names:
            value = median.get((size, name))
            shown = NONE if value is None else milliseconds(value)
            cells.append(f"**{shown}**" if name == fastest else shown)
        lines.append([*cells, f"{errors[size]:.0e}"])
    return table(["ms", *names.values(), "error"], lines)


def spreads(rows: list[dict]) -> str:
    """How far the medians of :func:`chains` may be trusted."""
    widest: dict[str, float] = {}
    for row in (row for row in rows if row["op"] == "denoise"):
        for name, kind in ((row["backend"], ""), (row["baseline"], "baseline_")):
            if name in BASELINES or name in KERNELS:
                low, high = (row[f"baseline_{p}" if kind else f"seconds_{p}"] for p in ("p20", "p80"))
                group = BASELINES.get(name, "this package")
                widest[group] = max(widest.get(group, 0.0), (high - low) / row[f"{kind}seconds"])
    runs = sorted({row["runs"] for row in rows if row["op"] == "denoise"})
    names = sorted(widest, key=widest.get)
    head = [f"largest spread, p20 to p80, of {' or '.join(map(str, runs))} runs", *names]
    return table(head, [["of the median", *(f"{100 * widest[name]:.0f} %" for name in names)]])


def ratios(rows: list[dict]) -> str:
    """Shares of the bandwidth of a copy, and of a sum where it was measured."""
    rows = [row for row in rows if row["op"] == "log_density_ratio" and row["backend"] != "torch"]
    sizes, backends, baselines = (dict.fromkeys(row[key] for row in rows) for key in ("size", "backend", "baseline"))
    found = {(row["baseline"], row["backend"], row["size"]): f"{row['ratio']:.2f}" for row in rows}
    parts = []
    for baseline in baselines:
        lines = [
            [f"`log_density_ratio`, {backend}", *(found.get((baseline, backend, size), NONE) for size in sizes)]
            for backend in backends
        ]
        head = [f"share of a {baseline.split()[0]}'s bandwidth", *(size.removesuffix(" C=16") for size in sizes)]
        parts.append(table(head, lines))
    return "\n".join(parts)


def verdicts(rows: list[dict]) -> str:
    """Milliseconds of the accept test with its redraws."""
    found = {(row["size"], row["backend"]): row for row in rows if row["op"] == "accept_reject"}
    measured = [backend for backend in ("triton", "cuda") if any(name.startswith(backend) for _, name in found)]
    contenders, lines = [(backend, how) for how in ("", ", replayed") for backend in measured], []
    for size in dict.fromkeys(size for size, _ in found):
        for residual in ("rejection", "closed_form"):
            own = [found[size, f"{backend} {residual}{how}"] for backend, how in contenders]
            shown = [own[0]["baseline_seconds"], *(row["seconds"] for row in own)]
            lines.append([f"{size.removesuffix(' C=16')}, {residual.replace('_', ' ')}", *map(milliseconds, shown)])
    return table(["`accept_reject`, ms", "looped torch", *map("".join, contenders)], lines)


def sweeps(rows: list[dict]) -> str:
    """Milliseconds of the chains step by step and in so many sweeps, by backend; the fastest in bold."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        backend, count, _ = row["backend"].split(maxsplit=2)
        times = found.setdefault(row["size"].replace(" T=100", ""), {})
        times[backend, "steps"] = row["baseline_seconds"]
        if row["ratio"] is not None:
            times[backend, f"{count} sweeps"] = row["seconds"]
    columns = [(backend, way) for backend in ("triton", "cuda") for way in ("steps", "10 sweeps", "27 sweeps")]
    lines = []
    for size, times in found.items():
        shown = {column: milliseconds(times[column]) if column in times else NONE for column in columns}
        fastest = min((column for column in columns if column in times), key=times.get, default=None)
        cells = [f"**{shown[column]}**" if column == fastest else shown[column] for column in columns]
        lines.append([size, *cells])
    return table(["ms", *map(", ".join, columns)], lines)


WAYS = ("torch.compile", "patched", "whole", "whole, step by step")  # columns of the images, beside the eager loop


def generated(rows: list[dict]) -> str:
    """Seconds an image of ``generate.py``, then what speculation adds. Of a wrong image no speed is shown."""
    parts, sampled = [], [row for row in rows if row["op"] == "sample_tokens"]
    if sampled:
        found = {(row["size"], *row["backend"].rsplit(" ", 1)): row for row in sampled}
        ways = [way for way in WAYS if any(key[1] == way for key in found)]
        lines = []
        for size, kind in dict.fromkeys((size, kind) for size, _, kind in found):
            eager, own = found[size, "eager loop", kind], [found.get((size, way, kind)) for way in ways]
            seconds = [image_seconds(eager), *(image_seconds(row) if row else NONE for row in own)]
            ours = [row["error"] for row, way in zip(own, ways) if row and way != "torch.compile"]
            lines.append([f"{size}, {kind}", *seconds, f"{max(ours):.0e}" if ours else NONE])
        parts.append(table(["seconds an image", "eager loop", *ways, "difference"], lines))
    windows = [row for row in rows if row["op"] == "run" and "acceptance" in row["details"]]
    if windows:
        lines = [
            [f"{row['size']}, {row['backend']}", each(row, "baseline_"), image_seconds(row), percent(row["details"])]
            for row in windows
        ]
        parts.append(table(["seconds an image", "target alone", "speculative", "accepted"], lines))
    return "\n".join(parts)


def batch_of(row: dict) -> int:
    return int(row["size"].partition("batch ")[2].split()[0])


def each(row: dict, which: str = "") -> str:
    return f"{row[f'{which}seconds'] / batch_of(row):.3g}"


def image_seconds(row: dict) -> str:
    """With the ratio to the baseline; a star where steps were left out and the rest scaled."""
    if row["ratio"] is None:
        return "wrong"
    star = "\\*" if "measured" in row["details"] else ""
    return each(row) + star + ("" if row["backend"] == row["baseline"] else f" ({row['ratio']:.1f}x)")


def percent(details: dict) -> str:
    return f"{100 * details['acceptance']:.0f} %"


def cpu(threads: int) -> str:
    return f"CPU, {threads} thread{'s' * (threads != 1)}"


def origin(result: dict) -> str:
    """On what, with what and at which commit."""
    environment = result["environment"]
    gpus = environment["gpus"]
    parts = [gpus[0]["name"] if gpus else cpu(environment["cpu threads"])]
    for name, key in (("driver", "nvidia driver"), ("PyTorch", "torch"), ("Triton", "triton"), ("Python", "python")):
        parts += [f"{name} {environment[key]}"] if environment.get(key, "none") != "none" else []
    if nvcc := environment.get("cuda extension", {}).get("nvcc"):
        parts.append(f"nvcc {nvcc}")
    return f"{', '.join(parts)}; commit {result['commit'].removesuffix('-dirty')}. {result.get('note', '')}".strip()


def whole_images(device: str) -> str:
    """By ``generate.py``."""
    result = load(f"generate-{device}.json")
    return f"{origin(result)}\n\n{generated(result['rows'])}"


def kernels(device: str) -> str:
    """By ``kernels.py``."""
    result = load(f"kernels-{device}.json")
    if device == "cpu":
        return f"{origin(result)}\n\n" + on_the_cpu(result["rows"], "op, size", "error")
    return f"{origin(result)}\n\n" + "\n".join(part(result["rows"]) for part in (chains, spreads, ratios, verdicts))


def swept() -> str:
    result = load("in-parallel-h100.json")
    return f"{origin(result)}\n\n" + sweeps(result["rows"])
