"""Microbenchmarks of the kernels: ``python benchmarks/kernels.py [--quick] [--only SECTION] [--json FILE]``;
``--compile-report`` prints registers, spills and shared memory of the Triton kernels instead, without a GPU.

Every row is a ratio against a named baseline, measured in the same run on the same inputs, with the
error beside it. A row whose error exceeds its bound shows no speed. Rows are printed, and written, as they come; what
raises is told in its place, the rest goes on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
from functools import partial
from pathlib import Path

import torch

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.backends import BACKENDS, implementation, why_unavailable
from cspd_kernels.crossover import PERSISTENT_LIMIT, PERSISTENT_VARIABLE, bucket
from cspd_kernels.ops.denoise import reference
from cspd_kernels.testing import random_inputs, randomize_, relative_error

import blocks
import in_parallel
from baselines import IN_ONE_GRAPH, compiled_denoise, eager_denoise, graphable_denoise, library_products
from common import captured, measure, spread
from judging import TOKENS, accept_reject_rows, density_ratio_rows
from report import Report, Row

HEADS = {"MAR-B": (6, 1024, 768), "MAR-L": (8, 1280, 1024), "MAR-H": (12, 1536, 1280)}  # D, W, Z
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
BASELINE_BOUND = 0.5  # far beyond rounding; tokens of other inputs are further off
CASES = {
    "cpu": [("MAR-B", 2), ("MAR-B", 8), ("MAR-B", 64)],
    "cuda": [("MAR-B", 2), ("MAR-B", 8), ("MAR-B", 64), ("MAR-L", 2), ("MAR-H", 2), ("MAR-H", 512)],
}
MORE = {  # sizes beside the simplest of the baselines
    "cpu": [],
    "cuda": [("MAR-B", 16), ("MAR-H", 64), ("MAR-H", 8), ("MAR-H", 16), ("MAR-B", 1), ("MAR-B", 4), ("MAR-H", 1)],
}
SIMPLE = ("eager float32", "library products alone bfloat16")
STEPS, CHANNELS = 100, 16
SECTIONS = ("denoise", "sizes", "parallel", "block", "judging")


def why_not_measured(op: str, backend: str, device: torch.device) -> str | None:
    """None where a backend is to be measured, else the reason; what runs on the CPU for tests is no speed."""
    if device.type != "cuda":
        return None if backend == "torch" else why_unavailable(backend, op) or "it runs on GPUs"
    try:
        implementation(op, backend, device)
    except RuntimeError as error:
        return str(error)
    return None


def serving(op: str, device: torch.device) -> list[str]:
    """The backends to measure."""
    return [name for name in BACKENDS if why_not_measured(op, name, device) is None]


def denoise_rows(
    model: str,
    rows: int,
    backends: list[str],
    runs: int,
    device: torch.device,
    report: Report,
    against: tuple[str, ...] | None = None,
) -> None:
    """The whole chain, 100 steps; errors against float64 on the same operands. ``against``: of the baselines, these."""
    diffloss = _diffloss(model, device)
    heads = {dtype: DiffusionHead.from_module(diffloss, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    inputs = [random_inputs(heads[torch.float32], rows, seed) for seed in range(2)]
    size, functions, fair = f"{model} N={rows} T={STEPS}", {}, {}
    for name, (make, dtypes) in _baselines(diffloss, heads[torch.bfloat16], rows, inputs[0], device).items():
        if against is not None and name not in against:
            continue
        with report.trying("denoise", size, name):
            functions[name], fair[name] = make(), dtypes
    contenders = _contenders(size, heads, rows, backends, device, report)
    functions |= {name: function for name, (_, function) in contenders.items()}
    seconds = measure(functions, inputs, runs, device, failed=partial(report.failed, "denoise", size))
    exact = {
        dtype: reference.denoise(head, *inputs[0], 1.0, None, dtype=torch.float64)[0] for dtype, head in heads.items()
    }
    baselines = []
    for name in [name for name in fair if name in seconds]:
        with report.trying("denoise", size, name):
            _check_baseline(functions[name](*inputs[0]), exact[torch.bfloat16])
            baselines.append(name)
    for name in [name for name in contenders if name in seconds]:
        dtype, function = contenders[name]
        with report.trying("denoise", size, name):
            error = relative_error(function(*inputs[0]).sample, exact[dtype])
            for baseline in [baseline for baseline in baselines if dtype in fair[baseline]]:
                timed = (*spread(seconds[name]), *spread(seconds[baseline]))
                report.add(Row("denoise", size, name, baseline, *timed, runs, error, BOUNDS[dtype], "of max, float64"))


def _diffloss(model: str, device: torch.device) -> DiffLoss:
    depth, width, cond = HEADS[model]
    torch.manual_seed(0)
    return randomize_(DiffLoss(CHANNELS, cond, depth, width, STEPS), seed=1).to(device).eval()


def _baselines(diffloss, narrow: DiffusionHead, rows: int, arguments, device: torch.device) -> dict[str, tuple]:
    """What makes each baseline, and the types of the contenders that it is fair to."""
    both, bfloat16 = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    makers = {
        "eager float32": (lambda: partial(eager_denoise, diffloss), both),
        "eager autocast bfloat16": (lambda: partial(eager_denoise, diffloss, dtype=torch.bfloat16), bfloat16),
    }
    if device.type == "cuda":
        makers |= {
            IN_ONE_GRAPH: (lambda: captured(graphable_denoise(diffloss, torch.bfloat16), device, arguments), bfloat16),
            "torch.compile reduce-overhead bfloat16": (lambda: compiled_denoise(diffloss, torch.bfloat16), bfloat16),
            "library products alone bfloat16": (lambda: captured(library_products(narrow, rows), device), bfloat16),
        }
    return makers


def _check_baseline(result, exact: torch.Tensor) -> None:
    """Raise where it computed something else altogether; its rounding is its own matter."""
    if isinstance(result, torch.Tensor) and not (error := relative_error(result, exact)) <= BASELINE_BOUND:
        raise ValueError(f"expected the loop's tokens within {BASELINE_BOUND} of the largest, got {error:.1e}")


def _contenders(size: str, heads: dict, rows: int, backends: list[str], device: torch.device, report: Report) -> dict:
    """Each backend's chain, layered and, where it serves, persistent: {name: (operand type, function)}."""
    contenders = {
        f"{backend} {_name(dtype)}": (dtype, partial(_up_to, 0, head, backend=backend))
        for backend in backends
        for dtype, head in heads.items()
    }
    if device.type != "cuda" or rows > PERSISTENT_LIMIT:
        return contenders
    for backend in (name for name in backends if name != "torch"):
        for dtype, head in heads.items():
            name = f"{backend} persistent {_name(dtype)}"
            with report.trying("denoise", size, name):
                if _serves_persistent(backend, head, rows):
                    contenders[name] = (dtype, partial(_up_to, PERSISTENT_LIMIT, head, backend=backend))
                else:
                    print(f"denoise, {name}, {size}: not measured, no such kernel or not of this size here", flush=True)
    return contenders


