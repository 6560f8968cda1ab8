"""A head's network by the kernels, one call at a time, whatever loop calls it.

A call is served where calls of its kind were compared, by the network's own forward and by the packed one, on a small
copy with random weights. Every other call runs its own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn as nn
from torch.autograd import forward_ad

from cspd_kernels import DiffusionHead, evaluate
from cspd_kernels.parts import part_of
from cspd_kernels.spec import HeadSpec, specs_of
from cspd_kernels.structure import compiled_from

from .diffusions import NotServedError
from .errors import CallError
from .heads import HeadCache
from .loop import LOCK
from .network_call import READINGS, Kind, Roles, flatten
from .source import Source, written
from .twin import CannotRunError, copies_of, cut_or_whole, first_line, quiet
from .verify import DiffersError, difference, tolerance

_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


@dataclass(frozen=True)
class Answer:
    """How calls of a kind are served."""

    reading: str  # of its times' shape, one of READINGS
    dtype: torch.dtype  # of what its own forward returns


class FastNetwork:
    """The calls of one network.

    Args:
        cache: of its packed weights, shared with its other users.
        backend, dtype: as in :func:`cspd.patch`.
        asked: serve everywhere; else where it is faster than its own forward (:attr:`pays`).
    """

    def __init__(
        self, net: nn.Module, cache: HeadCache, backend: str | None, dtype: torch.dtype | None, asked: bool = True
    ):
        self.net, self.cache, self.backend, self.dtype, self.asked = net, cache, backend, dtype, asked
        self.roles: Roles | None = None
        self.kinds: dict[Kind, Answer | str] = {}  # or why not
        self.written: tuple | None = None  # the code and the settings that those are about
        self.checked: str | None = None  # "" once it agreed, else why nothing did

    def __getstate__(self) -> dict:
        return {**self.__dict__, "roles": None, "kinds": {}, "written": None, "checked": None}

    @property
    def pays(self) -> bool:
        """Whether it serves where it stands: on a CPU looking for changed weights takes what it saves."""
        return self.asked or self.cache.weights == "frozen" or part_of(self.net, "input").weight.device.type != "cpu"

    @property
    def outcome(self) -> str:
        """What a head does by it, for the log."""
        return "keeps its own loop, its network is accelerated" if self.pays else "runs its own code, unaccelerated"

    def check(self) -> None:
        """Compare plain kinds of calls, N rows and a time for each. What the network may compute is tried in turn.

        Raises:
            DiffersError: nothing agrees, with the figure. CannotRunError: its own forward does not run here.
        """
        failure = None
        self.kinds, self.written = {}, written(self.net)
        for choice, spec in enumerate(specs_of(self.net)):
            self.cache.choose(choice)
            try:
                self.kinds, self.checked = self._plain_kinds(spec), ""
                return
            except DiffersError as error:
                failure = failure or error
        self.cache.choose(0)
        self.checked = str(failure)
        raise failure

    def _plain_kinds(self, spec: HeadSpec) -> dict[Kind, Answer]:
        """Kinds of calls that its own forward takes, which may accept only times of one dtype, or shapes of one
        rank."""
        weight, kinds, failures = spec.parts.input.weight.dtype, {}, []
        self.roles = Roles(own_forward(self.net), len(spec.times))
        for rows, times in (((3,), (3,)), ((3,), (3, 1)), ((3, 1), (3,))):
            for time in dict.fromkeys((weight, torch.float32, torch.int64)):
                kind = Kind((rows, weight), ((times, time),) * len(spec.times), (rows, weight), None)
                try:
                    kinds[kind] = self._compare(kind)
                except CannotRunError as error:
                    failures.append(error)
                except DiffersError as error:
                    failures.insert(0, error)
                    break
            if kinds:
                return kinds
        raise failures[0]

    def serve(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """One call.

        Raises:
            NotServedError: its own forward must run.
        """
        if forward_ad._current_level >= 0 or _transformed():
            raise NotServedError("it is called under a torch.func transform (vmap, grad, jvp)")
        source = self._look()
        x, times, c = self.roles.read(args, kwargs)
        kind = Kind.of(x, times, c)
        if torch.is_grad_enabled() and _recorded(source, x, c, *times):
            raise NotServedError("autograd records its calls: sample under torch.no_grad() or torch.inference_mode()")
        answer = self.kinds.get(kind)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            self._check_capture(answer is not None and self.cache.has(None, self.dtype))
        if answer is None:
            answer = self._compare_now(kind)
        if isinstance(answer, str):
            raise NotServedError(answer)
        head, flat = self.cache.get(None, self.dtype, source), flatten(x, times, c, answer.reading)
        try:
            out = evaluate(head, flat.x, flat.times, flat.c, backend=self.backend)
        except (TypeError, ValueError) as error:  # as its own code has it, which may know better
            raise NotServedError(str(error)) from None
        return out.view(*flat.shape, out.shape[-1]).to(answer.dtype)

    def _look(self) -> Source:
        source = self.cache.look()
        if source.written is not self.written:
            if source.written != self.written:  # what was compared was something else
                self.kinds, self.checked = {}, None
            self.written = source.written
        if self.checked is None:
            with LOCK, contextlib.suppress(DiffersError):
                try:
                    self.check()
                except CannotRunError as error:
                    self.checked = str(error)
            source = self.cache.look()
        if self.checked:
            raise NotServedError(self.checked)
        return source

    def _check_capture(self, ready: bool) -> None:
        if not ready:
            raise CallError(
                f"a patched {type(self.net).__name__} expected a first call like this one before you capture a "
                "CUDA graph: it makes things that a graph cannot hold. Call it once, then capture"
            )

    def _compare_now(self, kind: Kind) -> Answer | str:
        with LOCK:
            try:
                self.kinds[kind] = self._compare(kind)
            except (CannotRunError, DiffersError) as error:
                self.kinds[kind] = str(error)
            return self.kinds[kind]

    def _compare(self, kind: Kind) -> Answer:
        """Raises DiffersError, with the figure; CannotRunError where its own forward raises."""
        return cut_or_whole(lambda cut: self._compare_copies(kind, cut))

    def _compare_copies(self, kind: Kind, cut: bool) -> Answer:
        with quiet(self.net):
            net = _small(self.net, cut)
            spec = specs_of(net)[self.cache.choice]
            x, times, c = kind.call(spec.parts.input.weight.device, spec.channels, spec.cond_channels, exact=True)
            expected = _attempt(lambda: self._own(net, x, times, c))
            head = DiffusionHead.from_network(net, None, dtype=torch.float32, spec=spec)
            answers, failure = [], None
            for reading in READINGS:
                try:
                    flat = flatten(x, times, c, reading)
                except NotServedError as error:
                    failure = failure or DiffersError(str(error))
                    continue
                actual = evaluate(head, flat.x, flat.times, flat.c, backend="torch")
                actual = actual.view(*flat.shape, actual.shape[-1])
                if actual.shape != expected.shape:
                    continue
                error = difference(expected, actual)
                if error <= tolerance(net):
                    answers.append(reading)
                    break
                failure = DiffersError(f"its forward and the kernels' differ by {error:.2g} of the largest value")
        if not answers:
            raise failure or DiffersError(f"its forward returns {tuple(expected.shape)} for {tuple(x.shape)}")
        # Under the caller's autocast, with the weights' own types: what comes back is as wide as what its forward
        # returns.
        with torch.inference_mode(False), torch.no_grad():
            for copied, parameter in zip(net.parameters(), self.net.parameters()):
                copied.data = copied.data.to(parameter.dtype)
            x, times, c = kind.call(spec.parts.input.weight.device, spec.channels, spec.cond_channels, exact=False)
            return Answer(answers[0], _attempt(lambda: self._own(net, x, times, c)).dtype)

    def _own(self, net: nn.Module, x, times, c) -> torch.Tensor:
        out = own_forward(net)(**self.roles.arguments(x, times, c))
        if not isinstance(out, torch.Tensor):
            raise DiffersError(f"its forward returns {type(out).__name__}, not a tensor")
        return out


def own_forward(net: nn.Module) -> Callable:
    """A network's own forward, without what ``torch.compile`` and stand-ins made of it."""
    return MethodType(compiled_from(type(net).forward), net)


def _small(net: nn.Module, cut: bool) -> nn.Module:
    """A copy with random weights that belongs to no module and replaces none."""
    try:
        return copies_of(net, [], cut=cut, serving=True, steps=None).trial.net
    except Exception as error:
        raise CannotRunError(first_line(error)) from error


def _attempt(run: Callable) -> torch.Tensor:
    try:
        return run()
    except DiffersError:
        raise
    except Exception as error:
        raise CannotRunError(f"its own forward does not run on a small copy: {first_line(error)}") from error


def _recorded(source: Source, *values) -> bool:
    tensors = (value for value in (*source.weights, *values) if isinstance(value, torch.Tensor))
    return any(tensor.requires_grad for tensor in tensors)
