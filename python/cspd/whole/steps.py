"""The steps of a run as CUDA graphs: the transformer, its head and what is written, in one launch.

How many tokens are known is a value on the device. So a graph serves all steps that draw as many tokens and whose known
tokens fit the same room, a multiple of 32. It is captured at the first of them. A launch kernel by kernel goes before
the capture and compiles and loads what is needed. The results are always the graph's, so the bits of an image do not
depend on what was made before it. All graphs of a device share one pool of memory (:mod:`cspd_kernels.graphs`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from cspd_kernels import Denoised
from cspd_kernels.errors import CallError
from cspd_kernels.graphs import PlanCache, in_turn, why_not_here

from ..run_state import RunState
from ..strict import Proposed, propose, settle
from ..tree import Tree
from ..window import Drawn, Judged, Phase, draft, judge, look, prefill, untimed
from .transformers import ByWeights

ROOM = 32  # known tokens
MOST_ROWS = 16384  # rows of the transformer beyond which the device is busy without graphs, and exact sizes are faster
_MOST_GRAPHS = 96


def why_not_graphs(state: RunState, branches: int = 1) -> str | None:
    """None where a run's steps are to be graphs, else the reason. ``branches``: rows of an image in the draft's passes,
    which are what a device waits for the host at; the target's, of strict verification, may be larger."""
    models = [model for model in (state.draft, state.target) if model is not None]
    if reason := why_not_here(state.tokens.device):
        return reason
    if not all(isinstance(model.transformer, ByWeights) for model in models):
        return "a model runs its own blocks or methods"
    weights = state.target.transformer.weights
    if branches * len(state.target.embedding) * (weights.buffer + weights.length) > MOST_ROWS:
        return "the batch is large"
    if state.backend == "torch" and state.parallel_tol is not None:
        return "sweeps of the torch backend wait for the device"
    return None


