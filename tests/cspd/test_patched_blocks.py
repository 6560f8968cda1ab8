"""``with cspd.patched(model)``: nested, overlapping, in several threads, left by an exception."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn as nn
from foreign import conditions, made, run, state, unchanged
from small_models import small_mar

import cspd
from cspd.loop import patch_of

Z = conditions()


def test_patched_restores_options_and_survives_exceptions():
    model = cspd.patch(small_mar(), dtype=torch.bfloat16)
    net = model.diffloss.net
    with pytest.raises(RuntimeError, match="inside"), cspd.patched(model, noise="philox"):
        assert patch_of(net).options.noise == "philox"
        raise RuntimeError("inside")
    assert patch_of(net).options == cspd.options.Options(dtype=torch.bfloat16)
    cspd.unpatch(model)
    with pytest.raises(RuntimeError, match="inside"), cspd.patched(model):
        raise RuntimeError("inside")
    assert not cspd.is_patched(model)


def test_blocks_that_overlap():
    head = made()
    before = state(head)
    one, two = cspd.patched(head, dtype=torch.bfloat16), cspd.patched(head, noise="philox")
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert patch_of(head.net).options.noise == "philox"
    assert run(head, lambda h: h.sample(Z))[2] == 0
    two.__exit__(None, None, None)
    assert unchanged(before, state(head))


def test_blocks_in_several_threads():
    heads, failures = nn.ModuleList([made(seed=seed) for seed in range(2)]), []
    before = [state(head) for head in heads]

    def work(i):
        try:
            for _ in range(3):
                with cspd.patched(heads, weights=("live", "frozen")[i % 2]):
                    assert heads[i % 2].sample(Z).shape == (6, 4)
                    assert cspd.is_patched(heads[i % 2])
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [head.net.evaluations for head in heads] == [0, 0]
    assert not cspd.is_patched(heads)
    assert all(unchanged(a, state(head)) for a, head in zip(before, heads))
