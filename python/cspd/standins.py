"""Methods that stand in for a module's own on the instance: a head's ``sample`` and its network's moves are watched.

They are bound methods, so that a deep copy or a pickle of the module carries stand-ins of its own, and that
``torch.compile`` takes them for what they replace.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from types import MethodType

import torch.nn as nn

from cspd_kernels.backends import untraced

from .diffusions import LOOPS, NotServedError, diffusions_of, held
from .errors import CallError
from .heads import unwrapped
from .loop import LOCK, NO_LOOP, LoopHook, loops_entered, patch_of

ARGUMENTS = ("bsz", "num_iter", "cfg", "cfg_schedule", "labels", "temperature", "progress")  # of MAR's sample_tokens
_REPLICATE = "_replicate_for_data_parallel"
_thread = threading.local()


@contextlib.contextmanager
def counted(original: Callable, args: tuple, kwargs: dict) -> Iterator[None]:
    """During a call of ``sample_tokens``, count the loops that this thread enters: one a step."""
    before, first, of = getattr(_thread, "passes", None), loops_entered(), None
    with contextlib.suppress(TypeError):  # its own error, if it is one
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        of = operator.index(bound.arguments.get("num_iter"))
    _thread.passes = (first, of)
    try:
        yield
    finally:  # to one around it, these loops are none
        _thread.passes = None if before is None else (before[0] + loops_entered() - first, before[1])


def autoregressive_step() -> tuple[int, int]:
    """(which, of how many) the loop is of that this thread has entered last.

    Raises:
        RuntimeError: it is of none.
    """
    first, of = getattr(_thread, "passes", None) or (0, None)
    if of is None:
        raise CallError(
            "a head patched with a pair of sampling_steps expected a call from its model's sample_tokens with "
            "num_iter: the pair follows its autoregressive steps. Call that, or patch with one number"
        )
    return min(loops_entered() - 1 - first, of - 1), of


class StandIn:
    """Stands in for methods of one module, as long as there are patches that need it."""

    names: tuple[str, ...] = ()
    stands_in = True  # for :func:`cspd_kernels.structure.stood_for`

    def __new__(cls, *_):
        self = super().__new__(cls)
        self.users = weakref.WeakSet()  # the patches; copies of those enter themselves
        return self

    def __getstate__(self) -> dict:
        return {"module": self.module, "replaced": self.replaced}

    def __init__(self, module: nn.Module):
        self.module = module
        self.replaced: dict[str, object] = {}  # what already stood on the instance

    @classmethod
    def of(cls, module: nn.Module) -> StandIn | None:
        """The one on a module, None without."""
        found = (getattr(module.__dict__.get(name), "__self__", None) for name in cls.names)
        return next((owner for owner in found if isinstance(owner, cls)), None)

    def install(self) -> None:
        own = self.module.__dict__
        self.replaced = {name: own[name] for name in (*self.names, _REPLICATE) if name in own}
        for name in (*self.names, _REPLICATE):
            own[name] = getattr(self, name)

    def remove(self) -> None:
        """Leave the methods to those that stood there, also from below another stand-in."""
        for name in (*self.names, _REPLICATE):
            table = self.module.__dict__
            while isinstance(top := _owner(table.get(name)), StandIn):
                if top is self:
                    _put(table, name, self.replaced.get(name))
                    break
                table = top.replaced

    def original(self, name: str) -> Callable:
        """The method that stood there before."""
        return self.replaced.get(name) or getattr(type(self.module), name).__get__(self.module)

    def _as_original(self, name: str) -> MethodType:
        """A method that comes to ``call``; name, docstring and signature are the original's."""

        def method(watched, *args, **kwargs):
            return watched.call(name, args, kwargs)

        if "module" in vars(self):  # else it is being read from a pickle
            original = self.original(name)
            function = functools.wraps(getattr(original, "__func__", original))(method)
            own = inspect.signature(original)
            watched = inspect.Parameter("watched", inspect.Parameter.POSITIONAL_ONLY)
            function.__signature__ = own.replace(parameters=[watched, *own.parameters.values()])
            function.__name__ = name
        return MethodType(method, self)

    def call(self, name: str, args: tuple, kwargs: dict):
        """A call of the method of that name."""
        return self.run(*args, **kwargs)

    def present(self) -> list:
        """The users, none of which comes or goes meanwhile."""
        with LOCK:
            return list(self.users)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica has other weights, elsewhere: it calls nothing of the module that it was made from."""
        replica = self.original(_REPLICATE)()
        for name, value in [*replica.__dict__.items()]:
            if isinstance(_owner(value), StandIn):
                while isinstance(owner := _owner(value), StandIn):
                    value = owner.replaced.get(name)
                _put(replica.__dict__, name, value)
        return replica


def _owner(method) -> object:
    return getattr(method, "__self__", None)


def _put(table: dict, name: str, value) -> None:
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


class WatchedSample(StandIn):
    """A head's own ``sample``; where it never comes to a loop that is hooked, that is told."""

    names = ("sample",)

    @property
    def sample(self) -> MethodType:
        """Bound; name, docstring and signature are the original's."""
        return self._as_original("sample")

    @untraced
    def run(self, *args, **kwargs):
        self._follow()
        before = loops_entered()
        result = self.original("sample")(*args, **kwargs)
        if loops_entered() == before:
            for user in self.present()[:1]:
                (patch_of(user.net) or user).tell(NO_LOOP)
        return result

    def _follow(self) -> None:
        """Diffusion objects that were exchanged since the last call are taken over, too."""
        attributes = [value for name, value in [*self.module.__dict__.items()] if name[:1] != "_"]
        values = (value for attribute in attributes for _, value in held("", attribute))
        if any(hasattr(type(value), LOOPS[0]) and LoopHook.of(value) is None for value in values):
            with LOCK:
                for user in self.present():
                    user.take_over(diffusions_of(self.module))


