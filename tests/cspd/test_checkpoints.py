"""Checkpoints: safe to load, the model's size read from the weights."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import small_mar

from cspd.checkpoints import load_mar, load_state_dict, mar_config
from cspd.models import mar_large
from cspd.unpickling import plain_values_allowed

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
    loaded = load_mar(path, num_heads=2, patch_size=1, num_sampling_steps=7)
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
    for content in ({"step": 3}, {}, [1], {1: torch.ones(1)}, {"model": {}}):
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(ValueError, match="expected a state dict"):
            load_mar(tmp_path / "m.pth")
    with pytest.raises(ValueError, match="width 32 is unknown: pass num_heads"):
        mar_config(model.state_dict(), patch_size=1)
    with pytest.raises(ValueError, match=r"got one without 'class_emb.weight'"):
        mar_config({"weight": torch.ones(1)})
    short = {**model.state_dict(), "diffusion_pos_embed_learned": torch.ones(1, 15, 32)}
    with pytest.raises(ValueError, match="a square number of tokens, got 15"):
        mar_config(short, 2, 1)


def refusal(path, **options) -> str:
    """What load_mar says of the file: one plain line."""
    with pytest.raises(ValueError, match=path.name) as error:
        load_mar(path, **{"num_heads": 2, "patch_size": 1, **options})
    text = str(error.value)
    assert "\n" not in text
    assert "\x1b" not in text
    return text


# --- what stands beside the weights ---


NUMBERS = {
    "loss": np.float64(3.2), "step": np.int32(7), "best": np.bool_(True), "half": np.float16(1), "z": np.complex64(1j),
    "curve": np.arange(3.0), "table": np.asfortranarray(np.ones((2, 3), np.uint8)), "type": np.dtype("f4"),
}  # fmt: skip


def save_as(path, content, numpy_core: str) -> None:
    """As torch.save does where NumPy's core has this name: numpy.core in version 1, numpy._core from 2 on."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"multiarray" in data
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        data = data.replace(name, f"{numpy_core}.multiarray".encode())
    path.write_bytes(data)


@pytest.mark.parametrize("numpy_core", ["numpy.core", "numpy._core"])
def test_numbers_of_either_numpy_are_let_through(tmp_path, model, numpy_core):
    path = tmp_path / "m.pth"
    save_as(path, {"model": model.state_dict(), **NUMBERS}, numpy_core)
    state = load_state_dict(path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with plain_values_allowed():
        loaded = torch.load(path, weights_only=True)
    for name, value in NUMBERS.items():
        assert type(loaded[name]) is type(value)
        assert np.array_equal(loaded[name], value)


@pytest.mark.parametrize(
    "value",
    [np.array(["a"]), np.array([{}], dtype=object), np.zeros(1, "i4,f8"), np.str_("a"), np.random.RandomState(0)],
    ids=["text", "objects", "records", "string", "generator"],
)
def test_other_values_of_numpy_are_refused(tmp_path, model, value):
    torch.save({"model": model.state_dict(), "value": value}, tmp_path / "m.pth")
    assert "it holds a NumPy value that is no number, numpy." in refusal(tmp_path / "m.pth")


def test_weights_that_are_arrays_are_refused(tmp_path, model):
    torch.save({name: value.numpy() for name, value in model.state_dict().items()}, tmp_path / "m.pth")
    assert "got 'fake_latent' with a value of type ndarray" in refusal(tmp_path / "m.pth")


def test_what_is_refused_is_named(tmp_path, model):
    torch.save(model, tmp_path / "m.pth")
    assert "it holds cspd.models.mar.MAR, which weights_only loading refuses" in refusal(tmp_path / "m.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"no checkpoint at all", b"", pickle.dumps([torch.ones(1)], protocol=4), None])
def test_files_that_torch_save_did_not_write(tmp_path, model, content):
    torch.save(model.state_dict(), tmp_path / "m.pth")
    (tmp_path / "m.pth").write_bytes((tmp_path / "m.pth").read_bytes()[:5000] if content is None else content)
    text = refusal(tmp_path / "m.pth")
    assert re.search(r"it was not written by torch\.save, or is damaged( \([^)]*[a-z]{3,}[^)]*\))?$", text)
    assert "miniz" not in text
    assert "Re-running" not in text


@pytest.mark.parametrize("before", [[], [argparse.Namespace], [argparse.Namespace, np.dtype, Evil]])
@pytest.mark.parametrize("own", [False, True])
def test_what_may_be_unpickled_is_afterwards_what_it_was(tmp_path, model, monkeypatch, before, own):
    """Also where PyTorch has no safe_globals, as 2.4 has none."""
    if own:
        monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(), "n": np.int8(1)}, tmp_path / "m.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    at_first = list(torch.serialization.get_safe_globals())
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
        load_state_dict(tmp_path / "m.pth")
        refusal(tmp_path / "junk.pth")
        with plain_values_allowed():
            torch.serialization.add_safe_globals([threading.Thread])  # by another thread, say
        after = torch.serialization.get_safe_globals()
        assert sorted(map(repr, after)) == sorted(map(repr, [*before, threading.Thread]))
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(at_first)


def test_threads_that_load_together_leave_nothing_behind(tmp_path, model):
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(), "n": np.int8(1)}, tmp_path / "m.pth")
    before, errors = set(torch.serialization.get_safe_globals()), []

    def load():
        try:
            for _ in range(5):
                load_state_dict(tmp_path / "m.pth")
        except ValueError as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(torch.serialization.get_safe_globals()) == before


