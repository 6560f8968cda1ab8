"""A draft and a target whose tokens are Gaussian and linear in those before them, so that the law of all tokens of an
image is known; and tests of that law.

The runner, its rounds and its verdicts are the real ones. In place of the transformers and the heads stand linear maps:
given the tokens x of the known positions and the noise x_T that both models share, a token of a model is
``N(b + sum over known of A x + c x_T, sigma^2)`` by the criterion "last_step". Under guidance of scale s, b is
``b_u + s (b_c - b_u)``.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from small_models import small_mar

import cspd
from cspd.order import guidance_scale, plan_steps
from cspd_kernels import Denoised

LENGTH, CHANNELS = 9, 2
LABEL = 0.6  # of b, with a class


class Linear:
    """One of the models: A (L, C, L, C), b (L, C)."""

    waits = False

    def __init__(self, seed: int, near: Linear | None = None, sigma: float = 1.0, shared: float = 0.7):
        generator = torch.Generator().manual_seed(seed)
        a = 0.45 * torch.randn(LENGTH, CHANNELS, LENGTH, CHANNELS, generator=generator)
        b = torch.randn(LENGTH, CHANNELS, generator=generator)
        self.a, self.b = (a, b) if near is None else (near.a + 0.35 * a, near.b + 0.35 * b)
        self.sigma, self.shared = sigma, shared

    def conditions(self, tokens, plan, embedding):
        """(R, n, C + 2): mean without x_T, its coefficient, log sigma. Unknown tokens are not looked at."""
        count = plan.known.shape[1] if plan.count is None else plan.count[:, None]
        known = torch.where((plan.rank < count)[..., None], tokens, 0.0)
        mean = torch.einsum("pcqd,rqd->rpc", self.a, known) + self.b
        mean = mean.gather(1, plan.where[..., None].expand(-1, -1, CHANNELS))
        rest = torch.tensor([self.shared, math.log(self.sigma)]).expand(*mean.shape[:2], 2)
        z = torch.cat([mean, rest], dim=2)
        if not plan.guided:
            return z
        return torch.cat([z + torch.tensor([LABEL, LABEL, 0.0, 0.0]), z])


def denoise(head, cond, x_T, noise, *, temperature, cfg_scale, backend, parallel_tol, guess):  # noqa: N803
    """In place of the heads; the term of the path is anything, as it must not matter."""
    mean, rows = cond[: len(x_T), :CHANNELS], len(x_T)
    if len(cond) == 2 * rows:
        scale = cfg_scale[:, None] if isinstance(cfg_scale, torch.Tensor) else cfg_scale
        other = cond[rows:, :CHANNELS]
        mean = other + scale * (mean - other)
    mean = mean + cond[:rows, 2:3] * x_T
    log_std = cond[:rows, 3:].expand_as(mean) + math.log(temperature)
    return Denoised(mean, mean, log_std.contiguous(), 5.0 * mean[:, 0])


def pair(same_sigma: bool = True) -> tuple[Linear, Linear]:
    """(draft, target)."""
    target = Linear(1, sigma=0.8)
    return Linear(2, near=target, sigma=0.8 if same_sigma else 1.0, shared=0.5), target


def runner(monkeypatch, draft: Linear, target: Linear, relaxation=1.0, **options) -> cspd.SpecDecodeRunner:
    """Of models of these laws."""
    monkeypatch.setattr("cspd.window.denoise", denoise)
    config = dict(img_size=3, patch_size=1, vae_embed_dim=CHANNELS, learn_sigma=False)
    mar = small_mar(0, width=8, **config)
    options = {"verify": "strict", "criterion": "last_step", "prefill": 0.0, **options}
    made = cspd.SpecDecodeRunner(mar, small_mar(1, width=8, **config), relaxation, **options)
    made._pair.transformers = lambda _: {"draft": draft, "target": target}
    return made


def draw(made: cspd.SpecDecodeRunner, images: int, steps: int, gamma, cfg: float = 1.0, seed: int = 0):
    """(images, L, C) tokens in the order of drawing, all of the images in one order."""
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(5))
    drawn = made.run(images, steps, gamma, cfg=cfg, seed=seed, orders=order.expand(images, -1).contiguous())
    return made.target_model.patchify(drawn), order


def whitened(tokens: torch.Tensor, order: torch.Tensor, target: Linear, steps: int, cfg: float = 1.0) -> torch.Tensor:
    """(images, L C): independent standard normals, if and only if the tokens have the target's law."""
    x, known = tokens.double(), torch.zeros(LENGTH, dtype=torch.bool)
    residual = torch.empty_like(x)
    for step in plan_steps(LENGTH, steps, cfg, "linear"):
        new = order[step.after : step.before]
        scale = guidance_scale(cfg, "linear", max(step.after, 1), LENGTH)
        mean = torch.einsum("pcqd,rqd->rpc", target.a.double(), torch.where(known[:, None], x, 0.0)) + target.b
        mean = mean + (scale * LABEL if cfg != 1.0 else 0.0)
        residual[:, new] = (x - mean)[:, new]
        known[new] = True
    return residual.flatten(1) / math.sqrt(target.sigma**2 + target.shared**2)


def log_p_values(normals: torch.Tensor, bins: int = 5) -> tuple[float, float]:
    """How far (N, D) numbers are from independent standard normals: (the least log p of all tests, its margin).

    Kolmogorov-Smirnov on every coordinate and on sums and differences of neighbours, chi-square of ``bins``^2 equally
    probable cells on every pair of coordinates. The margin is by how many of its standard deviations the best test is
    beyond its critical value for p = 1e-9, as where its power is asked for: at 5 it is above 1 - 1e-6.
    """
    rows, dims = normals.shape
    sums = torch.cat([normals[:, 1:] + normals[:, :-1], normals[:, 1:] - normals[:, :-1]], dim=1) / math.sqrt(2)
    u = torch.special.ndtr(torch.cat([normals, sums, normals.sum(1, keepdim=True) / math.sqrt(dims)], dim=1))
    ordered = u.sort(dim=0).values
    grid = torch.arange(rows, dtype=torch.float64)[:, None] / rows
    distance = torch.maximum(ordered - grid, grid + 1.0 / rows - ordered).amax(dim=0) * math.sqrt(rows)
    log_p = math.log(2.0) - 2.0 * distance.square()  # the leading term: too small a p is not claimed
    margins = [(distance - math.sqrt(0.5 * math.log(2e9))) / 0.5]
    cells = (u[:, :dims] * bins).long().clamp(max=bins - 1)
    first, second = torch.triu_indices(dims, dims, 1)
    pairs = cells[:, first] * bins + cells[:, second]
    counts = torch.zeros(bins * bins, pairs.shape[1], dtype=torch.float64).scatter_add_(
        0, pairs, torch.ones_like(pairs, dtype=torch.float64)
    )
    expected, freedom = rows / bins**2, bins**2 - 1
    statistic = ((counts - expected) ** 2 / expected).sum(dim=0)
    half = torch.full_like(statistic, 0.5 * freedom)
    tail = torch.special.gammaincc(half, 0.5 * statistic).clamp(min=1e-300).log()
    beyond = (statistic - freedom).clamp(min=0)
    margins.append((statistic - _CRITICAL) / (2 * (freedom + 2 * beyond)).sqrt())
    return float(torch.cat([log_p, tail]).min()), float(torch.cat(margins).max())


_CRITICAL = 90.96  # of chi-square with 24 degrees of freedom, at p = 1e-9
IMPOSSIBLE = math.log(1e-9)


def stats_of(made) -> SimpleNamespace:
    return SimpleNamespace(**made.stats.to_dict())
