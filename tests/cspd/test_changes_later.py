"""A patched head whose diffusion object changes afterwards is compared again, and runs its own code where it must."""

from __future__ import annotations

import logging

import pytest
import torch
from foreign import STEPS, Head, Spaced, conditions, made, own_messages, run

import cspd

Z = conditions()


class Ranged(Spaced):
    """Clips x0 as its own attributes say."""

    def __init__(self):
        super().__init__()
        self.options, self.range = {"clip": False}, (-100.0, 100.0)

    def estimate(self, model, x, i, clip_denoised, *rest):
        clip = clip_denoised or self.options["clip"] or self.range[1] < 10
        return super().estimate(model, x, i, clip, *rest)


CHANGES = {
    "a dictionary, in place": lambda d: d.options.update(clip=True),
    "another dictionary": lambda d: setattr(d, "options", {"clip": True}),
    "another tuple": lambda d: setattr(d, "range", (-1.0, 1.0)),
    "a table, in place": lambda d: d.posterior_mean_coef1.__setitem__(3, 0.9),
    "a method": lambda d: setattr(d, "p_sample", lambda *args: 0.9 * Spaced.p_sample(d, *args)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_changes_on_the_diffusion_object_later_is_seen(how, caplog):
    head = cspd.patch(made(Head, Ranged()))
    assert run(head, lambda h: h.sample(Z))[2] == 0
    CHANGES[how](head.gen_diffusion)
    with caplog.at_level(logging.WARNING, "cspd"):
        actual, _, evaluations = run(head, lambda h: h.sample(Z))
    assert evaluations == STEPS
    assert len(own_messages(caplog)) == 1
    assert torch.equal(actual, run(cspd.unpatch(head), lambda h: h.sample(Z))[0])
