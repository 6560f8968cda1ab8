"""What calls cost beside their kernels: ``python benchmarks/host.py [--model MAR-B] [--json FILE]``.

The drop-in reads the call, looks at the weights and draws the noise before the op ``denoise`` runs, and lays out the
tokens after it. Here the op is measured by itself, and everything else with the op taken out of the call. The baseline
of the ratio is the code that is replaced, on the same conditions. ``host_judging.py`` measures the ops that judge
tokens.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import cspd
from cspd import made_calls
from cspd.models import DiffLoss
from cspd_kernels.testing import randomize_, relative_error

from common import measure, spread
from host_denoise import denoise_rows
from host_judging import host_seconds, judging_rows, print_host_rows
from registry import CHANNELS, HEADS
from rows import write_results

CASES = ((2, 1.0), (2, 3.0), (64, 3.0))  # tokens, guidance


def rows_of(model: str, dtype: torch.dtype, weights: str, runs: int, device: torch.device) -> list[dict]:
    """One row a case, of a head of this size with float32 weights and operands of ``dtype``."""
    depth, width, cond = HEADS[model]
    torch.manual_seed(0)
    head = randomize_(DiffLoss(CHANNELS, cond, depth, width, "100"), seed=1, scale=0.02).to(device)
    rows = []
    for tokens, cfg in CASES:
        z = torch.randn(2 * tokens if cfg != 1.0 else tokens, cond, device=device)
        eager = partial(_seeded, head, z, cfg)
        with torch.no_grad():
            expected = eager()
            cspd.patch(head, dtype=dtype, weights=weights)
            with mock.patch.object(made_calls, "denoise", wraps=made_calls.denoise) as record:
                error = relative_error(eager()[:tokens], expected[:tokens])
            (args, kwargs) = record.call_args
            op = partial(made_calls.denoise, *args, **kwargs)
            result = op()
            seconds = measure({"call": eager, "op": op}, [()], runs, device)
            with mock.patch.object(made_calls, "denoise", lambda *_, result=result, **__: result):
                rest = measure({"rest": eager}, [()], 10 * runs, device)["rest"]
                host = host_seconds(eager, 10 * runs, device)
            cspd.unpatch(head)
            seconds |= measure({"eager": eager}, [()], max(3, runs // 3), device)
        medians = {name: spread(values) for name, values in {**seconds, "rest": rest, "host": host}.items()}
        rows.append(
            {
                "model": model,
                "tokens": tokens,
                "cfg": cfg,
                "dtype": str(dtype).removeprefix("torch."),
                "weights": weights,
                "error": error,
                **{f"{name} seconds": values for name, values in medians.items()},
                "share": medians["rest"][0] / medians["op"][0],
                "ratio": medians["eager"][0] / medians["call"][0],
            }
        )
    return rows


def _seeded(head, z, cfg) -> torch.Tensor:
    torch.manual_seed(0)
    return head.sample(z, 1.0, cfg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=HEADS, default="MAR-B")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for weights in ("live", "frozen"):
            rows += rows_of(args.model, dtype, weights, args.runs, torch.device(args.device))
    print(
        "model   N cfg dtype    weights  op ms              beside it ms       share   host ms  call/eager  difference"
    )
    for row in rows:
        (op, low, high), (rest, rest_low, rest_high) = row["op seconds"], row["rest seconds"]
        print(
            f"{row['model']:6s} {row['tokens']:3d} {row['cfg']:.0f}   {row['dtype']:8s} {row['weights']:7s} "
            f"{1e3 * op:7.2f} ({1e3 * low:.1f}-{1e3 * high:.1f})  {1e3 * rest:6.3f} ({1e3 * rest_low:.2f}-"
            f"{1e3 * rest_high:.2f})  {100 * row['share']:5.2f}%  {1e3 * row['host seconds'][0]:6.3f}  "
            f"{row['ratio']:6.2f}x  {row['error']:.0e}"
        )
    calls_of_ops = denoise_rows(HEADS[args.model], CHANNELS, 20 * args.runs, torch.device(args.device))
    calls_of_ops += judging_rows(20 * args.runs, torch.device(args.device))
    print_host_rows(calls_of_ops)
    if args.json:
        write_results(args.json, rows + calls_of_ops, median=float(np.float64(50)), spread=[20, 80])
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
