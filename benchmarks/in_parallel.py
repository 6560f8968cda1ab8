"""The chain step by step beside sweeps over all steps at once; ``kernels.py`` prints its rows.

The number of sweeps that a head needs shows on trained heads alone: ``parallel.py`` counts it. Here a fixed number is
timed, on heads of the released sizes with random weights, whose tokens have not settled by then. So the error is that
of another call, which goes on until all has settled, and the row says after how many sweeps. Nothing is multiplied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch

from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.backends import why_unavailable
from cspd_kernels.crossover import PERSISTENT, prefers_persistent
from cspd_kernels.ops.denoise import parallel_chain, reference, torch_backend, torch_parallel
from cspd_kernels.ops.denoise.parallel import ROUNDING
from cspd_kernels.testing import random_inputs, relative_error

from common import measure, spread
from rows import Report, Row

SWEEPS = 10
SLOW = 27  # what the slowest of 48 tokens took under guidance 3 with bfloat16 operands (docs/parallel.md)
GUIDANCE = 3.0
MODELS = ("MAR-B", "MAR-H", "MAR-L")  # in this order: a run that is cut short has its ends
CASES = {
    "cpu": [("MAR-B", 1, False), ("MAR-B", 1, True), ("MAR-B", 8, False)],
    "cuda": [(model, n, guided) for model in MODELS for n in (1, 8, 64) for guided in (False, True)],
}


@contextlib.contextmanager
def only_sweeps(count: int) -> Iterator[None]:
    """In this block a call makes so many sweeps, and leaves what has not settled as it is. Its tokens are of no use.

    Heads that have been called in parallel before may hold graphs of whole calls: use others.
    """
    with contextlib.ExitStack() as stack:
        for module in (torch_parallel, parallel_chain):
            stack.enter_context(mock.patch.object(module, "most_sweeps", lambda steps: count))
        stack.enter_context(mock.patch.object(parallel_chain, "run_if", lambda *_, **__: None))
        stack.enter_context(mock.patch.object(torch_backend, "_sequential", _as_they_are))
        yield


def _as_they_are(head, cond, x, *_):
    return x, x, x, x[:, 0]


def _sweeps(head: DiffusionHead, *inputs, count: int = SWEEPS, **options):
    with only_sweeps(count):
        return denoise(head, *inputs, **options, parallel_tol=1e-30)


def parallel_rows(
    model: str,
    n: int,
    guided: bool,
    head: DiffusionHead,
    bound: float,
    backends: list[str],
    runs: int,
    device,
    report: Report,
) -> None:
    """A row a backend: a fixed number of sweeps beside its chain step by step, which is named as the automatic choice
    has it. Under guidance one more, of as many sweeps as a slow token needs there."""
    size = f"{model} N={n} T={head.num_steps}{' guided' if guided else ''}"
    scale = GUIDANCE if guided else 1.0
    inputs = [random_inputs(head, n, seed, guided) for seed in range(2)]
    exact = reference.denoise(head, *inputs[0], 1.0, scale if guided else None, dtype=torch.float64)[0]
    name = str(head.dtype).removeprefix("torch.")
    for backend in backends:
        if device.type == "cuda" and why_unavailable(backend):
            continue
        persistent = backend == "cuda" and prefers_persistent(head, n, 2 if guided else 1)
        steps = f"{PERSISTENT if persistent else backend} {name}"
        counts = (SWEEPS, SLOW) if guided and backend != "torch" else (SWEEPS,)
        contenders = {steps: partial(denoise, head, cfg_scale=scale, backend=backend, parallel_tol=None)} | {
            f"{backend} {count} sweeps {name}": partial(
                _sweeps, head.to(head.dtype), cfg_scale=scale, backend=backend, count=count
            )
            for count in counts
        }
        with report.trying("denoise", size, f"{backend} parallel {name}"):
            seconds = measure(contenders, inputs, runs, device)
            out = denoise(head, *inputs[0], cfg_scale=scale, backend=backend, parallel_tol=ROUNDING[head.dtype])
            error, settled = relative_error(out.sample, exact), f"settled after {int(out.sweeps.max())} sweeps"
            for contender in [contender for contender in contenders if contender != steps]:
                timed = (*spread(seconds[contender]), *spread(seconds[steps]))
                accuracy = f"of max, float64, {settled}"
                report.add(Row("denoise in parallel", size, contender, steps, *timed, runs, error, bound, accuracy))
