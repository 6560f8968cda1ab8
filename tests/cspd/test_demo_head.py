"""The demo's head of 100 steps: its file, its conditions, and its tokens by sweeps."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from cspd.demo import train_head
from cspd.demo.head import FILE, KNOWN, digits, held_out, load_head
from cspd.demo.pair import DATA, load_pair
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.testing import relative_error

IMAGES = 8


@pytest.fixture(scope="module")
def shipped():
    return load_head(images=IMAGES)


def test_loads_without_real_digits_the_same_every_time(monkeypatch, shipped):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    torch.manual_seed(5)
    np.random.seed(5)
    head, cond = load_head(images=IMAGES)
    assert torch.equal(cond, shipped[1])
    assert not head.training
    assert head.gen_diffusion.num_timesteps == 100
    assert cond.shape == (len(KNOWN) * IMAGES, 96)
    assert cond.dtype == torch.float32
    assert torch.isfinite(cond).all()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in head.parameters())
    packed = DiffusionHead.from_module(head)
    assert (packed.channels, packed.learned_variance, packed.num_steps) == (4, True, 100)
    assert (DATA / FILE).stat().st_size < 2e6


def test_positions_do_not_depend_on_the_model(shipped):
    target, draft = load_pair()
    tokens, labels = digits(target, IMAGES)
    assert torch.equal(held_out(target, tokens, labels), shipped[1])
    assert held_out(draft, tokens, labels).shape == (len(KNOWN) * IMAGES, 72)
    assert labels.tolist() == list(range(IMAGES))


def test_it_has_learned_the_digits(shipped):
    """Tokens drawn are pixels in [-1, 1], and those of different classes differ."""
    head = DiffusionHead.from_module(shipped[0])
    noise = torch.randn(100, len(shipped[1]), 4, generator=torch.Generator().manual_seed(0))
    tokens = denoise(head, shipped[1], noise[-1], noise, parallel_tol=None).sample
    assert tokens.abs().max() < 1.6
    assert (tokens.clamp(-1, 1) - tokens).abs().mean() < 0.05


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_its_tokens_by_sweeps_are_those_of_the_steps(shipped, scale):
    head, cond = DiffusionHead.from_module(shipped[0]), shipped[1]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(cond), 4, generator=generator)
    noise = torch.randn(100, len(cond), 4, generator=generator)
    cond = cond if scale == 1.0 else torch.cat([cond, cond.roll(1, 0)])
    steps = denoise(head, cond, x, noise, cfg_scale=scale, parallel_tol=None)
    sweeps = denoise(head, cond, x, noise, cfg_scale=scale, parallel_tol=1e-6)
    assert relative_error(sweeps.sample, steps.sample) < 5e-6
    assert int(sweeps.sweeps.max()) < 25


def test_no_file_and_another_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"head100\.safetensors do not exist.*cspd\.demo\.train_head"):
        load_head(tmp_path)
    (tmp_path / FILE).write_bytes((DATA / "draft.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not hold the weights of the demo's head"):
        load_head(tmp_path)


def test_training_writes_a_head_that_loads(tmp_path):
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    try:
        train_head.main(["--out", str(tmp_path), "--steps", "2"])
    finally:
        torch.set_num_threads(threads)
    for name in ("target", "draft"):
        (tmp_path / f"{name}.safetensors").write_bytes((DATA / f"{name}.safetensors").read_bytes())
    assert load_head(tmp_path, images=1)[1].shape == (len(KNOWN), 96)
