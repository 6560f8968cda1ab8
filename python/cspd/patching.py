"""``patch``: the kernels take over the sampling loop of every diffusion head in a model, in place, per instance."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from cspd_kernels.backends import implementation, untraced
from cspd_kernels.head import OPERAND_DTYPES

from .description import describe_head
from .diffusions import LOOPS, NotServedError, diffusions_of
from .heads import FoundHead, HeadCache, find_heads
from .loop import PATCHES, Call, LoopHook, finish, loops_entered, patch_of, run_call
from .twin import CannotRunError
from .verify import NO_LOOP, DiffersError, check_loop, check_sample, plain_calls

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
        _install(patches)
        if _logger.isEnabledFor(logging.INFO):  # it packs the head
            for head_patch in patches:
                _logger.info("cspd.patch: %s", describe_head(head_patch.found, head_patch).line)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`; a model that is not patched is left as it is. Returns the model."""
    with _lock:
        for head_patch in [p for module in model.modules() for p in module.__dict__.get(PATCHES, ())]:
            head_patch.remove()
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
        _install(patches, instead=False)
    try:
        yield model
    finally:
        with _lock:
            for head_patch in patches:
                head_patch.remove()


def _prepare(model: nn.Module, options: Options) -> list[HeadPatch]:
    """A compared patch for each head of a model, not installed.

    Raises:
        ValueError: there is no head, or one samples differently.
    """
    found = find_heads(model)
    patches = [HeadPatch(head, options) for head in found.heads]
    for head_patch in patches:
        head_patch.compare()
    for name, reason in found.near.items():
        _logger.warning("cspd.patch: %s is left unpatched: %s", name, reason)
    return patches


def _install(patches: list[HeadPatch], instead: bool = True) -> None:
    """All of them or none."""
    done = []
    try:
        for head_patch in patches:
            done.append(head_patch)
            head_patch.install()
    except Exception:
        for head_patch in done:
            head_patch.remove()
        raise
    if instead:
        for head_patch in patches:
            for older in [p for p in head_patch.net.__dict__[PATCHES] if p is not head_patch]:
                older.remove()


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
        self.told: list[str] = []
        self.hooks: list[LoopHook] = []

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def net(self) -> nn.Module:
        return self.found.net

    def __getstate__(self) -> dict:
        return {**self.__dict__, "verdicts": {}, "draws": {}}

    def __deepcopy__(self, memo: dict) -> HeadPatch:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        compared = {name: dict(getattr(self, name)) for name in ("verdicts", "draws")}
        twin.__setstate__({**copy.deepcopy(self.__getstate__(), memo), **compared})
        return twin

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        for hook in self.hooks:
            hook.users.add(self)

    def compare(self) -> None:
        """Sample with and without the kernels on a copy, and tell what of it runs its own code.

        Raises:
            ValueError: the two differ.
        """
        found = self.found
        _check_values(found, self.options.dtype)
        try:
            outcome = check_sample(found)
            self.verdicts = dict.fromkeys(outcome.kinds)
            for loop in LOOPS[1:]:  # which sample does not call
                self._compare_loops(loop)
            for reason in outcome.own:
                self.tell(reason)
        except CannotRunError as error:
            self._without_sample(str(error))
        except DiffersError as error:
            raise ValueError(f"{self.name} samples differently and is left unpatched: {error}") from None

    def _without_sample(self, why: str) -> None:
        """Its own ``sample`` did not run: compare the loops by themselves, as far as those run."""
        results = [self._compare_loops(loop) for loop in LOOPS]
        if any(agree for agree, _ in results):
            _logger.info("cspd.patch: %s: its sample did not run on a copy (%s); its loop was compared", self.name, why)
        else:
            reasons = "; ".join(dict.fromkeys([why, *(failure for _, failure in results if failure)]))
            _logger.info(
                "cspd.patch: %s: its code does not run here, so its first call compares: %s", self.name, reasons
            )

    def _compare_loops(self, loop: str) -> tuple[int, str]:
        """Compare a loop by itself, as the released code calls it: how many kinds of calls agree, and what else came.

        Raises:
            DiffersError: from the kernels'.
        """
        agree, failure = 0, ""
        for diffusion in self.found.samplers:
            if not callable(getattr(diffusion, loop, None)):
                continue
            hook = LoopHook.of(diffusion) or LoopHook(diffusion)
            try:
                for call in plain_calls(self.net, loop, hook.tables.schedule().num_steps):
                    kind = hook.kind(call)
                    if self.verdicts.get(kind, "") is not None:
                        self.draws[kind], self.verdicts[kind] = check_loop(call, diffusion), None
                    agree += 1
            except (CannotRunError, NotServedError) as error:
                failure = str(error)
        return agree, failure

    def install(self) -> None:
        self.net.__dict__.setdefault(PATCHES, []).append(self)
        self.hook(self.found.diffusions)
        sample = self.found.module.__dict__.get("sample")
        if callable(getattr(self.found.module, "sample", None)) and not isinstance(sample, WatchedSample):
            self.found.module.__dict__["sample"] = WatchedSample(self.found.module, self.net)

    def hook(self, diffusions: dict[str, object]) -> None:
        """Take over the loops of these diffusion objects, and of no others."""
        before, self.hooks = self.hooks, []
        for diffusion in diffusions.values():
            hook = LoopHook.of(diffusion)
            if hook is None:
                hook = LoopHook(diffusion)
                hook.install()
            hook.users.add(self)
            self.hooks.append(hook)
        self.found = replace(self.found, diffusions=diffusions)
        self._unhook([hook for hook in before if hook not in self.hooks])

    def _unhook(self, hooks: list[LoopHook]) -> None:
        for hook in hooks:
            hook.users.discard(self)
            if not hook.users:
                hook.remove()

    def remove(self) -> None:
        patches = self.net.__dict__.get(PATCHES, [])
        if self in patches:
            patches.remove(self)
        if not patches:
            self.net.__dict__.pop(PATCHES, None)
            if isinstance(watched := self.found.module.__dict__.get("sample"), WatchedSample):
                watched.remove()
        self._unhook(self.hooks)
        self.hooks = []
        self.cache.clear()

    def take(self, call: Call, hook: LoopHook) -> torch.Tensor:
        """Serve a call of a hooked loop.

        Raises:
            NotServedError: the loop's own code must run; nothing was drawn.
        """
        schedule, kind = hook.tables.schedule(), hook.kind(call)
        if call.inter_noise is not None and len(call.inter_noise) != schedule.num_steps:
            raise NotServedError(
                f"the noise of the steps is of {len(call.inter_noise)}, not {schedule.num_steps} steps"
            )
        if kind not in self.verdicts:
            self._compare_now(kind, call, hook)
        if (reason := self.verdicts[kind]) is not None:
            raise NotServedError(reason)
        options = self.options
        head = self.cache.get(schedule, options.dtype)
        draw = self.draws.get(kind, "cpu")
        out = run_call(call, head, backend=options.backend, philox=options.noise == "philox", draw=draw)
        return finish(call, out, hook.diffusion)

    def _compare_now(self, kind: tuple, call: Call, hook: LoopHook) -> None:
        """A kind of call that was not seen when the head was patched: it is compared before it is served."""
        with _lock:
            try:
                self.draws[kind], self.verdicts[kind] = check_loop(call, hook.diffusion), None
            except CannotRunError as error:
                self.verdicts[kind] = f"its own loop does not run on a copy to be compared with: {error}"
            except DiffersError as error:
                self.verdicts[kind] = f"{error}"

    def tell(self, reason: str) -> None:
        """Log once why the head's own code runs."""
        if reason not in self.told:
            self.told.append(reason)
            _logger.warning("cspd.patch: %s runs its own code, unaccelerated: %s", self.name, reason)


