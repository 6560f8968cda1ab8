"""One block of the network, two products with all that is around them: cases of ``python benchmarks/kernels.py``.

They show what the layered kernels take at many rows, without the chain around them. The baseline is the two library
products alone. All blocks of a step run one after the other in one CUDA graph, so each finds its weights outside the
cache. A row holds the time of all blocks over their number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead
from cspd_kernels.ops.denoise.chain import Chain, Tables
from cspd_kernels.testing import random_inputs, randomize_, relative_error

import registry
from baselines import Compilations
from common import captured
from floors import block_work
from groups import Contender, Group
from registry import Case

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


def group(cases: list[Case], device: torch.device, compilations: Compilations) -> Group:
    """A backend's blocks beside their library products: the ratio is the share of the library's rate."""
    first = cases[0]
    head, rows = block_head(*registry.HEADS[first.head], device), first.tokens
    contenders = [
        Contender(
            f"{case.backend} {case.dtype}",
            lambda backend=case.backend: captured(all_blocks(backend, head, rows), device),
            case.baselines,
            lambda _, backend=case.backend: (error_of(backend, head, rows), "of max, float64"),
            BOUND,
            block_work(head, rows),
        )
        for case in cases
    ]
    baselines = {name: lambda: captured(two_products(head, rows), device) for name in first.baselines}
    size = f"{first.head} M={rows}"
    return Group(first.op, size, [()], contenders, baselines, calls=head.depth, queued=True)
