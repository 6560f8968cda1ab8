"""`cspd generate` in one process: what it writes, what it makes again, and what it refuses before any work."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import types
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import small_mar

from cspd.cli import INTERRUPTED, main
from cspd.generate import images, models
from cspd.generate.models import Models
from cspd.generate.npz import write_npz

GOES_ON = "what was written stays, the same command makes the rest"


class Runner:
    """Stands in for the runner: an image is a function of the seed and its number; notes what it is asked."""

    runs: list[tuple[int, int, list[int]]] = []

    def __init__(self, draft, target, *rule, **options):
        self.size = (target.vae_embed_dim, target.seq_h * target.patch_size, target.seq_w * target.patch_size)

    def run(self, count, steps, gamma, schedule, labels, temperature, cfg, *, seed, first_image):
        Runner.runs.append((count, first_image, labels.tolist()))
        return torch.stack([self.image(seed, first_image + i) for i in range(count)])

    def image(self, seed, number):
        return torch.rand(self.size, generator=torch.Generator().manual_seed(1000 * seed + number)) * 2 - 1

    @property
    def stats(self):
        kept = dict(acceptance=0.5, raw_acceptance=0.25, fallback=0.0, drafted=12, prefilled=4)
        return SimpleNamespace(to_dict=lambda: kept | dict(target_calls=3, draft_calls=2, seconds={"total": 1.0}))


@pytest.fixture
def quick(monkeypatch):
    """The digits at once."""
    monkeypatch.setattr(models, "SpecDecodeRunner", Runner)
    monkeypatch.setattr(Runner, "runs", [])
    return Runner


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A small MAR of 4-channel latents, 4 x 4 of them, and a VAE of stride 2 that fits it."""
    monkeypatch.setattr("cspd.checkpoints._HEADS", {32: 2, 16: 2})
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


class Vae:
    """Three of four channels, enlarged."""

    channels, stride, loaded = 4, 2, "a VAE for tests"

    def decode(self, latents):
        return latents[:, :3].tanh().repeat_interleave(2, 2).repeat_interleave(2, 3)

    def check(self, model):
        if model.vae_embed_dim != self.channels:
            raise ValueError(f"expected a VAE of {model.vae_embed_dim} channels, got one of {self.channels}")


def contents(folder, kind="png"):
    """The images' bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"0*.{kind}"))}


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def one_line(capsys):
    """The one line on stderr, after the command's name."""
    error = capsys.readouterr().err
    assert error.startswith("cspd generate: ")
    assert error.count("\n") == 1
    return error.removeprefix("cspd generate: ").rstrip("\n")


# --- what is written ---


