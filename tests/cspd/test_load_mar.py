"""load_mar: what a file tells of its model, what is asked for, folders, memory; and conversion."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import small_mar

import cspd
from cspd import checkpoints, cli_convert, mar_sizes
from cspd.checkpoints import convert, load_mar, mar_config
from cspd.models import MAR, mar_base, mar_huge, mar_large
from cspd.weight_files import Weights

SHAPE = dict(img_size=8, vae_stride=1, patch_size=2, vae_embed_dim=4)  # tokens of 16 channels


@pytest.fixture
def model():
    return small_mar(**SHAPE)


@pytest.fixture(autouse=True)
def two_heads(monkeypatch):
    monkeypatch.setattr(mar_sizes, "_HEADS", {32: 2, 48: 2, **mar_sizes._HEADS})


def arguments(**changes):
    values = dict(patch_size=2, vae_stride=8, vae_embed_dim=4, img_size=64, num_sampling_steps="7", lr=1e-4)
    return argparse.Namespace(**{**values, **changes})


def same(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def millions(model) -> str:
    return f"{sum(value.numel() for value in model.state_dict().values()) / 1e6:.3g} M parameters"


def save_training(path, of, **changes) -> None:
    other = {name: value + 1 for name, value in of.state_dict().items()}
    content = {"model": other, "model_ema": of.state_dict(), "optimizer": {}, "epoch": 3, "args": arguments()}
    torch.save({**content, **changes}, path)


# --- patch size and stride ---


def test_what_a_training_checkpoint_tells_is_used(tmp_path, model, caplog):
    save_training(tmp_path / "m.pth", model)
    with caplog.at_level(logging.INFO, logger="cspd"):
        loaded = cspd.load_mar(tmp_path / "m.pth")
    assert same(model, loaded.state_dict())
    assert (loaded.patch_size, loaded.vae_stride, loaded.vae_embed_dim, loaded.img_size) == (2, 8, 4, 64)
    assert loaded.seq_len == 16
    assert loaded.diffloss.gen_diffusion.num_timesteps == 100  # how to sample is the caller's
    assert loaded.loaded == f"a MAR of {millions(model)}, model_ema, 16 tokens, patch size 2"
    assert caplog.messages == [f"loaded {tmp_path / 'm.pth'}: {loaded.loaded}"]
    latents = torch.arange(256.0).reshape(1, 4, 8, 8)
    assert torch.equal(loaded.unpatchify(model.patchify(latents)), latents)


def test_sixteen_channels_alone_are_in_doubt(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(
        ValueError, match=r"got tokens of 16 channels: pass patch_size= .*It is 1 \(16-channel.* or 2 \(4-"
    ):
        load_mar(tmp_path / "m.pth")
    with pytest.raises(ValueError, match="got tokens of 16 channels"):
        load_mar(tmp_path / "m.pth", vae_stride=8)
    loaded = load_mar(tmp_path / "m.pth", patch_size=2, vae_stride=8)
    assert (loaded.img_size, loaded.vae_stride, loaded.vae_embed_dim) == (64, 8, 4)
    assert load_mar(tmp_path / "m.pth", patch_size=2).vae_stride == 1
    with pytest.raises(ValueError, match="expected vae_stride >= 1, got 0"):
        load_mar(tmp_path / "m.pth", patch_size=2, vae_stride=0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (mar_base, "MAR-B, 208 M parameters, model_ema, 256 tokens"),
        (mar_large, "MAR-L, 478 M parameters, model_ema, 256 tokens"),
        (mar_huge, "MAR-H, 942 M parameters, model_ema, 256 tokens"),
    ],
)
def test_only_the_shapes_of_released_models_are_read_without_being_told(make, text):
    with torch.device("meta"):
        model = make()
        state = model.state_dict()
        config = mar_config(state)
        assert (config["patch_size"], config["vae_embed_dim"], config["img_size"]) == (1, 16, 16)
        assert mar_config(state, vae_stride=16)["img_size"] == 256
        with pytest.raises(ValueError, match="got tokens of 16 channels"):
            mar_config(state, vae_stride=8)
        for other in (dict(diffloss_d=3), dict(diffloss_w=512), dict(class_num=10), dict(buffer_size=32),
                      dict(img_size=512), dict(decoder_depth=1)):  # fmt: skip
            with pytest.raises(ValueError, match="got tokens of 16 channels"):
                mar_config(make(**other).state_dict())
    found = checkpoints._Found(Weights(Path("m.pth"), state, "model_ema", {}), config, model, False, False)
    assert found.description() == text


def test_an_assumed_patch_size_is_said(tmp_path, monkeypatch, caplog):
    """With a small model in the place of the released ones."""
    model = small_mar(img_size=16, patch_size=1, vae_embed_dim=16, class_num=1000, buffer_size=64)
    monkeypatch.setattr(mar_sizes, "RELEASED", {(32, 1): ("MAR-B", (2, 32))})
    torch.save({"model_ema": model.state_dict(), "model": model.state_dict()}, tmp_path / "m.pth")
    assumed = load_mar(tmp_path / "m.pth")
    assert assumed.patch_size == 1
    assert assumed.loaded == f"MAR-B, {millions(model)}, model_ema, 256 tokens, patch size 1 assumed"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not tell its patch size: read with 1, like the released MAR-B" in caplog.text
    caplog.clear()
    told = load_mar(tmp_path / "m.pth", patch_size=1)
    assert told.loaded == f"MAR-B, {millions(model)}, model_ema, 256 tokens"
    convert(tmp_path / "m.pth", tmp_path / "told.safetensors", patch_size=1, vae_stride=16)
    assert load_mar(tmp_path / "told.safetensors").loaded == told.loaded
    assert load_mar(tmp_path / "told.safetensors").img_size == 256
    assert not caplog.records
    convert(tmp_path / "m.pth", tmp_path / "assumed.safetensors")  # no fact by being written down
    assert load_mar(tmp_path / "assumed.safetensors").loaded == assumed.loaded
    other = small_mar(img_size=16, patch_size=1, vae_embed_dim=16, class_num=1000, buffer_size=64, diffloss_d=1)
    torch.save(other.state_dict(), tmp_path / "o.pth")
    text = load_mar(tmp_path / "o.pth", patch_size=1).loaded
    assert text == f"MAR-B with a head of 1 x 32, {millions(other)}, state dict, 256 tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(patch_size=1),
            r"tokens have 16 channels, but according to its args vae_embed_dim=4, patch_size=1: pass patch_size",
        ),
        (dict(vae_embed_dim=5), "tokens have 16 channels, but according to its args vae_embed_dim=5, patch_size=2"),
        (
            dict(img_size=256),
            "of img_size=64 with patch_size=2 and vae_stride=8, but according to its args it is 256: pass",
        ),
        (dict(vae_embed_dim=None, patch_size=3), "whose square divides the 16 channels, got 3"),
    ],
)
def test_what_contradicts_the_weights_is_refused(tmp_path, model, changes, message, caplog):
    save_training(tmp_path / "m.pth", model, args=arguments(**changes))
    with pytest.raises(ValueError, match=message):
        load_mar(tmp_path / "m.pth")
    loaded = load_mar(tmp_path / "m.pth", patch_size=2, vae_stride=16)
    assert (loaded.patch_size, loaded.img_size) == (2, 128)
    assert f"using vae_stride=16 as passed, although {tmp_path / 'm.pth'} says 8 in its args" in caplog.text


@pytest.mark.parametrize("args", [None, "text", [1], {"patch_size": 2}, {"vae_embed_dim": 4, "patch_size": True}])
def test_other_args(tmp_path, model, args):
    """A dictionary is as good; what is no number tells nothing; the patch size follows from the VAE's channels."""
    save_training(tmp_path / "m.pth", model, args=args)
    if isinstance(args, dict):
        assert load_mar(tmp_path / "m.pth").patch_size == 2
    else:
        with pytest.raises(ValueError, match="got tokens of 16 channels"):
            load_mar(tmp_path / "m.pth")