class Steps:
    """The graphs of runs that differ in nothing but the values of their tensors, and the buffers that these share.

    Args:
        state: of the first such run, which is kept.
    """

    exact = False  # sizes come in few

    def __init__(self, state: RunState):
        self.state, self.lock, self._running = state, threading.RLock(), False
        self.drawn = torch.zeros(1, dtype=torch.int64, device=state.tokens.device)
        self.plans = PlanCache(1 << 62, _MOST_GRAPHS)

    @contextlib.contextmanager
    def of(self, state: RunState) -> Iterator[Steps]:
        """A context for another run with this one's buffers: one run at a time, whatever its thread and stream."""
        with self.lock, in_turn(state.tokens.device):
            if self._running:  # this thread holds the lock already
                raise CallError("expected no run of the same kind inside a run's callback: start it after this one")
            self._running = True
            try:
                self._load(state)
                yield self
            finally:
                self._running = False

    def _load(self, state: RunState) -> None:
        self.drawn.zero_()
        self.state.previous_target_z = None
        if state is not self.state:
            for mine, new in zip(tensors(self.state), tensors(state), strict=True):
                mine.copy_(new)
            # What of it is the host's; graphs hold nothing of that.
            self.state.plan.steps, self.state.noise.seed = state.plan.steps, state.noise.seed
            self.state.prefilled = state.prefilled

    def target(self, i: int) -> None:
        """The i-th step, by the target alone."""
        self._step("target", prefill, i, plainly=callable(self.state.relaxation))

    def draft(self, first: int, stop: int, phase: Phase = untimed) -> torch.Tensor | None:
        """The steps first..stop-1, by the draft; what :func:`cspd.window.draft` returns of the last one."""
        entropy = None
        for i in range(first, stop):
            with phase("draft"):
                (entropy,) = self._step("draft", draft, i)
        return entropy

    def undo(self, i: int) -> None:
        """The i-th step, which was drafted last, is to be drawn again."""
        self.drawn.sub_(sum(self._shape(i, i + 1)[0]))

    def _step(self, name: str, draw: Callable, i: int, plainly: bool = False) -> list[torch.Tensor | None]:
        counts, room = self._shape(i, i + 1)

        def launch() -> list[torch.Tensor | None]:
            found = draw(self.state, self.state.plan.moving(self.drawn, counts, room))
            self.drawn.add_(sum(counts))
            return [found]

        return launch() if plainly else self._run((name, counts, room), launch, sum(counts))

    def judge(self, first: int, stop: int, phase: Phase = untimed) -> Judged:
        """The steps first..stop-1, which were drafted last, judged by the target."""
        counts, room = self._shape(first, stop)

        def launch() -> list[torch.Tensor]:
            drawn = look(self.state, self.state.plan.moving(self.drawn - sum(counts), counts, room))
            return [*drawn.chain[:4], drawn.z]

        with phase("target"):
            *chain, z = self._run(("look", counts, room), launch)
        with phase("verify"):  # a few launches, once a window, and a policy may be anybody's code
            whole = self.state.plan.window(first, stop).whole
            return judge(self.state, whole, Drawn(Denoised(*chain), z))

    def round(self, tree: Tree, known: int, phase: Phase = untimed) -> torch.Tensor:
        """A round of strict verification: its sums. ``known``: so many tokens at most are before one of its steps."""
        room, most = _room(known, self.state.tokens.shape[1]), self.state.plan.most
        policy = callable(self.state.relaxation)

        def launch() -> list[torch.Tensor | None]:
            proposed = propose(self.state, tree, room)
            return proposed.tensors() if policy else [settle(self.state, tree, room, proposed)]

        state = self.state
        written = (state.tokens, state.outcome, state.probability, state.at, state.entropy)
        changed = [value for value in written if value is not None]
        with phase("round"):
            results = self._run(("round", tree, room, most), launch, restored=changed)
            # A policy may be anybody's code, and what it sees of the window before is not there in the first.
            return settle(self.state, tree, room, Proposed.of(results)) if policy else results[0]

    def _shape(self, first: int, stop: int) -> tuple[tuple[int, ...], int]:
        """How many tokens the steps draw, and the room for those that are known before."""
        steps, length = self.state.plan.steps[first:stop], self.state.tokens.shape[1]
        known = length - steps[0].before
        return tuple(step.before - step.after for step in steps), _room(known, length)

    def _run(
        self,
        key: Hashable,
        launch: Callable[[], list[torch.Tensor | None]],
        draws: int = 0,
        restored: Sequence[torch.Tensor] = (),
    ) -> list[torch.Tensor | None]:
        """What a launch returns, copied out of the graphs' memory, where the next one writes.

        ``draws``: tokens of an image by which the launch moves on. Launched again, it draws the same ones again: it
        reads those alone that were drawn before, and what of it is ``restored`` in between.
        """
        key = (key, self.state.target.head.handle)  # annealed steps have several
        plan = self.plans.get(key, lambda: ([], []), self.state.tokens.device)

        def keep() -> None:
            plan.value[:] = launch()

        with plan.in_turn():
            if plan.graph.uses == 0:
                before = [value.clone() for value in restored]
                launch()
                self.drawn.sub_(draws)
                for value, old in zip(restored, before):
                    value.copy_(old)
                plan.graph.uses = 1
            plan.graph.run(keep, lambda: warm_up(self.state))
            return [None if value is None else value.clone() for value in plan.value]


