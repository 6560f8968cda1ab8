"""One call of a head's network: ``python benchmarks/network.py [--quick] [--json FILE]``.

What ``cspd.patch(model, loop="own")`` makes of a network, also with ``weights="frozen"``, beside its own forward:
eagerly, under ``torch.compile`` and, on a GPU, in a CUDA graph. A run is a loop of calls with one condition and
another x and time at each, as solvers and schedulers make them; the seconds are those of a call. The error is the
largest difference from float64 on the same weights, relative to the largest value.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

import cspd
from cspd_kernels.testing import relative_error

from baselines import EmbeddingOnDevice
from common import captured, measure, spread
from network_heads import HEADS, Head, network_of
from rows import Report, Row

CALLS = {"cuda": 20, "cpu": 5}  # of a run
ROWS = (1, 2, 8, 64)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BASELINE_BOUND = 0.1  # far beyond rounding
FROZEN = "patched frozen"  # weights="frozen"
OURS = ("patched", FROZEN)


def loop(call: Callable, x: torch.Tensor, times: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """(calls, N, O): the network at x (calls, N, C) and times (calls, N)."""
    return torch.stack([call(x[i], times[i], c) for i in range(len(x))])


def inputs_of(head: Head, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x (calls, N, C), times (calls, N) and a condition (N, Z)."""
    calls, generator = CALLS[device.type], torch.Generator().manual_seed(rows)
    x, c = (
        torch.randn(*shape, generator=generator) for shape in ((calls, rows, head.channels), (rows, head.cond_channels))
    )
    times = torch.linspace(0, head.largest_time, calls).round(decimals=2)[:, None].repeat(1, rows)
    return x.to(device, dtype), times.to(device, dtype), c.to(device, dtype)


def network_rows(name: str, rows: int, dtype: torch.dtype, runs: int, device: torch.device, report: Report) -> None:
    """Ours against everything else, for one network, number of rows and type."""
    head, size, kind = HEADS[name], f"{name} N={rows}", str(dtype).removeprefix("torch.")
    net = network_of(head, device, dtype)
    arguments = inputs_of(head, rows, dtype, device)
    exact = loop(copy.deepcopy(net).double(), *(value.double() for value in arguments))
    contenders, errors = {}, {}
    for what, make in _contenders(net, arguments, device).items():
        with report.trying("network", size, f"{what} {kind}"):
            call = make()
            error = relative_error(loop(call, *arguments), exact)
            if what not in OURS and not error <= BASELINE_BOUND:
                raise ValueError(f"expected what the network computes within {BASELINE_BOUND}, got {error:.1e}")
            contenders[what], errors[what] = call, error
    calls = {what: (lambda *values, call=call: loop(call, *values)) for what, call in contenders.items()}
    with torch.no_grad():
        seconds = measure(
            calls, [arguments], runs, device, failed=lambda what, error: report.failed("network", size, what, error)
        )
    spreads = {what: [value / CALLS[device.type] for value in spread(values)] for what, values in seconds.items()}
    for ours in (what for what in OURS if what in spreads):
        for what in (what for what in spreads if what not in OURS):
            accuracy = f"against float64; the baseline {errors[what]:.1e}"
            report.add(
                Row("network", size, f"{ours} {kind}", f"{what} {kind}", *spreads[ours], *spreads[what], runs,
                    errors[ours], BOUNDS[dtype], accuracy)
            )  # fmt: skip


def _contenders(net: nn.Module, arguments: tuple, device: torch.device) -> dict[str, Callable[[], Callable]]:
    """How to make what is called in a network's place."""

    def compiled() -> Callable:
        torch._dynamo.reset()  # or the second size compiles to code for any size
        return torch.compile(
            copy.deepcopy(net), mode="default" if device.type == "cpu" else "reduce-overhead", dynamic=False
        )  # fmt: skip

    def in_a_graph() -> Callable:
        own = copy.deepcopy(net)
        for name in ("time_embed", "t_embedder"):
            if (embedder := getattr(own, name, None)) is not None:
                setattr(own, name, EmbeddingOnDevice(embedder))
        return captured(own, device, tuple(value[0] if i < 2 else value for i, value in enumerate(arguments)))

    def patched() -> Callable:
        return cspd.patch(copy.deepcopy(net), loop="own")

    graph = {"eager in a CUDA graph": in_a_graph} if device.type == "cuda" else {}

    def frozen() -> Callable:
        return cspd.patch(copy.deepcopy(net), loop="own", weights="frozen")

    return {"eager": lambda: net, "torch.compile": compiled, **graph, "patched": patched, FROZEN: frozen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one network, 2 rows, few runs: a check, not a measurement"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device, report = torch.device(args.device), Report(args.json)
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}{threads}")
    for name in list(HEADS)[: 1 if args.quick else None]:
        for rows in (2,) if args.quick else ROWS:
            for dtype in BOUNDS:
                gc.collect()
                with report.trying("network", f"{name} N={rows}"), torch.no_grad():
                    runs = 3 if args.quick else 15 if device.type == "cuda" else 5
                    network_rows(name, rows, dtype, runs, device, report)
    print("\ncalls a second (median; 20 % and 80 %)")
    for line in calls_a_second(report.rows):
        print(line)
    report.finish()


def calls_a_second(rows: list[Row]) -> list[str]:
    """A line for every network, number of rows and type: ours, then everything else's."""
    lines: dict[tuple[str, str], str] = {}
    for row in rows:
        key = row.size, row.backend
        lines.setdefault(key, f"{row.size}, {row.backend}: {_rates(row.seconds, row.seconds_p20, row.seconds_p80)}")
        lines[key] += f"; {row.baseline}: {_rates(row.baseline_seconds, row.baseline_p20, row.baseline_p80)}"
    return list(lines.values())


def _rates(median: float, p20: float, p80: float) -> str:
    return f"{1 / median:.0f} ({1 / p80:.0f}..{1 / p20:.0f})"


if __name__ == "__main__":
    main()