# --- names ---


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_prefix_of_all_names_is_dropped(tmp_path, model, caplog, prefix, kind):
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / f"m.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save({"model": state}, path)
    with caplog.at_level(logging.INFO, logger="cspd"):
        loaded = load_mar(path, num_heads=2, patch_size=1).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert caplog.messages[0] == f"dropped the prefix {prefix} of all names in {path}"
    assert f"its names had the prefix {prefix!r}, which was dropped" in refusal(path, patch_size=None)


def test_no_prefix_is_no_message(tmp_path, model, caplog):
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with caplog.at_level(logging.INFO, logger="cspd"):
        load_mar(tmp_path / "m.pth", num_heads=2, patch_size=1)
    assert not any(message.startswith("dropped") for message in caplog.messages)


def test_a_prefix_of_some_names_is_refused(tmp_path, model):
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({**state, "loss.weight": torch.ones(1)}, tmp_path / "m.pth")
    assert "with the prefix 'module.', or none, got loss.weight too" in refusal(tmp_path / "m.pth")


def test_an_unknown_prefix_is_named(tmp_path, model):
    torch.save({f"net.{name}": value for name, value in model.state_dict().items()}, tmp_path / "m.pth")
    assert "begin with the prefix 'net.'" in refusal(tmp_path / "m.pth")


def test_weights_of_another_model_are_named(tmp_path, model):
    state = model.state_dict()
    for change, said in [
        ({"mask_token": None}, "got one without mask_token"),
        ({"mask_token": None, "decoder_norm.bias": None}, "got one without decoder_norm.bias and 1 more"),
        ({"extra": torch.ones(1)}, "got one with an unknown extra"),
        ({"mask_token": torch.ones(1)}, "expected mask_token of shape (1, 1, 32), got (1,)"),
    ]:
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path / "m.pth")
        assert said in refusal(tmp_path / "m.pth")


# --- forms of weights ---


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64],
)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_that_are_not_plain_floats_are_refused(tmp_path, model, dtype, kind):
    state, path = model.state_dict(), tmp_path / f"m.{kind}"
    name = "encoder_blocks.0.attn.qkv.weight"
    state[name] = state[name].to(dtype)
    if kind == "safetensors" and dtype == torch.complex64:
        pytest.skip("not every safetensors knows complex numbers")
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    assert f"got {name} of {dtype}: quantised" in refusal(path)


def test_sparse_weights_are_refused(tmp_path, model):
    state = model.state_dict()
    state["class_emb.weight"] = state["class_emb.weight"].to_sparse()
    torch.save(state, tmp_path / "m.pth")
    assert "got class_emb.weight of torch.sparse_coo" in refusal(tmp_path / "m.pth")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_loaded(tmp_path, model, dtype):
    torch.save({name: value.to(dtype) for name, value in model.state_dict().items()}, tmp_path / "m.pth")
    loaded = load_mar(tmp_path / "m.pth", num_heads=2, patch_size=1).state_dict()
    assert all(torch.equal(value.to(dtype).float(), loaded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["tensor", "model", "flat", "flat of an older FSDP", "all flat"])
def test_flattened_weights_are_refused(tmp_path, model, kind):
    flat = torch.ones(100)
    torch.save(
        {
            "tensor": flat,
            "model": {"model": flat, "epoch": 1},
            "flat": {"_fsdp_wrapped_module._flat_param": flat},
            "flat of an older FSDP": {"flat_param_0": flat},
            "all flat": {name: value.flatten() for name, value in model.state_dict().items()},
        }[kind],
        tmp_path / "m.pth",
    )
    assert "save a full state dict" in refusal(tmp_path / "m.pth")


# --- patch size ---


def test_the_patch_size_is_asked_for_where_it_is_in_doubt(tmp_path):
    model = small_mar(patch_size=2, img_size=8, vae_embed_dim=1)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    text = refusal(tmp_path / "m.pth", patch_size=None)
    assert "patch_size= to load_mar, or --patch-size to cspd generate" in text
    assert "It is 1 (4-channel latents) or 2 (1-channel latents)" in text
    loaded = load_mar(tmp_path / "m.pth", num_heads=2, patch_size=2)
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(loaded.patchify(image), model.patchify(image))
    assert torch.equal(loaded.unpatchify(model.patchify(image)), image)
    for wrong in (0, 3, 4):
        assert f"divides the 4 channels, got {wrong}" in refusal(tmp_path / "m.pth", patch_size=wrong)


@pytest.mark.parametrize(
    ("channels", "certain"), [(16, False), (5, True), (6, True), (1, True), (32, False), (9, False)]
)
def test_where_the_patch_size_is_known(channels, certain):
    state = small_mar(patch_size=1, img_size=4, vae_embed_dim=channels).state_dict()
    if certain:
        assert mar_config(state, 2)["patch_size"] == 1
        assert mar_config(state, 2)["vae_embed_dim"] == channels
    else:
        with pytest.raises(ValueError, match=f"got tokens of {channels} channels"):
            mar_config(state, 2)
