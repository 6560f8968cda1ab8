"""How a model's conditions are computed: by packed weights, by tables with its own blocks, or by its own methods."""

from __future__ import annotations

import contextlib

import torch

from cspd_kernels.head import call_dtype, without_autocast

from .. import transformer
from ..order import Pass
from . import compiled, passes
from .weights import Weights

_HALF = (torch.bfloat16, torch.float16)


class ByWeights:
    """By packed weights (:mod:`cspd.whole.passes`): in the operand type once, and a CUDA graph may hold it."""

    waits = False

    def __init__(self, weights: Weights, backend: str, compile: bool = False):
        self.weights, self.backend = weights, backend
        self.run = compiled.run_block if compile else passes.run_block

    def conditions(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor) -> torch.Tensor:
        """tokens (B, L, C), embedding (R, E) -> z (R, n, Z) of the positions that the pass draws."""
        return passes.conditions(
            self.weights,
            tokens,
            plan.known,
            plan.rank,
            plan.where,
            embedding,
            plan.count,
            self.backend,
            self.run,
        )


class ByTables:
    """By tables of indices, through the model's own blocks: hooks and other modules in them are called."""

    waits = False

    def __init__(self, module, dtype: torch.dtype | None):
        self.module, self.dtype = module, dtype

    def conditions(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor) -> torch.Tensor:
        """As of :class:`ByWeights`; the pass counts on the host."""
        tokens, known = tokens.repeat(plan.doubled, 1, 1), plan.known.repeat(plan.doubled, 1)
        with _autocast(tokens.device, self.dtype):
            return transformer.conditions(self.module, tokens, known, embedding, plan.wanted)


class ByMasks:
    """By the model's own methods, which pick the known tokens out by a mask: the host waits at each of them."""

    waits = True

    def __init__(self, module, dtype: torch.dtype | None):
        self.module, self.dtype = module, dtype

    def conditions(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor) -> torch.Tensor:
        """As of :class:`ByTables`."""
        with _autocast(tokens.device, self.dtype):
            return transformer.conditions_by_masks(
                self.module, tokens.repeat(plan.doubled, 1, 1), plan.mask, embedding, plan.wanted
            )


def operand_dtype(model, dtype: torch.dtype | None) -> torch.dtype:
    """What a model's products are in: ``dtype``; None follows autocast, else the weights' type."""
    weight = model.mask_token
    return call_dtype(weight.device, weight.dtype) if dtype is None else dtype


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast to a half type that was asked for, none for another type; None: whatever the caller has."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype) if dtype in _HALF else without_autocast(device)
