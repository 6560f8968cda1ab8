"""The sampling loops of a diffusion object, taken over on the instance.

A fork's own ``sample`` runs as it stands and calls ``p_sample_loop``; all that the kernels must know arrives there as
arguments (:mod:`cspd.calls`). Every call that they do not know runs the loop that was there, and the reason is told.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch.nn as nn

from cspd_kernels.backends import untraced
from cspd_kernels.structure import kind_of

from .calls import Call, read_call
from .diffusions import LOOPS, NotServedError, Tables
from .errors import NotAModel
from .heads import bound_network

PATCHES = "_cspd_patches"  # attribute of a network: its patches, the last one in charge
NO_LOOP = (
    "its sample does not call p_sample_loop: it has a sampler of its own, or makes a diffusion object at each call"
)
LOCK = threading.RLock()  # of patching and unpatching, of any model
_thread = threading.local()


def loops_entered() -> int:
    """How many hooked loops this thread has entered so far."""
    return getattr(_thread, "entered", 0)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Loops that a comparison enters belong to no patch."""
    entered = loops_entered()
    try:
        yield
    finally:
        _thread.entered = entered


@contextlib.contextmanager
def own_loops() -> Iterator[None]:
    """A context in which hooked loops run their own code in this thread: that is what is compared, patched or not."""
    before = getattr(_thread, "own", False)
    _thread.own = True
    try:
        with uncounted():
            yield
    finally:
        _thread.own = before


class LoopHook:
    """Stands in for the loops of one diffusion object, for every patched network that samples with it.

    Bound to the instance as methods of its own, so that a deep copy or a pickle of the diffusion object
    carries a hook of its own.
    """

    def __new__(cls, *_):
        self = super().__new__(cls)
        self.users = weakref.WeakSet()  # the patches that need it; copies of those enter themselves
        self.signatures: dict[Callable, inspect.Signature] = {}
        return self

    def __init__(self, diffusion):
        self.diffusion, self.tables = diffusion, Tables(diffusion)
        self.replaced: dict[str, object] = {}  # methods that already stood on the instance

    def __getstate__(self) -> dict:
        return {"diffusion": self.diffusion, "tables": self.tables, "replaced": self.replaced}

    @staticmethod
    def of(diffusion) -> LoopHook | None:
        """The hook on a diffusion object, None without one."""
        owner = getattr(vars(diffusion).get(LOOPS[0]), "__self__", None)
        return owner if isinstance(owner, LoopHook) else None

    def install(self) -> None:
        """Raises TypeError where the object refuses; :meth:`remove` undoes what was done."""
        own = vars(self.diffusion)
        self.replaced = {name: own[name] for name in LOOPS if name in own}
        for name in LOOPS:
            if not callable(getattr(self.diffusion, name, None)):
                continue
            try:
                setattr(self.diffusion, name, getattr(self, name))
            except Exception as error:
                raise NotAModel(
                    f"expected a diffusion object whose {name} can be replaced, but {kind_of(self.diffusion)} does not "
                    f"let it: {type(error).__name__}: {error}"
                ) from error

    def remove(self) -> None:
        own = vars(self.diffusion)  # and not its setattr: nothing that the object says can leave a part behind
        for name in LOOPS:
            if getattr(own.get(name), "__self__", None) is self:
                del own[name]
                if name in self.replaced:
                    own[name] = self.replaced[name]

    def original(self, name: str) -> Callable:
        """The loop that stood there before."""
        return self.replaced.get(name) or getattr(type(self.diffusion), name).__get__(self.diffusion)

    # Untraced: torch's own random numbers, and what the packed head is compared with are the parameters themselves.
    @untraced
    def p_sample_loop(self, *args, **kwargs):
        """The diffusion object's loop, by the kernels where they can stand in for it; see :func:`cspd.patch`."""
        return self._run("p_sample_loop", args, kwargs)

    @untraced
    def p_sample_loop_with_noise(self, *args, **kwargs):
        """Like ``p_sample_loop``, with the noise of the steps passed in (MarkXCloud/CSpD)."""
        return self._run("p_sample_loop_with_noise", args, kwargs)

    @untraced
    def ddim_sample_loop(self, *args, **kwargs):
        """Like ``p_sample_loop``, by DDIM."""
        return self._run("ddim_sample_loop", args, kwargs)

    def _run(self, name: str, args, kwargs):
        _thread.entered = loops_entered() + 1
        original, patch = self.original(name), None
        if getattr(_thread, "own", False):
            return original(*args, **kwargs)
        try:
            arguments, parameters = self._bind(original, args, kwargs)
            found = bound_network(arguments["model"])
            patch = self._patch(found)
            if patch is not None:
                spec = None if found is None else patch.spec()
                return patch.take(read_call(name, arguments, parameters, found, spec), self)
        except NotServedError as reason:
            if (patch := patch or self._any_user()) is not None:
                patch.tell(str(reason))
        return original(*args, **kwargs)

    def _bind(self, original: Callable, args, kwargs) -> tuple[dict, Mapping]:
        """(arguments by name, parameters) of a call."""
        function = getattr(original, "__func__", original)
        try:
            if function not in self.signatures:
                self.signatures[function] = inspect.signature(original)
            bound = self.signatures[function].bind(*args, **kwargs)
        except (TypeError, ValueError) as error:  # its own error, if it is one
            raise NotServedError(f"its loop is called with arguments that do not fit its signature: {error}") from None
        bound.apply_defaults()
        if "model" not in bound.arguments or "shape" not in bound.arguments:
            raise NotServedError("its loop has no arguments named model and shape")
        return bound.arguments, self.signatures[function].parameters

    def _patch(self, found: tuple[nn.Module, str] | None):
        """The patch in charge of a call; None for a network that is not patched."""
        if found is None:
            return self._any_user()
        patch = patch_of(found[0])
        if patch is None:
            for user in self._present():
                if (why := user.left_behind()) is not None:
                    user.tell(why)
        elif patch.net is not found[0]:
            patch.tell("this is a replica or a shallow copy of the patched network")
            return None
        return patch

    def kind(self, call: Call) -> tuple:
        """What decides whether the kernels compute the same as the loop, of a call and of the diffusion object."""
        return (*call.kind, *self.tables.sort())

    def _any_user(self):
        return next(iter(self._present()), None)

    def _present(self) -> list:
        with LOCK:  # none comes or goes meanwhile
            return list(self.users)


def patch_of(net: nn.Module):
    """The patch in charge of a network, None without one."""
    last = net.__dict__.get(PATCHES, ())[-1:]  # at once: another thread may undo it
    return last[0] if last else None
