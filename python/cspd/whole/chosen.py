"""Which of the three ways to a model's conditions is taken: compared once, and looked at again at every run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch.nn.modules import module as torch_module

from cspd_kernels.ops.add_norm import norm_backend

from ..errors import InvalidInput
from ..loop import LoopHook
from ..models import MAR, vit
from ..source import written
from ..standins import StandIn
from ..transformer import own_methods, why_not, why_not_by_tables
from . import passes
from .transformers import ByMasks, ByTables, ByWeights, operand_dtype
from .weights import Weights

_logger = logging.getLogger("cspd")
_OURS = {vit.Block, vit.Attention, vit.Mlp, nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, nn.ModuleList}
_PLAIN = {int, float, bool, str, tuple, type(None)}
_MOST_TYPES = 2  # operand types whose weights are kept


class ChosenTransformer:
    """A model's transformer for runs of it. It does not keep the model alive.

    Args:
        model: a MAR object. name: what it is called in the log.
    """

    def __init__(self, model: nn.Module, name: str, backend: str | None, compile: bool = False):
        self._model, self.name, self.backend, self._compile = weakref.ref(model), name, backend, compile
        self.seen: tuple | None = None  # of the model, when it was compared
        self._reasons: tuple[str | None, str | None] = (None, None)  # why not by weights, why not by tables
        self._packed: dict[torch.dtype, ByWeights] = {}

    @property
    def model(self) -> nn.Module:
        """The model, which somebody else keeps."""
        return self._model()

    def release(self) -> bool:
        """Let go of packed weights that are not the model's any more; whether there were any."""
        gone = [dtype for dtype, packed in self._packed.items() if not packed.weights.is_current(self.model)]
        for dtype in gone:
            del self._packed[dtype]
        return bool(gone)

    def packed(self) -> list[ByWeights]:
        """Whose weights are kept."""
        return list(self._packed.values())

    def get(self, dtype: torch.dtype | None = None, refresh: bool = True) -> ByWeights | ByTables | ByMasks:
        """The transformer for the model as it is now. The host does not wait unless the model's code has changed.

        ``refresh``: whether weights that were changed in place are to be followed.
        """
        if training(self.model):
            _logger.warning("%s is in training mode: dropout and label dropping are on; call .eval() first", self.name)
            return ByMasks(self.model, dtype)
        self.compare()
        by_weights, by_tables = self._reasons
        if by_weights is not None:
            return ByTables(self.model, dtype) if by_tables is None else ByMasks(self.model, dtype)
        operands = operand_dtype(self.model, dtype)
        packed = self._packed.get(operands)
        if packed is not None and packed.weights.is_current(self.model):
            if refresh:
                packed.weights.refresh()
            return packed
        if packed is None and len(self._packed) >= _MOST_TYPES:
            del self._packed[next(iter(self._packed))]
        weights = Weights(self.model, operands)
        if self._compile and weights.device.type != "cuda":
            raise InvalidInput(
                f"expected compile=True with a model on a GPU, got one on {weights.device}, where its products are "
                "packed for the CPU: omit it"
            )
        backend = norm_backend(self.backend, weights.device)
        packed = self._packed[operands] = ByWeights(weights, backend, self._compile)
        return packed

    @property
    def why_not_by_weights(self) -> str | None:
        """The reason from the last comparison."""
        return self._reasons[0]

    def compare(self) -> None:
        """Compare with the model's own methods, in eval mode, unless nothing but values has changed since."""
        seen = (own_methods(self.model), *(looks(self.model) if isinstance(self.model, nn.Module) else ()))
        if seen == self.seen:
            return
        self._packed.clear()
        by_weights = why_not_by_weights(self.model, self.backend)
        by_tables = None if by_weights is None else why_not_by_tables(self.model)
        self.seen, self._reasons = seen, (by_weights, by_tables)
        if by_weights is None:
            return
        waits = by_tables is not None
        _logger.log(
            logging.WARNING if self.model.fake_latent.device.type == "cuda" else logging.INFO,
            "%s (%s) runs %s: %s",
            self.name,
            type(self.model).__name__,
            "its own forward_mae_encoder and forward_mae_decoder, which synchronise at every pass"
            if waits
            else "its own blocks, without CUDA graphs",
            by_tables if waits else by_weights,
        )


def training(model: nn.Module) -> bool:
    """Whether any part of the transformer is in training mode; the head is asked for itself."""
    if not isinstance(model, nn.Module):
        return bool(getattr(model, "training", False))
    return model.training or any(module.training for module in _transformer(model))


def looks(model: nn.Module) -> tuple:
    """Whatever else than weights a model's results may depend on: code, settings, parts, hooks, replaced methods."""
    settings = [
        [(name, value) for name, value in m.__dict__.items() if type(value) in _PLAIN and name != "training"]
        for m in model.modules()
    ]
    names = [name for name, _ in model.named_parameters()]
    return written(model), settings, names, watched(model), replaced(model)


def replaced(model: nn.Module) -> list[tuple]:
    """Functions that were set on instances of modules, except this package's own."""
    return [
        (path, name, value)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if callable(value) and not isinstance(getattr(value, "__self__", None), (StandIn, LoopHook))
    ]


def watched(model: nn.Module) -> bool:
    """Whether somebody looks at, or replaces, what modules compute."""
    hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return any(map(bool, hooks)) or any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in _transformer(model)
    )


def _transformer(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, except itself and its head."""
    return (
        m for name, part in model._modules.items() if part is not None and name != "diffloss" for m in part.modules()
    )


def why_not_by_weights(model: nn.Module, backend: str | None = None) -> str | None:
    """None where :func:`cspd.whole.passes.conditions` computes what the model's own methods do, else why not."""
    if not isinstance(model, nn.Module):
        return "it is not a torch.nn.Module"
    if watched(model):
        return "its modules have hooks, or a forward of their own"
    try:
        packed = Weights(model, model.mask_token.dtype)
    except ValueError as error:
        return str(error)
    if is_ours(model):
        return None
    adds = norm_backend(backend, packed.device)

    def compute(tokens, known, embedding, where):
        order = torch.cat([known, where], dim=1)  # all positions
        return passes.conditions(packed, tokens, known, order.argsort(dim=1), where, embedding, None, adds)

    return why_not(model, compute)


def is_ours(model: nn.Module) -> bool:
    """Whether a model is this package's, to its last module, with no method replaced: nothing to compare."""
    methods = (name for path, name, _ in replaced(model) if hasattr(type(model.get_submodule(path)), name))
    return (
        type(model) is MAR
        and all(type(module) in _OURS for module in _transformer(model))
        and all(type(block) is vit.Block for block in (*model.encoder_blocks, *model.decoder_blocks))
        and not any(methods)
    )
