"""Small copies of a head with random weights, which sample by the head's own classes while somebody watches.

The weights are cut to a small width and made random: a freshly built head puts out zeros whatever it computes, and
trained ones may hide a difference. The released weights are never copied.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from cspd_kernels import Schedule
from cspd_kernels.head import without_autocast
from cspd_kernels.parts import part_of
from cspd_kernels.spec import HeadSpec, spec_of
from cspd_kernels.structure import compiled_from

from .calls import Call
from .cut import SEED, Cut
from .diffusions import LOOPS, NotServedError, Steps
from .errors import UnsupportedModel
from .heads import HeadCache
from .loop import PATCHES, LoopHook, uncounted
from .made_calls import finish, run_call
from .meanings import PLAIN, Meaning
from .standins import StandIn

_LIKE = {"randn_like": "normal_", "rand_like": "uniform_"}
_RANDOM = (
    "randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial", "normal_", "uniform_", "random_",
    "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_",
)  # fmt: skip


class CannotRunError(UnsupportedModel):
    """The module's own code does not run on a small copy here; nothing is known."""


def cut_or_whole(compare: Callable):
    """``compare(cut)`` on a copy that is cut to a small width, else on a whole one: more parts may fit that alone.

    Raises:
        CannotRunError: of the small one, where neither runs.
    """
    try:
        return compare(True)
    except CannotRunError as failure:
        with contextlib.suppress(CannotRunError):
            return compare(False)
        raise failure


@dataclass(eq=False)
class Trial:
    """The patch of a copied network: runs its own loop, or serves its calls by the torch backend, and keeps notes."""

    net: nn.Module
    serving: bool
    steps: int | None = None  # only so many of the last ones
    meanings: dict[tuple, Meaning] = field(default_factory=dict)  # by kind of call
    calls: list[Call] = field(default_factory=list)
    kinds: dict[tuple, tuple] = field(default_factory=dict)  # what a meaning of each is looked for with
    reasons: list[str] = field(default_factory=list)
    evaluations: int = 0  # of the network by its own loop
    served: int = 0  # calls
    tokens: torch.Tensor | None = None  # of the last call that was served

    def __post_init__(self):
        self.cache = HeadCache(self.net)
        if not self.serving:
            spec_of(self.net).parts.times[0].fc0.register_forward_pre_hook(self._count)

    def _count(self, *_) -> None:
        self.evaluations += 1

    def take(self, call: Call, hook: LoopHook) -> torch.Tensor:
        kind, steps = hook.kind(call), self.steps
        own = hook.tables.schedule()
        self.calls.append(call)
        self.kinds.setdefault(kind, (call, hook.diffusion, own))
        if not self.serving:
            raise NotServedError("")
        meaning = self.meanings.get(kind, PLAIN)
        schedule = hook.tables.schedule(Steps(call.eta, meaning.clip))
        if steps is not None and steps < schedule.num_steps:
            schedule = schedule.last(steps)
        if call.inter_noise is not None:
            call = replace(call, inter_noise=call.inter_noise[: schedule.num_steps])
        head = self.cache.get(schedule, torch.float32, given=meaning.way is not None)
        # Step by step, whatever was asked for: what is compared is code, which a tolerance would hide.
        out = run_call(call, head, meaning, backend="torch", philox=False, parallel_tol=None)
        self.tokens, self.served = finish(call, out, hook.diffusion), self.served + 1
        return self.tokens

    def spec(self) -> HeadSpec:
        return spec_of(self.net)

    def tell(self, reason: str) -> None:
        if reason:
            self.reasons.append(reason)


@dataclass
class Copies:
    """A copied head that samples by its own code, watched by a :class:`Trial`."""

    trial: Trial
    diffusions: list
    module: nn.Module | None


def copies_of(
    net: nn.Module, diffusions: list, module: nn.Module | None = None, *, cut: bool, serving: bool, steps: int | None
) -> Copies:
    """Copies with random weights, cut to a small width or not, that sample in all steps or in the last few."""
    cut_copy = Cut(net, spec_of(net), cut=cut)
    memo = cut_copy.memo
    for part in [net, *(module.modules() if module is not None else ())]:
        if (patches := part.__dict__.get(PATCHES)) is not None:  # a copy is nobody's yet
            memo[id(patches)] = []
    wrapper = module.net if module is not None else net
    net_copy = cut_copy.make()
    while wrapper is not net:  # compiled, or made parallel: the copy is neither
        memo[id(wrapper)] = net_copy
        wrapper = wrapper._modules.get("_orig_mod") or wrapper._modules["module"]
    module, diffusions = copy.deepcopy((module, diffusions), memo)
    for part in [*net_copy.modules(), *(module.modules() if module is not None else ()), *diffusions]:
        _uncompile(part)
    for part in (net_copy, module):
        if part is not None:
            part.float().eval()
    trial = Trial(net_copy, serving, steps)
    net_copy.__dict__[PATCHES] = [trial]
    for diffusion in diffusions:
        if (hook := LoopHook.of(diffusion)) is not None:
            hook.remove()
        if steps is not None:
            _last_steps(diffusion, steps)
        hook = LoopHook(diffusion)
        hook.install()
        hook.users.add(trial)  # is told of calls that name no network
    return Copies(trial, diffusions, module)


