"""The README's table, what does not help, the demo's table, and sweeps beside steps: chosen rows, in words."""

from __future__ import annotations

from report_tables import BASELINES, KERNELS, NONE, batch_of, cpu, load, milliseconds, table, time


def device(result: dict) -> str:
    gpus = result["environment"]["gpus"]
    return gpus[0]["name"].split()[1] if gpus else cpu(result["environment"]["cpu threads"])


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def image_lines(name: str, dtype: str) -> list[list[str]]:
    """The first case of ``generate.py`` in a dtype: the patched head, and the whole loop."""
    result = load(name)
    rows = [row for row in result["rows"] if row["op"] == "sample_tokens" and row["backend"].endswith(dtype)]
    lines = []
    for way, call in (("patched", "cspd.patch(model)"), ("whole", "cspd.patch(model, whole=True)")):
        row = next(row for row in rows if row["backend"] == f"{way} {dtype}")
        base = next(one for one in rows if one["backend"] == row["baseline"] and one["size"] == row["size"])
        model, steps = row["size"].split()[:2]
        lines.append([
            f"`{call}`: an image of {model} in {steps} steps, {dtype}", device(result),
            "your loop, eager " + image_time(base), image_time(row), *compared(row),
        ])  # fmt: skip
    return lines


def image_time(row: dict) -> str:
    if row["ratio"] is None:
        return "wrong"
    return time(row["seconds"] / batch_of(row)) + ("\\*" if "measured" in row["details"] else "")


def compared(row: dict) -> list[str]:
    return [NONE if row["ratio"] is None else times(row["ratio"]), f"{row['error']:.0e}"]


def head_line(size: str, baseline: str) -> list[str]:
    """The fastest kernels of this package for a chain on the H100."""
    result = load("kernels-h100.json")
    rows = [row for row in result["rows"] if (row["size"], row["baseline"]) == (size, baseline)]
    rows = [row for row in rows if row["backend"] in KERNELS and row["ratio"] is not None]
    row = min(rows, key=lambda row: row["seconds"])
    model, tokens = row["size"].split()[:2]
    return [
        f"the head of {model} alone: {tokens.removeprefix('N=')} tokens, 100 denoising steps, bfloat16", device(result),
        f"{BASELINES[baseline]} {time(row['baseline_seconds'])}", time(row["seconds"]), *compared(row),
    ]  # fmt: skip


def headline() -> str:
    """Of the README: a line where it does not help is among them."""
    gpu = load("generate-h100.json")
    runs = [row for row in gpu["rows"] if row["op"] == "run" and "draft" in row["details"] and row["ratio"] is not None]
    best = max(runs, key=lambda row: row["ratio"])
    model, steps = best["size"].split()[:2]
    lines = [
        *image_lines("generate-h100.json", "bfloat16"),
        head_line("MAR-B N=2 T=100", "torch.compile reduce-overhead bfloat16"),
        head_line("MAR-H N=512 T=100", "torch.compile reduce-overhead bfloat16"),
        *image_lines("generate-cpu.json", "float32"),
        [
            f"`SpecDecodeRunner`: an image of {model} in {steps} steps, draft {best['details']['draft']}, gamma "
            f"{best['backend'].split()[2]}, random weights", device(gpu),
            f"the target alone, `whole=True` {time(best['baseline_seconds'])}", time(best["seconds"]),
            times(best["ratio"]), "approximate",
        ],
    ]  # fmt: skip
    demo = load("demo-cpu.json")
    (target, *_), _, speculative = demo_rows(demo)
    lines.append([
        f"**no gain:** `SpecDecodeRunner`: {demo['timed_images']} digits, gamma {speculative['gamma']}",
        cpu(demo["threads"]),
        f"the target alone {time(target['seconds'])}", time(speculative["seconds"]),
        times(target["seconds"] / speculative["seconds"]),
        f"Frechet distance {speculative['frechet_distance']:.2f}, target {target['frechet_distance']:.2f}",
    ])  # fmt: skip
    head = ["what", "device", "baseline", "this package", "ratio", "difference"]
    return table(head, lines)


def demo_rows(result: dict) -> tuple[list[dict], dict, dict]:
    """The target's rows from many steps to few, the draft's, and that of speculation with the smallest gamma."""
    rows = result["rows"]
    targets = [row for row in rows if row["name"].startswith("target")]
    speculative = min((row for row in rows if row["gamma"] is not None), key=lambda row: row["gamma"])
    draft = next(row for row in rows if row["name"].startswith("draft"))
    return sorted(targets, key=lambda row: row["steps"], reverse=True), draft, speculative


def demo() -> str:
    """By ``cspd demo --json``."""

    def show(value, form: str) -> str:
        return NONE if value is None else format(value, form).replace("%", " %")

    result = load("demo-cpu.json")
    forms = {
        "seconds": ".2f", "target_calls": "d", "draft_calls": "d", "raw_acceptance": ".1%", "acceptance": ".1%",
        "frechet_distance": ".3f",
    }  # fmt: skip
    lines = [[row["name"], *(show(row.get(key), form) for key, form in forms.items())] for row in result["rows"]]
    return table(["", *(key.replace("_", " ").replace("frechet", "Frechet") for key in forms)], lines)


