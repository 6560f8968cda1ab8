"""Which implementation serves an op: argument, then ``CSPD_BACKEND``, then automatic."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from . import crossover, cuda_support
from .crossover import PARALLEL, PERSISTENT, PERSISTENT_VARIABLE, ranked
from .errors import BackendUnavailable, InvalidInput
from .logs import log_once

if TYPE_CHECKING:
    from .head import DiffusionHead

BACKENDS = ("torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "CSPD_BACKEND"
P = ParamSpec("P")
R = TypeVar("R")
_MOST_REMEMBERED = 4096
OLDEST_TRITON = (3, 6)  # what the kernels are tested with


def available_backends() -> dict[str, str]:
    """``{"torch": "ok", "triton": "ok" or why not, "cuda": "ok" or why not}``.

    "ok" means that ``denoise`` can be served on some device of this machine; the other ops may have fewer backends.

    Example:
        >>> import cspd_kernels
        >>> backends = cspd_kernels.available_backends()
        >>> sorted(backends), backends["torch"]
        (['cuda', 'torch', 'triton'], 'ok')
    """
    return {name: why_unavailable(name) or "ok" for name in BACKENDS}


def why_unavailable(backend: str, op: str = "denoise") -> str | None:
    """None when the backend can serve the op on some device of this machine, else the reason."""
    if backend == "torch":
        return None
    if not _exists(_module(op, backend)):
        return f"this release has no {backend} kernels for {op} yet; use backend='torch'"
    return _why_not_triton() if backend == "triton" else cuda_support.why_unavailable()


def interpreting() -> bool:
    """Whether Triton kernels imported now run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _why_not_triton() -> str | None:
    if not _exists("triton"):
        return "Triton is not installed: pip install triton"
    if reason := _why_not_this_triton():
        return reason
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device (TRITON_INTERPRET=1 before the first import runs the kernels on the CPU, slowly)"


@functools.cache
def _why_not_this_triton() -> str | None:
    """Asked at every call of an op, and neither the import nor the version changes."""
    try:
        # Not the distribution's metadata: it goes by several names.
        version = importlib.import_module("triton").__version__
    except Exception as error:  # noqa: BLE001  (whatever a broken installation raises)
        return f"Triton cannot be imported ({type(error).__name__}: {error}): install it again"
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {version} is older than {oldest}: upgrade PyTorch, which brings its own"
    return None


def implementation(
    op: str,
    backend: str | None,
    device: torch.device | None = None,
    subject: Any = None,
    tokens: int | None = None,
    groups: int = 1,
    parallel: bool = False,
) -> Callable[..., Any]:
    """The function that computes ``op``: the attribute of that name in ``ops/<op>/<backend>.py``.

    An explicit choice (argument or environment) that cannot be served raises. The automatic one takes, on CUDA devices,
    the fastest that can serve: ``crossover.ranked`` has the order. It logs once why it passed over others, as a warning
    where only torch is left. Elsewhere it is torch.

    Args:
        device: where the tensors are; None asks whether any device can be served.
        subject: what the op is about to work on (the head of ``denoise``); a backend module may refuse
            it with ``why_unsupported(subject)``.
        tokens: how many tokens the op is about to work on, where that is known.
        groups: rows that ``denoise`` computes of a token: 2 under guidance, 3 by two scales.
        parallel: whether it makes all of its steps at once.

    Raises:
        InvalidInput: no such backend. BackendUnavailable: the backend cannot serve. The message says why.
    """
    source = "backend"
    if backend is None and os.environ.get(ENVIRONMENT_VARIABLE):
        backend, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if backend is None:
        return _load(op, _automatic(op, device, subject, tokens, groups, parallel))
    if backend not in BACKENDS:
        raise InvalidInput(f"expected {source} one of {', '.join(BACKENDS)}, got {backend!r}")
    if reason := _why_not(op, backend, device, subject):
        raise BackendUnavailable(f"{source}={backend!r} cannot serve {op}: {reason}")
    return _load(op, backend)


# What a choice depends on beside the device and the call: variables that may change from one call to the next.
_LOOKED_AT: dict[str | None, tuple[str, ...]] = {
    "torch": (),
    "triton": ("TRITON_INTERPRET",),
    "cuda": (cuda_support.EMULATION_VARIABLE,),
}
_EVERYTHING = (ENVIRONMENT_VARIABLE, PERSISTENT_VARIABLE, *_LOOKED_AT["triton"], *_LOOKED_AT["cuda"])
_remembered: dict[Hashable, Any] = {}


def remembered(op: str, backend: str | None, x: torch.Tensor) -> Callable[..., Any]:
    """:func:`implementation` for tokens x (N, C), looked up for a shape, device and environment that it was chosen for
    before: choosing takes as long as a launch."""
    return remember((op, x.shape), backend, x.device, lambda: implementation(op, backend, x.device, x, x.shape[0]))


