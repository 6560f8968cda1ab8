"""A sampler of one's own: the example of CONTRIBUTING, what is registered, how short an adapter is."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from field.flow_heads import OneOutputNet
from foreign import CHANNELS, conditions, made
from patch_checks import assert_accelerated

from cspd import samplers
from cspd.samplers import Adapter, Draws, Reading


class SigmaHead(nn.Module):
    """From sigma_max down to 0 by a network that puts out the data: what CONTRIBUTING's example is of."""

    def __init__(self):
        super().__init__()
        self.sigma_min, self.sigma_max, self.net = 0.02, 5.0, OneOutputNet()

    @torch.no_grad()
    def sample(self, z, steps):
        sigmas = [*np.geomspace(self.sigma_max, self.sigma_min, steps).tolist(), 0.0]
        x = self.sigma_max * torch.randn(len(z), CHANNELS)
        for now, after in itertools.pairwise(sigmas):
            out = self.net(x, torch.full((len(z),), np.log(now)), z)
            x = out + (x - out) * (after / now)
        return x


def example() -> str:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(Adapter)" in block)
    return code


def test_the_example_of_contributing(caplog, monkeypatch):
    monkeypatch.setattr(samplers, "ADAPTERS", [*samplers.ADAPTERS])
    code = example()
    assert len(code.splitlines()) < 50
    exec(code, {"__name__": "example"})
    assert_accelerated(made(SigmaHead), lambda h: h.sample(conditions(6), steps=9), caplog, 9)


def test_every_adapter_is_as_short_as_is_promised():
    for path in Path(samplers.__file__).parent.glob("*.py"):
        if path.stem not in ("__init__", "adapter", "plan", "served"):
            assert len(path.read_text(encoding="utf-8").splitlines()) < 50, path.stem


def test_what_register_expects():
    class Half(Adapter):
        methods = ("sample", "sample_more")

        def sample(self, head, z):
            return Reading(None, z, draws=Draws())

    before = [*samplers.ADAPTERS]
    with pytest.raises(TypeError, match="expected an Adapter, got Head"):
        samplers.register(type("Head", (), {})())
    with pytest.raises(TypeError, match="expected Half to read sample_more"):
        samplers.register(Half())
    assert before == samplers.ADAPTERS
