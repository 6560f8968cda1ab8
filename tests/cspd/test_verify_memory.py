"""A comparison never copies the released weights: the copies are cut, and random."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from foreign import CHANNELS, COND, Head, conditions, made
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cspd
from cspd import twin, verify

Z = conditions()


class Allocations(TorchDispatchMode):
    """How many bytes of new tensors are alive at once."""

    live = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, size):
        self.live -= size


class Wide(Head):
    class net_class(Head.net_class):  # noqa: N801
        def __init__(self, width=1024):
            super(Head.net_class, self).__init__(CHANNELS, width, 2 * CHANNELS, COND, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_never_copied(dtype):
    head = made(Wide)
    weights = sum(p.nbytes for p in head.parameters())
    with Allocations() as counted:
        torch.empty(1000)
        assert counted.peak >= 4000
        cspd.patch(head, dtype=dtype)
    assert counted.peak < 0.25 * weights
    gc.collect()
    assert counted.live < 0.01 * weights
    with Allocations() as counted:  # at another kind of call, the first one
        head.gen_diffusion.p_sample_loop(
            head.net.forward, (2, CHANNELS), clip_denoised=False, model_kwargs={"c": Z[:2]}
        )
    assert counted.peak < (0.25 if dtype is None else 0.75) * weights
    assert head.net.evaluations == 0


@pytest.mark.parametrize(("width", "copied"), [(1024, 32), (32, 32), (16, 16)])
def test_wide_heads_are_cut(width, copied, monkeypatch):
    widths = set()

    def copies_of(*args, **options):
        copies = twin.copies_of(*args, **options)
        widths.add(copies.trial.net.input_proj.weight.shape[0])
        return copies

    monkeypatch.setattr(verify, "copies_of", copies_of)
    cspd.patch(made(Wide, width=width))
    assert widths == {copied}


def test_copies_are_random_and_hold_nothing_of_the_weights(monkeypatch):
    head, seen = made(Wide, width=48), []

    def copies_of(*args, **options):
        copies = twin.copies_of(*args, **options)
        seen.append([parameter.detach() for parameter in copies.trial.net.parameters()])
        return copies

    monkeypatch.setattr(verify, "copies_of", copies_of)
    for parameter in head.parameters():
        torch.nn.init.constant_(parameter, 12.5)
    cspd.patch(head)
    assert len(seen) > 4
    for parameters in seen:
        assert not any((parameter == 12.5).any() for parameter in parameters)
        assert all(a.std() > 0 for a in parameters)
        assert all(map(torch.equal, parameters, seen[0]))