def remembered_chain(
    backend: str | None, head: DiffusionHead, tokens: int, groups: int, parallel: bool = False
) -> Callable[..., Any]:
    """The same for ``denoise`` with so many tokens of a head."""
    return remember(
        (head.handle, tokens, groups, parallel),
        backend,
        head.device,
        lambda: implementation("denoise", backend, head.device, head, tokens, groups, parallel),
    )


def prefers_parallel(backend: str | None, head: DiffusionHead, tokens: int, groups: int) -> bool:
    """Whether sweeps over all steps were measured to be the fastest ``denoise`` for so many tokens of a head."""
    backend = backend or os.environ.get(ENVIRONMENT_VARIABLE)
    if backend is not None:
        return crossover.prefers_parallel(head, tokens, groups, backend)
    if head.device.type != "cuda":
        return crossover.prefers_parallel(head, tokens, groups, "torch")

    def look() -> bool:
        call = "denoise", head.device, head, tokens, groups, None
        return ranked(*call)[0].endswith(PARALLEL) and choice(*call)[0].endswith(PARALLEL)

    return remember((head.handle, tokens, groups), None, head.device, look)


def remember(key: Hashable, backend: str | None, device: torch.device, choose: Callable[[], R]) -> R:
    """What ``choose()`` returned for a key, a device and an environment, or returns now."""
    if device.type != "cuda" or not (backend is None or isinstance(backend, str)):
        return choose()
    key = (key, backend, device, *map(os.environ.get, _LOOKED_AT.get(backend, _EVERYTHING)))
    chosen: R | None = _remembered.get(key)
    if chosen is None:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        chosen = _remembered[key] = choose()
    return chosen


def _automatic(
    op: str, device: torch.device | None, subject: Any, tokens: int | None, groups: int, parallel: bool
) -> str:
    if device is None or device.type != "cuda":
        return "torch"
    name, refusals = choice(op, device, subject, tokens, groups, parallel)
    if refusals:
        reasons = "; ".join(f"{n}: {why}" for n, why in refusals.items())
        slow_on = device if name.split()[0] == "torch" else None
        log_once(f"automatic backend of {op}: {name} ({reasons})", slow_on=slow_on, cause=reasons)
    return name.split()[0]


def choice(
    op: str, device: torch.device, subject: Any, tokens: int | None, groups: int = 1, parallel: bool | None = False
) -> tuple[str, dict[str, str]]:
    """(what the automatic choice takes on a CUDA device, why not what would have come before it)."""
    refusals: dict[str, str] = {}
    for name in ranked(op, device, subject, tokens, groups, parallel):
        backend = name.split()[0]
        if reason := _why_not(op, backend, device, subject):
            refusals[backend] = reason
            continue
        if name == PERSISTENT and (reason := _load(op, backend, "why_not_persistent")(subject, tokens, groups)):
            refusals[name] = reason
            continue
        return name, refusals
    raise AssertionError("torch serves whatever the others refuse")


def _why_not(op: str, backend: str, device: torch.device | None, subject: Any) -> str | None:
    """None when the backend can serve this call, else the reason."""
    if reason := why_unavailable(backend, op):
        return reason
    if backend == "torch" or device is None:
        return None
    if reason := (_why_not_triton_on if backend == "triton" else cuda_support.why_unsupported_here)(device):
        return reason
    why_unsupported = getattr(importlib.import_module(_module(op, backend)), "why_unsupported", None)
    return why_unsupported(subject) if why_unsupported is not None and subject is not None else None


def _why_not_triton_on(device: torch.device) -> str | None:
    if interpreting():
        if device.type == "cpu":
            return None
        return f"TRITON_INTERPRET is set, so the kernels run on CPU tensors, and these are on {device}"
    if device.type == "cuda":
        return None
    return (
        f"its kernels run on CUDA tensors, and these are on {device}: move them, use backend='torch', "
        "or set TRITON_INTERPRET=1 before the first import to run the kernels on the CPU, slowly"
    )


@functools.cache
def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _module(op: str, backend: str) -> str:
    # A submodule named torch would take the place of the library's name in the op's package.
    name = "torch_backend" if backend == "torch" else backend
    return f"cspd_kernels.ops.{op.removeprefix('log_')}.{name}"


@functools.cache
def _load(op: str, backend: str, name: str | None = None) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(_module(op, backend)), name or op)
    return function


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compile`` breaks its graph here and runs the function as it is. Importing the compiler takes a second, so
    it is told only where it is at work."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            plain: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return plain(*args, **kwargs)
        return function(*args, **kwargs)

    return call
