"""Chains step by step: the cases of ``denoise`` for ``python benchmarks/kernels.py``."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from functools import partial

import torch

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.crossover import PERSISTENT_LIMIT, PERSISTENT_VARIABLE, bucket
from cspd_kernels.ops.denoise import reference
from cspd_kernels.testing import random_inputs, randomize_, relative_error

import registry
from baselines import (
    COMPILED,
    COMPILED_ON_CPU,
    IN_ONE_GRAPH,
    PRODUCTS,
    Compilations,
    compiled_denoise,
    eager_denoise,
    graphable_denoise,
    library_products,
)
from common import captured
from floors import chain_work
from groups import Contender, Group
from registry import AUTOCAST, BOUNDS, Case

BASELINE_BOUND = 0.5  # far beyond rounding; tokens of other inputs are further off


def group(cases: list[Case], device: torch.device, compilations: Compilations) -> Group:
    """Chains of 100 steps. Errors are against float64 on the same operands."""
    first = cases[0]
    diffloss = diffloss_of(first.head, device)
    heads = {kind: DiffusionHead.from_module(diffloss, dtype=kind) for kind in (torch.float32, torch.bfloat16)}
    inputs = [random_inputs(heads[torch.float32], first.tokens, seed) for seed in range(2)]

    @functools.cache
    def exact(dtype: torch.dtype) -> torch.Tensor:
        return reference.denoise(heads[dtype], *inputs[0], 1.0, None, dtype=torch.float64)[0]

    def check(result) -> None:
        """Raise where a baseline computed something else altogether; its rounding is its own matter."""
        if not isinstance(result, torch.Tensor):  # the products alone
            return
        error = relative_error(result, exact(torch.bfloat16))
        if not error <= BASELINE_BOUND:
            raise ValueError(f"expected the loop's tokens within {BASELINE_BOUND} of the largest, got {error:.1e}")

    contenders = []
    for case in cases:
        dtype = getattr(torch, case.dtype)
        error = lambda function, dtype=dtype: (  # noqa: E731
            relative_error(function(*inputs[0]).sample, exact(dtype)),
            "of max, float64",
        )
        make = partial(_function, case, heads[dtype])
        work = chain_work(heads[dtype], case.tokens)
        contenders.append(Contender(f"{case.backend} {case.dtype}", make, case.baselines, error, BOUNDS[dtype], work))
    named = dict.fromkeys(name for case in cases for name in case.baselines)
    known = baselines(diffloss, heads[torch.bfloat16], first.tokens, inputs, device, compilations)
    size = f"{first.head} N={first.tokens} T={diffloss.gen_diffusion.num_timesteps}"
    return Group(first.op, size, inputs, contenders, {name: known[name] for name in named}, check)


def diffloss_of(model: str, device: torch.device) -> DiffLoss:
    """A head of a released size with random weights."""
    depth, width, cond = registry.HEADS[model]
    torch.manual_seed(0)
    return randomize_(DiffLoss(registry.CHANNELS, cond, depth, width, registry.STEPS), seed=1).to(device).eval()


def baselines(
    diffloss, narrow: DiffusionHead, tokens: int, inputs: list[tuple], device: torch.device, compilations: Compilations
) -> dict[str, Callable]:
    """What makes each baseline, by name."""

    def compiled(name: str, dtype: torch.dtype, mode: str) -> Callable:
        make = partial(compiled_denoise, diffloss, dtype, mode)
        return partial(compilations.compiled, name, make, inputs)

    makers = {
        "eager float32": lambda: partial(eager_denoise, diffloss),
        AUTOCAST: lambda: partial(eager_denoise, diffloss, dtype=torch.bfloat16),
        IN_ONE_GRAPH: lambda: captured(graphable_denoise(diffloss, torch.bfloat16), device, inputs[0]),
        PRODUCTS: lambda: captured(library_products(narrow, tokens), device),
    }
    name = f"{COMPILED} bfloat16"
    makers[name] = compiled(name, torch.bfloat16, "reduce-overhead")
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{COMPILED_ON_CPU} {str(dtype).removeprefix('torch.')}"
        makers[name] = compiled(name, dtype, "default")
    return makers


def _function(case: Case, head: DiffusionHead) -> Callable | None:
    """The chain by its layered kernels or, where the case says so, by the persistent one."""
    backend, _, persistent = case.backend.partition(" ")
    if persistent and not serves_persistent(backend, head, case.tokens):
        print(f"{case.name}: not measured, no such kernel or not of this size here", flush=True)
        return None
    return partial(up_to, PERSISTENT_LIMIT if persistent else 0, head, backend=backend)


def serves_persistent(backend: str, head: DiffusionHead, rows: int) -> bool:
    persistent = importlib.import_module(f"cspd_kernels.ops.denoise.{backend}").KERNELS.persistent
    return rows <= PERSISTENT_LIMIT and persistent is not None and persistent.serves(head, bucket(rows), groups=1)


def up_to(tokens: int, head: DiffusionHead, *inputs, backend: str):
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
