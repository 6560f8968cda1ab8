"""The law of strictly verified tokens on real heads: given all shared noise, every token is the target's Gaussian
(``helpers/residuals.py``)."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from gaussian_pair import IMPOSSIBLE, log_p_values
from residuals import projected, residuals, strictly
from slow import mostly_slow
from strict_loop import gentle, near

from cspd import strict

CASES = {
    "float32": (torch.float32, torch.float32, {}, {}),
    "guided, candidates": (torch.float32, torch.float32, dict(num_candidates=2, branches=2), dict(cfg=2.0)),
    "bfloat16 draft": (torch.bfloat16, torch.float32, {}, dict(cfg=2.0)),
    "bfloat16 both": (torch.bfloat16, torch.bfloat16, dict(residual="closed_form"), {}),
}


@pytest.mark.parametrize("name", mostly_slow(CASES, fast=("float32", "bfloat16 both")))
def test_tokens_are_the_targets_gaussians(monkeypatch, name):
    types = CASES[name][:2]
    options, arguments = CASES[name][2:]
    target = gentle()
    draft, target = near(target, 0.9).to(types[0]), target.to(types[1])
    made = strictly(draft, target, **options)
    residual, difference = residuals(monkeypatch, made, **arguments)
    stats = made.stats
    assert residual.isfinite().all()
    assert 0.3 < stats.acceptance < 0.9
    assert stats.fallback < 1e-3
    # p < 1e-9 of the least of some 2,300 statistics, as in the tests of the law.
    assert log_p_values(residual)[0] > IMPOSSIBLE + math.log(2300 / 200)
    assert abs(projected(residual, difference)) < 6.1  # p < 1e-9


@pytest.mark.slow
def test_densities_of_other_numbers_would_be_found(monkeypatch):
    """A bfloat16 draft's tokens, judged by what its head gives in float32: not what they were drawn from.

    The projection on the difference between the two means has, were it the law, a standard normal distribution; its
    value here is beyond p = 1e-9 by more than five standard deviations, so the power is above 1 - 1e-6.
    """
    target = gentle(betas=np.linspace(0.0005, 0.5, 12))  # a last sigma that is no more than some of bfloat16's errors
    made = strictly(copy.deepcopy(target).to(torch.bfloat16), target)
    other = strictly(target, target)
    candidates, chains_of, other_means = strict.candidates, strict.chains_of, {}
    head = other.begin(1, 4).draft.head

    def drawn_twice(state, model, plan, z, *rest):
        chain = chains_of(state, model, plan, z, *rest)
        if model is state.draft:
            in_float32 = chains_of(
                state, type(model)(model.name, head, model.transformer, model.embedding), plan, z, *rest
            )
            other_means[chain.mean.data_ptr()] = (chain, in_float32.mean)
        return chain

    def recomputed(state, plan, chain, x=None):
        proposed = candidates(state, plan, chain, x)
        own = other_means.get(chain.mean.data_ptr())
        if own is None or own[0].mean is not chain.mean:
            return proposed
        errors.append((plan.rows[plan.valid.flatten()], (own[1] - chain.mean)[plan.valid.flatten()]))
        return proposed._replace(mean=own[1][:, None])

    def run(*patches):
        errors.clear()
        for name, function in patches:
            monkeypatch.setattr(strict, name, function)
        residual, difference = residuals(monkeypatch, made, 400)
        monkeypatch.undo()
        return residual, difference

    errors: list = []
    residual, difference = run()
    assert abs(projected(residual, difference)) < 6.1
    residual, _ = run(("chains_of", drawn_twice), ("candidates", recomputed))
    error = torch.zeros(400 * 16, 4, dtype=torch.float64)
    for rows, values in errors:
        error[rows] = values.double()
    assert abs(projected(residual, error.view(400, -1))) > 6.1 + 5