class WatchedSample:
    """A head's own ``sample``, watched: diffusion objects that are exchanged are taken over before it runs, and where
    it never comes to a loop that is, that is told."""

    def __init__(self, module: nn.Module, net: nn.Module):
        self.module, self.net = module, net
        self.replaced = module.__dict__.get("sample")
        self.held = self._held()

    def __getattr__(self, name: str):
        if name == "__wrapped__":  # signature, name and docstring are the original's
            return self.original()
        raise AttributeError(name)

    def _held(self) -> dict[str, object]:
        return {name: value for name, value in self.module.__dict__.items() if hasattr(type(value), LOOPS[0])}

    def original(self):
        return self.replaced or getattr(type(self.module), "sample").__get__(self.module)  # noqa: B009

    def remove(self) -> None:
        if self.replaced is None:
            del self.module.__dict__["sample"]
        else:
            self.module.__dict__["sample"] = self.replaced

    @untraced
    def __call__(self, *args, **kwargs):
        if any(self.module.__dict__.get(name) is not value for name, value in self.held.items()):
            with _lock:
                self.held = self._held()
                for head_patch in self.net.__dict__.get(PATCHES, ()):
                    head_patch.hook(diffusions_of(self.module))
        before = loops_entered()
        result = self.original()(*args, **kwargs)
        if loops_entered() == before and (head_patch := patch_of(self.net)) is not None:
            head_patch.tell(NO_LOOP)
        return result


def _check_values(found: FoundHead, dtype: torch.dtype | None) -> None:
    for name, weight in found.net.named_parameters(prefix="net"):
        if weight.is_meta:
            return
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{found.name} is left unpatched: expected finite weights, got NaN or infinity in {name}: load weights "
                "that did not diverge"
            )
        if dtype == torch.float16 and weight.numel() and float(weight.detach().abs().max()) > torch.finfo(dtype).max:
            raise ValueError(
                f"{found.name} is left unpatched: {name} holds values beyond float16's range: use dtype=torch.bfloat16"
            )
