"""The heads of other code bases, patched: the same tokens and generators as by their own code, and served as said.

Which kernels serve is counted, not believed: a loop is one call of ``denoise``, and a network in its own loop is one of
``evaluate`` at every step. The network's own code runs at neither.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter

import pytest
import torch
from field import FIELD, LOOP, NETWORK, REFUSED, Case
from foreign import own_messages, state, unchanged

import cspd
import cspd_kernels
from cspd_kernels.testing import relative_error

SERVED = [name for name, case in FIELD.items() if case.served in (LOOP, NETWORK)]


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """How often which kernels were called, from anywhere in the package."""
    counts = Counter()
    assert callable(cspd.patch)  # loaded when it is first asked for

    def count(name):
        function = getattr(cspd_kernels, name)

        def counting(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        for module in [*sys.modules.values()]:
            if getattr(module, "__name__", "").startswith("cspd.") and getattr(module, name, None) is function:
                monkeypatch.setattr(module, name, counting)

    count("denoise")
    count("evaluate")
    return counts


def seeded(case: Case, model, options: dict):
    """(tokens, generator afterwards, evaluations by the network's own code) of a call."""
    network = case.network(model)
    torch.manual_seed(5)
    before = network.evaluations
    with torch.no_grad():
        tokens = case.call(model, **options)
    return tokens, torch.get_rng_state(), network.evaluations - before


def compare(case: Case, model, own: list, counted: Counter, caplog, **options) -> list[Counter]:
    """Calls of a patched model are as before, without its network's code; by what the second of each was served."""
    served = []
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(model, **options)
        for arguments, (tokens, generator, _) in zip(case.calls, own):
            for _ in range(2):  # the first of a kind may be compared with its own code
                counted.clear()
                actual, after, evaluations = seeded(case, model, arguments)
                assert relative_error(actual, tokens) < 1e-5
                assert actual.dtype == tokens.dtype
                assert torch.equal(after, generator)
            assert evaluations == 0
            served.append(Counter(counted))
    return served


@pytest.mark.parametrize("name", SERVED)
def test_a_head_of_the_field(name, counted, caplog):
    case = FIELD[name]
    model = case.make()
    own = [seeded(case, model, arguments) for arguments in case.calls]
    before = state(model)
    # On a CPU a network is chosen where its weights do not change: else its own forward is as fast.
    options = {} if case.served == LOOP else {"weights": "frozen"}
    served = compare(case, model, own, counted, caplog, **options)
    if case.served == LOOP:
        assert not own_messages(caplog)
        assert served == [Counter(denoise=1)] * len(own)
    else:
        assert [counts["denoise"] for counts in served] == [0] * len(own)
        assert [counts["evaluate"] for counts in served] == [evaluations for *_, evaluations in own]
    cspd.unpatch(model)
    assert unchanged(before, state(model))
    for arguments, (tokens, _, evaluations) in zip(case.calls, own):
        again, _, counts = seeded(case, model, arguments)
        assert torch.equal(again, tokens)
        assert counts == evaluations


@pytest.mark.parametrize("name", [name for name in SERVED if FIELD[name].alone])
def test_in_its_own_loop(name, counted, caplog):
    case = FIELD[name]
    model = case.make()
    own = [seeded(case, model, arguments) for arguments in case.calls[:2]]
    served = compare(case, model, own, counted, caplog, loop="own")
    assert [counts["denoise"] for counts in served] == [0] * len(own)
    assert [counts["evaluate"] for counts in served] == [evaluations for *_, evaluations in own]


@pytest.mark.parametrize("name", [name for name, case in FIELD.items() if case.served == REFUSED])
def test_a_head_that_is_refused(name):
    case = FIELD[name]
    model = case.make()
    before = state(model)
    with pytest.raises(ValueError, match=case.why):
        cspd.patch(model)
    assert unchanged(before, state(model))
    assert not cspd.is_patched(model)
