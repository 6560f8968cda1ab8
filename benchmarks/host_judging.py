"""Rows of ``python benchmarks/host.py`` for the ops that judge tokens: the host's part of one eager call.

Beside it stands the bare launch: the op's kernel again, with the arguments that the call had made. Without a GPU the
launch and the choice of the backend are left out of the call, and only what remains is measured.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

import cspd_kernels.ops
from cspd_kernels import accept_reject, log_density_ratio
from cspd_kernels.backends import why_unavailable

from common import spread
from judging import _inputs
from registry import CHANNELS

BACKENDS = ("triton", "cuda")
TOKENS = 1024


def host_seconds(function, runs: int, device: torch.device) -> list[float]:
    """Until the call returns, whatever the device still has to do."""
    seconds = []
    for _ in range(runs):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def judging_rows(runs: int, device: torch.device) -> list[dict]:
    """One row an op and backend: seconds of the host, of the call and of its bare launch (None without a GPU)."""
    (x, draft, target), *_ = _inputs(TOKENS, device)
    rows, found = torch.arange(TOKENS, device=device), []
    for backend in BACKENDS:
        if not can_import("density_ratio", backend) or (device.type == "cuda" and why_unavailable(backend)):
            print(f"the host's part of {backend}: not measured, {why_unavailable(backend)}")
            continue
        for op, call in (
            ("log_density_ratio", partial(log_density_ratio, x, draft, target, backend=backend)),
            ("accept_reject", partial(accept_reject, x, draft, target, seed=0, rows=rows, backend=backend)),
        ):
            with contextlib.nullcontext() if device.type == "cuda" else _without_launch(op, backend):
                result = call()  # compiles
                bare = _bare_launch(op, backend, call) if device.type == "cuda" else None
                seconds = host_seconds(call, runs, device)
                launch = bare and host_seconds(bare, runs, device)
            del result
            found.append(host_row(op, TOKENS, CHANNELS, backend, seconds, launch))
    return found


def host_row(op: str, tokens: int, channels: int, backend: str, seconds: list, launch: list | None) -> dict:
    described = {"op": op, "tokens": tokens, "channels": channels, "backend": backend}
    return described | {"host seconds": spread(seconds), "bare launch seconds": launch and spread(launch)}


def can_import(op: str, backend: str) -> bool:
    try:
        importlib.import_module(f"cspd_kernels.ops.{op}.{backend}")
    except ImportError:
        return False
    return True


def _module(op: str, backend: str):
    return importlib.import_module(f"cspd_kernels.ops.{op.removeprefix('log_')}.{backend}")


@contextlib.contextmanager
def _without_launch(op: str, backend: str):
    """Calls do all but choose the backend and launch."""
    module, package = _module(op, backend), getattr(cspd_kernels.ops, op.removeprefix("log_"))
    nothing = lambda *_: None  # noqa: E731
    launch = {"launch": nothing} if backend == "triton" else {"extension": lambda: SimpleNamespace(**{op: nothing})}
    with (
        mock.patch.multiple(module, **launch),
        mock.patch.object(package, "remembered", lambda *_: getattr(module, op)),
    ):
        yield


def _bare_launch(op: str, backend: str, call):
    """The launch that a call makes, with its arguments, again; it keeps the call's tensors alive."""
    module = _module(op, backend)
    function = module.launch if backend == "triton" else getattr(module.extension(), op)
    launch = mock.Mock(wraps=function)
    seen = {"launch": launch} if backend == "triton" else {"extension": lambda: SimpleNamespace(**{op: launch})}
    with mock.patch.multiple(module, **seen):
        kept = call()
    arguments = launch.call_args.args
    return lambda: (function(*arguments), kept)


def print_host_rows(rows: list[dict]) -> None:
    print("op                 N     backend  host us              bare launch us")
    for row in rows:
        (call, low, high), bare = row["host seconds"], row["bare launch seconds"]
        launch = f"{1e6 * bare[0]:6.1f} ({1e6 * bare[1]:.1f}-{1e6 * bare[2]:.1f})" if bare else "-"
        print(
            f"{row['op']:17s} {row['tokens']:5d}  {row['backend']:7s}  {1e6 * call:6.1f} "
            f"({1e6 * low:.1f}-{1e6 * high:.1f})   {launch}"
        )