# --- files and folders ---


def test_without_averaged_weights(tmp_path, model):
    save_training(tmp_path / "m.pth", model, model_ema=None, model=model.state_dict())
    loaded = load_mar(tmp_path / "m.pth")
    assert same(model, loaded.state_dict())
    assert ", model, 16 tokens" in loaded.loaded


def test_a_file_of_the_format_before_zip_is_read(tmp_path, model):
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    assert same(model, load_mar(tmp_path / "m.pth", patch_size=2).state_dict())


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_the_model_does_not_live_in_its_file(tmp_path, model, kind):
    """Else the file written over, or cut short, would be the end of the process."""
    path = tmp_path / f"m.{kind}"
    save_file(model.state_dict(), path) if kind == "safetensors" else torch.save(model.state_dict(), path)
    loaded = load_mar(path, patch_size=2)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert same(model, loaded.state_dict())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


def test_types(tmp_path, model):
    state = {name: value.half() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    for dtype in (None, torch.float32, torch.bfloat16):
        loaded = load_mar(tmp_path / "m.safetensors", patch_size=2, dtype=dtype).state_dict()
        assert all(torch.equal(value.to(dtype or torch.float32), loaded[name]) for name, value in state.items())
        assert {value.dtype for value in loaded.values()} == {dtype or torch.float32}


def test_a_hub_snapshot(tmp_path, model):
    """Weights under a library's name, with its config.json; links into a store, three folders deep."""
    store = tmp_path / "models--me--mar" / "blobs"
    snapshot = tmp_path / "models--me--mar" / "snapshots" / "abc"
    store.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), store / "1f")
    (snapshot / "model.safetensors").symlink_to(store / "1f")
    (snapshot / "config.json").write_text(json.dumps(dict(patch_size=2, vae_stride=8, encoder_depth=1, name="mar")))
    for path in (snapshot, snapshot / "model.safetensors", tmp_path / "models--me--mar"):
        loaded = load_mar(path)
        assert (loaded.patch_size, loaded.vae_stride) == (2, 8)
        assert same(model, loaded.state_dict())
    (snapshot / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*config.json, beside model.safetensors"):
        load_mar(snapshot)
    (snapshot / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="got tokens of 16 channels"):
        load_mar(snapshot)


def test_a_folder_of_several(tmp_path, model):
    with pytest.raises(
        ValueError, match=r"expected a checkpoint in the folder .*found no file named \*.safetensors, \*.pth"
    ):
        load_mar(tmp_path)
    save_file({"decoder.conv_in.weight": torch.ones(1)}, tmp_path / "kl16.safetensors")
    torch.save({"state": 3}, tmp_path / "optimizer.bin")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text(json.dumps(dict(patch_size=1)))  # of none of them by its name
    with pytest.raises(ValueError, match=r"of a MAR in .*only others: broken.pt, kl16.safetensors, optimizer.bin"):
        load_mar(tmp_path)
    save_file(model.state_dict(), tmp_path / "mar-base.safetensors")
    assert same(model, load_mar(tmp_path, patch_size=2).state_dict())
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "l.pth")
    with pytest.raises(ValueError, match=r"found several: give one of l.pth, mar-base.safetensors"):
        load_mar(tmp_path, patch_size=2)


