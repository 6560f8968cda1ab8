"""Rows of ``python benchmarks/host.py`` for ``denoise``: the host's part of one call whose graph is there.

Beside it stands the bare launch: the replay of that graph. Without a GPU a part of the call is measured.
The launch, the choice of the backend, and the checks of values that tensors on a GPU are spared are left out.
"""

from __future__ import annotations

import contextlib
import importlib
from functools import partial
from unittest import mock

import torch

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.backends import why_unavailable
from cspd_kernels.ops.denoise import on_device
from cspd_kernels.testing import random_inputs, randomize_

from host_judging import BACKENDS, can_import, host_row, host_seconds

TOKENS = 2
# The modules that `cspd_kernels.ops.denoise`, which is a function there, and `graphs` name.
_OP, _GRAPHS = (importlib.import_module(f"cspd_kernels.{name}") for name in ("ops.denoise", "graphs"))


def denoise_rows(sizes: tuple[int, int, int], channels: int, runs: int, device: torch.device) -> list[dict]:
    """One row a backend: seconds of the host, of the call and of its bare launch (None without a GPU).

    Args:
        sizes: depth, width and condition of the head.
    """
    depth, width, cond = sizes
    torch.manual_seed(0)
    module = randomize_(DiffLoss(channels, cond, depth, width, "100"), seed=1).to(device)
    found = []
    for backend in BACKENDS:
        if (reason := why_unavailable(backend)) and (device.type == "cuda" or not can_import("denoise", backend)):
            print(f"the host's part of denoise, {backend}: not measured, {reason}")
            continue
        head = DiffusionHead.from_module(module, dtype=torch.bfloat16)
        call = partial(denoise, head, *random_inputs(head, TOKENS, 0), backend=backend)
        with contextlib.nullcontext() if device.type == "cuda" else _without_launch(backend):
            for _ in range(3):  # compiles, captures
                call()
            (plan,) = on_device._HEADS[head][backend].plans._plans.values()
            seconds = host_seconds(call, runs, device)
            launch = host_seconds(plan.graph.graph.replay, runs, device) if plan.graph.graph is not None else None
        found.append(host_row("denoise", TOKENS, channels, backend, seconds, launch))
    return found


@contextlib.contextmanager
def _without_launch(backend: str):
    """Calls do all but choose the backend, look at values, order streams and launch."""
    module = importlib.import_module(f"cspd_kernels.ops.denoise.{backend}")

    class Graph(_GRAPHS.CudaGraph):
        def run(self, launch, warm_up):
            pass

    class Event:
        def record(self, stream):
            pass

        def synchronize(self):
            pass

    patches = [
        mock.patch.multiple(
            _OP,
            remembered_chain=lambda *_: module.denoise,
            check_values=lambda **_: None,
            check_result=lambda *_: None,
        ),
        mock.patch.object(on_device, "why_not_here", lambda device: None),
        mock.patch.object(_GRAPHS, "CudaGraph", Graph),
        mock.patch.multiple(torch.cuda, Event=Event, current_stream=lambda: None),
    ]
    _GRAPHS._turn.cache_clear()
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    finally:
        _GRAPHS._turn.cache_clear()
