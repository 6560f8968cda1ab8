"""Rows of ``python benchmarks/kernels.py`` for the ops that judge tokens: density ratio and acceptance-rejection."""

from __future__ import annotations

from functools import partial

import torch

from cspd_kernels import accept_reject, log_density_ratio
from cspd_kernels.ops.accept_reject.reference import accept_reject as accept_reject_definition
from cspd_kernels.ops.density_ratio.reference import log_density_ratio as log_density_ratio_definition
from cspd_kernels.testing import random_chains

from baselines import looped_accept_reject
from common import captured, measure, spread
from report import Report, Row

TOKENS, CHANNELS = (64, 1024, 8192, 131072), 16
_CHECKED = 4096  # tokens compared with the definition, which walks every token through every try
LOOP = "looped torch"  # eager: it waits for the host every round, and no graph can hold it


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


def density_ratio_rows(tokens: int, backends: list[str], runs: int, device: torch.device, report: Report) -> None:
    """The ratio beside as many bytes moved by the library: ``ratio`` is the share of its bandwidth.

    A copy writes half of them, which a large L2 takes in without waiting for memory. A sum reads all of them, as the
    ratio does, and is the fairer of the two.
    """
    op, size = "log_density_ratio", f"N={tokens} C={CHANNELS}"
    inputs = _inputs(tokens, device)
    moved = 4 * tokens * (5 * CHANNELS + 3)
    source, total = torch.randn(moved // 4, device=device), torch.empty((), device=device)
    half = source[: moved // 8]
    baselines = {"copy of as many bytes": partial(_copy, torch.empty_like(half), half)}
    baselines["sum of as many bytes"] = partial(_sum, total, source)
    makers = baselines | {backend: partial(log_density_ratio, backend=backend) for backend in backends}
    functions = {}
    for name, function in makers.items():
        with report.trying(op, size, name):
            functions[name] = _replays(function, inputs, device) if device.type == "cuda" else function
    seconds = measure(functions, inputs, runs, device, failed=partial(report.failed, op, size))
    exact = log_density_ratio_definition(*inputs[0], dtype=torch.float64)
    for backend in [backend for backend in backends if backend in seconds]:
        with report.trying(op, size, backend):
            actual = log_density_ratio(*inputs[0], backend=backend)
            error = float(((actual - exact).abs() / (1 + exact.abs())).max())
            for baseline in [baseline for baseline in baselines if baseline in seconds]:
                timed = (*spread(seconds[backend]), *spread(seconds[baseline]))
                report.add(Row(op, size, backend, baseline, *timed, runs, error, 1e-5, "relative, float64"))


def _copy(to: torch.Tensor, source: torch.Tensor, *_) -> None:
    to.copy_(source)


def _sum(to: torch.Tensor, source: torch.Tensor, *_) -> None:
    torch.sum(source, 0, out=to)


def accept_reject_rows(tokens: int, backends: list[str], runs: int, device: torch.device, report: Report) -> None:
    """Accept test and redraw; the error is the share of tokens that differ from the definition's."""
    for residual in ("rejection", "closed_form"):
        with report.trying("accept_reject", f"N={tokens} C={CHANNELS}", f"all with {residual}"):
            _accept_reject_rows(tokens, residual, backends, runs, device, report)


def _accept_reject_rows(tokens, residual, backends, runs, device, report) -> None:
    op, size = "accept_reject", f"N={tokens} C={CHANNELS}"
    inputs = _inputs(tokens, device, shared_sigma=residual == "closed_form")
    address = torch.arange(tokens, device=device)
    functions, backend_of = {LOOP: looped_accept_reject}, {}
    for backend in backends:
        name = f"{backend} {residual}"
        functions[name] = partial(accept_reject, seed=0, rows=address, residual=residual, backend=backend)
        backend_of[name] = backend
        if device.type == "cuda":
            with report.trying(op, size, f"{name}, replayed"):
                functions[f"{name}, replayed"] = _replays(functions[name], inputs, device)
                backend_of[f"{name}, replayed"] = backend
    seconds = measure(functions, inputs, runs, device, failed=partial(report.failed, op, size))
    part = _first(inputs[0], _CHECKED)
    expected = accept_reject_definition(*part, 0, address[:_CHECKED], residual=residual)[0]
    for name, backend in backend_of.items():
        if name not in seconds or LOOP not in seconds:
            continue
        with report.trying(op, size, name):
            token = accept_reject(*inputs[0], seed=0, rows=address, residual=residual, backend=backend).token
            error = float(((token[:_CHECKED] - expected).abs().amax(1) > 1e-4).float().mean())
            if not bool(torch.isfinite(token).all()):
                error = float("nan")
            timed = (*spread(seconds[name]), *spread(seconds[LOOP]))
            # Decisions within rounding of their threshold may fall either way.
            report.add(Row(op, size, name, LOOP, *timed, runs, error, 1e-3, "of tokens differ"))
