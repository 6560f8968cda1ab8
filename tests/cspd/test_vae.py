"""MAR's VAE: released names to diffusers', and pictures. A decoder of the same names, written out here, judges."""

from __future__ import annotations

import argparse
import logging
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import small_mar

import cspd
from cspd import cli_convert, vae
from cspd.vae import SCALE, decoder_config, to_diffusers, to_uint8, vae_weights

WIDTHS, CHANNELS, BLOCKS = (32, 64, 96), 5, 2  # by level, pictures first


def released(seed: int = 0, attend: int | None = None) -> dict[str, torch.Tensor]:
    """Random weights of a small decoder under the released names; ``attend``: the level that has attention too."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def conv(name, into, out, size):
        state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=generator) / (into**0.5 * size)
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", into, out, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", into, out, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    conv("post_quant_conv", CHANNELS, CHANNELS, 1)
    width = WIDTHS[-1]
    conv("decoder.conv_in", CHANNELS, width, 3)
    block("decoder.mid.block_1", width, width)
    attention("decoder.mid.attn_1", width)
    block("decoder.mid.block_2", width, width)
    for level in reversed(range(len(WIDTHS))):
        for index in range(BLOCKS + 1):
            block(f"decoder.up.{level}.block.{index}", width, WIDTHS[level])
            width = WIDTHS[level]
            if level == attend:
                attention(f"decoder.up.{level}.attn.{index}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    return state


def decoded(state: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """What those weights decode to, layer by layer."""

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def block(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, places)
        weights = torch.softmax(q.mT @ k / q.shape[1] ** 0.5, dim=-1)  # (B, of, at)
        return x + conv(f"{name}.proj_out", (v @ weights.mT).reshape(x.shape))

    h = conv("decoder.conv_in", conv("post_quant_conv", latents / SCALE))
    h = block("decoder.mid.block_1", h)
    h = attention("decoder.mid.attn_1", h)
    h = block("decoder.mid.block_2", h)
    for level in reversed(range(len(WIDTHS))):
        for index in range(BLOCKS + 1):
            h = block(f"decoder.up.{level}.block.{index}", h)
            if f"decoder.up.{level}.attn.{index}.q.weight" in state:
                h = attention(f"decoder.up.{level}.attn.{index}", h)
        if level:
            h = conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return conv("decoder.conv_out", F.silu(norm("decoder.norm_out", h)))


def with_the_rest(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As training leaves it: an encoder, and a discriminator that has counters, too."""
    return {
        "encoder.conv_in.weight": torch.ones(2, 3, 3, 3),
        "quant_conv.weight": torch.ones(2, 2, 1, 1),
        **state,
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
    }


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": with_the_rest(released())}, path)
    return path


LATENTS = torch.randn(3, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(9)) * SCALE

# --- names and files: without diffusers ---


def test_names():
    """Levels from the other end, the middle, and attention's matrices, which are no convolutions."""
    state = released(attend=2)
    renamed = to_diffusers(state)
    for old, new in {
        "post_quant_conv.weight": "post_quant_conv.weight",
        "decoder.conv_in.bias": "decoder.conv_in.bias",
        "decoder.conv_out.bias": "decoder.conv_out.bias",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "decoder.mid.block_1.norm1.weight": "decoder.mid_block.resnets.0.norm1.weight",
        "decoder.mid.block_2.conv2.bias": "decoder.mid_block.resnets.1.conv2.bias",
        "decoder.mid.attn_1.norm.weight": "decoder.mid_block.attentions.0.group_norm.weight",
        "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.up.0.block.2.conv1.weight": "decoder.up_blocks.2.resnets.2.conv1.weight",
        "decoder.up.0.block.0.nin_shortcut.weight": "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
        "decoder.up.2.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "decoder.up.2.attn.1.k.bias": "decoder.up_blocks.0.attentions.1.to_k.bias",
    }.items():
        assert renamed[new] is state[old]
    query = renamed["decoder.mid_block.attentions.0.to_q.weight"]
    assert query.shape == (96, 96)
    assert torch.equal(query, state["decoder.mid.attn_1.q.weight"][:, :, 0, 0])
    assert len(renamed) == len(state)


