"""The command ``cspd``."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import small_mar

from cspd.checkpoints import load_mar
from cspd.cli import main


def test_info(capsys):
    assert main(["info"]) == 0
    assert "backends:" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["torch"] == "ok"


def test_generate_digits(tmp_path, capsys):
    pictures = []
    for residual in ("rejection", "closed_form"):
        pictures.append(tmp_path / f"{residual}.png")
        command = ["generate", "--labels", "3", "7", "--num-iter", "8", "--gamma", "4", "--relaxation", "1"]
        assert main([*command, "--residual", residual, "--out", str(pictures[-1])]) == 0
        assert Image.open(pictures[-1]).width > 100
        assert "of the drafted tokens kept" in capsys.readouterr().out
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_the_closed_form_is_not_for_learned_variances(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cspd.checkpoints._HEADS", {32: 2})
    save_file(small_mar(patch_size=1, img_size=4, vae_embed_dim=4).state_dict(), tmp_path / "t.safetensors")
    model = ["--target", str(tmp_path / "t.safetensors"), "--draft", str(tmp_path / "t.safetensors")]
    out = str(tmp_path / "x.safetensors")
    assert main(["generate", *model, "--labels", "1", "--residual", "closed_form", "--out", out]) == 2
    assert "expected heads with a fixed variance" in capsys.readouterr().err
    options = [
        "--labels",
        "1",
        "--residual",
        "closed_form",
        "--num-iter",
        "2",
        "--num-sampling-steps",
        "3",
        "--out",
        out,
    ]
    assert main(["generate", *model, "--target-sigma", *options]) == 0
    assert main(["generate", *model[:2], *options]) == 0  # nothing is redrawn


@pytest.mark.parametrize("with_draft", [False, True])
def test_generate_from_checkpoints(tmp_path, capsys, monkeypatch, with_draft):
    monkeypatch.setattr("cspd.checkpoints._HEADS", {32: 2, 16: 2})
    for name, width in (("target", 32), ("draft", 16)):
        state = small_mar(width=width, patch_size=1, img_size=4, vae_embed_dim=4).state_dict()
        save_file(state, tmp_path / f"{name}.safetensors")
    out = tmp_path / "latents.safetensors"
    command = ["generate", "--target", str(tmp_path / "target.safetensors"), "--labels", "1", "2", "--num-iter", "6"]
    command += ["--num-sampling-steps", "5", "--cfg", "2.0", "--out", str(out), "--seed", "4"]
    if with_draft:
        command += ["--draft", str(tmp_path / "draft.safetensors"), "--gamma", "2", "--relaxation", "10"]
    assert main(command) == 0
    written = load_file(out)
    assert written["latents"].shape == (2, 4, 4, 4)
    assert torch.isfinite(written["latents"]).all()
    assert written["labels"].tolist() == [1, 2]
    assert ("5 draft calls" if with_draft else "0 draft calls") in capsys.readouterr().out
    assert load_mar(tmp_path / "target.safetensors").num_classes == 10


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--labels", "3", "--out", "x.jpg"], "expected --out with the ending .png"),
        (["generate", "--labels", "12", "--out", "x.png"], "expected labels in 0..9, got [12]"),
        (
            ["generate", "--labels", "1", "--draft", "d.pth", "--out", "x.png"],
            "expected --target together with --draft",
        ),
        (["generate", "--labels", "1", "--target", "t.pth", "--out", "x.safetensors"], "found none at t.pth"),
        (["generate", "--labels", "1", "--temperature", "-1", "--out", "x.png"], "temperature >= 0"),
        (["demo", "--out", "no/such/folder/x.png"], "expected a folder for x.png"),
        (["demo", "--out", "x.jpg"], "expected --out with the ending .png"),
        (["demo", "--num-images", "1"], "expected --num-images >= 2"),
        (["generate", "--labels", "1", "--out", "no/such/x.png"], "expected a folder for x.png"),
        (["generate", "--labels", "1", "--out", "x.png", "--device", "cuda:77"], "expected --device"),
        (["generate", "--labels", "1", "--out", "x.png", "--num-sampling-steps", "9"], "expected --target together"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["demo", "--gamma", "0"], ["demo", "--num-images", "x"], ["fly"]])
def test_usage_errors(command):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["junk.pth", "junk.safetensors", "other.safetensors"])
def test_unreadable_checkpoints_are_one_line(tmp_path, capsys, name):
    path = tmp_path / name
    if name.startswith("junk"):
        path.write_bytes(b"this is no checkpoint" * 10)
    else:
        state = small_mar(width=768, patch_size=1, img_size=4, vae_embed_dim=4).state_dict()
        state.pop("diffloss.net.cond_embed.weight")
        save_file(state, path)
    command = ["generate", "--target", str(path), "--labels", "1", "--out", str(tmp_path / "x.safetensors")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1
