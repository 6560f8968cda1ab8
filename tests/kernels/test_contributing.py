"""A new head is the lines that CONTRIBUTING.md shows: they describe the network below."""

import copy
import math
import pathlib
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from cspd_kernels import DiffusionHead, denoise, evaluate, parts, spec
from cspd_kernels.ops.denoise import reference
from cspd_kernels.testing import random_inputs, relative_error

C, Z, W, H = 4, 6, 32, 80
PAGE = pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md"


class RootNorm(nn.Module):
    def __init__(self, width=None):
        super().__init__()
        self.eps, self.weight = 1e-5, None if width is None else nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, W), nn.SiLU(), nn.Linear(W, W))

    def forward(self, t):
        angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(8) / 8)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.pre_norm, self.ada = RootNorm(W), nn.Linear(W, 3 * W)
        self.ff = nn.ModuleDict({"gate": nn.Linear(W, H), "up": nn.Linear(W, H), "down": nn.Linear(H, W)})

    def forward(self, x, y):
        gate, scale, shift = self.ada(y).chunk(3, -1)
        h = self.pre_norm(x) * (1 + scale) + shift
        return x + gate * self.ff.down(F.silu(self.ff.gate(h)) * self.ff.up(h))


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_norm, self.out_ada, self.out = RootNorm(), nn.Linear(W, 2 * W), nn.Linear(W, C)

    def forward(self, x, y):
        scale, shift = self.out_ada(y).chunk(2, -1)
        return self.out(self.out_norm(x) * (1 + scale) + shift)


class NewNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.latent_in, self.context_in, self.step_embedder = nn.Linear(C, W), nn.Linear(Z, W), Steps()
        self.stages, self.tail = nn.ModuleList(Stage() for _ in range(3)), Tail()

    def forward(self, x, t, context):
        x, y = self.latent_in(x), F.silu(self.step_embedder(t) + self.context_in(context))
        for stage in self.stages:
            x = stage(x, y)
        return self.tail(x, y)


@pytest.fixture
def lines(monkeypatch):
    """The page's lines, run; the tables are as before afterwards."""
    section = PAGE.read_text().split("## A head of another code base")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S).group(1)
    for module, names in ((parts, ("NAMES", "BLOCK", "FINAL")), (spec, ("KNOWN",))):
        for name in names:
            table = getattr(module, name)
            for key, value in copy.copy(table).items():
                monkeypatch.setitem(table, key, value)
    monkeypatch.setitem(spec.KNOWN, "step_embedder", None)
    before = parts.SWIGLUS.copy()

    def run():
        values = {}
        exec(code, values)
        return code, values

    yield run
    parts.SWIGLUS[:] = before


@torch.no_grad()
def test_the_lines_of_the_page_are_all_that_a_new_head_takes(lines):
    net = NewNet()
    assert "it lacks net.input_proj" in spec.spec_of(net)
    code, values = lines()
    assert len([line for line in code.splitlines() if line.strip()]) < 50
    generator = torch.Generator().manual_seed(1)
    x, c, t = (torch.randn(9, size, generator=generator) for size in (C, Z, 1))
    head = DiffusionHead.from_network(net, values["steps"])
    assert relative_error(evaluate(head, x, t, c), net(x, t[:, 0], c)) <= 1e-5
    cond, start, noise = random_inputs(head, 9, 2)
    tokens = denoise(head, cond, start, noise).sample
    x = start
    for t in (0.0, 0.25, 0.5, 0.75):
        x = x + 0.25 * net(x, torch.full((9,), t), cond)
    assert relative_error(tokens, x) <= 1e-5
    assert relative_error(tokens, reference.denoise(head, cond, start, noise, 1.0, (), dtype=torch.float64)[0]) <= 1e-5
