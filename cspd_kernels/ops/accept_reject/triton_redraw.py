"""Device functions that redraw one rejected token, in one warp: as a block of tries, or in closed form.

Both return (try, tokens [K, BC], their tries [K]). The token to take is the one whose try is the first value.
A first value of 0 means that there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import STREAM_PROPOSAL as _STREAM_PROPOSAL
from ...noise import STREAM_UNIFORM as _STREAM_UNIFORM
from ...triton_noise import normals, uniform, words
from ...triton_support import expm1
from ..density_ratio.triton_terms import judged, residuals, sum_of_channels
from .reference import FARTHEST as _FARTHEST
from .reference import SHORTEST as _SHORTEST

FARTHEST: tl.constexpr = tl.constexpr(_FARTHEST)
SHORTEST: tl.constexpr = tl.constexpr(_SHORTEST)
STREAM_UNIFORM: tl.constexpr = tl.constexpr(_STREAM_UNIFORM)
STREAM_PROPOSAL: tl.constexpr = tl.constexpr(_STREAM_PROPOSAL)
POINTS: tl.constexpr = tl.constexpr(32)  # of one round of the search: one a thread
ROUNDS: tl.constexpr = tl.constexpr(6)  # 33^-6 of 18 sigma, 1e-8, is below float32's rounding


@triton.jit
def uniform_of(seed, row, index):
    """The uniform of (seed; row, try ``index``); row int64."""
    word, _, _, _ = words(seed, row, index, 0, STREAM_UNIFORM)
    return uniform(word)


@triton.jit
def by_rejection(
    seed, row, first, max_tries, mean_q, log_q, mean_p, log_p, path, valid,
    BG: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Tries first..first + K - 1: y ~ N(mu_p, sigma_p^2), kept where u <= 1 - exp(-log r_1(y)). Operands [1, BC]."""
    index = first + tl.arange(0, K)
    n = normals(seed, row, index[:, None], tl.arange(0, BG)[None, :], STREAM_PROPOSAL)
    y = mean_p + tl.exp(log_p) * n
    difference, total, log_scale = residuals(y, mean_q, log_q, mean_p, log_p)
    term = tl.where(valid, 0.5 * difference * total - log_scale, 0.0)
    log_ratio = judged(sum_of_channels(term) + path)
    kept = (uniform_of(seed, row, index) <= -expm1(-log_ratio)) & (index <= max_tries)
    never = 0x7FFFFFFF
    at = tl.min(tl.where(kept, index, never), 0)
    return tl.where(at == never, 0, at), y, index


@triton.jit
def in_closed_form(seed, row, max_tries, mean_q, mean_p, log_p, path, valid, BG: tl.constexpr):
    """The first proposal, its component along the models' difference drawn by inverting its distribution function.

    As the definition has it (``reference.closed_form``); scalars in float64. Operands [1, BC].
    """
    index = tl.full([1], 1, tl.int32)
    n = normals(seed, row, index[:, None], tl.arange(0, BG)[None, :], STREAM_PROPOSAL)
    d = difference(mean_q, mean_p, log_p, valid)
    distance = tl.sqrt(tl.sum(sum_of_channels(d * d), 0))
    t_0 = -0.5 * distance - path.to(tl.float64) / distance
    exists = (t_0 <= FARTHEST) & (distance < float("inf")) & (max_tries > 0)  # not at temperature 0: d is not finite
    t = invert(tl.maximum(distance, SHORTEST), t_0, uniform_of(seed, row, 1).to(tl.float64))
    inverse = 1.0 / tl.maximum(distance, 1e-200)
    along = (d * inverse).to(tl.float32)
    across = tl.sum(sum_of_channels(tl.where(valid, n * along, 0.0)), 0)
    y = mean_p + tl.exp(log_p) * (n + (t.to(tl.float32) - across) * along)
    infinite = tl.sum(tl.sum(tl.where(valid & ~(tl.abs(y) < float("inf")), 1, 0), 1), 0)
    return tl.where(exists & (infinite == 0), 1, 0), y, index


@triton.jit
def difference(mean_q, mean_p, log_p, valid):
    """(mu_p - mu_q) / sigma_p, float64, 0 where not valid."""
    d = (mean_p.to(tl.float64) - mean_q.to(tl.float64)) * tl.exp(-log_p.to(tl.float64))
    return tl.where(valid, d, 0.0)


@triton.jit
def invert(distance, t_0, u):
    """t with S(t) = u S(t_0), float64: every round splits the interval at POINTS places at once."""
    low, high = tl.maximum(t_0, -FARTHEST), 2.0 * FARTHEST
    log_weight = distance * (t_0 + 0.5 * distance)
    goal = u * survival(low, distance, log_weight)
    width = (high - low) / (POINTS + 1)
    for _ in range(ROUNDS):
        t = low + width * (1 + tl.arange(0, POINTS)).to(tl.float64)
        beyond = survival(t, distance, log_weight) > goal
        low += width * tl.sum(beyond.to(tl.int32), 0).to(tl.float64)
        width = width / (POINTS + 1)
    return low


@triton.jit
def survival(t, distance, log_weight):
    """Q(t) - exp(log_weight) Q(t + distance), float64."""
    return weighted_tail(t, 0.0) - weighted_tail(t + distance, log_weight)


@triton.jit
def weighted_tail(t, log_weight):
    """exp(log_weight) Q(t), Q the normal's upper tail, float64; the weight may lie beyond what exp can hold."""
    density = 0.3989422804014327 * tl.exp(log_weight - 0.5 * t * t)
    tail = density * mills_ratio(tl.abs(t))
    return tl.where(t < 0, tl.exp(log_weight + 0.0 * t) - tail, tail)


@triton.jit
def mills_ratio(t):
    """Q(t) / phi(t) for t >= 0, float64 to 1e-14: a polynomial fit of (t + 4) Q(t) / phi(t) in (t - 4) / (t + 4)."""
    scale = 1.0 / (t + 4.0)
    w = (t - 4.0) * scale
    total = 1.694634851711294e-08 * w + 3.246097788147439e-08
    total = (total * w - 1.418963836663327e-07) * w - 3.6980329543421077e-07
    total = (total * w + 5.886507245617645e-07) * w + 2.5284643065651822e-06
    total = (total * w - 1.5037142571422076e-06) * w - 1.4811589753109296e-05
    total = (total * w + 1.757374125438696e-06) * w + 8.80801678666937e-05
    total = (total * w - 4.770094625462865e-06) * w - 0.0005792645450405851
    total = (total * w + 0.0003342418261349448) * w + 0.004087854811152283
    total = (total * w - 0.008722294928179589) * w - 0.018900450775092
    total = (total * w + 0.15139176229053172) * w - 0.46754096300217596
    total = (total * w + 0.9704095548680988) * w - 1.5237709108199398
    total = total * w + 1.8932190633084853
    return total * scale
