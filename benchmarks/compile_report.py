"""What the compiler makes of every Triton kernel, at the sizes of MAR's heads: needs no GPU.

``python benchmarks/kernels.py --compile-report [--quick] [--json FILE]``
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, PhiloxNoise
from cspd_kernels.ops.denoise.triton_chain import Chain, Tables
from cspd_kernels.ops.denoise.triton_config import PERSISTENT_LIMIT
from cspd_kernels.ops.denoise.triton_persistent import PersistentChain
from cspd_kernels.triton_report import ARCHITECTURES, Launch, compiled, recorded_launches

CHANNELS = 16
TOKENS = (1, 2, 4, 8, 16, 64, 128, 512)  # every tile of the table
QUICK_TOKENS = (1, 64, 512)
DTYPES = (torch.bfloat16, torch.float32)  # float16 compiles to what bfloat16 does
CASES = ((True, True), (False, False))  # guided, Philox noise; the first needs more registers


def launches_of(
    kind: type[Chain], depth: int, width: int, cond: int, dtype: torch.dtype, tokens: int, guided: bool, philox: bool
) -> list[Launch]:
    """Every kernel specialisation that a chain of this size launches, recorded on tensors without storage."""
    with torch.device("meta"):
        head = DiffusionHead.from_module(DiffLoss(CHANNELS, cond, depth, width, "2"), dtype=dtype)
        noise = torch.empty(2, tokens, CHANNELS)
        if philox:
            noise = PhiloxNoise(0, torch.empty(tokens, dtype=torch.int64))
        condition, x = torch.empty(2 * tokens if guided else tokens, cond), torch.empty(tokens, CHANNELS)
    with recorded_launches() as launches:
        chain = kind(head, tokens, guided, noise, head.num_steps, static=False)
        chain.load(condition, x, noise, 1.0, 2.0 if guided else None)
        chain.launch(head, Tables(head))
    return list(launches)


def _rows_of(arguments: tuple) -> list[dict]:
    """Resources of the kernels of one chain, on every architecture. Launches do not travel between processes."""
    model, kind, size, dtype, tokens, (guided, philox) = arguments
    rows = []
    for launch in launches_of(kind, *size, dtype, tokens, guided, philox):
        for architecture in ARCHITECTURES:
            resources = compiled(launch, architecture)
            name = str(dtype).removeprefix("torch.")
            case = {"model": model, "dtype": name, "tokens": tokens, "guided": guided, "philox": philox}
            rows.append(case | asdict(resources) | {"fits": resources.fits})
    return rows


def report(heads: dict[str, tuple[int, int, int]], quick: bool, processes: int) -> list[dict]:
    """One row per kernel, size and architecture; compiled by ``processes`` at a time."""
    work = [
        (model, kind, size, dtype, tokens, case)
        for model, size in heads.items()
        for dtype in DTYPES
        for tokens in (QUICK_TOKENS if quick else TOKENS)
        for kind in ((Chain, PersistentChain) if tokens <= PERSISTENT_LIMIT else (Chain,))
        for case in CASES[: 1 if quick else None]
    ]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(_rows_of, work) for row in rows]


def print_report(rows: list[dict], path: Path | None) -> None:
    """The table, equal lines once; fails where a kernel does not fit."""
    columns = [
        "kernel",
        "dtype",
        "tokens",
        "model",
        "architecture",
        "registers",
        "stack_bytes",
        "shared_bytes",
        "warps",
    ]
    lines = dict.fromkeys(tuple(str(row[c]) for c in columns) for row in rows)
    for line in [tuple(columns), *lines]:
        print("  ".join(cell.ljust(18 if i == 0 else 12) for i, cell in enumerate(line)).rstrip())
    misfits = [row for row in rows if not row["fits"]]
    print(f"{len(rows)} compiled, {len(misfits)} with spills or more shared memory than the architecture has")
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    if misfits:
        raise SystemExit(1)
