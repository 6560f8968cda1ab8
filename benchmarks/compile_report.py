"""What the compilers make of every Triton kernel and of every CUDA kernel in the installed extension. Needs no GPU.

The Triton kernels are compiled at the sizes of MAR's heads, of other heads and of tokens.

``python benchmarks/kernels.py --compile-report [--quick] [--json FILE]``
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from cspd.models import DiffLoss
from cspd_kernels import Denoised, DiffusionHead, PhiloxNoise
from cspd_kernels.cuda_support import build_record, extension
from cspd_kernels.devices import SHARED_LIMITS
from cspd_kernels.ops.accept_reject import RESIDUALS
from cspd_kernels.ops.accept_reject.triton import accept_reject
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.cuda_chain import DTYPE_CODES
from cspd_kernels.ops.denoise.parallel_chain import ParallelChain
from cspd_kernels.ops.denoise.triton_chain import LayeredChain
from cspd_kernels.ops.denoise.triton_config import FLOAT32_TILES, HALF_TILES, Products, Tile
from cspd_kernels.ops.density_ratio.triton import log_density_ratio
from cspd_kernels.triton_randn import randn
from cspd_kernels.triton_refresh import Refresh
from cspd_kernels.triton_report import ARCHITECTURES, Launch, compiled, recorded_launches

import compile_heads

CHANNELS = 16
TOKENS = (1, 2, 4, 8, 16, 64, 128, 512)  # every tile of the table
QUICK_TOKENS = (1, 64, 512)
DTYPES = (torch.bfloat16, torch.float32)  # float16 compiles to what bfloat16 does
CASES = ((True, True), (False, False))  # guided, Philox noise; the first needs more registers
SWEPT = ((1, 100), (64, 100), (1, 1000))  # tokens, steps, in parallel over the steps
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H100 and H200, B200
PLANNED_ROWS = (2, 16)
VERDICT_CHANNELS = (1, 4, 16, 32, 64, 100, 256)
QUICK_VERDICT_CHANNELS = (16, 256)
CANDIDATES = (1, 2, 4, 8, 16)  # of a token
QUICK_CANDIDATES = (16,)


def launches_of(
    depth: int,
    width: int,
    cond: int,
    dtype: torch.dtype,
    tokens: int,
    guided: bool,
    philox: bool,
    tile: Tile | None = None,
) -> list[Launch]:
    """Every kernel specialisation that a chain of this size launches, recorded on tensors without storage; with a tile,
    the products of this one."""
    head, noise = _without_storage(depth, width, cond, dtype, tokens, philox, 2)
    with torch.device("meta"):
        condition, x = torch.empty(2 * tokens if guided else tokens, cond), torch.empty(tokens, CHANNELS)
    with recorded_launches() as launches:
        if tile:
            chain = with_products(tile, tile)(head, tokens, 1 + guided, noise, head.num_steps, static=False)
            chain.keep_modulations_in(torch.empty(chain.memory_bytes, dtype=torch.uint8, device="meta"))
            chain.run_block(head, 0, 0)
            return list(launches)[:2]
        chain = LayeredChain(head, tokens, 1 + guided, noise, head.num_steps, static=False)
        chain.load(condition, x, noise, 1.0, (2.0,) if guided else ())
        chain.launch(head, Tables(head))
    return list(launches)


def sweep_launches(
    depth: int, width: int, cond: int, dtype: torch.dtype, tokens: int, guided: bool, philox: bool, steps: int
) -> list[Launch]:
    """Likewise of a chain in parallel over its steps, all of whose kernels but the first ones may be called off."""
    head, noise = _without_storage(depth, width, cond, dtype, tokens, philox, steps)
    with recorded_launches() as launches:
        for guessed in (False, True):
            chain = ParallelChain(LayeredChain, head, tokens, 1 + guided, noise, static=True, guessed=guessed)
            chain.launch(head, Tables(head))
    return list(launches)


def _without_storage(
    depth, width, cond, dtype, tokens, philox, steps
) -> tuple[DiffusionHead, torch.Tensor | PhiloxNoise]:
    """A head and the noise of a call."""
    with torch.device("meta"):
        head = DiffusionHead.from_module(DiffLoss(CHANNELS, cond, depth, width, str(steps)), dtype=dtype)
        if philox:
            return head, PhiloxNoise(0, torch.empty(tokens, dtype=torch.int64))
        return head, torch.empty(steps, tokens, CHANNELS)


def with_products(first: Tile | None, second: Tile | None) -> type[LayeredChain]:
    """The chain with products by these tiles, or by the library (None), whatever the table says."""
    return type("Tiled", (LayeredChain,), {"choose": lambda chain, head: Products(first, second)})


def verdict_launches(
    channels: int, dtype: torch.dtype, residual: str | None, per_token: bool, candidates: int | None = None
) -> list[Launch]:
    """The launch of ``accept_reject`` by one of its methods, or of ``log_density_ratio`` where that is None; with so
    many candidates a token, each of chains of its own."""
    lines = (64,) if candidates is None else (64, candidates)
    with torch.device("meta"):
        value, per_row = torch.empty(*lines, channels, dtype=dtype), torch.empty(lines)
        rows = torch.empty(64, dtype=torch.int64)
    chain = Denoised(value, value, value, per_row)
    relaxation = per_row if per_token else 42.0
    with recorded_launches() as launches:
        if residual is None:
            log_density_ratio(value, chain, chain, relaxation, "paper")
        else:
            accept_reject(value, chain, chain, 0, rows, relaxation, "paper", 100, residual)
    return list(launches)


def _chain_rows(model, size, dtype, tokens, case) -> list[dict]:
    guided, philox = case
    described = {"model": model, "tokens": tokens, "guided": guided, "philox": philox}
    return _rows(launches_of(*size, dtype, tokens, guided, philox), dtype, described)


def _sweep_rows(model, size, dtype, tokens, steps, case) -> list[dict]:
    guided, philox = case
    described = {"model": model, "tokens": f"{tokens} x {steps}", "guided": guided, "philox": philox}
    return _rows(sweep_launches(*size, dtype, tokens, guided, philox, steps), dtype, described)


def _head_rows(name, dtype, tokens, groups) -> list[dict]:
    described = {"model": name, "tokens": f"{tokens} in {groups}", "guided": groups > 1, "philox": True}
    return _rows(compile_heads.launches_of(name, dtype, tokens, groups), dtype, described)


def _tile_rows(model, size, dtype, tile) -> list[dict]:
    described = {"model": model, "tokens": f"tile {tile.name}", "guided": False, "philox": False}
    return _rows(launches_of(*size, dtype, 64, False, False, tile), dtype, described)


def _verdict_rows(channels, dtype, residual, per_token, candidates=None) -> list[dict]:
    model = f"C={channels}" + (f" {residual}" if residual else "") + (f" K={candidates}" if candidates else "")
    described = {"model": model, "tokens": "any", "per_token": per_token}
    return _rows(verdict_launches(channels, dtype, residual, per_token, candidates), dtype, described)


def refresh_launches(dtype: torch.dtype) -> list[Launch]:
    """The launch that brings copies of type ``dtype`` up to date with float32 weights."""
    with torch.device("meta"):
        pair = torch.empty(64, 64, dtype=dtype), torch.empty(64, 64)
    with recorded_launches() as launches:
        Refresh((pair,))()
    return list(launches)


def _refresh_rows(dtype) -> list[dict]:
    return _rows(refresh_launches(dtype), dtype, {"model": "weights", "tokens": "any"})


def noise_launches(dtype: torch.dtype) -> list[Launch]:
    """The launches that draw the noise of all steps, the first one's of the same type or of a narrow one."""
    out = torch.empty(2, 64, dtype=dtype, device="meta")
    with recorded_launches() as launches:
        for first in (dtype, torch.bfloat16):
            randn(out, 0, 0, 1, 1, first, True)
    return list(launches)


