"""What ``cspd.patch`` does to a head: it accelerates a call, or has its own code run and says so, or refuses the head.

Whether a call is accelerated is counted: the packed head does not evaluate the network.
"""

from __future__ import annotations

import logging
import re

import torch
from foreign import STEPS, own_messages, run

import cspd
from cspd_kernels.testing import relative_error


def assert_accelerated(head, call, caplog, steps=STEPS):
    """The same call, patched: equal tokens and generator, no evaluation, nothing told."""
    compare(head, call, caplog, steps, evaluations=0, told=[])


def assert_own_code(head, call, caplog, reason, steps=STEPS):
    """The same call, patched: it runs its own code, and the reason is told once, however often it is called."""
    compare(head, call, caplog, steps, evaluations=steps, told=[reason])


@torch.no_grad()  # loops need not say so
def assert_own_loop(head, call, caplog, match, steps=STEPS):
    """The same call, patched: it runs its own loop, whose network is accelerated; ``patch`` tells why, once.

    On a CPU with weights that change, its own network is as fast, and runs bit for bit.
    """
    cspd.unpatch(head)
    expected, rng, own = run(head, call)
    assert own == steps
    told = {"live": "runs its own code, unaccelerated", "frozen": "keeps its own loop, its network is accelerated"}
    for weights, outcome in told.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cspd"):
            cspd.patch(head, weights=weights)
            for _ in range(2):
                actual, rng_after, evaluations = run(head, call)
                assert evaluations == (steps if weights == "live" else 0)
                assert torch.equal(rng_after, rng)
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, expected) if evaluations else relative_error(actual, expected) < 1e-5
        (message,) = [record.getMessage() for record in caplog.records]
        assert re.search(f"{outcome}: {match}", message)


def compare(head, call, caplog, steps, evaluations, told):
    cspd.unpatch(head)
    expected, rng, own = run(head, call)
    assert own == steps
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(head)
        assert not own_messages(caplog)
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
