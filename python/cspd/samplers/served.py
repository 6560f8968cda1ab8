"""A head's own sampler by the kernels: compared on small copies, then stood in for.

A call is served where calls of its kind agreed: the head's own method and the kernels, on a copy with random weights,
to rounding and with the random number generators in the same state after it. Every other call runs the method itself.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead, PhiloxNoise, Schedule, denoise
from cspd_kernels.backends import untraced
from cspd_kernels.head import stream_dtype
from cspd_kernels.structure import compiled_from

from ..calls import draw_steps, scale_of
from ..diffusions import Code, NotServedError
from ..heads import FoundHead, unwrapped
from ..loop import LOCK, patch_of
from ..standins import REPLICATE, StandIn
from ..twin import CannotRunError, OwnNumbers, copies_of, first_line, normal, quiet, seeded
from ..verify import DiffersError, same
from . import adapter_of
from .adapter import Adapter, Reading

if TYPE_CHECKING:
    from ..head_patch import HeadPatch

_PLAIN = (str, bool, int, float, type(None), torch.dtype, torch.device)
RECORDS = "autograd records what it computes: sample under torch.no_grad() or torch.inference_mode()"


@dataclass(frozen=True)
class Plan:
    """A call that the kernels can make; nothing is drawn yet."""

    reading: Reading
    rows: int  # N
    scales: tuple

    def kind(self, method: str) -> tuple:
        """What decides whether the kernels compute the same; the numbers do not."""
        r = self.reading
        what = (r.groups, r.schedule.deterministic, r.schedule.learned, r.draws.rows is None, r.draws.first)
        return (method, *what, r.draws.last, r.draws.scale == 1.0, r.copies, r.cond.device.type)


class OwnSampler:
    """The sampler of one head, and which kinds of its calls were found to agree."""

    def __init__(self, module: nn.Module, net: nn.Module, adapter: Adapter):
        self.module, self.net, self.adapter = module, net, adapter
        self.agreed: dict[tuple, set[tuple] | str] = {}  # what the head was like -> kinds of calls, or why none
        self._code: Code | None = None

    @staticmethod
    def of(found: FoundHead) -> OwnSampler | None:
        """Of the first module that an adapter recognises among those that hold the network; None without one."""
        for module in found.module.modules():
            net = module._modules.get("net")
            if net is None or unwrapped(net)[0] is not found.net:
                continue
            if (adapter := adapter_of(module)) is not None:
                return OwnSampler(module, found.net, adapter)
        return None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "agreed": {}, "_code": None}

    def __str__(self) -> str:
        return f"{', '.join(self.adapter.methods)} of {self.adapter.source or type(self.adapter).__name__}"

    # --- calls ---

    def serve(self, patch: HeadPatch, name: str, original: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        """One call of a method.

        Raises:
            NotServedError: the method itself must run; nothing was drawn.
        """
        source = patch.cache.look()
        plan = self._plan(self.module, name, original, args, kwargs, patch)
        if self.adapter.records and _recorded(source.weights, args, kwargs):
            raise NotServedError(RECORDS)
        options, schedule, kind = patch.options, plan.reading.schedule, plan.kind(name)
        state = (self._looks(), source.written[0], repr(source.written[1]))
        if plan.reading.cond.is_cuda and torch.cuda.is_current_stream_capturing():
            patch.check_capture(state in self.agreed and patch.cache.has(schedule, options.dtype))
        agreed = self._kinds(state)
        if isinstance(agreed, str) or kind not in agreed:
            raise NotServedError(agreed if isinstance(agreed, str) else f"{name} was not compared in such calls")
        head = patch.cache.get(schedule, options.dtype, source)
        return run(plan, head, options.backend, options.noise == "philox", options.parallel_tol)

    def _plan(self, head: nn.Module, name: str, original: Callable, args, kwargs, patch) -> Plan:
        try:
            bound = inspect.signature(original).bind(*args, **kwargs)
        except TypeError as error:  # its own error
            raise NotServedError(f"{name} is not called as it says: {error}") from None
        bound.apply_defaults()
        return plan_of(self.adapter, head, name, bound, patch)

    def _kinds(self, state: tuple) -> set[tuple] | str:
        if state not in self.agreed:
            with LOCK:
                try:
                    self.agreed[state] = self.compare()
                except CannotRunError as error:
                    self.agreed[state] = f"it does not run on a copy to be compared with: {error}"
                except DiffersError as error:
                    self.agreed[state] = str(error)
        return self.agreed[state]

    def _looks(self) -> tuple:
        """What the method may depend on beside the network: code and attributes of the head and of what it holds."""
        if self._code is None or not self._code.is_current():
            held = [type(value) for value in vars(self.module).values() if _is_object(value)]
            self._code = Code(dict.fromkeys([type(self.module), *held]))
        aside = {*self.adapter.methods, REPLICATE, "training", *vars(nn.Module())}
        return self._code.functions, _told({n: v for n, v in vars(self.module).items() if n not in aside}, depth=3)

    # --- the comparison ---
