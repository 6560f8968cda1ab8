"""What a network looked like when it was packed or compared, and whether it still does."""

from __future__ import annotations

import operator
import weakref
from itertools import chain

import torch
import torch.nn as nn

from cspd_kernels.live import fingerprint
from cspd_kernels.spec import HeadSpec
from cspd_kernels.structure import GLOBAL_HOOKS

from .diffusions import Code

_LAYOUT = (torch.Tensor.data_ptr, torch.Tensor.dtype.__get__, torch.Tensor.size, torch.Tensor.stride)
_PLAIN = {int, float, bool, str}


class Source:
    """What a network looked like when it was packed, except the values of its weights.

    It is checked at every call. Walking the module tree would take longer than everything else that the host does
    there. So it remembers the tables in which the modules keep their children, weights and hooks, and compares those.
    It holds the parameters but not their memory, so a model that moves leaves none behind. When that memory is freed,
    ``released`` is called at once.

    Attributes:
        spec: what the network computes.
        code: the functions of the network's classes.
        written: those, and whatever else than weights their results may depend on.
        moody: modules that may compute something else in training mode.
    """

    def __init__(self, net: nn.Module, spec: HeadSpec, released: weakref.WeakMethod):
        self.spec, self.modules = spec, list(net.modules())
        self.kinds = [*map(type, self.modules)]
        self.code = Code(dict.fromkeys(self.kinds))
        self.own = [m.__dict__ for m in self.modules]
        self.sizes = [*map(len, self.own)]  # what replaces a method of a class is one more
        self.forwards = [(own, own["forward"]) for own in self.own if "forward" in own]
        self.hooks = [*GLOBAL_HOOKS, *(h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks))]
        self.tables = [table for m in self.modules for table in (m._modules, m._parameters, m._buffers) if table]
        self.members = [*chain.from_iterable(map(dict.values, self.tables))]
        layers = [layer for _, layer in chain(spec.linears(), spec.norms())]
        weights = (getattr(layer, role, None) for layer in layers for role in ("weight", "bias", "alpha"))
        self.weights = list({id(weight): weight for weight in weights if weight is not None}.values())
        self.weight_kinds = [*map(type, self.weights)]
        first = spec.parts.input.weight
        self.device, self.dtype = first.device, first.dtype
        self.norms = spec.torchs_norms()
        self.constants, self.state = [norm.eps for norm in self.norms], self._state()
        self.moody = [m for m in self.modules if _is_moody(m)]
        self.theirs = [m for m in self.modules if not _is_torchs(type(m))]
        self.buffers = list(net.buffers())
        self.settings = settings(self.theirs, self.buffers)
        self.written = (self.code.functions, self.settings)

        this = weakref.ref(self)

        def gone(_):
            if (watching := this()) is not None:
                watching.dead = True
            if (method := released()) is not None:
                method()

        self.dead = False
        self.storages = [weakref.ref(p.untyped_storage(), gone) for p in self.weights]

    def is_current(self) -> bool:
        if self.dead or any(self.hooks) or [*map(type, self.modules)] != self.kinds:
            return False
        if [*map(len, self.own)] != self.sizes or not all(own.get("forward") is f for own, f in self.forwards):
            return False
        members = [*chain.from_iterable(map(dict.values, self.tables))]
        if len(members) != len(self.members) or not all(map(operator.is_, members, self.members)):
            return False
        if [*map(type, self.weights)] != self.weight_kinds or not self.code.is_current():
            return False
        return (
            [norm.eps for norm in self.norms] == self.constants
            and self._state() == self.state
            and settings(self.theirs, self.buffers) == self.settings
        )

    def _state(self) -> list[list]:
        return [[*map(read, self.weights)] for read in _LAYOUT]


def settings(modules: list[nn.Module], buffers: list[torch.Tensor]) -> list:
    """Plain attributes of modules, except their mode, and what buffers hold: what results depend on beside weights."""
    attributes = [
        [(name, value) for name, value in m.__dict__.items() if type(value) in _PLAIN and name != "training"]
        for m in modules
    ]
    return [attributes, [_print(buffer) for buffer in buffers]]


def written(net: nn.Module) -> tuple:
    """Like ``Source.written``, for a network that need not be readable."""
    theirs = [m for m in net.modules() if not _is_torchs(type(m))]
    return Code(map(type, net.modules())).functions, settings(theirs, list(net.buffers()))


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _is_moody(module: nn.Module) -> bool:
    """Whether a module's code asks for its mode: dropout that drops something, batch statistics, a fork's own."""
    if _is_torchs(type(module)):
        return getattr(module, "p", 0) > 0 if "Dropout" in type(module).__name__ else hasattr(module, "running_mean")
    functions = (value for base in type(module).__mro__ if not _is_torchs(base) for value in vars(base).values())
    return any("training" in getattr(getattr(f, "__code__", None), "co_names", ()) for f in functions)


def _print(buffer: torch.Tensor):
    """What tells two states of a buffer apart; the host does not wait for a device."""
    if buffer.device.type == "cpu":
        return [part.tolist() for part in fingerprint(buffer)]
    return buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version