def _noise_rows(dtype) -> list[dict]:
    return _rows(noise_launches(dtype), dtype, {"model": "noise", "tokens": "any"})


def _rows(launches: list[Launch], dtype: torch.dtype, described: dict) -> list[dict]:
    """Their resources on every architecture."""
    rows = []
    for launch in launches:
        for architecture in ARCHITECTURES:
            resources = compiled(launch, architecture)
            described = described | {"backend": "triton", "dtype": str(dtype).removeprefix("torch.")}
            rows.append(described | asdict(resources) | {"fits": resources.fits})
    return rows


def cuda_rows(record: dict) -> list[dict]:
    """The kernels of the CUDA extension as nvcc compiled them when it was built."""
    rows = []
    for kernel in record["kernels"]:
        spills = kernel["spill_store_bytes"] + kernel["spill_load_bytes"]
        fits = spills == 0 and kernel["shared_bytes"] <= SHARED_LIMITS.get(kernel["architecture"], 48 << 10)
        described = {"backend": "cuda", "model": "any", "tokens": "any", "dtype": "any", "warps": "any"}
        rows.append(described | kernel | {"fits": fits})
    return rows


def plan_rows(heads: dict[str, tuple[int, int, int]]) -> list[dict]:
    """The shared memory that launches of the persistent CUDA kernel ask for, which is not known to the compiler: one
    block a multiprocessor, on the largest device of every architecture."""
    rows = []
    for model, (depth, width, _) in heads.items():
        for dtype in DTYPES:
            for tokens in PLANNED_ROWS:
                for architecture, multiprocessors in MULTIPROCESSORS.items():
                    limit = SHARED_LIMITS[architecture]
                    plan = extension().persistent_plan(
                        DTYPE_CODES[dtype], tokens, tokens, CHANNELS, width, depth, multiprocessors, limit
                    )
                    kept = "weights stay" if plan.resident else "weights stream"
                    described = {"kernel": f"persistent_kernel: {plan.blocks} blocks, {kept}", "backend": "cuda"}
                    described |= {"model": model, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
                    described |= {
                        "architecture": architecture,
                        "registers": "above",
                        "stack_bytes": "above",
                        "warps": 8,
                    }
                    fits = 0 < plan.blocks <= multiprocessors and plan.shared_bytes <= limit
                    rows.append(described | {"shared_bytes": plan.shared_bytes, "warps": 8, "fits": fits})
    return rows


def _run(work: tuple) -> list[dict]:
    """In a process of its own; launches do not travel between processes, so it records them itself."""
    function, *arguments = work
    return function(*arguments)


def report(heads: dict[str, tuple[int, int, int]], quick: bool, processes: int) -> list[dict]:
    """One row per kernel, size and architecture; compiled by ``processes`` at a time."""
    work = [
        (_chain_rows, model, size, dtype, tokens, case)
        for model, size in heads.items()
        for dtype in DTYPES
        for tokens in (QUICK_TOKENS if quick else TOKENS)
        for case in CASES[: 1 if quick else None]
    ]
    work += [
        (_sweep_rows, model, size, dtype, tokens, steps, case)
        for model, size in heads.items()
        for dtype in DTYPES[: 1 if quick else None]
        for tokens, steps in SWEPT[: 1 if quick else None]
        for case in CASES[: 1 if quick else None]
    ]
    others = [(name, *case) for name in compile_heads.NETWORKS for case in compile_heads.CASES]
    work += [
        (_head_rows, name, dtype, tokens, groups)
        for name, tokens, groups in (compile_heads.QUICK if quick else others)
        for dtype in DTYPES[: 1 if quick else None]
    ]
    work += [
        (_tile_rows, model, size, dtype, tile)
        for model, size in list(heads.items())[: 1 if quick else None]
        for dtype, tiles in ((torch.bfloat16, HALF_TILES), (torch.float32, FLOAT32_TILES))
        for tile in (tiles[-1:] if quick else tiles)
    ]
    work += [
        (_verdict_rows, channels, dtype, residual, per_token)
        for channels in (QUICK_VERDICT_CHANNELS if quick else VERDICT_CHANNELS)
        for dtype in DTYPES
        for residual in (None, *RESIDUALS)
        for per_token in ((True,) if quick else (True, False))
    ]
    work += [
        (_verdict_rows, channels, dtype, residual, True, candidates)
        for channels in (QUICK_VERDICT_CHANNELS if quick else VERDICT_CHANNELS)
        for dtype in DTYPES[: 1 if quick else None]
        for residual in RESIDUALS
        for candidates in (QUICK_CANDIDATES if quick else CANDIDATES)
    ]
    work += [(rows_of, dtype) for rows_of in (_refresh_rows, _noise_rows) for dtype in DTYPES]
    with ProcessPoolExecutor(processes) as pool:
        rows = [row for rows in pool.map(_run, work) for row in rows]
    record = build_record()
    if not record["built"]:
        print(f"no CUDA kernels: {record['reason']}")
        return rows
    return rows + cuda_rows(record) + plan_rows(heads)


def print_report(rows: list[dict], path: Path | None) -> None:
    """The table, equal lines once; fails where a kernel does not fit."""
    columns = ["kernel", "dtype", "tokens", "model", "architecture", "registers"]
    columns += ["stack_bytes", "shared_bytes", "warps"]
    lines = [columns, *dict.fromkeys(tuple(str(row[c]) for c in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    misfits = [row for row in rows if not row["fits"]]
    print(f"{len(rows)} compiled, {len(misfits)} with spills or more shared memory than the architecture has")
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    if misfits:
        raise SystemExit(1)
