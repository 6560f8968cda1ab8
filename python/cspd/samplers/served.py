"""A head's own sampler by the kernels: compared on small copies, then stood in for.

A call is served if calls of its kind agreed on a copy with random weights. The head's own method and the kernels must
agree to rounding, and leave the random number generators in the same state. Every other call runs the method itself.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch.autograd import forward_ad

from cspd_kernels.backends import untraced
from cspd_kernels.structure import compiled_from

from ..diffusions import Code, NotServedError
from ..heads import FoundHead, HeadCache, unwrapped
from ..loop import LOCK, patch_of
from ..source import Source
from ..standins import StandIn
from ..twin import CannotRunError, copies_of, cut_or_whole, first_line, quiet, seeded
from ..verify import DiffersError, same
from . import adapter_of
from .adapter import Adapter
from .plan import plan_of, run

if TYPE_CHECKING:
    from ..head_patch import HeadPatch

_PLAIN = (str, bool, int, float, type(None), torch.dtype, torch.device)
_SEED = 20261127
_MOST = 64  # states of a head that are compared
RECORDS = "autograd records what its sample computes: call it under torch.no_grad() or torch.inference_mode()"


class OwnSampler:
    """The sampler of one head, and which kinds of its calls agreed."""

    def __init__(self, module: nn.Module, net: nn.Module, adapter: Adapter):
        self.module, self.net, self.adapter = module, net, adapter
        self.verdicts: dict[tuple, frozenset[tuple] | str] = {}  # what the head is like -> kinds of calls, or why none
        self.written: tuple | None = None  # what the network was like
        self._signatures: dict[Callable, inspect.Signature] = {}
        self._code: Code | None = None

    @staticmethod
    def of(found: FoundHead) -> OwnSampler | None:
        """The sampler of the first module that an adapter recognises among those that hold the network, or None."""
        for module in found.module.modules():
            net = module._modules.get("net")
            if net is None or unwrapped(net)[0] is not found.net:
                continue
            if (adapter := adapter_of(module)) is not None:
                return OwnSampler(module, found.net, adapter)
        return None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "verdicts": {}, "written": None, "_signatures": {}, "_code": None}

    def check(self, choice: int, written: tuple) -> None:
        """Compare as the head is now.

        Args:
            choice: which of :func:`cspd_kernels.spec.specs_of` the network is. written: as ``Source.written``.

        Raises:
            DiffersError: with the figure. CannotRunError: its own method does not run here.
        """
        self.written = written
        self.verdicts[self._state()] = self._compare(choice)

    def serve(self, patch: HeadPatch, name: str, original: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        """One call of a method.

        Raises:
            NotServedError: the method itself must run; nothing was drawn.
        """
        source, options, function = patch.cache.look(), patch.options, getattr(original, "__func__", original)
        if function not in self._signatures:
            self._signatures[function] = inspect.signature(original)
        bound = _bound(name, self._signatures[function], args, kwargs)
        plan, state = plan_of(self.adapter, self.module, name, bound, source), self._state()
        if self.adapter.records and _recorded([*source.weights, plan.cond]):
            raise NotServedError(RECORDS)
        if source.written is not self.written:
            if source.written != self.written:  # what was compared was something else
                self.verdicts = {}
            self.written = source.written
        ready = state in self.verdicts and patch.cache.has(plan.reading.schedule, options.dtype)
        if not ready and plan.cond.is_cuda and torch.cuda.is_current_stream_capturing():
            patch.refuse_capture()
        agreed = self._agreed(state, patch.cache.choice)
        if isinstance(agreed, str):
            raise NotServedError(agreed)
        if plan.kind not in agreed:
            raise NotServedError(f"such a call of its {name} was not compared")
        head = patch.cache.get(plan.reading.schedule, options.dtype, source)
        return run(plan, head, options.backend, options.noise == "philox", options.parallel_tol)

    def _agreed(self, state: tuple, choice: int) -> frozenset[tuple] | str:
        if (agreed := self.verdicts.get(state)) is not None:
            return agreed
        if len(self.verdicts) >= _MOST:
            return "its attributes change from call to call, so it would have to be compared at each"
        with LOCK:
            try:
                agreed = self._compare(choice)
            except CannotRunError as error:
                agreed = f"it does not run on a copy, so it cannot be compared: {error}"
            except DiffersError as error:
                agreed = f"{error}"
        self.verdicts[state] = agreed
        return agreed

    def _state(self) -> tuple:
        """What the methods may depend on beside the network: code and attributes of the head."""
        if self._code is None or not self._code.is_current():
            held = [type(value) for value in vars(self.module).values() if _is_object(value)]
            self._code = Code(dict.fromkeys([type(self.module), *held]))
        aside = ("training", *self.adapter.methods)
        own = {name: value for name, value in vars(self.module).items() if name[:1] != "_" and name not in aside}
        return self._code.functions, _told(own, depth=3)

    def _compare(self, choice: int) -> frozenset[tuple]:
        with quiet(self.net), _eagerly():
            return cut_or_whole(lambda cut: self._compare_copies(choice, cut))

    def _compare_copies(self, choice: int, cut: bool) -> frozenset[tuple]:
        (theirs, _), (ours, cache) = (self._copy(choice, cut) for _ in range(2))
        agreed, failure, source = set(), None, cache.look()
        trials = (self.adapter.trials(head, _conditions(source)) for head in (theirs, ours))
        for (name, arguments), (_, again) in zip(*trials):
            what = f"its {name}" + _numbers(arguments)
            try:
                own = seeded(lambda: _as_written(getattr(theirs, name))(**arguments), [])  # noqa: B023
            except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
                failure = failure or CannotRunError(first_line(error))
                continue
            try:
                plan = plan_of(
                    self.adapter, ours, name, _bound(name, inspect.signature(getattr(ours, name)), (), again), source
                )
                head = cache.get(plan.reading.schedule, torch.float32)
                # Step by step, whatever was asked for: what is compared is code, which a tolerance would hide.
                served = seeded(lambda: run(plan, head, "torch", False, None), [])  # noqa: B023
            except Exception as error:
                raise DiffersError(f"{what} runs, but with the kernels it raises {first_line(error)}") from error
            same(own, served, None, what, self.net)
            agreed.add(plan.kind)
        if not agreed:
            raise failure or CannotRunError(f"it is not known how {type(self.module).__name__} is called")
        return frozenset(agreed)

    def _copy(self, choice: int, cut: bool) -> tuple[nn.Module, HeadCache]:
        try:
            copies = copies_of(self.net, [], self.module, cut=cut, serving=True, steps=None)
        except Exception as error:
            raise CannotRunError(first_line(error)) from error
        if (stands := ServedSample.of(copies.module)) is not None:
            stands.remove()
        return copies.module, HeadCache(copies.trial.net, choice=choice)


class ServedSample(StandIn):
    """The methods of a head that its patch's :class:`OwnSampler` knows; of a patch without one they are the head's."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.names = adapter_of(module).methods

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "names": self.names}

    @classmethod
    def of(cls, module: nn.Module) -> ServedSample | None:
        methods = (value for value in [*vars(module).values()] if isinstance(value, MethodType))
        return next((method.__self__ for method in methods if isinstance(method.__self__, cls)), None)

    def __getattr__(self, name: str):
        """A method of the head, bound to this."""
        if name[:1] == "_" or name not in vars(self).get("names", (name,)):
            raise AttributeError(name)
        return self._as_original(name)

    @untraced
    def call(self, name: str, args: tuple, kwargs: dict):
        original, net = self.original(name), self.module._modules.get("net")
        patch = None if net is None else patch_of(unwrapped(net)[0])
        if patch is None:
            for user in self.present():
                user.tell(f"the net of {type(self.module).__name__} was replaced since it was patched: patch again")
        sampler = getattr(patch, "own_sampler", None)
        if sampler is None:
            return original(*args, **kwargs)
        try:
            if sampler.module is not self.module:
                raise NotServedError("its network has since been patched as that of another head")
            if name in self.replaced and not _is_of_class(self.replaced[name], self.module, name):
                raise NotServedError(f"its {name} had been replaced on the instance")
            return sampler.serve(patch, name, original, args, kwargs)
        except NotServedError as reason:
            patch.tell(str(reason))
        if patch.network is not None:  # in whose place something stands: a full graph would not take it
            original = _as_written(original)
        return original(*args, **kwargs)


