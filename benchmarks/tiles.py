"""Who should make the two products of a block of the Triton chain, on this GPU: ``python benchmarks/tiles.py
[--models MAR-B ...] [--rows 8 64 ...] [--json FILE]``.

Times every tile and the library, each product with all that its choice brings along, and prints the winners as entries
of ``TILES`` in ``cspd_kernels/ops/denoise/triton_config.py``. What is wrong by float64 has no time and never wins.
"""

from __future__ import annotations

import argparse
import gc
import math
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead
from cspd_kernels.testing import random_inputs, randomize_, relative_error

from common import captured, measure, spread
from registry import BOUNDS, CHANNELS, HEADS
from rows import first_line, write_results

ROWS = (2, 4, 8, 16, 32, 64, 100, 128, 200, 256, 400, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RUNS = 15


def chain_of(choice, head: DiffusionHead, rows: int, seed: int = 0):
    """A chain of one step whose products are made by ``choice``, with random numbers in its buffers."""
    from cspd_kernels.ops.denoise.triton_chain import LayeredChain

    kind = type("Chosen", (LayeredChain,), {"choose": lambda chain, head: choice})
    chain = kind(head, rows, 1, random_inputs(head, rows, seed)[2], 1, static=True)
    chain.keep_modulations_in(torch.empty(chain.memory_bytes, dtype=torch.uint8, device=head.device))
    generator = torch.Generator(device=head.device).manual_seed(seed)
    for value in (chain.h, chain.activations, *([chain.operand] if choice else ()), chain.mods):
        value.normal_(generator=generator)
    chain.mods.mul_(0.3)
    return chain


def error_of(chain, head: DiffusionHead, layer: str) -> float:
    """Of the first layer of the first block (the activations), or of the second (h, and the next block's operand),
    relative to float64 on the same operands."""
    b, following, mods = head.blocks[0], head.blocks[1], chain.mods.double()
    shift, scale, gate = mods[0].chunk(3, dim=-1)
    if layer == "first":
        a = chain.operand.double() if chain.products else operand(chain.h.double(), b, shift, scale, head)
        expected = F.silu(F.linear(a, b.weight0.double(), b.bias0.double()))
        chain.run_first(head, 0, 0)
        return relative_error(chain.activations, expected)
    a = chain.activations.double()
    expected = chain.h.double() + gate * F.linear(a, b.weight1.double(), b.bias1.double())
    next_shift, next_scale, _ = mods[1].chunk(3, dim=-1)
    chain.run_second(head, 0, 0)
    error = relative_error(chain.h, expected)
    if chain.products:
        error = max(error, relative_error(chain.operand, operand(expected, following, next_shift, next_scale, head)))
    return error


def operand(h, block, shift, scale, head):
    """LN(h) (1 + scale) + shift, float64."""
    norm = F.layer_norm(h, (head.width,), block.norm_weight.double(), block.norm_bias.double(), head.norm_eps)
    return norm * (1 + scale) + shift


def choices(rows: int, dtype: torch.dtype) -> dict:
    """What can make the products of a block of so many rows, by name."""
    from cspd_kernels.ops.denoise.triton_config import FEW_ROWS, FLOAT32_TILES, HALF_TILES, Products

    tiles = HALF_TILES if dtype.itemsize == 2 else FLOAT32_TILES
    made = {t.name: Products(t, t) for t in tiles if t.bm <= max(16, 2 * rows)}
    few = {"few": None} if rows <= FEW_ROWS else {}
    return few | made | {"library": Products(None, None)}


def seconds_of(chain, head: DiffusionHead, layer: str) -> list[float]:
    """Of one layer of one block, launched for all blocks in a CUDA graph, so that weights are as cold as in a chain."""
    run = chain.run_first if layer == "first" else chain.run_second

    def all_blocks():
        for index in range(head.depth):
            run(head, index, 0)

    replay = captured(all_blocks, head.device)  # `chain` outlives it, and with it the memory that it reads and writes
    return [s / head.depth for s in measure({"": replay}, [()], RUNS, head.device)[""]]


def rows_of(model: str, dtype: torch.dtype, rows: int, device: torch.device) -> list[dict]:
    """Both layers by every choice, one after another."""
    depth, width, cond = HEADS[model]
    torch.manual_seed(0)
    module = randomize_(DiffLoss(CHANNELS, cond, depth, width, "2"), seed=1).to(device)
    head, results = DiffusionHead.from_module(module, dtype=dtype), []
    case = {"model": model, "width": width, "dtype": str(dtype).removeprefix("torch."), "rows": rows}
    for name, choice in choices(rows, dtype).items():
        try:
            chain = chain_of(choice, head, rows)
            results += [case | timed(chain, head, layer, dtype) | {"choice": name} for layer in ("first", "second")]
            del chain
        except Exception as error:  # noqa: BLE001  (of a compiler or a driver: the other choices go on)
            results.append(case | {"layer": "both", "choice": name, "seconds": None, "reason": first_line(error)})
        gc.collect()
        for found in [r for r in results if r["choice"] == name]:
            time = f"{1e6 * found['seconds']:8.2f} us" if found["seconds"] is not None else found.get("reason", "WRONG")
            error = f"  error {found['error']:.1e}" if "error" in found else ""
            print(f"{model} {case['dtype']:8} M={rows:<5} {found['layer']:6} {name:12} {time}{error}", flush=True)
    return results


def timed(chain, head: DiffusionHead, layer: str, dtype: torch.dtype) -> dict:
    """Error and seconds of one layer; no seconds where it is wrong."""
    case = {"layer": layer, "error": error_of(chain, head, layer), "seconds": None, "p20": None, "p80": None}
    if case["error"] <= BOUNDS[dtype]:  # false for NaN
        case |= dict(zip(("seconds", "p20", "p80"), spread(seconds_of(chain, head, layer))))
    return case


def winners(results: list[dict]) -> dict[tuple, list[tuple[int, str, str]]]:
    """(width, bytes of an element) -> (rows, first, second) by the fastest of bfloat16 and float32; not of a few rows,
    whose kernels are not in the table."""
    found: dict[tuple, list[tuple[int, str, str]]] = {}

    def key(case):
        return case["width"], 4 if case["dtype"] == "float32" else 2, case["rows"]

    right = [c for c in results if c["seconds"] is not None and c["choice"] != "few" and c["dtype"] != "float16"]
    for (width, size, rows), cases in groupby(sorted(right, key=key), key):
        best: dict[str, dict] = {}
        for case in cases:
            if case["seconds"] < best.get(case["layer"], {"seconds": math.inf})["seconds"]:
                best[case["layer"]] = case
        if len(best) == 2:
            entry = (rows, best["first"]["choice"], best["second"]["choice"])
            found.setdefault((width, size), []).append(entry)
    return found


def table(results: list[dict], capability: tuple[int, int]) -> str:
    """The winners in the form of ``TILES``; a number of rows takes what won at the next larger one that was timed."""
    from cspd_kernels.ops.denoise.triton_config import FEW_ROWS, FLOAT32_TILES, HALF_TILES

    text = []
    for (width, size), entries in winners(results).items():
        known = {t.name: t for t in (HALF_TILES if size == 2 else FLOAT32_TILES)} | {"library": None}
        entries = [entry for entry in entries if entry[0] > FEW_ROWS]
        # Of neighbours with the same winners the last, and no limit behind the largest.
        kept = [list(group)[-1] for _, group in groupby(entries, lambda entry: entry[1:])]
        text.append(f"    ({capability}, {width}, {size}): (")
        for i, (rows, first, second) in enumerate(kept):
            limit = None if i + 1 == len(kept) else rows
            text.append(f"        ({limit}, Products({known[first]}, {known[second]})),".replace("'", ""))
        text.append("    ),")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("nothing to measure: the tiles of the Triton kernels are for GPUs, and PyTorch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    results = []
    with torch.no_grad():
        for model in args.models:
            for dtype in DTYPES:
                for rows in args.rows:
                    results += rows_of(model, dtype, rows, device)
                    if args.json:  # so that it holds what there is however the run ends
                        write_results(args.json, results)
    print(f"\n{torch.cuda.get_device_name(device)}, entries of TILES:")
    print(table(results, torch.cuda.get_device_capability(device)))
    if args.json:
        print(f"wrote {args.json}")
    if any(case["seconds"] is None for case in results):
        raise SystemExit("a choice is wrong or failed: see above")


if __name__ == "__main__":
    main()