def test_folders_in_folders(tmp_path, model):
    """As the released code's download script leaves them."""
    for name in ("mar_base", "mar_large"):
        (tmp_path / name).mkdir()
        save_training(tmp_path / name / "checkpoint-last.pth", model)
    assert same(model, load_mar(tmp_path / "mar_base").state_dict())
    with pytest.raises(ValueError, match=r"give one of mar_base/checkpoint-last.pth, mar_large/checkpoint-last.pth"):
        load_mar(tmp_path)


def test_parts_of_a_checkpoint_are_refused(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="expected all weights in one file, got one part"):
        load_mar(tmp_path)


# --- conversion ---


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    cli_convert.add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", *map(str, words)])
    return args.run(args)


@pytest.mark.parametrize("weights", [None, "model_ema", "model"])
def test_convert(tmp_path, model, capsys, weights):
    save_training(tmp_path / "m.pth", model)
    output = tmp_path / "m.safetensors"
    assert run(tmp_path / "m.pth", output, *(("--weights", weights) if weights else ())) == 0
    source = weights or "model_ema"
    text = f"a MAR of {millions(model)}, {source}, 16 tokens, patch size 2"
    assert capsys.readouterr().out == f"wrote {output}: {text}\n"
    with safe_open(output, "pt") as file:
        assert file.metadata() == {
            "format": "pt", "converted_from": "m.pth", "weights": source,
            "patch_size": "2", "vae_embed_dim": "4", "vae_stride": "8", "img_size": "64",
        }  # fmt: skip
    loaded = load_mar(output)
    assert (loaded.loaded, loaded.patch_size, loaded.vae_stride, loaded.img_size) == (text, 2, 8, 64)
    shift = 1 if weights == "model" else 0
    assert all(torch.equal(value + shift, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert sorted(os.listdir(tmp_path)) == ["m.pth", "m.safetensors"]
    before = output.read_bytes()
    assert run(output, output) == 0  # over itself
    assert load_mar(output).loaded == text
    assert len(output.read_bytes()) == pytest.approx(len(before), abs=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_convert_keeps_types_and_layouts_out(tmp_path, model, dtype):
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    state["mask_token"] = state["mask_token"].to(
        torch.bfloat16 if dtype.itemsize > 2 else torch.float64
    )  # of another size
    state["z_proj.weight"] = state["z_proj.weight"].T.contiguous().T
    torch.save(state, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", tmp_path / "m.safetensors", patch_size=2)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state.items())
        assert all(file.get_tensor(name).dtype == value.dtype for name, value in state.items())
        assert "weights" not in file.metadata()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "theirs.safetensors")
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("m.safetensors", "theirs.safetensors"))
    starts = [8 + int.from_bytes(data[:8], "little") for data in (ours, theirs)]
    assert ours[starts[0] :] == theirs[starts[1] :]


def test_what_convert_refuses(tmp_path, model):
    save_training(tmp_path / "m.pth", model, args=None)
    for words, message in [
        ((tmp_path / "m.pth", tmp_path / "m.bin"), "the ending .safetensors, got m.bin"),
        ((tmp_path / "m.pth", tmp_path / "no" / "m.safetensors"), "expected a folder for m.safetensors"),
        ((tmp_path / "m.pth", tmp_path / "o.safetensors"), "--patch-size to cspd generate and cspd convert"),
        (
            (tmp_path / "m.pth", tmp_path / "o.safetensors", "--vae", "--patch-size", 2),
            "expected --vae alone, got --pa",
        ),
        ((tmp_path / "m.pth", tmp_path / "o.safetensors", "--vae"), "expected one VAE in"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            run(*words)
    save_training(tmp_path / "m.pth", model, model_ema=None)
    with pytest.raises(ValueError, match="expected the entry model_ema in"):
        run(tmp_path / "m.pth", tmp_path / "o.safetensors", "--weights", "model_ema")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not say that it has it"):
        run(tmp_path / "m.safetensors", tmp_path / "o.safetensors", "--weights", "model")
    assert sorted(os.listdir(tmp_path)) == ["m.pth", "m.safetensors"]


def test_a_mar_knows_its_sizes():
    with torch.device("meta"):
        model = MAR(img_size=512, encoder_depth=1, decoder_depth=1)
    assert (model.img_size, model.vae_stride, model.seq_len) == (512, 16, 1024)


@pytest.mark.parametrize("device", ["cuda:77", "nonsense"])
def test_a_device_that_is_not_there_is_told_before_anything_is_read(device):
    with pytest.raises(cspd.InvalidInput, match=f"load_mar expected a device that torch has .*, got {device}: "):
        cspd.load_mar("no such file", device=device)