def test_sizes():
    config = decoder_config(released(attend=1))
    assert config["block_out_channels"] == WIDTHS
    assert (config["latent_channels"], config["layers_per_block"], config["out_channels"]) == (CHANNELS, BLOCKS, 3)
    assert config["up_block_types"] == ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    for change, message in [
        ({"post_quant_conv.weight": None}, "without a convolution post_quant_conv.weight"),
        ({"decoder.up.1.block.0.conv1.weight": None}, r"without a convolution decoder.up.1.block.0.conv1.weight"),
        ({"post_quant_conv.weight": torch.ones(4, 4, 1, 1)}, "as the decoder takes, got 4 and 5"),
        ({"decoder.up.0.block.0.conv1.weight": torch.ones(24, 64, 3, 3)}, r"multiples of 32, got \[24, 64, 96\]"),
    ]:
        state = {name: value for name, value in {**released(), **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            decoder_config(state)


@pytest.mark.parametrize("prefix", ["", "module.", "first_stage_model."])
def test_what_belongs_to_the_decoder_is_found(tmp_path, prefix):
    state = released()
    content = {prefix + name: value for name, value in with_the_rest(state).items()}
    torch.save({"state_dict": {**content, "betas": torch.ones(2, dtype=torch.int64)}}, tmp_path / "v.ckpt")
    found = vae_weights(tmp_path / "v.ckpt").tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_what_is_no_such_vae(tmp_path):
    path = tmp_path / "v.pth"
    for content, message in [
        (small_mar().state_dict(), "expected one VAE in .*decoder.conv_in.weight, found 0"),
        ({"model": torch.ones(1)}, "found 0"),
        ({**released(), **{f"ema.{name}": value for name, value in released().items()}}, "found 2"),
        (to_diffusers(released()), "got the names of diffusers"),
        ({name: value.to(torch.int8) for name, value in released().items()}, "of torch.int8: quantised"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            vae_weights(path)


def test_without_diffusers(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match=r'pictures need diffusers, .* pip install "cspd-kernels\[vae\]"') as error:
        cspd.load_vae(checkpoint)
    assert "\n" not in str(error.value)


def test_convert(tmp_path, checkpoint, capsys):
    parser = argparse.ArgumentParser()
    cli_convert.add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", str(checkpoint), str(tmp_path / "kl16.safetensors"), "--vae"])
    assert args.run(args) == 0
    assert capsys.readouterr().out.endswith(
        "kl16.safetensors: a VAE, decoder of 1.31 M parameters, 5 channels, stride 4\n"
    )
    kept = {name: value for name, value in with_the_rest(released()).items() if not name.startswith("loss")}
    written = load_file(tmp_path / "kl16.safetensors")
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], kept[name]) for name in kept)
    assert vae_weights(tmp_path / "kl16.safetensors").tensors.keys() == released().keys()


def test_bytes_are_rounded_as_the_released_script_does():
    """Its expression, in NumPy."""
    values = torch.cat([torch.linspace(-1.2, 1.2, 3 * 1021), (torch.arange(510) + 0.5) / 127.5 - 1, torch.zeros(3)])
    images = values.reshape(1, 3, -1, 1)
    expected = np.round(np.clip(((images + 1) / 2)[0].numpy().transpose([1, 2, 0]) * 255, 0, 255)).astype(np.uint8)
    got = to_uint8(images)
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    assert np.array_equal(got[0].numpy(), expected)
    assert to_uint8(torch.zeros(0, 3, 2, 2)).shape == (0, 2, 2, 3)
    for wrong, message in [
        (torch.zeros(3, 2, 2), "expected images"),
        (torch.zeros(1, 1, 2, 2), "expected images"),
        (torch.full((1, 3, 2, 2), float("nan")), "expected finite images"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_uint8(wrong)


# --- pictures ---


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("attend", [None, 0, 2])
def test_pictures(tmp_path, diffusers, attend):
    state = released(attend=attend)
    save_file(state, tmp_path / "v.safetensors")
    loaded = cspd.load_vae(tmp_path / "v.safetensors")
    images = loaded.decode(LATENTS)
    expected = decoded({name: value.double() for name, value in state.items()}, LATENTS.double())
    assert images.shape == (3, 3, 16, 24)
    assert (images - expected).abs().max() / expected.abs().max() < 1e-5
    for name in [name for name in state if ".attn" in name and name.endswith("q.weight")]:  # attention matters
        other = decoded({**state, name: state[name.replace("q.w", "k.w")]}, LATENTS)
        assert (images - other).abs().max() / expected.abs().max() > 1e-3


def test_chunks_types_and_surroundings(checkpoint, diffusers, caplog):
    with caplog.at_level(logging.INFO, logger="cspd"):
        loaded = cspd.load_vae(checkpoint)
    text = "a VAE, decoder of 1.31 M parameters, 5 channels, stride 4"
    assert loaded.loaded == text
    assert caplog.messages == [f"loaded {checkpoint}: {text}"]
    assert (loaded.channels, loaded.stride, loaded.dtype) == (CHANNELS, 4, torch.float32)
    assert not any(parameter.requires_grad for parameter in loaded.autoencoder.parameters())
    images = loaded.decode(LATENTS)
    for chunk in (1, 2, 3, 100):
        torch.testing.assert_close(loaded.decode(LATENTS, chunk=chunk), images, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded.decode(LATENTS), images)
    assert loaded.decode(LATENTS[:0]).shape == (0, 3, 16, 24)
    strided = LATENTS.repeat_interleave(2, 3)[..., ::2]
    assert torch.equal(loaded.decode(strided), images)
    half = cspd.load_vae(checkpoint, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.decode(LATENTS).dtype == torch.float32
    assert 1e-4 < (half.decode(LATENTS) - images).abs().max() / images.abs().max() < 0.1
    for wrong in (LATENTS[:, 1:], LATENTS[0]):
        with pytest.raises(ValueError, match=r"expected latents \(B, 5, h, w\)"):
            loaded.decode(wrong)
    with pytest.raises(ValueError, match="expected chunk >= 1, got 0"):
        loaded.decode(LATENTS, chunk=0)
    with pytest.raises(ValueError, match=r"load_vae expected dtype as float32, bfloat16 \(.*\), got torch.float16"):
        cspd.load_vae(checkpoint, dtype=torch.float16)


def test_larger_pictures_come_in_smaller_chunks(checkpoint, diffusers, monkeypatch):
    loaded, sizes = cspd.load_vae(checkpoint), []

    def decode(latents, return_dict):
        sizes.append(len(latents))
        return (latents.new_zeros(len(latents), 3, *(4 * side for side in latents.shape[2:])),)

    monkeypatch.setattr(loaded.autoencoder, "decode", decode)
    for side, chunk, expected in [(64, 2, [2, 2, 1]), (128, 8, [2, 2, 1]), (128, 2, [1] * 5), (32, 2, [2, 2, 1])]:
        assert loaded.decode(torch.zeros(5, CHANNELS, side, side), chunk).shape == (5, 3, 4 * side, 4 * side)
        assert sizes == expected
        sizes.clear()


def test_the_vae_does_not_live_in_its_file(checkpoint, diffusers):
    loaded = cspd.load_vae(checkpoint)
    images = loaded.decode(LATENTS)
    with checkpoint.open("r+b") as file:
        file.write(b"\0" * checkpoint.stat().st_size)
    assert torch.equal(loaded.decode(LATENTS), images)


def test_which_models_fit(checkpoint, diffusers):
    loaded = cspd.load_vae(checkpoint)
    loaded.check(small_mar(vae_embed_dim=5))
    loaded.check(small_mar(vae_embed_dim=5, vae_stride=4, img_size=32))
    loaded.check(torch.nn.Linear(1, 1))  # of another code base: its latents will tell
    with pytest.raises(
        ValueError, match=r"a VAE of 4 channels, .*\(its patch size is 2\), got one of 5: a VAE, decoder"
    ):
        loaded.check(small_mar(vae_embed_dim=4))
    with pytest.raises(ValueError, match="expected a VAE of stride 8, as in the model, got one of 4"):
        loaded.check(small_mar(vae_embed_dim=5, vae_stride=8, img_size=64))


def test_folders_and_unfitting_weights(tmp_path, checkpoint, diffusers):
    save_file(small_mar().state_dict(), tmp_path / "mar-base.safetensors")
    assert cspd.load_vae(tmp_path).channels == CHANNELS
    state = released()
    for change, message in [
        (
            {"decoder.mid.attn_1.q.weight": None},
            "cannot load .* as a VAE: .*got one without decoder.mid_block.attentions",
        ),
        ({"decoder.up.0.extra.weight": torch.ones(1)}, "with an unknown decoder.up_blocks.2.extra.weight"),
        ({"decoder.norm_out.weight": torch.ones(64)}, r"expected decoder.conv_norm_out.weight of shape \(32,\)"),
    ]:
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, checkpoint)
        with pytest.raises(ValueError, match=message):
            cspd.load_vae(checkpoint)


def test_the_marker_is_the_released_name():
    assert vae._MARKER in released()


def test_a_vae_in_the_place_of_a_mar_is_named(tmp_path):
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": with_the_rest(released())}, path)
    with pytest.raises(ValueError, match=r"expected the state dict of a MAR model in .*kl16\.ckpt, got a VAE$"):
        cspd.load_mar(path)