def _room(known: int, length: int) -> int:
    """The room for so many known tokens."""
    return min(length, -(-known // ROOM) * ROOM)


class KeptSteps:
    """The graphs of runs of several kinds. The ``most`` that were used last are kept."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[tuple, Steps] = OrderedDict()

    def of(self, state: RunState, transformers: list[ByWeights]) -> Steps:
        """The graphs for runs like this one. ``transformers``: of the models as they are now; graphs of others go."""
        key = signature(state)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = Steps(state)
            self._kept.move_to_end(key)
            for old, steps in list(self._kept.items()):
                models = [model for model in (steps.state.draft, steps.state.target) if model is not None]
                if not all(any(model.transformer is current for current in transformers) for model in models):
                    del self._kept[old]
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return self._kept[key]

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._kept.clear()

    def values(self) -> list[Steps]:
        """All, the last used one at the end."""
        return list(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)


class PlainSteps:
    """The same, launched kernel by kernel with exact sizes: for a CPU, large batches, and models with own blocks."""

    exact = True

    def __init__(self, state: RunState):
        self.state = state

    @contextlib.contextmanager
    def of(self, state: RunState) -> Iterator[PlainSteps]:
        """See :class:`Steps`, of the run that they were made for."""
        yield self

    def target(self, i: int) -> None:
        """See :class:`Steps`."""
        prefill(self.state, self.state.plan.step(i))

    def draft(self, first: int, stop: int, phase: Phase = untimed) -> torch.Tensor | None:
        """See :class:`Steps`."""
        entropy = None
        for i in range(first, stop):
            with phase("draft"):
                entropy = draft(self.state, self.state.plan.step(i))
        return entropy

    def undo(self, i: int) -> None:
        """See :class:`Steps`; a step is told of where it is."""

    def judge(self, first: int, stop: int, phase: Phase = untimed) -> Judged:
        """See :class:`Steps`."""
        whole = self.state.plan.window(first, stop).whole
        with phase("target"):
            target = look(self.state, whole)
        with phase("verify"):
            return judge(self.state, whole, target)

    def round(self, tree: Tree, known: int, phase: Phase = untimed) -> torch.Tensor:
        """See :class:`Steps`; a tree of fewer images is of those that are not done, which the host looks for."""
        state, images = self.state, None
        if tree.batch < len(state.tokens):
            images = (state.at < len(state.plan.steps)).nonzero()[:, 0]
            state = state.of_images(images)
        proposed = propose(state, tree, known, phase)
        with phase("verify"):
            sums = settle(state, tree, known, proposed)
        if images is not None:
            self.state.take_back(state, images)
        return sums


def warm_up(state: RunState) -> None:
    """What libraries make once for a thread, which a capture cannot hold."""
    for model in (state.draft, state.target):
        if model is not None:
            a = torch.ones(16, 64, dtype=model.transformer.weights.dtype, device=state.tokens.device)
            torch.nn.functional.linear(a, a, a[:, 0])
            torch.nn.functional.scaled_dot_product_attention(a[None, None], a[None, None], a[None, None])


def tensors(state: RunState) -> list[torch.Tensor]:
    """What differs between runs of one size: buffers, tables, class embeddings, the seed, relaxations by position."""
    found = [state.tokens, *state.plan.buffers().values(), *state.noise.values]
    found += [model.embedding for model in (state.draft, state.target) if model is not None]
    optional = (state.outcome, state.probability, state.relaxation, state.at, state.entropy)
    return found + [value for value in optional if isinstance(value, torch.Tensor)]


def signature(state: RunState) -> tuple:
    """What a run's graphs depend on beside the values of its tensors."""
    models = [state.draft, state.target, *(model for step in state.annealed for model in step.values())]
    models = tuple(
        None if model is None else (model.head.handle, model.transformer, model.initial_scale) for model in models
    )
    shapes = tuple((tuple(value.shape), value.dtype) for value in tensors(state))
    relaxation = None if isinstance(state.relaxation, torch.Tensor) else state.relaxation
    options = (state.temperature, state.backend, state.parallel_tol, relaxation, tuple(sorted(state.rule.items())))
    drafted = state.drafted and (state.drafted.trajectory is not None, state.drafted.z is not None)
    how = (state.candidates, state.criterion, state.ends)
    return models, shapes, state.noise.kind, options, drafted, state.plan.guided, how