class WatchedMoves(StandIn):
    """A network's ``_apply``, by which it is moved and converted: what was packed for where it stood is let go."""

    names = ("_apply",)

    def _apply(self, *args, **kwargs) -> nn.Module:
        try:
            return self.original("_apply")(*args, **kwargs)
        finally:
            for user in self.present():
                user.release()


class WholeSampling(StandIn):
    """A model's ``sample_tokens``: by the whole sampler of the patch in charge of its head, or the model's own.

    Calls of the head in the model's own are counted, for a patch with other denoising steps at each. This object holds
    no patch, and no patch holds it: a copy of the head alone must not carry the model.
    """

    names = ("sample_tokens",)

    @property
    def sample_tokens(self) -> MethodType:
        """Bound; name, docstring and signature are the original's."""
        return self._as_original("sample_tokens")

    @untraced
    def run(self, *args, **kwargs):
        original = self.original("sample_tokens")
        net = getattr(getattr(self.module, "diffloss", None), "net", None)
        patch = None if net is None else patch_of(unwrapped(net)[0])
        if patch is None or not patch.options.watches:
            return original(*args, **kwargs)
        with counted(original, args, kwargs) if patch.options.sampling.anneals else contextlib.nullcontext():
            return self._run(original, patch, args, kwargs)

    def _run(self, original: Callable, patch, args: tuple, kwargs: dict):
        if not patch.options.whole:
            return original(*args, **kwargs)
        try:
            sampler, arguments = patch.sampler_of(self.module), self._arguments(original, args, kwargs)
            sampler.check()
            try:
                sampler.check_call(**arguments)
            except (TypeError, ValueError) as error:  # its own code may know better
                raise NotServedError(f"{error}") from None
        except NotServedError as error:
            patch.tell_of_model(self.module, f"{error}")
            return original(*args, **kwargs)
        return sampler.sample(**arguments)

    def _arguments(self, original: Callable, args: tuple, kwargs: dict) -> dict:
        """Arguments of a call, with the method's own defaults.

        Raises:
            NotServedError: there are others than MAR's.
        """
        if "sample_tokens" in self.replaced:
            raise NotServedError("it had been replaced on the instance")
        bound = inspect.signature(original).bind(*args, **kwargs)
        if more := [name for name in bound.arguments if name not in ARGUMENTS]:
            raise NotServedError(f"it is called with {', '.join(more)}")
        bound.apply_defaults()
        return {name: value for name, value in bound.arguments.items() if name in ARGUMENTS}
