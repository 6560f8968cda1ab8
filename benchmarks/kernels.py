"""Microbenchmarks of the kernels: ``python benchmarks/kernels.py [--quick] [--json FILE] [--device cuda]``;
``--compile-report`` prints registers, spills and shared memory of the Triton kernels instead, without a GPU.

Every row is a ratio against a named baseline, measured in the same run on the same inputs, with the
error beside it; a row whose error exceeds its bound shows no speed.
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
from cspd_kernels.crossover import PERSISTENT_LIMIT, PERSISTENT_VARIABLE
from cspd_kernels.ops.denoise import reference
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.on_device import bucket
from cspd_kernels.testing import random_inputs, randomize_, relative_error

from baselines import compiled_denoise, eager_denoise, library_products
from common import Row, captured, measure, print_rows, spread, write_json
from judging import TOKENS, accept_reject_rows, density_ratio_rows

HEADS = {"MAR-B": (6, 1024, 768), "MAR-L": (8, 1280, 1024), "MAR-H": (12, 1536, 1280)}  # D, W, Z
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
CASES = {
    "cpu": [("MAR-B", 2), ("MAR-B", 8), ("MAR-B", 64)],
    "cuda": [("MAR-B", 2), ("MAR-B", 8), ("MAR-B", 64), ("MAR-L", 2), ("MAR-H", 2), ("MAR-H", 512)],
}
STEPS, CHANNELS = 100, 16


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


def denoise_rows(model: str, rows: int, backends: list[str], runs: int, device: torch.device) -> list[Row]:
    """The whole chain, 100 steps; errors against float64 on the same operands."""
    depth, width, cond = HEADS[model]
    torch.manual_seed(0)
    diffloss = randomize_(DiffLoss(CHANNELS, cond, depth, width, STEPS), seed=1).to(device).eval()
    dtypes = (torch.float32, torch.bfloat16)
    heads = {dtype: DiffusionHead.from_module(diffloss, dtype=dtype) for dtype in dtypes}
    inputs = [random_inputs(heads[torch.float32], rows, seed) for seed in range(2)]
    narrow = heads[torch.bfloat16]
    baselines = {
        "eager float32": (partial(eager_denoise, diffloss), dtypes),
        "eager autocast bfloat16": (partial(eager_denoise, diffloss, dtype=torch.bfloat16), (torch.bfloat16,)),
    }
    if device.type == "cuda":
        compiled = compiled_denoise(diffloss, torch.bfloat16)
        baselines["torch.compile reduce-overhead bfloat16"] = (compiled, (torch.bfloat16,))
        products = captured(library_products(narrow, rows), device)
        baselines["library products alone bfloat16"] = (products, (torch.bfloat16,))
    contenders = {
        f"{backend} {_name(dtype)}": (dtype, partial(_up_to, 0, head, backend=backend))
        for backend in backends
        for dtype, head in heads.items()
    }
    if device.type == "cuda" and rows <= PERSISTENT_LIMIT:
        for backend in (name for name in backends if name != "torch"):
            for dtype, head in heads.items():
                name = f"{backend} persistent {_name(dtype)}"
                if _serves_persistent(backend, head, rows):
                    contenders[name] = (dtype, partial(_up_to, PERSISTENT_LIMIT, head, backend=backend))
                else:
                    print(f"denoise, {name}, {model} N={rows}: not measured, its kernel does not cover this size here")
    functions = {name: function for name, (function, _) in baselines.items()}
    functions |= {name: function for name, (_, function) in contenders.items()}
    seconds = measure(functions, inputs, runs, device)
    exact = {
        dtype: reference.denoise(head, *inputs[0], 1.0, None, dtype=torch.float64)[0] for dtype, head in heads.items()
    }
    results = []
    for name, (dtype, function) in contenders.items():
        error = relative_error(function(*inputs[0]).sample, exact[dtype])
        for baseline, (_, fair_to) in baselines.items():
            if dtype in fair_to:
                size = f"{model} N={rows} T={STEPS}"
                timed = (*spread(seconds[name]), *spread(seconds[baseline]))
                results.append(
                    Row("denoise", size, name, baseline, *timed, runs, error, BOUNDS[dtype], "of max, float64")
                )
    return results


def _serves_persistent(backend: str, head: DiffusionHead, rows: int) -> bool:
    kernels = importlib.import_module(f"cspd_kernels.ops.denoise.{backend}").KERNELS
    return kernels.persistent is not None and kernels.persistent.serves(head, Tables(head), bucket(rows), guided=False)


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
    rows = []
    for model, n in CASES[device.type][: 1 if args.quick else None]:
        rows += denoise_rows(model, n, serving("denoise", device), 3 if args.quick else 7 if n == 64 else 15, device)
    for n in (1024,) if args.quick else TOKENS:
        runs = 5 if args.quick or (n > 10_000 and device.type == "cpu") else 31
        rows += density_ratio_rows(n, serving("log_density_ratio", device), runs, device)
        rows += accept_reject_rows(n, serving("accept_reject", device), runs, device)
    print_rows(rows)
    if args.json:
        write_json(args.json, rows)
    if not all(row.correct for row in rows):
        raise SystemExit("a row is wrong: see the error column")


if __name__ == "__main__":
    main()
