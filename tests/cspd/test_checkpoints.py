"""Checkpoints: safe to load, the model's size read from the weights."""

from __future__ import annotations

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file
from small_models import small_mar

from cspd.checkpoints import load_mar, load_state_dict, mar_config
from cspd.models import mar_large

SHAPE = dict(patch_size=1, img_size=4, vae_embed_dim=4)


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.fixture
def model():
    return small_mar(**SHAPE)


@pytest.mark.parametrize("kind", ["safetensors", "plain", "training"])
def test_round_trip(tmp_path, model, kind):
    state = model.state_dict()
    if kind == "safetensors":
        path = tmp_path / "m.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "m.pth"
        other = {k: v + 1 for k, v in state.items()}
        training = {"model": other, "model_ema": state, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
        torch.save(training if kind == "training" else state, path)
    allowed = set(torch.serialization.get_safe_globals())
    loaded = load_mar(path, num_heads=2, num_sampling_steps=7)
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert not loaded.training
    assert loaded.diffloss.gen_diffusion.num_timesteps == 7
    assert loaded.seq_len == 16
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())


def test_pickled_code_is_refused(tmp_path):
    torch.save({"model_ema": Evil()}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"expected a checkpoint of plain tensors.*[Ww]eights.only"):
        load_state_dict(tmp_path / "m.pth")


def test_size_of_a_released_model_is_recognised():
    with torch.device("meta"):
        model = mar_large()
    config = mar_config(model.state_dict())
    assert config["encoder_num_heads"] == 16
    assert (config["diffloss_d"], config["diffloss_w"], config["encoder_depth"]) == (8, 1280, 16)
    assert (config["img_size"], config["vae_embed_dim"], config["buffer_size"], config["mlp_ratio"]) == (
        16,
        16,
        64,
        4.0,
    )


def test_clear_errors(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file, found none at"):
        load_mar(tmp_path / "none.pth")
    torch.save({"step": 3}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_mar(tmp_path / "m.pth")
    with pytest.raises(ValueError, match="width 32 is unknown: give num_heads"):
        mar_config(model.state_dict())
    with pytest.raises(ValueError, match=r"got one without 'class_emb.weight'"):
        mar_config({"weight": torch.ones(1)})
