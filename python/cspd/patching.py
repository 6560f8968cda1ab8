"""``patch``: the kernels take over the sampling loop of every diffusion head in a model, in place, per instance."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from cspd_kernels.backends import implementation
from cspd_kernels.head import OPERAND_DTYPES

from .describe import describe_head
from .diffusions import Code, NotServedError, diffusions_of
from .heads import FoundHead, HeadCache, find_heads, unwrapped
from .loop import PATCHES, Call, LoopHook, finish, run_call
from .standins import StandIn, WatchedMoves, WatchedSample
from .twin import CannotRunError
from .verify import DiffersError, check_loop, check_sample, plain_call

_logger = logging.getLogger("cspd")
_NOISES, _WEIGHTS = ("upstream", "philox"), ("live", "frozen")
_lock = threading.RLock()  # patching and unpatching, of any model


@dataclass(frozen=True)
class Options:
    """What :func:`patch` was asked for."""

    backend: str | None = None
    dtype: torch.dtype | None = None
    noise: str = "upstream"
    weights: str = "live"

    def check(self) -> None:
        if self.noise not in _NOISES:
            raise ValueError(f"patch expected noise one of {_NOISES}, got {self.noise!r}")
        if self.weights not in _WEIGHTS:
            raise ValueError(f"patch expected weights one of {_WEIGHTS}, got {self.weights!r}")
        if self.dtype is not None and self.dtype not in OPERAND_DTYPES:
            raise ValueError(f"patch expected dtype None or one of {OPERAND_DTYPES}, got {self.dtype!r}")
        implementation("denoise", self.backend)


def patch(
    model: nn.Module,
    *,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    noise: str = "upstream",
    weights: str = "live",
) -> nn.Module:
    """Make every diffusion head of a model sample through :func:`cspd_kernels.denoise`.

    Exact: the same seed gives the same tokens, up to rounding. In place and per instance: classes,
    other models, ``state_dict``, ``isinstance``, device moves and copies are as before. Patching again
    replaces the options.

    Taken over is ``p_sample_loop`` of the diffusion objects that the model holds, and
    ``p_sample_loop_with_noise`` of MarkXCloud/CSpD (its distribution manager is filled as before). The
    head's own ``sample`` runs as it is. A loop that is not MAR's in everything it is given runs its own
    code, and so does a network that computes more than its weights say (hooks, replaced or computed
    layers); the log tells why, once.

    Before anything is changed, a small copy of each head with random weights samples with and without
    the kernels; a difference refuses. Where its own code does not run here, the first call that can
    compares.

    Under guidance 2N rows come back as before; the last N, which callers drop, repeat the first. On a
    GPU the host waits nowhere that the replaced code does not; a temperature there is read. Weights are
    looked at at every call, so that they are never stale. ``torch.compile`` of a model around it breaks
    its graph at the loop.

    Args:
        model: any module tree that holds one or more heads.
        backend: as in :func:`cspd_kernels.denoise`.
        dtype: type of the matrix products' operands (float32, bfloat16, float16); None follows
            autocast at the call, else the weights' type. The residual stream stays float32.
        noise: ``"upstream"`` draws the numbers of the replaced code in its order; ``"philox"`` draws
            one seed per call and stores no noise of the steps.
        weights: ``"live"`` sees every change at the next call; ``"frozen"`` looks at nothing after the
            first one, for serving: patch again after a change.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: nothing to patch, or a head that samples differently; nothing was changed.
        RuntimeError: the backend cannot serve.
    """
    options = Options(backend, dtype, noise, weights)
    options.check()
    with _lock:
        patches = _prepare(model, options)
        lines = [describe_head(p.found, p).line for p in patches] if _logger.isEnabledFor(logging.INFO) else []
        older = _patches_in(model)
        _install(patches, lines)
        _remove(older)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`; a model that is not patched is left as it is. Returns the model."""
    with _lock:
        _remove(_patches_in(model))
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any diffusion head of the model is patched."""
    return any(module.__dict__.get(PATCHES) for module in model.modules())


@contextlib.contextmanager
def patched(model: nn.Module, **options) -> Iterator[nn.Module]:
    """Patch for the length of a ``with`` block; afterwards the model is as it was, also after an exception.

    Blocks may overlap, in several threads too: the last one to begin decides the options, and the model
    is patched until the last one ends.
    """
    options = Options(**options)
    options.check()
    with _lock:
        patches = _prepare(model, options)
        _install(patches)
    try:
        yield model
    finally:
        with _lock:
            _remove(patches)


def _prepare(model: nn.Module, options: Options) -> list[HeadPatch]:
    """A compared patch for each head of a model, not installed.

    Raises:
        ValueError: there is no head, or one samples differently.
    """
    found = find_heads(model)
    patches, left = [], dict(found.near)
    for head in found.heads:
        head_patch = HeadPatch(head, options)
        if (reason := head_patch.compare()) is None:
            patches.append(head_patch)
        else:
            left[head.name] = reason
    if not patches:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise ValueError(f"no head of {type(model).__name__} can be served, and all are left unpatched: {reasons}")
    for name, reason in left.items():
        _logger.warning("cspd.patch: %s is left unpatched: %s", name, reason)
    return patches


def _patches_in(model: nn.Module) -> list[HeadPatch]:
    """All patches of a model's heads, also of networks that the model no longer holds."""
    modules = dict.fromkeys(model.modules())
    hooks = [LoopHook.of(diffusion) for diffusion in diffusions_of(model).values()]
    hooks += [kind.of(module) for module in modules for kind in (WatchedSample, WatchedMoves)]
    users = [p for hook in hooks if hook is not None for p in hook.users if p.found.module in modules]
    return list(dict.fromkeys([*(p for module in modules for p in module.__dict__.get(PATCHES, ())), *users]))