def limits() -> str:
    """Where it does not help, with the figures."""
    demo, gpu, cpu = load("demo-cpu.json"), load("kernels-h100.json")["rows"], load("kernels-cpu.json")["rows"]
    (_, fewer, *_), draft, own = demo_rows(demo)

    def at(rows: list[dict], size: str, backend: str, baseline: str) -> dict:
        return next(row for row in rows if (row["size"], row["backend"], row["baseline"]) == (size, backend, baseline))

    few, many, few_half, many_half = (
        at(cpu, f"MAR-B N={n} T=100", f"torch {dtype}", baseline)["ratio"]
        for dtype, baseline in (("float32", "eager float32"), ("bfloat16", "eager autocast bfloat16")) for n in (2, 64)
    )  # fmt: skip
    size = "MAR-H N=512 T=100"
    compiled, products = (at(gpu, size, "cuda bfloat16", f"{name} bfloat16") for name in (
        "torch.compile reduce-overhead", "library products alone",
    ))  # fmt: skip
    layered = at(gpu, size, "triton bfloat16", "library products alone bfloat16")["seconds"]
    wide = at(gpu, size, "triton float32", "eager float32")
    shares = [at(gpu, "N=131072 C=16", backend, "copy of as many bytes")["ratio"] for backend in ("triton", "cuda")]
    eager = [row["ratio"] for row in gpu if row["op"] == "accept_reject" and row["backend"].startswith("torch")
             and "replayed" not in row["backend"]]  # fmt: skip
    host = [row["ratio"] for row in cpu if row["op"] == "accept_reject"]
    copies = [row["ratio"] for row in cpu if row["baseline"] == "copy of as many bytes"]
    lines = [
        "**Speculation on the digits.** Its transformers are tiny, and the head runs for every token in both models. "
        f"Gamma {own['gamma']} took {time(own['seconds'])} and has a Frechet distance of "
        f"{own['frechet_distance']:.3f}. "
        f"The target alone with {fewer['steps']} steps took {time(fewer['seconds'])} and has "
        f"{fewer['frechet_distance']:.3f}. The draft alone took "
        f"{time(draft['seconds'])} and has {draft['frechet_distance']:.3f}.",
        "**Many tokens on a CPU.** The arithmetic is then the limit. In float32 the head is "
        f"{times(few)} as fast as eager code with 2 tokens, and {times(many)} with 64. In bfloat16 it is "
        f"{times(few_half)} and {times(many_half)}, against eager code under autocast.",
        f"**Many tokens on the H100.** For 512 tokens of MAR-H the CUDA kernels took {time(compiled['seconds'])} and "
        f"the Triton kernels {time(layered)}. `torch.compile` took {time(compiled['baseline_seconds'])}, and the "
        f"library's matrix products alone {time(products['baseline_seconds'])}. In float32 the Triton kernels took "
        f"{time(wide['seconds'])} and eager code {time(wide['baseline_seconds'])}.",
        f"**Judging on the H100.** `log_density_ratio` reached {min(shares):.2f} to {max(shares):.2f} of a copy's "
        f"bandwidth at 131,072 tokens. `accept_reject(backend=\"torch\")`, called eagerly, ran at {min(eager):.2f} to "
        f"{max(eager):.2f} times the speed of the loop that it replaces.",
        f"**Judging on a CPU.** `accept_reject` ran at {min(host):.2f} to {max(host):.2f} times the speed of the loop "
        "that it replaces. Its random numbers do not depend on the batch, and that costs integer arithmetic. "
        f"`log_density_ratio` reached {min(copies):.2f} to {max(copies):.2f} of a copy's bandwidth. Both take "
        "milliseconds, beside a head that takes tenths of seconds.",
    ]  # fmt: skip
    return "".join(f"- {line}\n" for line in lines)


def host() -> str:
    """By ``host.py``: what a patched call does beside the op, of two tokens without guidance."""
    result, lines = load("host-cpu.json"), []
    for row in result["rows"]:
        if (row["tokens"], row["cfg"]) == (2, 1.0):
            call, op, rest = (row[f"{name} seconds"][0] for name in ("call", "op", "rest"))
            lines.append(
                [row["dtype"], row["weights"], time(call), time(op), time(rest), f"{100 * row['share']:.2g} %"]
            )
    head = ["operands", "weights", "a patched call", "the op", "beside the op", "share"]
    return table(head, lines)


def sweeps_on_the_cpu() -> str:
    """Ten sweeps beside the steps of MAR-B's head."""
    lines = []
    for row in load("in-parallel-cpu.json")["rows"]:
        dtype = row["backend"].rsplit(" ", 1)[1]
        lines.append([
            f"{row['size'].removesuffix(' T=100').replace(' T=100 ', ', ')}, {dtype}", time(row["baseline_seconds"]),
            time(row["seconds"]), NONE if row["ratio"] is None else f"{row['ratio']:.2f}x",
        ])  # fmt: skip
    return table(["CPU, one thread", "steps", "10 sweeps", "ratio"], lines)


def sweeps_or_steps() -> str:
    """The faster backend's steps, the faster backend's sweeps, and how many sweeps take as long as the steps."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    steps: dict[str, float] = {}
    for row in load("in-parallel-h100.json")["rows"]:
        backend, count = row["backend"].split()[:2]
        if backend == "torch":
            continue
        steps[row["size"]] = min(steps.get(row["size"], row["baseline_seconds"]), row["baseline_seconds"])
        if row["ratio"] is not None:
            found.setdefault(row["size"], {}).setdefault(int(count), {})[backend] = row["seconds"]
    lines = []
    for size, counts in found.items():
        model, tokens, _, *guided = size.split()
        few = min(counts[10].values())
        equal = ""
        if 27 in counts:
            each = (min(counts[27].values()) - few) / 17
            equal = f"{(steps[size] - few) / each + 10:.0f}" if steps[size] > few else ""
        count = int(tokens.removeprefix("N="))
        name = ", ".join([model, f"{count} token{'s' * (count > 1)}", *guided])
        lines.append([name, milliseconds(steps[size]), milliseconds(few), f"{steps[size] / few:.2f}x", equal])
    return table(["ms", "steps", "10 sweeps", "ratio", "sweeps that take as long as the steps"], lines)
