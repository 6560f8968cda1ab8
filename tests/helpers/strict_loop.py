"""Strict verification as a loop over one image in Python: a pass of a model for every step, a verdict for every token.

Written from the method, beside the package's own rounds: no rows that stand at different places, no room for more
tokens than a step has, nothing that is masked.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from small_models import small_mar

from cspd.models import GaussianDiffusion
from cspd_kernels import Denoised, PhiloxNoise, Schedule, accept_reject, denoise
from cspd_kernels.noise import CANDIDATE_STRIDE


def image(runner, number: int, steps: int, gamma: int, seed: int, **options) -> tuple[torch.Tensor, list[int]]:
    """Tokens (L, C) of one image, and how many steps each of its rounds kept."""
    state = runner.begin(1, steps, seed=seed, first_image=number, **options)
    last_step, count = runner.criterion == "last_step", runner.num_candidates
    tokens, plan = state.tokens.clone(), state.plan

    def draw(model, tokens, i):
        """Of step i: positions (n,), rows, and a chain of each candidate: lists of fields (K, n, ...)."""
        step = plan.step(i)
        z = model.transformer.conditions(tokens, step, model.embedding).flatten(0, 1)
        chains = []
        for k in range(count):
            noise = PhiloxNoise(seed, step.rows + k * CANDIDATE_STRIDE)
            own = PhiloxNoise(seed, step.rows) if last_step else noise
            channels = model.head.channels
            chain = denoise(
                model.head, z, own.x_T(channels), own, cfg_scale=step.cfg_scale, temperature=state.temperature,
                parallel_tol=None,
            )  # fmt: skip
            sample, path = chain.mean, chain.path_log_std
            if last_step:
                sample = (chain.mean + chain.log_std.exp() * noise.step(0, channels)).float()
                path = torch.zeros_like(path)
            chains.append(Denoised(sample, chain.mean, chain.log_std, path))
        return step, chains

    def place(tokens, step, values):
        tokens = tokens.clone()
        tokens[0, step.where[0]] = values.float()
        return tokens

    at, kept = 0, []
    while at < state.prefilled:
        step, chains = draw(state.target, tokens, at)
        tokens, at = place(tokens, step, chains[0].sample), at + 1
    stop = len(plan.steps)
    while at < stop:
        last = min(at + gamma, stop)
        step, first = draw(state.draft, tokens, at)
        paths = []  # of every branch: the tokens behind its steps, and what was drafted
        for branch in range(min(runner.branches, count)):
            known, drafted = [tokens, place(tokens, step, first[branch].sample)], [(step, first)]
            for i in range(at + 1, last):
                drafted.append(draw(state.draft, known[-1], i))
                known.append(place(known[-1], *(drafted[-1][0], drafted[-1][1][0].sample)))
            paths.append((known, drafted))
        branch, moved = 0, 0
        for i in range(at, last):
            known, drafted = paths[branch]
            own, proposed = drafted[i - at]
            _, looked = draw(state.target, tokens, i)
            verdicts = [verdict_of(runner, seed, own, proposed, looked, n) for n in range(len(own.rows))]
            tokens = place(tokens, own, torch.cat([v.token for v in verdicts]))
            moved += 1
            chosen = [int(v.candidate) if hasattr(v, "candidate") else int(v.accepted) - 1 for v in verdicts]
            ways = range(len(paths)) if i == at else (0,)
            if len(set(chosen)) > 1 or chosen[0] not in ways:
                break
            branch = chosen[0] if i == at else branch
        at += moved
        kept.append(moved)
    return tokens[0], kept


def verdict_of(runner, seed, step, draft, target, n):
    """Of the n-th token of a step: it alone."""
    rows, count, relaxation = step.rows[n : n + 1], len(draft), runner.relaxation
    if isinstance(relaxation, torch.Tensor):
        relaxation = float(relaxation[step.where[0, n]])
    fields = [[torch.stack([c[f][n] for c in chains])[None] for f in range(4)] for chains in (draft, target)]
    if count == 1:
        fields = [[value[:, 0] for value in side] for side in fields]
    draft, target = (Denoised(*side) for side in fields)
    return accept_reject(
        draft.sample, draft, target, seed=seed, rows=rows, relaxation=relaxation, sigma=runner.sigma,
        max_tries=runner.max_tries, residual=runner.residual, target_sigma=runner.target_sigma, backend="torch",
    )  # fmt: skip


def gentle(learned: bool = False, betas=(0.1,) * 5):
    """A small target of few denoising steps, whose tokens are not far larger than its last sigma."""
    model = small_mar(1, width=32, learn_sigma=learned)
    times = np.arange(len(betas)) * (1000 // len(betas))
    schedule = Schedule.diffusion(np.array(betas), times, "learned" if learned else "fixed_small")
    model.diffloss.gen_diffusion = GaussianDiffusion(schedule)
    return model


def near(target, size: float, seed: int = 0):
    """A draft: the target with all its weights changed by a fraction."""
    draft, generator = copy.deepcopy(target), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator) * weight.abs().mean())
    return draft