def _install(patches: list[HeadPatch], lines: Sequence[str] = ()) -> None:
    """All of them or none."""
    try:
        for head_patch in patches:
            head_patch.install()
        for line in lines:
            _logger.info("cspd.patch: %s", line)
    except BaseException:
        _remove(patches)
        raise


def _remove(patches: list[HeadPatch]) -> None:
    for head_patch in patches:
        head_patch.remove()


class HeadPatch:
    """The patch of one head: what it was asked for, its packed weights, and which kinds of calls were compared.

    It stands on the head's network, where the hooks of the diffusion objects find it, so that a deep
    copy or a pickle of the model carries a patch of its own.
    """

    def __init__(self, found: FoundHead, options: Options):
        self.found, self.options = found, options
        self.cache = HeadCache(found.net, options.weights)
        self.verdicts: dict[tuple, str | None] = {}  # kind of call -> why it is not served
        self.draws: dict[tuple, str] = {}
        self.code = Code(map(type, found.net.modules())).functions  # that the verdicts are about
        self.told: list[str] = []
        self.hooks: list[LoopHook | StandIn] = []

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def net(self) -> nn.Module:
        return self.found.net

    def __getstate__(self) -> dict:
        return {**self.__dict__, "verdicts": {}, "draws": {}, "code": ()}

    def __deepcopy__(self, memo: dict) -> HeadPatch:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        compared = {"verdicts": dict(self.verdicts), "draws": dict(self.draws), "code": self.code}
        twin.__setstate__({**copy.deepcopy(self.__getstate__(), memo), **compared})
        return twin

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        for hook in self.hooks:
            hook.users.add(self)

    def compare(self) -> str | None:
        """Sample with and without the kernels on a copy; None where some call is served, else why none is.

        Raises:
            ValueError: the two differ.
        """
        found = self.found
        _check_values(found, self.options.dtype)
        try:
            outcome = check_sample(found)
            if not outcome.kinds:
                return "; ".join(dict.fromkeys(outcome.own))
            self.verdicts = dict.fromkeys(outcome.kinds)
            for reason in outcome.own:
                self.tell(reason)
        except CannotRunError as error:
            self._compare_loops(str(error))
        except DiffersError as error:
            raise ValueError(f"{self.name} samples differently and is left unpatched: {error}") from None
        return None

    def _compare_loops(self, why: str) -> None:
        """Its own ``sample`` did not run: compare the loops by themselves, as far as those run."""
        compared, failure = 0, None
        for diffusion in self.found.samplers:
            for method in ("forward", "forward_with_cfg"):
                if not hasattr(self.net, method):
                    continue
                call = plain_call(self.net, method)
                try:
                    check_loop(call, diffusion)
                    compared, self.verdicts[call.kind] = compared + 1, None
                except CannotRunError as error:
                    failure = error
                except DiffersError as error:
                    raise ValueError(f"{self.name} samples differently and is left unpatched: {error}") from None
        if compared:
            _logger.info("cspd.patch: %s: its sample did not run on a copy (%s); its loop was compared", self.name, why)
        else:
            why = f"{why}; {failure}" if failure is not None and str(failure) != why else why
            _logger.info(
                "cspd.patch: %s: its own code does not run here, so its first call compares: %s", self.name, why
            )

    def install(self) -> None:
        self.net.__dict__.setdefault(PATCHES, []).append(self)
        module = self.found.module
        hooked = [*((LoopHook, diffusion) for diffusion in self.found.samplers), (WatchedMoves, self.net)]
        if callable(getattr(module, "sample", None)):
            hooked.append((WatchedSample, module))
        for kind, owner in hooked:
            found = kind.of(owner)
            hook = kind(owner) if found is None else found
            hook.users.add(self)
            self.hooks.append(hook)
            if found is None:
                hook.install()

    def remove(self) -> None:
        patches = self.net.__dict__.get(PATCHES, [])
        if self in patches:
            patches.remove(self)
        if not patches:
            self.net.__dict__.pop(PATCHES, None)
        for hook in self.hooks:
            hook.users.discard(self)
            if not hook.users:
                hook.remove()
        self.hooks = []
        self.cache.clear()

    def take(self, call: Call, hook: LoopHook) -> torch.Tensor:
        """Serve a call of a hooked loop.

        Raises:
            NotServedError: the loop's own code must run; nothing was drawn.
        """
        schedule, kind, source = hook.tables.schedule(), hook.kind(call), self.cache.look()
        if source.code.functions is not self.code:
            if source.code.functions != self.code:  # what was compared was other code
                self.verdicts, self.draws = {}, {}
            self.code = source.code.functions
        verdicts, draws = self.verdicts, self.draws
        if kind not in verdicts:
            self._compare_now(kind, call, hook, verdicts, draws)
        if (reason := verdicts[kind]) is not None:
            raise NotServedError(reason)
        options = self.options
        head = self.cache.get(schedule, options.dtype, source)
        draw = draws.get(kind, "cpu")
        out = run_call(call, head, backend=options.backend, philox=options.noise == "philox", draw=draw)
        return finish(call, out, hook.diffusion)

    def _compare_now(self, kind: tuple, call: Call, hook: LoopHook, verdicts: dict, draws: dict) -> None:
        """A kind of call that was not seen when the head was patched: it is compared before it is served."""
        with _lock:
            try:
                draws[kind] = check_loop(call, hook.diffusion)
                verdicts[kind] = None
            except CannotRunError as error:
                verdicts[kind] = f"its own loop does not run on a copy to be compared with: {error}"
            except DiffersError as error:
                verdicts[kind] = f"{error}"

    def left_behind(self) -> str | None:
        """Why the head does not come to this patch any more, None where it does."""
        net = self.found.module._modules.get("net")
        inner = None if net is None else unwrapped(net)[0]
        return None if inner is self.net else "its network is another one now, or wrapped by another kind: patch again"

    def tell(self, reason: str) -> None:
        """Log once why the head's own code runs."""
        if reason not in self.told:
            self.told.append(reason)
            _logger.warning("cspd.patch: %s runs its own code, unaccelerated: %s", self.name, reason)


def _check_values(found: FoundHead, dtype: torch.dtype | None) -> None:
    for name, weight in found.net.named_parameters(prefix="net"):
        if weight.is_meta:
            return
        weight = weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{found.name} is left unpatched: expected finite weights, got NaN or infinity in {name}: load weights "
                "that did not diverge"
            )
        if dtype == torch.float16 and weight.numel() and float(weight.abs().max()) > torch.finfo(dtype).max:
            raise ValueError(
                f"{found.name} is left unpatched: {name} holds values beyond float16's range: use dtype=torch.bfloat16"
            )