def _uncompile(part) -> None:
    """Take off what ``torch.compile`` made of its own methods: in a copy it still runs what it was made from."""
    for name, value in [*vars(part).items()]:
        if (function := compiled_from(value)) is not value:
            while isinstance(owner := getattr(function, "__self__", None), (LoopHook, StandIn)):
                function = compiled_from(owner.original(name))
            if getattr(function, "__func__", None) is getattr(type(part), name, ()):
                del vars(part)[name]


def _last_steps(diffusion, steps: int) -> None:
    """Make a diffusion object sample in its last steps alone, in which x stays as large as it starts."""
    if isinstance(schedule := getattr(diffusion, "schedule", None), Schedule):
        diffusion.schedule = schedule.last(steps)
    elif "num_timesteps" in vars(diffusion):
        diffusion.num_timesteps = min(steps, diffusion.num_timesteps)


def normal(shape: tuple, net: nn.Module) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(SEED + 1)
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return values.to(part_of(net, "input").weight.device)


@dataclass
class Run:
    """A run from fixed seeds: its result, its generators' states after it, what it set on its diffusion objects."""

    result: object
    states: list[torch.Tensor]
    kept: set[str]


def seeded(run: Callable[[], object], diffusions: list) -> Run:
    np.random.seed(0)
    random.seed(0)
    before, numbers = _attributes(diffusions), OwnNumbers()
    with numbers:
        result = run()
    after = _attributes(diffusions)
    kept = {name for name, value in after.items() if name not in before or before[name] is not value}
    return Run(result, [generator.get_state() for _, generator in sorted(numbers.generators.items())], kept)


class OwnNumbers(TorchFunctionMode):
    """Random numbers of this thread from generators of its own: others may draw from torch's meanwhile."""

    def __init__(self):
        super().__init__()
        self.generators: dict[str, torch.Generator] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in _LIKE:
            out = torch.empty_like(*args, **kwargs)
            return getattr(out, _LIKE[name])(generator=self._of(out.device))
        if name in _RANDOM and kwargs.get("generator") is None:
            first = args[0] if args else None
            device = first.device if isinstance(first, torch.Tensor) else kwargs.get("device")
            kwargs = {**kwargs, "generator": self._of(device or default_device())}
        return function(*args, **kwargs)

    def _of(self, device) -> torch.Generator:
        device = torch.device(device)
        if device.type not in self.generators:
            self.generators[device.type] = torch.Generator(device).manual_seed(SEED)
        return self.generators[device.type]


def default_device() -> torch.device:
    """Where tensors are made now; PyTorch 2.4 does not say so of its context manager."""
    return torch.empty(0).device


def _attributes(diffusions: list) -> dict[str, object]:
    """Attributes of the diffusion objects, and of the plain objects that those hold."""
    found = {}
    for i, diffusion in enumerate(diffusions):
        for name, value in vars(diffusion).items():
            found[f"{i}.{name}"] = value
            if name not in LOOPS and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
                found |= {f"{i}.{name}.{inner}": part for inner, part in vars(value).items()}
    return found


@contextlib.contextmanager
def quiet(net: nn.Module) -> Iterator[None]:
    """Nothing of the caller's state has a part in a comparison, and nothing is left of it afterwards."""
    device = part_of(net, "input").weight.device
    if device.type == "meta":
        raise CannotRunError("its weights are on the meta device")
    dtype, numbers, python = torch.get_default_dtype(), np.random.get_state(), random.getstate()
    seed, state = torch.initial_seed(), torch.get_rng_state()
    try:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
        meta = default_device().type == "meta"
        default = torch.device(device) if meta else contextlib.nullcontext()
        with torch.inference_mode(False), torch.no_grad(), without_autocast(device), default, uncounted():
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)
        np.random.set_state(numbers)
        random.setstate(python)
        if torch.initial_seed() != seed:  # its own code seeds; else other threads may have drawn since
            torch.set_rng_state(state)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
