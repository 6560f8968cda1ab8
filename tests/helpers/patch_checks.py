"""What ``cspd.patch`` does to a head: it accelerates a call, or has its own code run and says so, or refuses the head.

Whether a call is accelerated is counted: the packed head does not evaluate the network.
"""

from __future__ import annotations

import logging

import pytest
import torch
from foreign import STEPS, own_messages, run, state, unchanged

import cspd
from cspd_kernels.testing import relative_error


def assert_accelerated(head, call, caplog, steps=STEPS):
    """The same call, patched: equal tokens and generator, no evaluation, nothing told."""
    compare(head, call, caplog, steps, evaluations=0, told=[])


def assert_own_code(head, call, caplog, reason, steps=STEPS, by_patch=False):
    """The same call, patched: it runs its own code, and the reason is told once, however often it is called.

    ``by_patch``: by ``patch`` already, as this is what its ``sample`` does without an option.
    """
    compare(head, call, caplog, steps, evaluations=steps, told=[reason], by_patch=by_patch)


def compare(head, call, caplog, steps, evaluations, told, by_patch=False):
    cspd.unpatch(head)
    expected, rng, own = run(head, call)
    assert own == steps
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(head)
        assert len(own_messages(caplog)) == (len(told) if by_patch else 0)
        for _ in range(3):
            actual, rng_after, counted = run(head, call)
            assert counted == evaluations
            assert torch.equal(rng_after, rng)
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected) if evaluations else relative_error(actual, expected) < 1e-5
    messages = own_messages(caplog)
    assert len(messages) == len(told)
    for message, reason in zip(messages, told):
        assert reason in message
    assert bool(messages) or not caplog.records


def assert_refused(head, match):
    before = state(head)
    evaluations = head.net.evaluations
    with pytest.raises(ValueError, match=match):
        cspd.patch(head)
    assert unchanged(before, state(head))
    assert not cspd.is_patched(head)
    assert head.net.evaluations == evaluations
