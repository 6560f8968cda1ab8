"""What a call of a sampling loop may mean where its arguments do not tell: of several meanings, one is found to agree.

How a network's method mixes its rows under guidance, how its further inputs enter and where its loop draws are code. A
few ways of each are known. They are tried one after the other on a twin (:mod:`cspd.verify`), and the first that
computes what the module's own code does is taken. Where none does, that code runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cspd_kernels import Schedule

from .calls import Call
from .diffusions import NotServedError
from .embedding import Way, ways_of

_FAR = 1e8  # beyond any limit of x0
MOST = 64  # meanings that are tried


@dataclass(frozen=True)
class Meaning:
    """The meaning of a kind of call.

    Attributes:
        draw: where x_T comes from where it is not given, ``"cpu"`` or ``"device"``.
        each_step: whether the loop draws at every step.
        weights: of each group of rows, as coefficients of (1, s_0, s_1, ...): the guided output is their weighted sum.
        way: how the condition is embedded where that is not the head's own part.
        clip: limits of x0, (lows, highs).
    """

    draw: str = "cpu"
    each_step: bool = True
    weights: tuple[tuple[float, ...], ...] = ()
    way: Way | None = None
    clip: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def scales(self, given: list) -> tuple:
        """The scales of :func:`cspd_kernels.denoise` for those of a call: sums of the weights of the first groups."""
        if self._as_given:
            return tuple(given)
        scales = []
        for constant, *factors in self._sums:
            terms = [g if f == 1.0 else f * g for f, g in zip(factors, given) if f != 0.0]
            scale = sum(terms[1:], start=terms[0]) if terms else constant
            scales.append(scale + constant if terms and constant != 0.0 else scale)
        return tuple(scales)

    @cached_property
    def _as_given(self) -> bool:
        """Whether the scales are those of the call: each call asks."""
        return self._sums == [[0.0, 1.0]][: len(self.weights)]

    @cached_property
    def _sums(self) -> list[list[float]]:
        return np.cumsum(np.array(self.weights), axis=0)[:-1].tolist() if self.weights else []


PLAIN = Meaning()


def meanings_of(call: Call, diffusion, schedule: Schedule) -> list[Meaning]:
    """Every meaning that a call may have, the likeliest first.

    Args:
        diffusion: a copy of the object whose loop is called, which may be run. schedule: its tables.
    """
    draws = ("cpu", "device") if call.noise is None else ("cpu",)
    each = (True, False) if call.eta == 0.0 else (True,)
    clips = clips_of(call, diffusion, schedule) if call.clip else [None]
    found = itertools.product(draws, clips, ways_of(call.net, call.spec, call.extra), each, guidances(len(call.scales)))
    return [Meaning(draw, every, weights, way, clip) for draw, clip, way, every, weights in found]


def all_meanings(calls: dict[tuple, tuple]) -> Iterator[dict[tuple, Meaning]]:
    """Meanings of several kinds of calls -> arguments of :func:`meanings_of`: every choice of one meaning each."""
    kinds = [meanings_of(*arguments) for arguments in calls.values()]
    for chosen in itertools.islice(itertools.product(*kinds), MOST):
        yield dict(zip(calls, chosen))


def guidances(scales: int) -> list[tuple[tuple[float, ...], ...]]:
    """Weights of the groups of rows, by how many scales there are.

    Of two groups c and u: ``u + s (c - u)``, ``c + s (c - u)`` (mit-han-lab/hart), and both with u first. Of three:
    ``u + s_0 (m - u) + s_1 (c - m)`` (arXiv 2211.09800), and ``u + s_0 (a - u) + s_1 (b - u)``, in any order of the
    groups and of the scales.
    """
    if scales == 0:
        return [()]
    if scales == 1:
        c, u = (0.0, 1.0), (1.0, -1.0)
        more, less = (1.0, 1.0), (0.0, -1.0)
        return [(c, u), (more, less), (u, c), (less, more)]
    if scales > 2:
        raise NotServedError(f"the network gets {scales} guidance scales, not one or two")
    forms = [((0, 0, 1), (0, 1, -1), (1, -1, 0)), ((0, 1, 0), (0, 0, 1), (1, -1, -1))]
    found = []
    for form, turned in itertools.product(forms, (False, True)):
        groups = [(a, c, b) if turned else (a, b, c) for a, b, c in form]
        found += [tuple(tuple(map(float, g)) for g in order) for order in itertools.permutations(groups)]
    return list(dict.fromkeys(found))


def clips_of(call: Call, diffusion, schedule: Schedule) -> list:
    """The limits that ``clip_denoised`` may stand for: those that the object is seen to have, else [-1, 1]."""
    channels = call.shape[-1]
    read = limits_of(diffusion, schedule, call)
    if read is not None:
        return [read]
    return [((-1.0,) * channels, (1.0,) * channels)]


@torch.no_grad()
def limits_of(diffusion, schedule: Schedule, call: Call) -> tuple | None:
    """What x0 far away is limited to, channel by channel, by the object's own ``p_mean_variance``; None: not read.

    The object is given a network that puts out what leads there.
    """
    if not callable(getattr(diffusion, "p_mean_variance", None)):
        return None
    device, shape = call.spec.parts.input.weight.device, (1, *call.shape[1:])
    outputs = call.spec.outputs

    def read(step: int, sign: float) -> list[float]:
        value = sign * _FAR * float(np.sign(schedule.x0_out[step]))
        out = torch.full((*shape[:-1], outputs), value, device=device)
        out[..., shape[-1] :] = 0.0
        x, t = torch.zeros(shape, device=device), torch.full((1,), step, device=device)
        found = diffusion.p_mean_variance(lambda *_, **__: out, x, t, clip_denoised=True)["pred_xstart"]
        return found.expand(shape).reshape(-1, shape[-1])[0].tolist()

    try:
        lows, highs = ([read(step, sign) for step in (0, schedule.num_steps - 1)] for sign in (-1.0, 1.0))
    except Exception:  # noqa: BLE001  (whatever a fork's code raises)
        return None
    clear = lows[0] == lows[1] and highs[0] == highs[1] and all(low < high for low, high in zip(lows[0], highs[0]))
    near = clear and max(map(abs, (*lows[0], *highs[0]))) < _FAR / 1e4
    return (tuple(lows[0]), tuple(highs[0])) if near else None
