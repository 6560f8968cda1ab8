"""The patch of one head, asked at every call of its loops; what it knows before is in :mod:`cspd.before_patching`."""

from __future__ import annotations

import copy
import logging
import weakref
from dataclasses import replace

import torch
import torch.nn as nn

from cspd_kernels import Schedule
from cspd_kernels.spec import HeadSpec

from .calls import Call
from .diffusions import NotServedError, Steps
from .errors import CallError
from .heads import FoundHead, HeadCache, unwrapped
from .loop import LOCK, PATCHES, LoopHook
from .made_calls import finish, run_call
from .meanings import Meaning
from .network import FastNetwork
from .network_patch import NetworkForward
from .options import Options
from .samplers.served import OwnSampler, ServedSample
from .source import written
from .standins import StandIn, WatchedMoves, WatchedSample, WholeSampling, autoregressive_step
from .twin import CannotRunError
from .verify import DiffersError, check_loop, hidden
from .whole.sampler import SampleOptions, Sampler

_logger = logging.getLogger("cspd")


class HeadPatch:
    """The patch of one head: its options, its packed weights, and which kinds of calls were compared.

    It is an attribute of the head's network, where the hooks of the diffusion objects find it. So a deep copy or a
    pickle of the model carries a patch of its own.
    """

    def __init__(self, found: FoundHead, options: Options, model: nn.Module | None = None):
        self.found, self.options = found, options
        self.cache = HeadCache(found.net, options.weights)
        self.verdicts: dict[tuple, Meaning | str] = {}  # kind of call -> what it means, or why it is not served
        self.written = written(found.net)  # the code and the settings that the verdicts are about
        self.told: list[str] = []
        self.hooks: list[LoopHook | StandIn] = []
        self._model = None if model is None else weakref.ref(model)  # whose sample_tokens is taken over, too
        self.sampler: Sampler | None = None
        self.own_sampler = OwnSampler.of(found)  # of a loop that is no diffusion object's
        self.own_loop: str | None = None  # why its loops stay its own, None where they are taken over
        self.network: FastNetwork | None = None  # of loops of its own

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def net(self) -> nn.Module:
        return self.found.net

    @property
    def model(self) -> nn.Module | None:
        """The model around the head, where its ``sample_tokens`` is taken over, too."""
        return None if self._model is None else self._model()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "verdicts": {}, "written": None, "sampler": None, "_model": None}

    def __deepcopy__(self, memo: dict) -> HeadPatch:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        compared = {"verdicts": dict(self.verdicts), "written": self.written}
        twin.__setstate__({**copy.deepcopy(self.__getstate__(), memo), **compared})
        return twin

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        for hook in self.hooks:
            hook.users.add(self)

    def sampler_of(self, model: nn.Module) -> Sampler:
        """The sampler of whole images, with ``whole=True``.

        Raises:
            NotServedError: it is not MAR's model.
        """
        if self.sampler is None or self.sampler.model is not model:
            o = self.options
            options = SampleOptions(o.dtype, o.backend, o.noise, o.parallel_tol, o.compile, o.sampling)
            try:
                self.sampler = Sampler(model, options, self.cache)
            except TypeError as error:
                raise NotServedError(f"{error}") from None
        return self.sampler

    def install(self) -> None:
        """Take its place; :meth:`remove` undoes it, also where this raised in between."""
        self.net.__dict__.setdefault(PATCHES, []).append(self)
        module = self.found.module
        self._hook(WatchedMoves, self.net)
        if self.network is not None:
            self._hook(NetworkForward, self.net)
        if self.own_loop is not None:
            return
        if self.own_sampler is not None:
            self._hook(ServedSample, self.own_sampler.module)
        elif callable(getattr(module, "sample", None)):
            self._hook(WatchedSample, module)
        model = self.model
        if model is not None and WholeSampling.of(model) is None:
            WholeSampling(model).install()
        self.take_over(self.found.diffusions)

    def take_over(self, diffusions: dict[str, object]) -> None:
        """Stand in for the loops of these diffusion objects, and of no others from now on."""
        before = [hook for hook in self.hooks if isinstance(hook, LoopHook)]
        for diffusion in diffusions.values():
            if not any(hook.diffusion is diffusion for hook in before):
                self._hook(LoopHook, diffusion)
        self.found = replace(self.found, diffusions=diffusions)
        self._release([hook for hook in before if not any(hook.diffusion is d for d in diffusions.values())])

    def _hook(self, kind: type[LoopHook | StandIn], owner) -> None:
        found = kind.of(owner)
        hook = kind(owner) if found is None else found
        hook.users.add(self)
        self.hooks.append(hook)
        if found is None:
            hook.install()

    def _release(self, hooks: list[LoopHook | StandIn]) -> None:
        for hook in hooks:
            self.hooks.remove(hook)
            hook.users.discard(self)
            if not hook.users:
                hook.remove()

    def release(self) -> None:
        """Let go of what was packed for weights that have moved on."""
        self.cache.release()
        if self.sampler is not None:
            self.sampler.release()

    def remove(self) -> None:
        """Leave everything as it was."""
        patches = self.net.__dict__.get(PATCHES, [])
        if self in patches:
            patches.remove(self)
        if not patches:
            self.net.__dict__.pop(PATCHES, None)
        self._release([*self.hooks])
        self.cache.clear()
        self.sampler, model = None, self.model
        if model is not None:
            leave_whole(model)

    def take(self, call: Call, hook: LoopHook) -> torch.Tensor:
        """Serve a call of a hooked loop.

        Raises:
            NotServedError: the loop's own code must run; nothing was drawn.
        """
        if self.own_loop is not None:  # its diffusion object is another patch's, too
            raise NotServedError("")  # which is told already
        kind, source = hook.kind(call), self.cache.look()
        if source.spec is not call.spec:
            call = replace(call, spec=source.spec)
        if source.written is not self.written:
            if source.written != self.written:  # what was compared was something else
                self.verdicts = {}
            self.written = source.written
        verdicts, capturing = self.verdicts, call.cond.is_cuda and torch.cuda.is_current_stream_capturing()
        if kind not in verdicts:
            if capturing:
                self.refuse_capture()
            self._compare_now(kind, call, hook, verdicts)
        meaning, options = verdicts[kind], self.options
        if isinstance(meaning, str):
            raise NotServedError(meaning)
        schedule = self._schedule(call, meaning, hook)
        given = meaning.way is not None
        if capturing and not self.cache.has(schedule, options.dtype, given):
            self.refuse_capture()
        out = run_call(
            call,
            self.cache.get(schedule, options.dtype, source, given=given),
            meaning,
            backend=options.backend,
            philox=options.noise == "philox",
            parallel_tol=options.parallel_tol,
        )
        return finish(call, out, hook.diffusion)

    def spec(self) -> HeadSpec:
        """What the network is made of.

        Raises:
            NotServedError: as of :meth:`HeadCache.look`.
        """
        return self.cache.spec()

    def _schedule(self, call: Call, meaning: Meaning, hook: LoopHook) -> Schedule:
        """The steps of a call: its loop's, or those that were asked for in their place."""
        sampling = self.options.sampling
        if sampling.sampler is None and sampling.steps is None:
            return hook.tables.schedule(Steps(call.eta, meaning.clip))
        if call.inter_noise is not None:
            raise NotServedError(f"the noise of its steps is passed in, but {sampling} has other steps")
        if call.eta is not None and sampling.sampler is None:
            sampling = replace(sampling, sampler="ddim", eta=call.eta)
        step, of = autoregressive_step() if sampling.anneals else (0, 1)
        return sampling.schedule(hook.tables.schedule(Steps(clip=meaning.clip)), step, of)

    def refuse_capture(self) -> None:
        raise CallError(
            f"{self.name} expected a first call like this one before you capture a CUDA graph: it makes things that a "
            "graph cannot hold. Call it once, then capture"
        )

    def _compare_now(self, kind: tuple, call: Call, hook: LoopHook, verdicts: dict) -> None:
        """A kind of call that was not seen when the head was patched: it is compared before it is served.

        Raises:
            NotServedError: it tells nothing of its kind.
        """
        if (name := hidden(call)) is not None:
            raise NotServedError(
                f"{name} is 0 in all rows, so the comparison cannot show what the network does with it"
            )
        with LOCK:
            try:
                verdicts[kind] = check_loop(call, hook.diffusion)
            except CannotRunError as error:
                verdicts[kind] = f"its own loop does not run on a copy, so it cannot be compared: {error}"
            except (DiffersError, NotServedError) as error:
                verdicts[kind] = f"{error}"

    def left_behind(self) -> str | None:
        """Why the head does not come to this patch any more, None where it does."""
        net = self.found.module._modules.get("net")
        inner = None if net is None else unwrapped(net)[0]
        return None if inner is self.net else "its network was replaced or wrapped since it was patched: patch again"

    def tell_of_model(self, model: nn.Module, reason: str) -> None:
        """Log once why the model's own ``sample_tokens`` runs, with the patched head."""
        if (line := f"sample_tokens: {reason}") not in self.told:
            self.told.append(line)
            kind = type(model).__name__
            _logger.warning("cspd.patch: sample_tokens of %s runs its own code, its head is patched: %s", kind, reason)

    def tell(self, reason: str) -> None:
        """Log once why the head's own loop runs."""
        if not reason:
            return
        if self.network is None or not self.network.pays:
            self.tell_of_network(reason)
        elif (line := f"{reason} (its network is accelerated)") not in self.told:
            self.told.append(line)
            _logger.warning("cspd.patch: %s %s: %s", self.name, self.network.outcome, reason)

    def tell_of_network(self, reason: str) -> None:
        """Log once why the head's own code runs, with its own network."""
        if reason not in self.told:
            self.told.append(reason)
            _logger.warning("cspd.patch: %s runs its own code, unaccelerated: %s", self.name, reason)


def leave_whole(model: nn.Module) -> None:
    """Give a model its own ``sample_tokens`` back where no patch of its head wants it any more."""
    stands = WholeSampling.of(model)
    net = getattr(getattr(model, "diffloss", None), "net", None)
    left = [] if net is None else unwrapped(net)[0].__dict__.get(PATCHES, ())
    if stands is not None and not any(patch.options.watches for patch in left):
        stands.remove()
