"""A diffusion head, packed: the weights of an adaLN-MLP in the form that every backend reads."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn

from .schedule import Schedule
from .structure import why_not_a_head

_STREAM_FIELDS = (
    "norm_weight", "norm_bias", "time_embedding", "input_weight", "input_bias", "final_weight", "final_bias",
)  # fmt: skip
OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_handles = itertools.count(1)
_heads: weakref.WeakValueDictionary[int, DiffusionHead] = weakref.WeakValueDictionary()


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the residual stream, the norms and the update of x, for a GEMM operand type.

    Modulations and the activations between two GEMMs are of the operand type.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def call_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """Operand type when none is asked for: autocast's where it is on for this device, else the weights'."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weights


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which the caller's autocast is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Block:
    """Weights of one residual block: ``h += gate * mlp1(silu(mlp0(LN(h) (1 + scale) + shift)))``."""

    norm_weight: torch.Tensor  # (W,) residual-stream type, like norm_bias
    norm_bias: torch.Tensor
    weight0: torch.Tensor  # (W, W)
    bias0: torch.Tensor
    weight1: torch.Tensor  # (W, W)
    bias1: torch.Tensor
    mod_weight: torch.Tensor  # (3W, W): shift, scale, gate
    mod_bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class DiffusionHead:
    """The denoising network of one module at one operand type, with its schedule.

    Built by :meth:`from_module`. GEMM operands (weights and biases) are of ``dtype``. What touches
    x or the residual stream directly is of the stream's type (float32; float64 for a float64 head):
    the LayerNorm's affine parameters, the time embedding, and the two C-wide layers at the ends,
    which cost next to nothing and would round, or in float16 overflow, x and the noise estimate.
    Weights that need no conversion are shared with the module, not copied: build the head again
    after changing them.

    Attributes:
        schedule: the :class:`Schedule` of T steps.
        time_embedding: (T, W), ``time_embed(schedule.timesteps)``: it does not depend on the data.
        norm_eps: the epsilon of every LayerNorm.
        handle: the int that stands for this head, and for no other, in the arguments of an op.
        copies: (packed, weight of the module) of everything that had to be converted or copied.
        shared: what backends make of the weights; one dict for heads that differ in the schedule alone.
        watched: whether what they made follows the weights' values.
    """

    schedule: Schedule
    dtype: torch.dtype
    norm_eps: float
    time_embedding: torch.Tensor
    cond_weight: torch.Tensor  # (W, Z)
    cond_bias: torch.Tensor
    input_weight: torch.Tensor  # (W, C) residual-stream type, like final_weight
    input_bias: torch.Tensor
    blocks: tuple[Block, ...]
    final_mod_weight: torch.Tensor  # (2W, W): shift, scale
    final_mod_bias: torch.Tensor
    final_weight: torch.Tensor  # (2C, W): eps, v; (C, W) with a fixed variance
    final_bias: torch.Tensor

    # No fields: of the head that was packed from a module, not of what is made from it.
    copies = ()
    watched = True

    def __post_init__(self):
        object.__setattr__(self, "handle", next(_handles))
        object.__setattr__(self, "shared", {})
        _heads[self.handle] = self

    def __reduce__(self):
        """Copies and pickles are built like any other head, and so get a handle of their own."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    @staticmethod
    def of_handle(handle: int) -> DiffusionHead:
        """The head with this handle; a handle does not keep its head alive."""
        head = _heads.get(handle)
        if head is None:
            raise RuntimeError(
                f"expected the handle of a living DiffusionHead, got {handle}, whose head is gone (or of another "
                "process): keep the head as long as what was compiled with it"
            )
        return head

    @property
    def channels(self) -> int:
        """C, channels of a token."""
        return self.input_weight.shape[1]

    @property
    def cond_channels(self) -> int:
        """Z, width of a condition."""
        return self.cond_weight.shape[1]

    @property
    def width(self) -> int:
        """W, width of the residual stream."""
        return self.input_weight.shape[0]

    @property
    def depth(self) -> int:
        """D, number of residual blocks."""
        return len(self.blocks)

    @property
    def num_steps(self) -> int:
        """T, number of reverse steps."""
        return self.schedule.num_steps

    @property
    def learned_variance(self) -> bool:
        """Whether the variance is what the network puts out behind the first C channels."""
        return self.schedule.learned and self.final_weight.shape[0] == 2 * self.channels

    @property
    def device(self) -> torch.device:
        return self.input_weight.device

    def __repr__(self) -> str:
        return (
            f"DiffusionHead(channels={self.channels}, width={self.width}, depth={self.depth}, "
            f"num_steps={self.num_steps}, dtype={self.dtype}, device={self.device})"
        )

    def to(self, dtype: torch.dtype) -> DiffusionHead:
        """The same head with GEMM operands of another type (float64: everything in float64)."""
        _check_dtype(dtype)
        stream = stream_dtype(dtype)

        def convert(name: str, value):
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(stream if name in _STREAM_FIELDS else dtype)

        values = {f.name: convert(f.name, getattr(self, f.name)) for f in fields(self)}
        values["dtype"] = dtype
        values["blocks"] = tuple(
            Block(**{f.name: convert(f.name, getattr(block, f.name)) for f in fields(Block)}) for block in self.blocks
        )
        return DiffusionHead(**values)

    @classmethod
    @torch.no_grad()
    def from_module(cls, diffloss: nn.Module, *, dtype: torch.dtype | None = None, device=None) -> DiffusionHead:
        """Pack a ``DiffLoss``-like module, recognised by its structure and never by its class name.

        The module must hold ``in_channels``, ``gen_diffusion`` and ``net`` with ``input_proj``,
        ``time_embed`` (``mlp``, ``frequency_embedding_size``), ``cond_embed``, ``res_blocks`` (each
        ``in_ln``, ``mlp``, ``adaLN_modulation``) and ``final_layer`` (``norm_final``, ``linear``,
        ``adaLN_modulation``), as in LTH14/mar's ``models/diffloss.py``.

        Args:
            dtype: GEMM operand type: float32, bfloat16, float16, or float64 (torch backend only).
                None follows autocast where it is on, else the weights' type.
            device: where the head lives; None leaves the weights where they are.

        Raises:
            TypeError: the module is no such head; the message lists what is missing.
            ValueError: it is one, of a kind that is not covered (the message says which).
        """
        problem = why_not_a_head(diffloss)
        if problem:
            kind = type(diffloss).__name__
            raise TypeError(f"DiffusionHead.from_module expected a DiffLoss-like module, got {kind}: {problem}")
        schedule = Schedule.from_diffusion(diffloss.gen_diffusion)
        return cls.from_network(diffloss.net, schedule, dtype=dtype, device=device)

    @classmethod
    @torch.no_grad()
    def from_network(
        cls, net: nn.Module, schedule: Schedule, *, dtype: torch.dtype | None = None, device=None
    ) -> DiffusionHead:
        """As :meth:`from_module`, of a network that has the structure and a schedule to sample it with."""
        device = torch.device(device) if device is not None else net.input_proj.weight.device
        if dtype is None:
            dtype = call_dtype(device, net.input_proj.weight.dtype)
        _check_dtype(dtype)
        stream, copies = stream_dtype(dtype), []

        def take(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            packed = weight.detach().to(device, dtype).contiguous()
            if packed.numel() and packed.data_ptr() != weight.data_ptr():
                copies.append((packed, weight))
            return packed

        def gemm(layer: nn.Linear, dtype: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
            none = layer.bias is None
            bias = torch.zeros(layer.out_features, device=device, dtype=dtype) if none else take(layer.bias, dtype)
            return take(layer.weight, dtype), bias

        def norm(layer: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
            width = net.input_proj.out_features
            weight, bias = (
                make(width, device=device, dtype=stream) if value is None else take(value, stream)
                for value, make in ((layer.weight, torch.ones), (layer.bias, torch.zeros))
            )
            return weight, bias

        blocks = tuple(
            Block(*norm(b.in_ln), *gemm(b.mlp[0]), *gemm(b.mlp[2]), *gemm(b.adaLN_modulation[-1]))
            for b in net.res_blocks
        )
        head = cls(
            schedule,
            dtype,
            float(net.final_layer.norm_final.eps),
            time_embedding(net.time_embed, schedule, device, stream),
            *gemm(net.cond_embed),
            *gemm(net.input_proj, stream),
            blocks,
            *gemm(net.final_layer.adaLN_modulation[-1]),
            *gemm(net.final_layer.linear, stream),
        )
        object.__setattr__(head, "copies", tuple(copies))
        return head

    @torch.no_grad()
    def with_schedule(self, net: nn.Module, schedule: Schedule) -> DiffusionHead:
        """The same weights under another schedule; ``net`` is the network that this head was packed from."""
        embedding = time_embedding(net.time_embed, schedule, self.device, self.time_embedding.dtype)
        head = replace(self, schedule=schedule, time_embedding=embedding)
        object.__setattr__(head, "shared", self.shared)
        object.__setattr__(head, "watched", self.watched)
        return head


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in OPERAND_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in OPERAND_DTYPES)
        raise ValueError(f"DiffusionHead expected dtype one of {names}, got {dtype}: pass dtype=torch.float32")


@torch.no_grad()
def time_embedding(time_embed: nn.Module, schedule: Schedule, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(T, W): sinusoidal features, cosines first, through the embedding's MLP, in ``dtype`` throughout.

    The features themselves are float32 whatever ``dtype``: that is the definition trained networks saw.
    """
    mlp = [p.detach().to(device, dtype) for layer in (time_embed.mlp[0], time_embed.mlp[2])
           for p in (layer.weight, layer.bias)]  # fmt: skip
    features = _features(schedule, time_embed.frequency_embedding_size, device, dtype)
    with without_autocast(device):
        hidden = nn.functional.silu(nn.functional.linear(features, mlp[0], mlp[1]))
        return nn.functional.linear(hidden, mlp[2], mlp[3])


def _features(schedule: Schedule, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(T, size); kept with the schedule, as they are asked for again where weights are watched."""
    kept = schedule.__dict__.setdefault("_features", {})
    key = (size, device, dtype)
    if key not in kept:
        half = size // 2
        timesteps = torch.tensor(schedule.timesteps, device=device)
        # In this order of operations: trained networks saw its rounding.
        exponents = torch.arange(half, dtype=torch.float32, device="cpu")
        freqs = torch.exp(-math.log(10000.0) * exponents / half).to(device)
        angles = timesteps[:, None].float() * freqs
        kept[key] = torch.cat([angles.cos(), angles.sin(), angles.new_zeros(len(angles), size % 2)], dim=1).to(dtype)
    return kept[key]