def test_the_digits(tmp_path, capsys):
    out = tmp_path / "a folder" / "out"
    command = [
        "generate",
        "--labels",
        "3,7",
        "1",
        "--steps",
        "4",
        "--gamma",
        "2",
        "--relaxation",
        "1",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    assert f"{out}: 3 images, 3 made now, 3 target and 3 draft calls, " in capsys.readouterr().out
    assert list(contents(out)) == ["000000.png", "000001.png", "000002.png"]
    with Image.open(out / "000000.png") as image:
        assert (image.size, image.mode) == ((8, 8), "RGB")
    run = run_of(out)
    assert run["settings"]["labels"] == [3, 7, 1]
    assert run["settings"]["steps"] == 4
    assert (run["settings"]["batch_size"], run["settings"]["dtype"]) == (3, "float32")
    assert run["image_size"] == [8, 8]
    assert set(run["starts"][0]["versions"]) >= {"cspd", "python", "torch", "numpy"}
    assert {"look", "load"} <= set(run["starts"][0]["seconds"])
    assert {"draft", "target", "verify", "total", "decode", "write"} <= set(run["seconds"])
    other = [*command[:-1], str(tmp_path / "closed"), "--residual", "closed_form"]
    assert main(other) == 0
    assert contents(tmp_path / "closed") != contents(out)


def test_balanced_classes_in_whole_batches(tmp_path, quick):
    assert main(["generate", "--num-images", "25", "--batch-size", "10", "--out", str(tmp_path)]) == 0
    assert len(contents(tmp_path)) == 25
    assert quick.runs == [(10, first, list(range(10))) for first in (0, 10, 20)]
    assert run_of(tmp_path)["settings"]["classes"] == 10
    quick.runs.clear()
    command = ["generate", "--num-images", "5", "--classes", "3", "--batch-size", "4", "--out", str(tmp_path / "few")]
    assert main(command) == 0
    assert [labels for _, _, labels in quick.runs] == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_latents_from_checkpoints(tmp_path, checkpoint, capsys):
    command = ["generate", *checkpoint, "--labels", "1,2,5", "--steps", "6", "--num-sampling-steps", "5", "--cfg", "2"]
    drafted = ["--draft", str(tmp_path / "draft.safetensors"), "--gamma", "2", "--relaxation", "10"]
    for name, extra, calls in (("alone", [], "0 draft calls"), ("drafted", drafted, "10 draft calls, ")):
        out = tmp_path / name
        assert main([*command, *extra, "--batch-size", "2", "--latents", "--out", str(out)]) == 0
        assert calls in capsys.readouterr().out
        written = [load_file(out / f"00000{i}.safetensors") for i in range(3)]
        assert [int(tensors["label"]) for tensors in written] == [1, 2, 5]
        for tensors in written:
            assert tensors["latents"].shape == (4, 4, 4)
            assert torch.isfinite(tensors["latents"]).all()
        assert not contents(out)
        assert run_of(out)["settings"]["prefill"] == (0.15 if extra else 1.0)
    closed = [*command, "--latents", "--residual", "closed_form", "--out", str(tmp_path / "closed")]
    assert main(closed) == 0  # nothing is redrawn
    assert run_of(tmp_path / "closed")["settings"]["residual"] == "rejection"


def test_pictures_from_checkpoints(tmp_path, checkpoint, quick):
    out = tmp_path / "out"
    command = [
        "generate",
        *checkpoint,
        "--vae",
        str(tmp_path / "vae.safetensors"),
        "--labels",
        "1,2",
        "--out",
        str(out),
    ]
    assert main([*command, "--latents"]) == 0
    for i, name in enumerate(contents(out)):
        latents = load_file(out / f"00000{i}.safetensors")["latents"]
        expected = ((Vae().decode(latents[None])[0] + 1) * 127.5).round().permute(1, 2, 0)
        assert (np.asarray(Image.open(out / name)) == expected.numpy()).all()
    run = run_of(out)
    assert run["models"]["vae"] == "a VAE for tests"
    assert run["settings"]["vae"]["sha256"] == hashlib.sha256(b"a VAE").hexdigest()


def test_the_grid_and_the_array_are_those_of_the_images(tmp_path, quick):
    extra = ["--grid", str(tmp_path / "out" / "grid.png"), "--npz", str(tmp_path / "all.npz")]
    assert main(["generate", "--num-images", "70", "--batch-size", "32", "--out", str(tmp_path / "out"), *extra]) == 0
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in contents(tmp_path / "out").values()])
    with np.load(tmp_path / "all.npz") as arrays:
        assert (arrays["arr_0"] == pixels).all()
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [i % 10 for i in range(70)]
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert grid.shape == (8 * 66 - 2, 8 * 66 - 2, 3)
    assert (grid[66 : 66 + 64 : 8, 66 : 66 + 64 : 8] == pixels[9]).all()


