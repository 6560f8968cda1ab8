"""Finding diffusion heads in a model, and keeping their packed form up to date."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead, Schedule
from cspd_kernels.head import call_dtype
from cspd_kernels.live import LiveWeights
from cspd_kernels.parts import NAMES, part_of
from cspd_kernels.spec import HeadSpec, specs_of
from cspd_kernels.structure import stood_for, why_not_a_network, why_not_as_written, why_not_plain

from .diffusions import NotServedError, diffusions_of
from .errors import NotAModel, UnsupportedModel
from .source import Source

_MAX_SCHEDULES = 128  # of one network, whose packed heads share their weights: steps annealed from 100 to 1 have 100


@dataclass(frozen=True)
class FoundHead:
    """A module that holds a head's network as ``net``, or is one, and the diffusion objects that sample with it."""

    name: str
    module: nn.Module
    net: nn.Module  # without wrappers
    diffusions: dict[str, object] = field(default_factory=dict)  # by path

    @property
    def samplers(self) -> list[object]:
        """The diffusion objects."""
        return list(self.diffusions.values())


@dataclass(frozen=True)
class Found:
    """The heads of a model, and the reasons against modules that look like one."""

    heads: list[FoundHead]
    near: dict[str, str]


def look_for_heads(model: nn.Module) -> Found:
    """Every diffusion head in the module tree, found by structure."""
    if not isinstance(model, nn.Module):
        raise NotAModel(f"expected a torch.nn.Module with a diffusion head, got {type(model).__name__}")
    heads, near, seen = [], {}, set()
    everywhere = diffusions_of(model)
    for path, module in model.named_modules():
        net = module._modules.get("net")  # its own: compiled modules and the like pass attributes on
        if net is None and type(module).__name__ != "DiffLoss":
            continue
        name = f"{_plain(path) or 'the model itself'} ({type(module).__name__})"
        inner, reason = (None, "it lacks net") if net is None else unwrapped(net)
        reason = reason or _why_sharded(inner) or why_not_a_network(inner, given=True) or why_not_plain(inner)
        diffusions = diffusions_of(module) or everywhere
        seen.add(inner)
        if (first := next((head for head in heads if inner is head.net), None)) is not None:
            for held, diffusion in diffusions.items():  # two heads share a network, or one is around the other
                if not any(diffusion is known for known in first.samplers):
                    first.diffusions[f"{_plain(path)}.{held}"] = diffusion
            continue
        if reason is None:
            heads.append(FoundHead(name, module, inner, diffusions))
        elif net is None or part_of(inner, "blocks") is not None:
            near[name] = reason
    for path, module in model.named_modules():  # networks that loops of their own call
        inner, reason = unwrapped(module)
        if inner in seen or any(part_of(inner, role) is None for role in NAMES if role != "modulations"):
            continue
        seen.add(inner)
        name = f"{_plain(path) or 'the model itself'} ({type(inner).__name__})"
        reason = reason or _why_sharded(inner) or why_not_a_network(inner) or why_not_plain(inner)
        if reason is None:
            heads.append(FoundHead(name, inner, inner))
        else:
            near[name] = reason
    return Found(heads, near)


def find_heads(model: nn.Module) -> Found:
    """Like :func:`look_for_heads`, for a model that has at least one.

    Raises:
        ValueError: there is none; the message lists what was looked for and what came near.
    """
    found = look_for_heads(model)
    if not found.heads:
        near = "".join(f"\n  {name}: {reason}" for name, reason in found.near.items())
        raise UnsupportedModel(
            f"no diffusion head found in {type(model).__name__} that can be served; it is left unpatched. Looked for "
            "networks with input_proj, time_embed, cond_embed, res_blocks and final_layer, as in LTH14/mar, or the "
            "names of other known code bases. The network is usually the attribute net of a module with a diffusion "
            "object that has p_sample_loop." + (" These came near:" + near if near else " No module came near.")
        )
    return found


def unwrapped(net: nn.Module) -> tuple[nn.Module, str | None]:
    """The network inside of ``torch.compile``, DDP and DataParallel; and why those compute more, None if not."""
    reason = None
    while True:
        inner, kind = None, type(net).__name__
        if "_orig_mod" in net._modules:
            inner, what = net._modules["_orig_mod"], net._forward_hooks or net._forward_pre_hooks
        elif kind in ("DistributedDataParallel", "DataParallel"):
            inner, what = net._modules["module"], why_not_as_written(net)
        if inner is None:
            return net, reason
        if what:
            reason = f"the {kind} around its net {what if isinstance(what, str) else 'has forward hooks'}"
        net = inner


def _why_sharded(net: nn.Module) -> str | None:
    sharded = any(type(m).__name__ == "FullyShardedDataParallel" for m in net.modules())
    return "its weights are sharded by FullyShardedDataParallel" if sharded else None


def _plain(path: str) -> str:
    wrappers = ("_orig_mod", "_fsdp_wrapped_module")
    return ".".join(name for name in path.split(".") if name not in wrappers)


