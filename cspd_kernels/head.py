"""A diffusion head, packed: the weights of an adaLN-MLP in the form that every backend reads."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn

from .dtypes import OPERAND_DTYPES, as_dtype, call_dtype, stream_dtype, without_autocast
from .errors import CallError, NotAModel
from .packing import Packer
from .schedule import Schedule
from .spec import HeadSpec, spec_of
from .structure import why_not_a_head
from .time_embedding import TimeEmbedding, embed_schedule

__all__ = ["OPERAND_DTYPES", "Block", "DiffusionHead", "call_dtype", "stream_dtype", "without_autocast"]

_STREAM_FIELDS = (
    "norm_weight", "norm_bias", "time_embedding", "input_weight", "input_bias", "final_weight", "final_bias",
)  # fmt: skip
_handles = itertools.count(1)
_heads: weakref.WeakValueDictionary[int, DiffusionHead] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Block:
    """Weights of one residual block: ``h += gate * mlp1(act(mlp0(norm(h) (1 + scale) + shift)))``.

    ``act`` is SiLU, and under "swiglu" ``silu(a) * b`` of the two halves a and b, for which weight0 and bias0 have 2H
    rows. Blocks that share a modulation hold the same tensors.
    """

    norm_weight: torch.Tensor  # (W,) residual-stream type, like norm_bias, which is zero of an "rms" norm
    norm_bias: torch.Tensor
    weight0: torch.Tensor  # (H, W)
    bias0: torch.Tensor
    weight1: torch.Tensor  # (W, H)
    bias1: torch.Tensor
    mod_weight: torch.Tensor  # (3W, W): shift, scale, gate
    mod_bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class DiffusionHead:
    """The denoising network of one module at one operand type, with its schedule.

    Built by :meth:`from_module`. GEMM operands (weights and biases) are of ``dtype``. What touches
    x or the residual stream directly is of the stream's type (float32; float64 for a float64 head).
    That is the norms' affine parameters, the time embedding, and the two C-wide layers at the ends.
    Those layers cost next to nothing. In a narrow type they would round x and the noise estimate,
    or overflow in float16.
    Weights that need no conversion are shared with the module, not copied: build the head again
    after changing them.

    Attributes:
        schedule: the :class:`Schedule` of T steps; None of a head that is only evaluated.
        time_embedding: (T, W), of the schedule's timesteps: it does not depend on the data. None without a schedule.
        norm_eps: the epsilon of every norm.
        cond_weight, cond_bias: None where conditions are given embedded, as (N, W).
        norm: "layer", or "rms", which is ``h / sqrt(mean(h^2) + eps)``.
        mlp: of the blocks, "silu" or "swiglu".
        time: the time embeddings, whose mean is taken; empty where timesteps are not embedded any more.
        handle: the int that stands for this head, and for no other, in the arguments of an op.
        copies: (packed, weight of the module) of everything that had to be converted or copied.
        shared: what backends make of the weights; one dict for heads that differ in the schedule alone.
        watched: whether what they made follows the weights' values.

    Example:
        >>> from cspd_kernels import DiffusionHead
        >>> from cspd.models import DiffLoss
        >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
        >>> head
        DiffusionHead(channels=4, width=8, depth=2, num_steps=5, dtype=torch.float32, device=cpu)
        >>> head.cond_channels, head.outputs, head.learned_variance
        (6, 8, True)
    """

    schedule: Schedule | None
    dtype: torch.dtype
    norm_eps: float
    time_embedding: torch.Tensor | None
    cond_weight: torch.Tensor | None  # (W, Z)
    cond_bias: torch.Tensor | None
    input_weight: torch.Tensor  # (W, C) residual-stream type, like final_weight
    input_bias: torch.Tensor
    blocks: tuple[Block, ...]
    final_mod_weight: torch.Tensor  # (2W, W): shift, scale
    final_mod_bias: torch.Tensor
    final_weight: torch.Tensor  # (2C, W): eps, v; (C, W) with a fixed variance
    final_bias: torch.Tensor
    norm: str = "layer"
    mlp: str = "silu"
    time: tuple[TimeEmbedding, ...] = ()

    # No fields: of the head that was packed from a module, not of what is made from it.
    copies: ClassVar[tuple[tuple[torch.Tensor, torch.Tensor], ...]] = ()
    watched: ClassVar[bool] = True
    if TYPE_CHECKING:  # of this head alone

        @property
        def handle(self) -> int: ...

        @property
        def shared(self) -> dict[Any, Any]: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", next(_handles))
        object.__setattr__(self, "shared", {})
        _heads[self.handle] = self

    def __reduce__(self) -> tuple[type[DiffusionHead], tuple[Any, ...]]:
        """Copies and pickles are built like any other head, and so get a handle of their own."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    @staticmethod
    def of_handle(handle: int) -> DiffusionHead:
        """The head with this handle; a handle does not keep its head alive.

        Example:
            >>> from cspd_kernels import DiffusionHead
            >>> from cspd.models import DiffLoss
            >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
            >>> DiffusionHead.of_handle(head.handle) is head
            True
        """
        head = _heads.get(handle)
        if head is None:
            raise CallError(
                f"expected the handle of a DiffusionHead of this process, got {handle}, whose head is gone: keep the "
                "head as long as the code that was compiled with it"
            )
        return head

    @property
    def channels(self) -> int:
        """C, channels of a token."""
        return self.input_weight.shape[1]

    @property
    def cond_channels(self) -> int:
        """Z, width of a condition."""
        return self.width if self.cond_weight is None else self.cond_weight.shape[1]

    @property
    def width(self) -> int:
        """W, width of the residual stream."""
        return self.input_weight.shape[0]

    @property
    def hidden(self) -> int:
        """H, width of the blocks' MLPs."""
        return self.blocks[0].weight1.shape[1] if self.blocks else self.width

    @property
    def outputs(self) -> int:
        """O, channels that the network puts out: C or 2C."""
        return self.final_weight.shape[0]

    @property
    def modulation_of(self) -> tuple[int, ...]:
        """For each block, which of the distinct modulations it uses, numbered in the order of the blocks."""
        order: dict[int, int] = {}
        return tuple(order.setdefault(id(block.mod_weight), len(order)) for block in self.blocks)

    @property
    def shared_modulation(self) -> bool:
        """Whether several blocks use one modulation."""
        return len(set(self.modulation_of)) < self.depth

    @property
    def depth(self) -> int:
        """D, number of residual blocks."""
        return len(self.blocks)

    @property
    def num_steps(self) -> int:
        """T, number of reverse steps; 0 without a schedule."""
        return 0 if self.schedule is None else self.schedule.num_steps

    @property
    def learned_variance(self) -> bool:
        """Whether the variance is what the network puts out behind the first C channels."""
        return self.schedule is not None and self.schedule.learned and self.outputs == 2 * self.channels

    @property
    def device(self) -> torch.device:
        return self.input_weight.device

    def __repr__(self) -> str:
        return (
            f"DiffusionHead(channels={self.channels}, width={self.width}, depth={self.depth}, "
            f"num_steps={self.num_steps}, dtype={self.dtype}, device={self.device})"
        )

    def to(self, dtype: torch.dtype | str) -> DiffusionHead:
        """The same head with GEMM operands of another type (float64: everything in float64).

        Example:
            >>> from cspd_kernels import DiffusionHead
            >>> from cspd.models import DiffLoss
            >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
            >>> head.to("bfloat16").dtype
            torch.bfloat16
        """
        dtype = as_dtype(dtype, "DiffusionHead.to")
        stream = stream_dtype(dtype)

        made: dict[int, torch.Tensor] = {}  # blocks that share a tensor go on sharing it

        def convert(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in made:
                made[id(value)] = value.to(stream if name in _STREAM_FIELDS else dtype)
            return made[id(value)]

        values = {f.name: convert(f.name, getattr(self, f.name)) for f in fields(self)}
        values["dtype"], values["time"] = dtype, tuple(time.to(stream) for time in self.time)
        values["blocks"] = tuple(
            Block(**{f.name: convert(f.name, getattr(block, f.name)) for f in fields(Block)}) for block in self.blocks
        )
        return DiffusionHead(**values)

    @classmethod
    @torch.no_grad()
    def from_module(
        cls, diffloss: nn.Module, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
    ) -> DiffusionHead:
        """Pack a ``DiffLoss``-like module, recognised by its structure and never by its class name.

        The module must hold ``in_channels``, ``gen_diffusion`` and ``net``, as in LTH14/mar's ``models/diffloss.py``.
        The parts of ``net``, which may have other names (:mod:`cspd_kernels.spec`), are:

        - ``input_proj``, ``time_embed`` (``mlp``) and ``cond_embed``;
        - ``res_blocks``, each with ``in_ln``, ``mlp`` and ``adaLN_modulation``;
        - ``final_layer`` with ``norm_final``, ``linear`` and ``adaLN_modulation``.

        Args:
            dtype: GEMM operand type: float32, bfloat16, float16, or float64 (torch backend only).
                None follows autocast where it is on, else the weights' type.
            device: where the head lives; None leaves the weights where they are.

        Raises:
            NotAModel: the module is no such head. The message lists what is missing.
            UnsupportedModel: it is one, of a kind that is not covered. The message says which.
            WrongDtype: a dtype that heads do not have.

        Example:
            >>> from cspd.models import DiffLoss
            >>> from cspd_kernels import DiffusionHead
            >>> DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5), dtype="bfloat16")
            DiffusionHead(channels=4, width=8, depth=2, num_steps=5, dtype=torch.bfloat16, device=cpu)
        """
        problem = why_not_a_head(diffloss)
        if problem:
            kind = type(diffloss).__name__
            raise NotAModel(f"DiffusionHead.from_module expected a DiffLoss-like module, got {kind}: {problem}")
        schedule = Schedule.from_diffusion(diffloss.gen_diffusion)
        net: Any = diffloss.net
        return cls.from_network(net, schedule, dtype=dtype, device=device)

    @classmethod
    @torch.no_grad()
    def from_network(
        cls,
        net: nn.Module,
        schedule: Schedule | None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        spec: HeadSpec | None = None,
    ) -> DiffusionHead:
        """Like :meth:`from_module`, for a network with that structure, and a schedule to sample it with.

        Args:
            schedule: None packs a head that can only be evaluated.
            spec: what the network computes; None is the likeliest, by its structure (:func:`spec_of`).

        Raises:
            NotAModel: it has no such structure. WrongDtype: a dtype that heads do not have.

        Example:
            >>> from cspd.models import DiffLoss
            >>> from cspd_kernels import DiffusionHead, Schedule
            >>> net = DiffLoss(4, 6, 2, 8, num_sampling_steps=5).net
            >>> DiffusionHead.from_network(net, Schedule.linear(50)).num_steps
            50
        """
        found = spec_of(net) if spec is None else spec
        if isinstance(found, str):
            raise NotAModel(f"DiffusionHead.from_network expected a head's network, got {type(net).__name__}: {found}")
        return cls._packed(found, schedule, dtype, device)

    @classmethod
    def _packed(
        cls,
        spec: HeadSpec,
        schedule: Schedule | None,
        dtype: torch.dtype | str | None,
        device: torch.device | str | None,
    ) -> DiffusionHead:
        parts: Any = spec.parts
        where = torch.device(device) if device is not None else parts.input.weight.device
        dtype = as_dtype(call_dtype(where, parts.input.weight.dtype) if dtype is None else dtype, "DiffusionHead")
        packer = Packer(spec, where, dtype)
        times = tuple(packer.time(time, kind) for time, kind in zip(parts.times, spec.times))
        values: list[Any] = [
            schedule,
            dtype,
            spec.norm_eps,
            None if schedule is None else embed_schedule(times, schedule),
            *(packer.linear(parts.cond) if spec.condition == "linear" else (None, None)),
            *packer.linear(parts.input, packer.stream),
            tuple(Block(*packer.block(block)) for block in parts.blocks),
            *packer.modulation(parts.final_modulation, spec.final_modulation),
            *(weight[: spec.outputs] for weight in packer.linear(parts.final, packer.stream)),
            spec.norm,
            spec.mlp,
            times,
        ]
        head = cls(*values)
        object.__setattr__(head, "copies", tuple(packer.copies))
        return head

    @torch.no_grad()
    def with_schedule(self, schedule: Schedule | None) -> DiffusionHead:
        """The same weights under another schedule; None: to be evaluated.

        Example:
            >>> from cspd.models import DiffLoss
            >>> from cspd_kernels import DiffusionHead, Schedule
            >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
            >>> faster = head.with_schedule(Schedule.cosine(3))
            >>> faster.num_steps, faster.input_weight is head.input_weight
            (3, True)
        """
        embedding = None if schedule is None else embed_schedule(self.time, schedule)
        head = replace(self, schedule=schedule, time_embedding=embedding)
        object.__setattr__(head, "shared", self.shared)
        object.__setattr__(head, "watched", self.watched)
        return head