def test_the_array_is_read_as_evaluators_read_it(tmp_path):
    """guided-diffusion's evaluator opens the archive itself and streams the array after its header."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    write_npz(tmp_path / "x.npz", iter(pixels), [3, 1, 4, 1, 5], (4, 6, 3))
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == (pixels.shape, False, np.dtype(np.uint8))
        assert file.read() == pixels.tobytes()
    first = (tmp_path / "x.npz").read_bytes()
    write_npz(tmp_path / "x.npz", iter(pixels), [3, 1, 4, 1, 5], (4, 6, 3))
    assert (tmp_path / "x.npz").read_bytes() == first


def test_the_array_takes_the_memory_of_a_few_images(tmp_path):
    import tracemalloc

    tracemalloc.start()
    write_npz(tmp_path / "x.npz", (np.zeros((64, 64, 3), np.uint8) for _ in range(500)), [0] * 500, (64, 64, 3))
    assert tracemalloc.get_traced_memory()[1] < 1e6  # the array has 6 MB
    tracemalloc.stop()


# --- started again ---

TEN = ["generate", "--num-images", "10", "--batch-size", "4", "--latents", "--out"]


def test_only_what_is_missing_or_broken_is_made_again(tmp_path, quick, capsys):
    assert main([*TEN, str(tmp_path)]) == 0
    before, latents = contents(tmp_path), contents(tmp_path, "safetensors")
    (tmp_path / "000005.png").unlink()
    (tmp_path / "000002.png").write_bytes(before["000002.png"][:-7])  # cut by a crash
    (tmp_path / "000003.png").write_bytes(b"")
    changed = bytearray(before["000000.png"])
    changed[60] ^= 1
    (tmp_path / "000000.png").write_bytes(changed)
    (tmp_path / "000006.safetensors").write_bytes(latents["000006.safetensors"][:-1])
    (tmp_path / ".cspd-0123456789abcdef").write_bytes(b"left by a process that was killed")
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in ("000001.png", "000004.png", "000006.png")}
    quick.runs.clear()
    assert main([*TEN, str(tmp_path)]) == 0
    assert [first for _, first, _ in quick.runs] == [0, 4]
    assert contents(tmp_path) == before
    assert contents(tmp_path, "safetensors") == latents
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(tmp_path.glob(".*"))
    run = run_of(tmp_path)
    assert [start["missing"] for start in run["starts"]] == [10, 5]
    assert run["statistics"] == dict(
        batches=3,
        acceptance=0.5,
        raw_acceptance=0.25,
        fallback=0.0,
        drafted=36,
        prefilled=12,
        target_calls=9,
        draft_calls=6,
    )


def test_what_does_not_change_images_may_change(tmp_path, quick, monkeypatch):
    assert main(["generate", "--num-images", "6", "--batch-size", "4", "--out", str(tmp_path)]) == 0
    before = contents(tmp_path)
    command = ["generate", "--num-images", "6", "--batch-size", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(Models, "__init__", lambda *_: pytest.fail("there is nothing to make"))
    assert main([*command, "--grid", str(tmp_path / "grid.png"), "--npz", str(tmp_path / "all.npz")]) == 0
    assert (tmp_path / "grid.png").exists()
    monkeypatch.undo()
    monkeypatch.setattr(models, "SpecDecodeRunner", Runner)
    assert main([*command, "--classes", "10", "--latents"]) == 0  # all ten were meant
    assert contents(tmp_path) == before
    assert len(contents(tmp_path, "safetensors")) == 6


def test_a_run_keeps_its_number_of_threads(tmp_path, checkpoint, quick, monkeypatch):
    """With another one, images made on a CPU are rounded otherwise."""
    seen, run = [], Runner.run
    monkeypatch.setattr(Runner, "run", lambda *a, **o: seen.append(torch.get_num_threads()) or run(*a, **o))
    command = ["generate", *checkpoint, "--latents", "--labels", "1", "--out", str(tmp_path / "out")]
    before = torch.get_num_threads()
    assert main([*command, "--threads", str(before + 1)]) == 0
    (tmp_path / "out" / "000000.safetensors").unlink()
    assert main(command) == 0
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--seed", "1"], "--seed was 0, is 1"),
        (["--batch-size", "5"], "--batch-size was 4, is 5"),
        (["--cfg", "3", "--steps", "2"], "--steps was 16, is 2; --cfg was 1.0, is 3.0"),
        (["--parallel-tol", "off"], "--parallel-tol was auto, is none"),
        (["--threads", "2"], "--threads was 1, is 2"),
        (["--classes", "5"], "--classes was 10, is 5"),
    ],
)
def test_a_changed_setting_is_refused(options, difference, tmp_path, quick, capsys):
    assert main([*TEN, str(tmp_path)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    quick.runs.clear()
    capsys.readouterr()
    assert main([*TEN, str(tmp_path), *options]) == 2
    assert f"got others: {difference}. Give another --out, or these settings again" in one_line(capsys)
    assert not quick.runs
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_checkpoints_are_known_by_their_contents(tmp_path, checkpoint, quick, capsys, monkeypatch):
    command = ["generate", *checkpoint, "--latents", "--labels", "1", "--out", str(tmp_path / "out")]
    path = tmp_path / "target.safetensors"
    assert main(command) == 0
    os.utime(path, (1, 1))
    assert main(command) == 0
    moved = path.rename(tmp_path / "moved.safetensors")
    assert main([*command[:2], str(moved), *command[3:]]) == 0
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    capsys.readouterr()
    assert main([*command[:2], str(moved), *command[3:]]) == 2
    assert f"--target was {path} (sha256 " in one_line(capsys)


def test_a_folder_of_others_is_left_alone(tmp_path, quick, capsys):
    (tmp_path / "000000.png").write_bytes(b"somebody's")
    assert main([*TEN, str(tmp_path)]) == 2
    assert one_line(capsys).endswith(f"found images in {tmp_path} without run.json")
    (tmp_path / "run.json").write_text("{")
    assert main([*TEN, str(tmp_path)]) == 2
    assert one_line(capsys) == f"expected what an earlier run wrote in {tmp_path / 'run.json'}, could not read it"
    assert len(list(tmp_path.iterdir())) == 2


def test_two_runs_in_one_folder(tmp_path, quick, capsys):
    pytest.importorskip("fcntl")
    make = Runner.run

    def meanwhile(self, *arguments, **options):
        if not Runner.runs:
            Runner.runs.append((0, 0, []))
            assert main([*TEN, str(tmp_path)]) == 2
        return make(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runner, "run", meanwhile)
        assert main([*TEN, str(tmp_path)]) == 0
    assert one_line(capsys) == f"expected one run at a time in {tmp_path}, another one is at work there"
    assert main([*TEN, str(tmp_path)]) == 0


def test_other_versions_are_told(tmp_path, quick, caplog):
    assert main([*TEN, str(tmp_path)]) == 0
    run = run_of(tmp_path)
    run["starts"][-1]["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "000001.png").unlink()
    with caplog.at_level(logging.WARNING, "cspd"):
        assert main([*TEN, str(tmp_path)]) == 0
    assert "may differ from a run in one go by rounding: torch was 1.0, is " in caplog.text


# --- stopped in the middle ---


def test_an_interrupt_leaves_a_run_that_goes_on(tmp_path, quick, capsys, monkeypatch):
    assert main([*TEN, str(tmp_path / "whole")]) == 0
    make = Models.make

    def interrupted(self, number, pixels):
        if number == 2:
            raise KeyboardInterrupt
        return make(self, number, pixels)

    monkeypatch.setattr(Models, "make", interrupted)
    out = tmp_path / "out"
    assert main([*TEN, str(out)]) == INTERRUPTED == 130
    assert one_line(capsys) == f"interrupted; {GOES_ON}"
    assert len(contents(out)) == 8  # what was made is written
    monkeypatch.undo()
    monkeypatch.setattr(models, "SpecDecodeRunner", Runner)
    assert main([*TEN, str(out)]) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_with_the_same_bytes(tmp_path):
    command = ["generate", "--num-images", "7", "--batch-size", "3", "--steps", "8", "--gamma", "2", "--device", "cuda"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    before, run = contents(tmp_path), run_of(tmp_path)
    assert (run["settings"]["device"], run["settings"]["dtype"], run["settings"]["threads"]) == (
        "cuda",
        "bfloat16",
        None,
    )
    for number in (1, 6):
        (tmp_path / f"00000{number}.png").unlink()
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_a_run_that_goes_on(tmp_path, quick, capsys, monkeypatch):
    assert main([*TEN, str(tmp_path / "whole")]) == 0
    out, synced, sync = tmp_path / "out", [], os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr("cspd.files.os.fsync", full)
    assert main([*TEN, str(out)]) == 2
    line = one_line(capsys)
    assert line.endswith(f"could not write the file (No space left on device); {GOES_ON}")
    assert line.startswith(f"{out}/0")
    assert not list(out.glob(".*"))
    monkeypatch.setattr("cspd.files.os.fsync", sync)
    there = contents(out)
    assert 0 < len(there) < 10
    assert main([*TEN, str(out)]) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert contents(out, "safetensors") == contents(tmp_path / "whole", "safetensors")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_small_disk(small_disk, tmp_path, quick, capsys, monkeypatch):
    assert main([*TEN, str(tmp_path / "whole")]) == 0
    out = small_disk / "out"
    assert main([*TEN, str(out)]) == 2
    assert one_line(capsys).startswith("expected 0.4 MB of free space at ")
    assert not out.exists()
    monkeypatch.setattr("cspd.generate.run.check_space", lambda needs: None)
    assert main([*TEN, str(out)]) == 2
    line = one_line(capsys)
    assert line.endswith(f"could not write the file (No space left on device); {GOES_ON}")
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert main([*TEN, str(out)]) == 0
    assert contents(out) == contents(tmp_path / "whole")


# --- refused before any work ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "3,12"], "expected labels in 0..9, got 12"),
        ([], "expected --labels or --num-images, one of them"),
        (["--labels", "3", "--num-images", "4"], "expected --labels or --num-images, one of them"),
        (["--labels", "3", "--classes", "4"], "expected --num-images together with --classes"),
        (["--num-images", "4", "--classes", "11"], "expected --classes at most the model's 10, got 11"),
        (["--labels", "1", "--draft", "d.pth"], "expected --target together with --draft"),
        (["--labels", "1", "--vae", "v.pth"], "expected --target together with --vae"),
        (["--labels", "1", "--num-sampling-steps", "9"], "expected --target together with --num-sampling-steps"),
        (["--labels", "1", "--target", "t.pth"], "expected --vae, which makes pictures of latents, or --latents"),
        (["--labels", "1", "--target", "t.pth", "--latents", "--npz", "x"], "expected --vae together with --npz"),
        (["--labels", "1", "--target", "t.pth", "--latents"], "expected a checkpoint, found none at t.pth"),
        (["--labels", "1", "--temperature", "-1"], "temperature >= 0"),
        (["--labels", "1", "--prefill", "1.5"], "expected ratio in [0, 1], got 1.5"),
        (["--labels", "1", "--seed", "-1"], "seed"),
        (["--labels", "1", "--device", "cuda:77"], "expected --device as one that torch has here, got cuda:77: "),
        (["--labels", "1", "--grid", "no/such/x.png"], "expected a folder for x.png"),
        (["--labels", "1", "--grid", "out/000000.png"], "expected --grid as another file than those of the run"),
        (["--labels", "1", "--grid", "x", "--npz", "./x"], "expected --grid as another file than --npz"),
        (["--labels", "1", "--out", "x.png"], "expected --out as a folder, got x.png"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--out", "out", *options]) == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", ["1,x", "", "1,,2"])
def test_labels_are_numbers(labels, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", f"--labels={labels}", "--out", "out"])
    assert stopped.value.code == 2
    assert f"expected numbers with commas between them, got {labels}" in capsys.readouterr().err


def test_models_that_do_not_fit(tmp_path, checkpoint, capsys, monkeypatch):
    save_file(small_mar(patch_size=1, img_size=3, vae_embed_dim=4).state_dict(), tmp_path / "draft.safetensors")
    command = ["generate", *checkpoint, "--labels", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--latents", "--draft", str(tmp_path / "draft.safetensors")]) == 2
    assert "expected draft and target with the same seq_len, got 9 and 16" in one_line(capsys)
    monkeypatch.setattr(Vae, "channels", 16)
    assert main([*command, "--vae", str(tmp_path / "vae.safetensors")]) == 2
    assert one_line(capsys) == "expected a VAE of 4 channels, got one of 16"
    closed = ["--residual", "closed_form", "--draft", str(tmp_path / "target.safetensors"), "--latents"]
    assert main([*command, *closed]) == 2
    assert "expected heads with a fixed variance" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    assert main([*command, *closed, "--target-sigma", "--steps", "2", "--num-sampling-steps", "3"]) == 0
    settings = run_of(tmp_path / "out")["settings"]
    assert (settings["residual"], settings["target_sigma"]) == ("closed_form", True)


def test_too_little_space(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr("cspd.generate.folder.shutil.disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    command = ["generate", "--num-images", "1000", "--out", str(tmp_path / "out")]
    assert main([*command, "--npz", str(tmp_path / "all.npz")]) == 2
    assert one_line(capsys) == f"expected 8.9 MB of free space at {tmp_path}, found 3.0 MB"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_place_of_the_folder(below, tmp_path, quick, capsys):
    (tmp_path / "file").write_bytes(b"mine")
    assert main([*TEN, str(tmp_path / "file" / "out" if below else tmp_path / "file")]) == 2
    assert one_line(capsys) == f"expected --out as a folder, found a file at {tmp_path / 'file'}"
    assert not quick.runs
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_may_not_be_written(there, tmp_path, quick, capsys, monkeypatch):
    if there:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr("cspd.generate.folder.os.access", lambda path, mode: False)
    assert main([*TEN, str(tmp_path / "out")]) == 2
    named = tmp_path / "out" if there else tmp_path
    assert one_line(capsys) == f"expected --out as a folder that may be written, found one that may not at {named}"


def test_a_whole_png():
    data = images.to_png(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    assert images.is_whole_png(data, 5, 7)
    assert not images.is_whole_png(data, 7, 5)
    assert not images.is_whole_png(data + b"x", 5, 7)
    for end in range(len(data)):
        assert not images.is_whole_png(data[:end], 5, 7)
    for at in range(len(data)):
        assert not images.is_whole_png(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :], 5, 7)


def test_a_signal_ends_the_process_with_one_line(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "import cspd.generate.models as models\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs behind ignore it\n"
        "def make(self, *_):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)  # it may come a moment later\n"
        "models.Models.make = make\n"
        "from cspd.cli import main\n"
        f"sys.exit(main(['generate', '--labels', '1', '--out', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, f"cspd generate: interrupted; {GOES_ON}\n")
