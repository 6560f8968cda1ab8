"""Rows of ``python benchmarks/kernels.py`` for one block of the network: two products and all that is around them.

What the layered kernels take at many rows, without the chain around them, beside nothing but the two library products.
All blocks of a step run one after the other in one CUDA graph, so that each finds its weights outside the cache. A row
is the time of the whole over their number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead
from cspd_kernels.ops.denoise.chain import Chain, Tables
from cspd_kernels.testing import random_inputs, randomize_, relative_error

from common import captured, measure, spread
from report import Report, Row

MODELS, ROWS = ("MAR-B", "MAR-H"), (100, 200, 400, 1024, 2048)
OP, PRODUCTS = "one block", "its two library products bfloat16"
STEPS, CHANNELS, BOUND = 2, 16, 2e-2  # one step is run; what is not timed is short


def block_head(depth: int, width: int, cond: int, device: torch.device) -> DiffusionHead:
    """A bfloat16 head of random weights."""
    torch.manual_seed(0)
    module = randomize_(DiffLoss(CHANNELS, cond, depth, width, STEPS), seed=1, scale=width**-0.5)
    return DiffusionHead.from_module(module.to(device), dtype=torch.bfloat16)


def started(backend: str, head: DiffusionHead, rows: int) -> Chain:
    """The layered chain of a backend at its first step, before the first block, as ``on_device`` brings it there."""
    kind = importlib.import_module(f"cspd_kernels.ops.denoise.{backend}").KERNELS.layered
    cond, x, noise = random_inputs(head, rows, 0)
    chain = kind(head, rows, 1, noise, 1, static=True)
    chain.load(cond[None], x, noise, 1.0, ())
    chain.start(head)
    chain.hoist(head, STEPS - 1, STEPS)
    chain.begin_step(head, Tables(head), 0)
    return chain


def definition(head: DiffusionHead, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(h before the first block, what it adds to h) of the first step, float64 on the same operands."""
    cond, x, _ = random_inputs(head, rows, 0)
    wide = head.to(torch.float64)
    block, shape = wide.blocks[0], (wide.width,)
    h = F.linear(x.double(), wide.input_weight, wide.input_bias)
    y = F.silu(wide.time_embedding[STEPS - 1] + F.linear(cond.double(), wide.cond_weight, wide.cond_bias))
    shift, scale, gate = F.linear(y, block.mod_weight, block.mod_bias).chunk(3, dim=-1)
    a = F.layer_norm(h, shape, block.norm_weight, block.norm_bias, wide.norm_eps) * (1 + scale) + shift
    a = F.silu(F.linear(a, block.weight0, block.bias0))
    return h, gate * F.linear(a, block.weight1, block.bias1)


def error_of(backend: str, head: DiffusionHead, rows: int) -> float:
    """Of what the first block adds to h, relative to its largest value."""
    before, added = definition(head, rows)
    chain = started(backend, head, rows)
    chain.run_block(head, 0, 0)
    return relative_error(chain.h.view(rows, -1).double() - before, added)


def all_blocks(backend: str, head: DiffusionHead, rows: int) -> Callable[[], None]:
    """One block after the other on the buffers of a chain, which it keeps."""
    chain = started(backend, head, rows)

    def run() -> None:
        for index in range(head.depth):
            chain.run_block(head, index, 0)

    return run


def two_products(head: DiffusionHead, rows: int) -> Callable[[], None]:
    """The products of all blocks by the library, on operands of the same shapes."""
    a = torch.randn(rows, head.width, device=head.device).to(head.dtype)
    hidden, out = torch.empty_like(a), torch.empty_like(a)

    def run() -> None:
        for block in head.blocks:
            torch.mm(a, block.weight0.t(), out=hidden)
            torch.mm(hidden, block.weight1.t(), out=out)

    return run


def block_rows(
    model: str, head: DiffusionHead, rows: int, backends: list[str], runs: int, device: torch.device, report: Report
) -> None:
    """One row a backend; ``ratio`` is the share of the library's rate."""
    size, functions = f"{model} M={rows}", {}
    with report.trying(OP, size, PRODUCTS):
        functions[PRODUCTS] = captured(two_products(head, rows), device)
    for backend in backends:
        with report.trying(OP, size, f"{backend} bfloat16"):
            functions[f"{backend} bfloat16"] = captured(all_blocks(backend, head, rows), device)

    seconds = measure(functions, [()], runs, device, failed=partial(report.failed, OP, size), queued=True)
    if PRODUCTS not in seconds:
        return
    share = {name: [value / head.depth for value in values] for name, values in seconds.items()}
    for backend in backends:
        if (name := f"{backend} bfloat16") in share:
            with report.trying(OP, size, name):
                timed = (*spread(share[name]), *spread(share[PRODUCTS]))
                error = error_of(backend, head, rows)
                report.add(Row(OP, size, name, PRODUCTS, *timed, runs, error, BOUND, "of max, float64"))