def _serves_persistent(backend: str, head: DiffusionHead, rows: int) -> bool:
    persistent = importlib.import_module(f"cspd_kernels.ops.denoise.{backend}").KERNELS.persistent
    return persistent is not None and persistent.serves(head, bucket(rows), groups=1)


def _up_to(tokens: int, head: DiffusionHead, *inputs, backend: str):
    """The chain with the persistent kernel for up to so many tokens, whatever the environment and the table say."""
    before = os.environ.get(PERSISTENT_VARIABLE)
    os.environ[PERSISTENT_VARIABLE] = str(tokens)
    try:
        return denoise(head, *inputs, backend=backend)
    finally:
        if before is None:
            del os.environ[PERSISTENT_VARIABLE]
        else:
            os.environ[PERSISTENT_VARIABLE] = before


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size per op, few runs: a check, not a measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", choices=SECTIONS, help="one section of the run")
    parser.add_argument(
        "--compile-report", action="store_true", help="registers, spills, shared memory of all kernels; no GPU needed"
    )
    args = parser.parse_args()
    if args.compile_report:
        import compile_report  # needs Triton

        return compile_report.print_report(compile_report.report(HEADS, args.quick, os.cpu_count() or 1), args.json)
    device = torch.device(args.device)
    for name in BACKENDS:
        for op in ("denoise", "log_density_ratio", "accept_reject"):
            if reason := why_not_measured(op, name, device):
                print(f"{op}, {name}: not measured, {reason}")
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}{threads}")
    report = Report(args.json)
    sections = {
        "denoise": whole_chains,
        "sizes": more_sizes,
        "parallel": in_sweeps,
        "block": one_block,
        "judging": judging,
    }
    for name in (args.only,) if args.only else SECTIONS:
        sections[name](args.quick, device, report)
    report.finish()


def whole_chains(quick: bool, device: torch.device, report: Report) -> None:
    """The chain step by step beside what users run today."""
    for model, n in CASES[device.type][: 1 if quick else None]:
        with report.trying("denoise", f"{model} N={n}"):
            denoise_rows(model, n, serving("denoise", device), 3 if quick else 7 if n == 64 else 15, device, report)


def more_sizes(quick: bool, device: torch.device, report: Report) -> None:
    """The chain of the kernels step by step, at sizes between those beside all baselines."""
    for model, n in MORE[device.type][: 1 if quick else None]:
        backends = [name for name in serving("denoise", device) if name != "torch" or device.type == "cpu"]
        with report.trying("denoise", f"{model} N={n}"):
            denoise_rows(model, n, backends, 3 if quick else 7, device, report, SIMPLE)


def judging(quick: bool, device: torch.device, report: Report) -> None:
    """The two ops that judge tokens."""
    for n in (1024,) if quick else TOKENS:
        runs = 5 if quick or (n > 10_000 and device.type == "cpu") else 31
        with report.trying("log_density_ratio", f"N={n}"):
            density_ratio_rows(n, serving("log_density_ratio", device), runs, device, report)
        with report.trying("accept_reject", f"N={n}"):
            accept_reject_rows(n, serving("accept_reject", device), runs, device, report)


def in_sweeps(quick: bool, device: torch.device, report: Report) -> None:
    """The chain in parallel over its steps."""
    for model, n, guided in in_parallel.CASES[device.type][: 1 if quick else None]:
        with report.trying("denoise in parallel", f"{model} N={n}"):
            diffloss = _diffloss(model, device)
            for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,):
                head = DiffusionHead.from_module(diffloss, dtype=dtype)
                in_parallel.parallel_rows(
                    model, n, guided, head, BOUNDS[dtype], serving("denoise", device), 3 if quick else 7, device, report
                )


def one_block(quick: bool, device: torch.device, report: Report) -> None:
    """The section of that name, for the layered kernels."""
    if device.type != "cuda":
        print(f"{blocks.OP}: not measured, it needs a GPU")
        return
    backends = [name for name in serving("denoise", device) if name != "torch"]
    for model in blocks.MODELS[: 1 if quick else None]:
        with report.trying(blocks.OP, model):
            head = blocks.block_head(*HEADS[model], device)
            for rows in blocks.ROWS[: 1 if quick else None]:
                blocks.block_rows(model, head, rows, backends, 5 if quick else 31, device, report)


if __name__ == "__main__":
    main()
