"""The ops that judge tokens, density ratio and acceptance-rejection: cases of ``python benchmarks/kernels.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch

from cspd_kernels import accept_reject, log_density_ratio
from cspd_kernels.ops.accept_reject.reference import accept_reject as accept_reject_definition
from cspd_kernels.ops.density_ratio.reference import log_density_ratio as log_density_ratio_definition
from cspd_kernels.testing import random_chains

from baselines import Compilations, looped_accept_reject
from common import captured
from floors import ratio_work, verdict_work
from groups import Contender, Group
from registry import CHANNELS, RATIO, VERDICT, Case

_CHECKED = 4096  # tokens compared with the definition, which walks every token through every try


def _inputs(tokens: int, device: torch.device, shared_sigma: bool = False) -> list[tuple]:
    """Two sets of (x, draft, target) of close models."""
    inputs = []
    for seed in range(2):
        x, draft, target = random_chains(tokens, CHANNELS, seed)
        if shared_sigma:
            draft = draft._replace(log_std=target.log_std)
        inputs.append((x.to(device), *(type(c)(*(field.to(device) for field in c)) for c in (draft, target))))
    return inputs


def _first(inputs: tuple, count: int) -> tuple:
    x, *chains = inputs
    return x[:count], *(type(c)(*(field[:count] for field in c)) for c in chains)


def _replays(function, inputs: list[tuple], device: torch.device):
    """One CUDA graph for each set of inputs: a launch without its way through Python, as in a captured window."""
    graphs = {id(one[0]): captured(partial(function, *one), device) for one in inputs}
    return lambda x, *_: graphs[id(x)]()


def group(cases: list[Case], device: torch.device, compilations: Compilations) -> Group:
    """The cases of one op and number of tokens."""
    return (ratios if cases[0].op == RATIO else verdicts)(cases, device)


def ratios(cases: list[Case], device: torch.device) -> Group:
    """The ratio beside as many bytes moved by the library: its share of the library's bandwidth.

    A copy writes half of them, and a large L2 takes those in without waiting for memory. A sum reads all of them, as
    the ratio does, and is the fairer of the two.
    """
    tokens = cases[0].tokens
    inputs = _inputs(tokens, device)
    source, total = torch.randn(tokens * (5 * CHANNELS + 3), device=device), torch.empty((), device=device)
    half = source[: len(source) // 2]
    moved = {"copy of as many bytes": partial(_copy, torch.empty_like(half), half)}
    moved["sum of as many bytes"] = partial(_sum, total, source)

    def made(function) -> Callable:
        return _replays(function, inputs, device) if device.type == "cuda" else function

    @functools.cache
    def exact() -> torch.Tensor:
        return log_density_ratio_definition(*inputs[0], dtype=torch.float64)

    def error(backend: str) -> tuple[float, str]:
        difference = (log_density_ratio(*inputs[0], backend=backend) - exact()).abs()
        return float((difference / (1 + exact().abs())).max()), "relative, float64"

    contenders = [
        Contender(
            case.backend,
            lambda backend=case.backend: made(partial(log_density_ratio, backend=backend)),
            case.baselines,
            lambda _, backend=case.backend: error(backend),
            1e-5,
            ratio_work(tokens, CHANNELS),
        )
        for case in cases
    ]
    baselines = {name: lambda name=name: made(moved[name]) for name in cases[0].baselines}
    return Group(RATIO, f"N={tokens} C={CHANNELS}", inputs, contenders, baselines)


def _copy(to: torch.Tensor, source: torch.Tensor, *_) -> None:
    to.copy_(source)


def _sum(to: torch.Tensor, source: torch.Tensor, *_) -> None:
    torch.sum(source, 0, out=to)


def verdicts(cases: list[Case], device: torch.device) -> Group:
    """Accept test and redraw. The error is the share of tokens that differ from the definition's."""
    tokens, residual = cases[0].tokens, cases[0].variant
    inputs = _inputs(tokens, device, shared_sigma=residual == "closed_form")
    address = torch.arange(tokens, device=device)

    def call(backend: str) -> Callable:
        return partial(accept_reject, seed=0, rows=address, residual=residual, backend=backend)

    @functools.cache
    def expected() -> torch.Tensor:
        part = _first(inputs[0], _CHECKED)
        return accept_reject_definition(*part, 0, address[:_CHECKED], residual=residual)[0]

    def error(backend: str) -> tuple[float, str]:
        token = call(backend)(*inputs[0]).token
        if not bool(torch.isfinite(token).all()):
            return float("nan"), "of tokens differ"
        return float(((token[:_CHECKED] - expected()).abs().amax(1) > 1e-4).float().mean()), "of tokens differ"

    contenders = []
    for case in cases:
        backend, _, replayed = case.backend.partition(", ")
        make = lambda backend=backend, replayed=replayed: (  # noqa: E731
            _replays(call(backend), inputs, device) if replayed else call(backend)
        )
        name = f"{backend} {residual}{', replayed' if replayed else ''}"
        # Decisions within rounding of their threshold may fall either way: hence the bound.
        contenders.append(
            Contender(
                name, make, case.baselines, lambda _, backend=backend: error(backend), 1e-3,
                verdict_work(tokens, CHANNELS, shared_sigma=residual == "closed_form"),
            )
        )  # fmt: skip
    baselines = {name: lambda: looped_accept_reject for name in cases[0].baselines}
    return Group(VERDICT, f"N={tokens} C={CHANNELS}", inputs, contenders, baselines)
