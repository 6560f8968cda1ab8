"""How a model's conditions are computed: by packed weights, by tables with its own blocks, or by its own methods."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch

from cspd_kernels.head import call_dtype, without_autocast

from .. import transformer
from ..errors import UnsupportedModel
from ..order import Pass
from . import compiled, passes
from .weights import Weights

_HALF = (torch.bfloat16, torch.float16)


class ByWeights:
    """Passes by packed weights (:mod:`cspd.whole.passes`): in the operand type once, and a CUDA graph may hold it."""

    waits = False
    shows_attention = True

    def __init__(self, weights: Weights, backend: str, compile: bool = False):
        self.weights, self.backend = weights, backend
        self.run = compiled.run_block if compile else passes.run_block

    def conditions(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor, attention: bool = False):
        """tokens (B, L, C), embedding (R, E) -> z (R, n, Z) of the positions that the pass draws.

        B are the pass's rows. With ``attention`` the entropies (B, n) of :func:`cspd.whole.passes.conditions` as well.
        """
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
            attention,
        )


class ByTables:
    """Passes by tables of indices, through the model's own blocks: hooks and other modules in them are called.

    They take as many known tokens in every row: where a pass counts on the device the host waits, and rows of one count
    go together.
    """

    waits = False
    shows_attention = False

    def __init__(self, module, dtype: torch.dtype | None):
        self.module, self.dtype = module, dtype

    def conditions(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor, attention: bool = False):
        """See :class:`ByWeights`; without the entropies."""
        _refuse(attention, "blocks")
        return _by_count(self._of_one_count, tokens, plan, embedding)

    def _of_one_count(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor) -> torch.Tensor:
        tokens, known = tokens.repeat(plan.doubled, 1, 1), plan.known.repeat(plan.doubled, 1)
        with _autocast(tokens.device, self.dtype):
            return transformer.conditions(self.module, tokens, known, embedding, plan.wanted)


class ByMasks:
    """Passes by the model's own methods, which pick out the known tokens by a mask: each one synchronises.

    As with :class:`ByTables`, rows of one count go together.
    """

    waits = True
    shows_attention = False

    def __init__(self, module, dtype: torch.dtype | None):
        self.module, self.dtype = module, dtype

    def conditions(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor, attention: bool = False):
        """See :class:`ByTables`."""
        _refuse(attention, "methods")
        return _by_count(self._of_one_count, tokens, plan, embedding)

    def _of_one_count(self, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor) -> torch.Tensor:
        with _autocast(tokens.device, self.dtype):
            return transformer.conditions_by_masks(
                self.module, tokens.repeat(plan.doubled, 1, 1), plan.mask, embedding, plan.wanted
            )


def _by_count(compute: Callable, tokens: torch.Tensor, plan: Pass, embedding: torch.Tensor) -> torch.Tensor:
    """Of rows that count on the device, by those of one count at a time; the rest as it is."""
    if plan.count is None:
        return compute(tokens, plan, embedding)
    rows, z = len(plan.where), None
    counts = plan.count.expand(rows).tolist()
    for count in sorted(set(counts)) or [0]:
        taken = [row for row in range(rows) if counts[row] == count]
        taken = torch.tensor(taken, dtype=torch.int64, device="cpu").to(tokens.device)
        fields = {name: getattr(plan, name)[taken] for name in ("known", "rank", "where")}
        part = dataclasses.replace(plan, **{**fields, "known": fields["known"][:, :count], "count": None})
        both = (torch.arange(plan.doubled, device=taken.device)[:, None] * rows + taken).flatten()
        found = compute(tokens[taken], part, embedding[both])
        z = found.new_empty(len(embedding), *found.shape[1:]) if z is None else z
        z[both] = found
    return z


def _refuse(attention: bool, what: str) -> None:
    if attention:
        raise UnsupportedModel(
            "expected a model that shows its attention, whose entropy is needed: its transformer runs its own "
            f"{what}; the log says why"
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
