"""What a model holds for the kernels, and what of it they serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead, Schedule
from cspd_kernels.backends import implementation
from cspd_kernels.head import call_dtype
from cspd_kernels.ops.denoise.parallel import AUTO
from cspd_kernels.spec import spec_of

from .diffusions import LOOPS, NO_DIFFUSION
from .heads import FoundHead, look_for_heads
from .loop import patch_of
from .samplers.served import OwnSampler

if TYPE_CHECKING:
    from .head_patch import HeadPatch


@dataclass(frozen=True)
class HeadDescription:
    """One diffusion head of a model.

    Attributes:
        name: path and class of the module that holds it.
        channels, width, depth, cond_channels: C, W, D and Z of its network.
        samplers: its diffusion objects by the attribute that holds them: their T, or why the kernels
            cannot stand in for them. Or its own methods of sampling that are stood in for, and whose they are like.
        dtype: operand type that a call would have now. weights: type of the weights. device: theirs.
        backend: what would serve it, or why nothing can.
        patched: whether its loops, or its network, are taken over.
        own_loop: why its loops stay its own, where its network alone is taken over or would be; else None.
        network: whether calls of its network by loops of its own are the kernels', on the device where it is.
        parallel_tol: as patched, else patch's default.
        sampling: the steps that are made in place of the loops' own; empty where those are.
        whole: whether ``sample_tokens`` of the model around it is taken over, too.
        own_code: reasons that calls have run their own code for, so far.
        untouched: sampling methods that patch does not look at; a loop that they call may be served.
    """

    name: str
    channels: int
    width: int
    depth: int
    cond_channels: int
    samplers: dict[str, str]
    dtype: torch.dtype
    weights: torch.dtype
    device: torch.device
    backend: str
    patched: bool
    own_loop: str | None
    network: bool
    parallel_tol: float | str | None
    sampling: str
    whole: bool
    own_code: tuple[str, ...]
    untouched: tuple[str, ...]

    @property
    def line(self) -> str:
        """The first line of the page."""
        kinds = _short(self.dtype) if self.dtype == self.weights else f"{_short(self.dtype)} of {_short(self.weights)}"
        patched = "not patched"
        if self.patched and self.own_loop is not None:
            patched = f"patched: its own loop, its {'network by the kernels' if self.network else 'own network'}"
        elif self.patched:
            taken = "patched, whole images" if self.whole else "patched"
            taken += f", {self.sampling}" if self.sampling else ""
            patched = f"{taken}, parallel_tol={self.parallel_tol}"
        return (
            f"{self.name}: C={self.channels} W={self.width} D={self.depth} Z={self.cond_channels}, "
            f"{kinds} on {self.device}, backend {self.backend}, {patched}"
        )

    def __str__(self) -> str:
        lines = [self.line, *(f"  {name}: {what}" for name, what in self.samplers.items())]
        if self.own_loop is not None:
            own = "" if self.network or not self.patched else " and network (faster with weights='frozen')"
            lines.append(f"  keeps its own loop{own}: {self.own_loop}")
        lines += [f"  ran its own code: {reason}" for reason in self.own_code]
        if self.untouched:
            lines.append(f"  not taken over: {', '.join(self.untouched)}")
        return "\n".join(lines)


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
    """Describe what :func:`cspd.patch` finds in a model: sizes, dtypes, the backend, and what is not supported and why.

    This changes nothing and does not run the model's code.

    Raises:
        NotAModel: the object is not a module.

    Example:
        >>> import cspd
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> found = cspd.describe(model)
        >>> head = found.heads[0]
        >>> head.name, head.samplers, head.patched
        ('diffloss (DiffLoss)', {'train_diffusion': '100 steps', 'gen_diffusion': '40 steps'}, False)
    """
    found = look_for_heads(model)
    return Description([describe_head(head, patch_of(head.net)) for head in found.heads], found.near)


def describe_head(found: FoundHead, head_patch: HeadPatch | None = None) -> HeadDescription:
    """One head; ``head_patch`` is its patch, if it has one."""
    net = found.net
    spec: Any = spec_of(net)
    weight = spec.parts.input.weight
    options = head_patch.options if head_patch is not None else None
    dtype = options.dtype if options is not None and options.dtype is not None else None
    dtype = dtype or call_dtype(weight.device, weight.dtype)
    network = None if head_patch is None else head_patch.network
    samplers: dict[str, str] = {}
    schedule: Schedule | None = None
    why: str | None = NO_DIFFUSION
    for path, diffusion in found.diffusions.items():
        try:
            schedule = Schedule.from_diffusion(diffusion)
            what = f"{schedule.num_steps} steps"
        except (TypeError, ValueError) as error:
            what, why = f"own code: {error}", str(error)
        name = path.partition("[")[0]  # of a list, all in one line
        samplers[name] = what if samplers.get(name, what) == what else f"{samplers[name]}, {what}"
    own = OwnSampler.of(found) if head_patch is None else head_patch.own_sampler
    if own is not None:
        samplers |= dict.fromkeys(own.adapter.methods, f"as of {own.adapter}")
        why = None
    return HeadDescription(
        name=found.name,
        channels=spec.channels,
        width=spec.width,
        depth=spec.depth,
        cond_channels=spec.cond_channels,
        samplers=samplers,
        dtype=dtype,
        weights=weight.dtype,
        device=weight.device,
        backend=_backend(net, schedule, dtype, weight.device, options.backend if options is not None else None),
        patched=head_patch is not None,
        network=network is not None and network.pays,
        own_loop=head_patch.own_loop if head_patch is not None else None if schedule is not None else why,
        parallel_tol=options.parallel_tol if options is not None else AUTO,
        sampling=str(options.sampling) if options is not None and options.sampling.changes else "",
        whole=options is not None and options.whole,
        own_code=tuple(head_patch.told) if head_patch is not None else (),
        untouched=tuple(name for name in _untouched(found) if name not in samplers),
    )


def _untouched(found: FoundHead) -> tuple[str, ...]:
    names = {name for name in dir(type(found.module)) if name.startswith("sample") and name != "sample"}
    for diffusion in found.diffusions.values():
        names |= {name for name in dir(type(diffusion)) if name.endswith("sample_loop") and name not in LOOPS}
    return tuple(sorted(names))


def _backend(
    net: nn.Module, schedule: Schedule | None, dtype: torch.dtype, device: torch.device, asked: str | None
) -> str:
    if device.type == "meta":
        return "none: its weights are on the meta device"
    head = DiffusionHead.from_network(net, schedule, dtype=dtype)
    try:
        op = "evaluate" if schedule is None else "denoise"
        module = implementation(op, asked, device, head).__module__.rpartition(".")[2]
    except RuntimeError as error:
        return f"none: {error}"
    return module.removesuffix("_backend")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
