"""Residuals of strictly verified tokens on real heads: standard normals, if their law is the target's.

A token that is kept is judged once, against a mean and a sigma of the target's that follow from the tokens before it
and from the noise of other steps. So ``(token - mean) / sigma`` is a standard normal that is independent of all that,
whatever the models: by it the tests see whether the numbers that were judged are the ones that were drawn, in every
type. And weighted by any numbers that are known before, such residuals add up to a normal again.
"""

from __future__ import annotations

import torch

import cspd
from cspd import strict

IMAGES, STEPS = 200, 12


def residuals(monkeypatch, made, images=IMAGES, **arguments):
    """(images, 16 * C) residuals of all tokens, and (images, 16 * C) differences of the means, in sigma."""
    found = {}
    decide = strict.decide

    def watched(state, plan, draft, target, relaxation):
        verdict = decide(state, plan, draft, target, relaxation)
        rows, valid = plan.rows, plan.valid.flatten()
        sigma = target.log_std[:, 0].exp()
        found[len(found)] = (
            rows[valid],
            ((verdict.token - target.mean[:, 0]) / sigma)[valid],
            ((draft.mean[:, 0] - target.mean[:, 0]) / sigma)[valid],
        )
        return verdict

    monkeypatch.setattr(strict, "decide", watched)
    made.run(images, STEPS, 3, seed=4, **arguments)
    shape = (images * 16, 4)
    residual, difference = torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for rows, values, d in found.values():  # of a token that is judged again, the last time counts
        residual[rows], difference[rows] = values.double(), d.double()
    return residual.view(images, -1), difference.view(images, -1)


def projected(residual, weights) -> float:
    """A standard normal, where the weights are known before the residuals."""
    return float((residual * weights).sum() / weights.square().sum().sqrt())


def strictly(draft, target, **options):
    options = {"verify": "strict", "criterion": "last_step", "prefill": 0.0, **options}
    return cspd.SpecDecodeRunner(draft, target, 1.0, **options)
