"""Fixtures of the tests of the model-side package."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from runs import Runner, Vae
from safetensors.torch import save_file
from small_models import small_mar


@pytest.fixture
def quick(monkeypatch):
    """The digits at once."""
    monkeypatch.setattr("cspd.generate.models.SpecDecodeRunner", Runner)
    monkeypatch.setattr(Runner, "runs", [])
    return Runner


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """A small MAR of 4-channel latents, 4 x 4 of them, and a VAE of stride 2 that fits it."""
    monkeypatch.setattr("cspd.mar_sizes._HEADS", {32: 2, 16: 2})
    for name, width in (("target", 32), ("draft", 16)):
        save_file(
            small_mar(width=width, patch_size=1, img_size=4, vae_embed_dim=4).state_dict(),
            tmp_path / f"{name}.safetensors",
        )
    (tmp_path / "vae.safetensors").write_bytes(b"a VAE")
    fake = types.ModuleType("cspd.vae")
    fake.load_vae = lambda path, *, device, dtype: Vae()
    fake.to_uint8 = lambda images: ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    monkeypatch.setitem(sys.modules, "cspd.vae", fake)
    return ["--target", str(tmp_path / "target.safetensors"), "--patch-size", "1"]