def _as_written(method: Callable) -> Callable:
    """A method without what ``torch.compile`` made of it, also behind a wrapper (``smart_compile`` of NextStep-1)."""
    function = compiled_from(getattr(method, "__func__", method))
    inner = getattr(function, "original", None)
    function = inner if isinstance(inner, FunctionType) else function
    owner = getattr(method, "__self__", None)
    return function if owner is None else MethodType(function, owner)


def _is_of_class(method, module: nn.Module, name: str) -> bool:
    """Whether a method on the instance is its class's, perhaps compiled."""
    return getattr(compiled_from(method), "__func__", None) is getattr(type(module), name)


def _bound(name: str, signature: inspect.Signature, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:  # its own error
        raise NotServedError(f"its {name} is called with arguments that do not fit its signature: {error}") from None
    bound.apply_defaults()
    return bound


def _recorded(values: list) -> bool:
    """Whether derivatives of these are taken."""
    if getattr(torch._C, "_are_functorch_transforms_active", lambda: False)() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(value.requires_grad for value in values)


def _eagerly() -> contextlib.AbstractContextManager:
    """What forks have under ``torch.compile`` runs as it is written: a comparison is no reason to compile."""
    stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    compiled = "torch._dynamo" in sys.modules  # else nothing is, and this would import it
    return stance("force_eager") if compiled and stance is not None else contextlib.nullcontext()


def _conditions(source: Source) -> Callable[[int], torch.Tensor]:
    """``z(rows)``: others at every call, the same in every run."""
    generator = torch.Generator("cpu").manual_seed(_SEED)

    def z(rows: int) -> torch.Tensor:
        shape = (rows, source.spec.cond_channels)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(source.device)

    return z


def _numbers(arguments: dict) -> str:
    told = ", ".join(f"{name} {value}" for name, value in arguments.items() if isinstance(value, _PLAIN))
    return f" at {told}" if told else ""


def _is_object(value) -> bool:
    """Whether a value is an object of a fork's own, such as a transport, whose attributes tell what it does."""
    plain = (nn.Module, type, FunctionType, MethodType, torch.Tensor)
    return hasattr(value, "__dict__") and not isinstance(value, plain)


def _told(value, depth: int):
    """What tells two states of an attribute apart."""
    if isinstance(value, _PLAIN):
        return value
    if depth and isinstance(value, (list, tuple)):
        return tuple(_told(item, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return tuple((str(name), _told(item, depth - 1)) for name, item in value.items())
    if depth and _is_object(value):
        return type(value), _told(vars(value), depth - 1)
    return type(value), id(value)
