"""What a model holds for the kernels, and what of it they serve."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead, Schedule
from cspd_kernels.backends import implementation
from cspd_kernels.head import call_dtype

from .diffusions import LOOPS
from .heads import FoundHead, look_for_heads
from .loop import patch_of


@dataclass(frozen=True)
class HeadDescription:
    """One diffusion head of a model.

    Attributes:
        name: path and class of the module that holds it.
        channels, width, depth, cond_channels: C, W, D and Z of its network.
        num_steps: T of each diffusion object that the kernels can sample with.
        dtype: operand type that a call would have now. weights: type of the weights. device: theirs.
        backend: what would serve it, or why nothing can.
        patched: whether its loops are taken over.
        own_code: what runs its own code, and why.
    """

    name: str
    channels: int
    width: int
    depth: int
    cond_channels: int
    num_steps: tuple[int, ...]
    dtype: torch.dtype
    weights: torch.dtype
    device: torch.device
    backend: str
    patched: bool
    own_code: tuple[str, ...]

    def __str__(self) -> str:
        steps = ", ".join(map(str, self.num_steps)) or "no"
        kinds = _short(self.dtype) if self.dtype == self.weights else f"{_short(self.dtype)} of {_short(self.weights)}"
        line = (
            f"{self.name}: C={self.channels} W={self.width} D={self.depth} Z={self.cond_channels}, {steps} steps, "
            f"{kinds} on {self.device}, backend {self.backend}, {'patched' if self.patched else 'not patched'}"
        )
        return line + "".join(f"\n    own code: {reason}" for reason in self.own_code)


@dataclass(frozen=True)
class Description:
    """The heads of a model; ``str()`` is a page for people.

    Attributes:
        heads: those that the kernels can serve.
        others: name -> reason, of modules that look like heads and cannot be served.
    """

    heads: list[HeadDescription] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [*map(str, self.heads), *(f"{name}: not served: {reason}" for name, reason in self.others.items())]
        return "\n".join(lines) or "no diffusion head found"

    __repr__ = __str__


def describe(model: nn.Module) -> Description:
    """What :func:`cspd.patch` finds in a model: sizes, types, the backend that would serve, what is not served and why.

    Changes nothing and runs none of the model's code.

    Raises:
        TypeError: not a module.
    """
    found = look_for_heads(model)
    return Description([describe_head(head, patch_of(head.net)) for head in found.heads], found.near)


def describe_head(found: FoundHead, head_patch=None) -> HeadDescription:
    """One head; ``head_patch`` is its patch, if it has one."""
    net, weight = found.net, found.net.input_proj.weight
    options = head_patch.options if head_patch is not None else None
    dtype = options.dtype if options is not None and options.dtype is not None else None
    dtype = dtype or call_dtype(weight.device, weight.dtype)
    steps, own = [], list(head_patch.told) if head_patch is not None else []
    for diffusion in found.diffusions:
        try:
            steps.append(Schedule.from_diffusion(diffusion))
        except (TypeError, ValueError) as error:
            own.append(f"{type(diffusion).__name__}: {error}")
    methods = {name for name in dir(type(found.module)) if name.startswith("sample") and name != "sample"}
    methods |= {
        name
        for diffusion in found.diffusions
        for name in dir(type(diffusion))
        if name.endswith("sample_loop") and name not in LOOPS
    }
    if others := sorted(methods):
        own.append(f"whatever of {', '.join(others)} does not come to {LOOPS[0]}")
    return HeadDescription(
        name=found.name,
        channels=net.input_proj.in_features,
        width=net.input_proj.out_features,
        depth=len(net.res_blocks),
        cond_channels=net.cond_embed.in_features,
        num_steps=tuple(sorted({schedule.num_steps for schedule in steps})),
        dtype=dtype,
        weights=weight.dtype,
        device=weight.device,
        backend=_backend(net, steps, dtype, weight.device, options.backend if options is not None else None),
        patched=head_patch is not None,
        own_code=tuple(own),
    )


def _backend(net: nn.Module, schedules: list[Schedule], dtype, device: torch.device, asked: str | None) -> str:
    if device.type == "meta":
        return "none: its weights are on the meta device"
    if not schedules:
        return "none: no diffusion object that the kernels can sample with"
    head = DiffusionHead.from_network(net, schedules[0], dtype=dtype)
    try:
        module = implementation("denoise", asked, device, head).__module__.rpartition(".")[2]
    except RuntimeError as error:
        return f"none: {error}"
    return module.removesuffix("_backend")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
