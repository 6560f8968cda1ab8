"""Chains in sweeps over all steps at once: cases of ``denoise`` for ``python benchmarks/kernels.py``.

How many sweeps a head needs shows only on trained heads: ``parallel.py`` counts them. Here a fixed number is timed on
heads of the released sizes with random weights. Their tokens have not settled by then. So the error is that of another
call, which goes on until all have settled. The row says after how many sweeps that was.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch

from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.crossover import PERSISTENT, prefers_persistent
from cspd_kernels.ops.denoise import parallel_chain, reference, torch_backend, torch_parallel
from cspd_kernels.ops.denoise.parallel import ROUNDING
from cspd_kernels.testing import random_inputs, relative_error

from baselines import Compilations
from denoising import diffloss_of
from floors import chain_work
from groups import Contender, Group
from registry import BOUNDS, GUIDED, Case

SWEEPS = 10
SLOW = 27  # what the slowest of 48 tokens took under guidance 3 with bfloat16 operands (docs/parallel.md)
GUIDANCE = 3.0


@contextlib.contextmanager
def only_sweeps(count: int) -> Iterator[None]:
    """In this block a call makes so many sweeps and leaves the rest unsettled: its tokens are of no use.

    Use heads of their own: one that was called in parallel before may hold graphs of whole calls.
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


def group(cases: list[Case], device: torch.device, compilations: Compilations) -> Group:
    """A fixed number of sweeps beside the chain step by step of the same backend, as the automatic choice has it.

    Under guidance kernels have one contender more, of as many sweeps as a slow token needs there.
    """
    first, guided = cases[0], cases[0].variant == GUIDED
    diffloss, scale = diffloss_of(first.head, device), GUIDANCE if guided else 1.0
    heads = {case.dtype: DiffusionHead.from_module(diffloss, dtype=getattr(torch, case.dtype)) for case in cases}
    inputs = [random_inputs(heads[first.dtype], first.tokens, seed, guided) for seed in range(2)]
    rows, contenders, steps = 2 if guided else 1, [], {}

    @functools.cache
    def error_of(backend: str, dtype: str) -> tuple[float, str]:
        head = heads[dtype]
        exact = reference.denoise(head, *inputs[0], 1.0, scale if guided else None, dtype=torch.float64)[0]
        out = denoise(head, *inputs[0], cfg_scale=scale, backend=backend, parallel_tol=ROUNDING[head.dtype])
        return relative_error(out.sample, exact), f"of max, float64, settled after {int(out.sweeps.max())} sweeps"

    for case in cases:
        head, call = heads[case.dtype], {"cfg_scale": scale, "backend": case.backend}
        persistent = case.backend == "cuda" and prefers_persistent(head, case.tokens, rows)
        baseline = f"{PERSISTENT if persistent else case.backend} {case.dtype}"
        steps[baseline] = lambda head=head, call=call: partial(denoise, head, **call, parallel_tol=None)
        for count in (SWEEPS, SLOW) if guided and case.backend != "torch" else (SWEEPS,):
            make = lambda head=head, call=call, count=count: partial(  # noqa: E731
                _sweeps, head.to(head.dtype), **call, count=count
            )
            error = lambda _, case=case: error_of(case.backend, case.dtype)  # noqa: E731
            work = chain_work(head, case.tokens, rows, count)
            name = f"{case.backend} {count} sweeps {case.dtype}"
            contenders.append(Contender(name, make, (baseline,), error, BOUNDS[head.dtype], work))
    size = f"{first.head} N={first.tokens} T={diffloss.gen_diffusion.num_timesteps}{' guided' if guided else ''}"
    return Group(first.op, size, inputs, contenders, steps)
