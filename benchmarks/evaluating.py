"""Single calls of a head's network: the cases of ``evaluate`` for ``python benchmarks/kernels.py``.

The condition is the same at every call and x is another, as in the loops of solvers. ``network.py`` measures whole
networks that ``cspd.patch`` has patched, of more kinds.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial

import torch

from cspd_kernels import DiffusionHead, evaluate
from cspd_kernels.ops.evaluate import reference
from cspd_kernels.testing import random_inputs, relative_error

from baselines import COMPILED, COMPILED_ON_CPU, Compilations, EmbeddingOnDevice
from common import captured
from denoising import diffloss_of
from floors import evaluate_work
from groups import Contender, Group
from registry import BOUNDS, Case

BASELINE_BOUND = 0.1  # far beyond rounding
TIME = 500.0


def group(cases: list[Case], device: torch.device, compilations: Compilations) -> Group:
    """One call of ``evaluate``. Errors are against float64 on the same operands."""
    first = cases[0]
    net = diffloss_of(first.head, device).net
    heads = {
        case.dtype: DiffusionHead.from_network(net, None, dtype=getattr(torch, case.dtype), device=device)
        for case in cases
    }
    cond, *_ = random_inputs(heads[first.dtype], first.tokens, 0)
    times = torch.full((first.tokens,), TIME, device=device)
    inputs = [(_tokens(first.tokens, net, seed, device), times, cond) for seed in range(2)]

    @functools.cache
    def exact(dtype: str) -> torch.Tensor:
        return reference.evaluate(heads[dtype], *inputs[0], dtype=torch.float64)

    def check(result: torch.Tensor) -> None:
        error = relative_error(result, exact(first.dtype))
        if not error <= BASELINE_BOUND:
            raise ValueError(f"expected what the network computes within {BASELINE_BOUND}, got {error:.1e}")

    contenders = []
    for case in cases:
        head = heads[case.dtype]
        error = lambda function, case=case: (  # noqa: E731
            relative_error(function(*inputs[0]), exact(case.dtype)),
            "of max, float64",
        )
        make = partial(partial, evaluate, head, backend=case.backend)
        work = evaluate_work(head, case.tokens)
        name = f"{case.backend} {case.dtype}"
        contenders.append(Contender(name, make, case.baselines, error, BOUNDS[head.dtype], work))
    named = dict.fromkeys(name for case in cases for name in case.baselines)
    baselines = {name: partial(_baseline, name, net, inputs, device, compilations) for name in named}
    return Group(first.op, f"{first.head} N={first.tokens}", inputs, contenders, baselines, check)


def _tokens(count: int, net, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, net.input_proj.in_features, generator=generator).to(device)


def _baseline(name: str, net, inputs: list[tuple], device: torch.device, compilations: Compilations) -> Callable | None:
    """The network's own forward with weights of the type that the baseline's name ends with."""
    dtype = getattr(torch, name.rsplit(maxsplit=1)[1])
    own = copy.deepcopy(net).to(dtype)

    def forward(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return own(x.to(dtype), t, cond.to(dtype))

    if name.startswith("eager in a CUDA graph"):
        own.time_embed = EmbeddingOnDevice(own.time_embed)
        return captured(forward, device, inputs[0])
    if name.startswith((COMPILED, COMPILED_ON_CPU)):
        mode = "reduce-overhead" if name.startswith(COMPILED) else "default"
        return compilations.compiled(name, lambda: torch.compile(forward, mode=mode, dynamic=False), inputs)
    return forward