class HeadCache:
    """The packed forms of one network, up to date at every call.

    By operand type; and by schedule, of which a head may have several: those share their weights.

    Args:
        weights: ``"live"`` looks at the network at every :meth:`get`: at its modules, hooks and
            memory, and at the values of what had to be converted (:mod:`cspd_kernels.live`).
            ``"frozen"`` packs once and looks at nothing.
        choice: which of the network's specs it is, where a comparison has chosen another than the first.
    """

    def __init__(self, net: nn.Module, weights: str = "live", choice: int = 0):
        self.net, self.weights, self.choice = net, weights, choice
        self._lock = threading.RLock()
        self._forms: dict[torch.dtype, _Form] = {}
        self._source: Source | None = None

    def __getstate__(self) -> dict:
        return {"net": self.net, "weights": self.weights, "choice": self.choice}  # copies and pickles pack their own

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def choose(self, choice: int) -> None:
        """Take the network for another of its specs."""
        if choice != self.choice:
            self.choice = choice
            self.clear()

    def clear(self) -> None:
        """Forget what is packed, and free its memory."""
        with self._lock:
            self._forms, self._source = {}, None

    def release(self) -> None:
        """Forget it if the network has moved on."""
        with self._lock:
            if self._source is not None and not self._source.is_current():
                self.clear()

    def look(self) -> Source:
        """The network as it is now, looked at again unless it is frozen.

        Raises:
            NotServedError: it cannot be read, or computes more than its weights say.
        """
        with self._lock:
            if self._source is None or (self.weights == "live" and not self._source.is_current()):
                self.clear()
                if (reason := why_not_a_network(self.net, given=True) or why_not_plain(self.net)) is not None:
                    raise NotServedError(reason)
                spec = specs_of(self.net)[self.choice]
                if spec.parts.input.weight.is_meta:
                    raise NotServedError("its weights are on the meta device: offloaded, or not loaded yet")
                self._source = Source(self.net, spec, weakref.WeakMethod(self.clear))
            if any(module.training for module in self._source.moody):
                raise NotServedError("the network computes something else in training mode (dropout?): call .eval()")
            return self._source

    def spec(self) -> HeadSpec:
        """What the network computes, as :meth:`look` last saw it.

        Raises:
            NotServedError: as :meth:`look`, the first time.
        """
        source = self._source
        return (self.look() if source is None else source).spec

    def has(self, schedule: Schedule, dtype: torch.dtype | None = None, given: bool = False) -> bool:
        """Whether :meth:`get` would pack nothing."""
        with self._lock:
            source = self._source
            if source is None:
                return False
            form = self._forms.get(call_dtype(source.device, source.dtype) if dtype is None else dtype)
            return form is not None and schedule in (
                form.given if given and form.first.cond_weight is not None else form.heads
            )

    def get(
        self,
        schedule: Schedule,
        dtype: torch.dtype | None = None,
        source: Source | None = None,
        *,
        given: bool = False,
    ) -> DiffusionHead:
        """The head with operands of ``dtype``; None follows autocast, else the weights' type.

        Args:
            source: what :meth:`look` has just returned.
            given: of conditions that are embedded already.

        Raises:
            NotServedError: as :meth:`look`.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if source is None or source is not self._source:
                self.look()
            if dtype is None:
                dtype = call_dtype(self._source.device, self._source.dtype)
            form = self._forms.get(dtype)
            if form is None:
                form = self._forms[dtype] = _Form(self.net, self._source.spec, schedule, dtype, self.weights == "live")
            return form.embedded(form.get(schedule)) if given else form.get(schedule)


class _Form:
    """The heads of one operand type, by schedule."""

    def __init__(self, net: nn.Module, spec: HeadSpec, schedule: Schedule | None, dtype: torch.dtype, live: bool):
        self.first = DiffusionHead.from_network(net, schedule, dtype=dtype, spec=spec)
        object.__setattr__(self.first, "watched", live)
        self.heads = OrderedDict([(schedule, self.first)])
        self.given: dict[Schedule, DiffusionHead] = {}
        self.live = LiveWeights(self.first) if live else None
        self.made: torch.cuda.Event | None = None
        self._made_here()

    def _made_here(self) -> None:
        """Other streams wait for what this one has just been told to make."""
        if self.first.device.type == "cuda":
            self.made = torch.cuda.Event()
            self.made.record(torch.cuda.current_stream(self.first.device))

    def get(self, schedule: Schedule) -> DiffusionHead:
        if self.made is not None and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.first.device).wait_event(self.made)
        head = self.heads.get(schedule)
        if self.live is not None:
            known = [] if head is None else [head]
            self.live.refresh(known if self.made is not None else list(self.heads.values()))
        if head is None:
            head = self.heads[schedule] = self.first.with_schedule(schedule)
            self._made_here()
            if len(self.heads) > _MAX_SCHEDULES:
                self.heads.popitem(last=False)
        else:
            self.heads.move_to_end(schedule)
        return head

    def embedded(self, head: DiffusionHead) -> DiffusionHead:
        """One of these heads for conditions that are embedded already; what follows the weights' values is shared."""
        if head.cond_weight is None:
            return head
        made = self.given.get(head.schedule)
        if made is None or made.time_embedding is not head.time_embedding:
            self.given = {schedule: made for schedule, made in self.given.items() if schedule in self.heads}
            made = self.given[head.schedule] = replace(head, cond_weight=None, cond_bias=None)
            object.__setattr__(made, "watched", head.watched)
        return made


def bound_network(function) -> tuple[nn.Module, str] | None:
    """(network, name of its method) of what a sampling loop is given to call; None for any other function.

    Raises:
        NotServedError: what is around the network computes more.
    """
    function = function if isinstance(function, nn.Module) else stood_for(function)
    if isinstance(function, nn.Module):
        owner, name = function, "forward"
    else:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if not isinstance(owner, nn.Module):
            return None
        name = "forward" if name in ("__call__", "_wrapped_call_impl", "_call_impl") else name
        replaced = stood_for(owner.__dict__.get(name))
        if replaced is not None and replaced != function:
            return None  # something else stands there now
    net, reason = unwrapped(owner)
    if reason is not None:
        raise NotServedError(reason)
    return net, name
