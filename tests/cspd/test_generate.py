"""`cspd generate` in one process: what it writes, and what it refuses before any work."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TEN, Vae, contents, one_line, run_of
from safetensors.torch import load_file, save_file
from small_models import small_mar

from cspd import cli_support
from cspd.cli import main
from cspd.demo.pair import load_pair
from cspd.demo.picture import to_pixels
from cspd.generate import images
from cspd.generate.npz import write_npz
from cspd.generate.run import _load
from cspd.generate.settings import fingerprint
from cspd.speculative import SpecDecodeRunner

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


def test_strict_digits(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["generate", "--labels", "3,7", "--steps", "6", "--gamma", "3", "--relaxation", "1", "--seed", "2"]
    command += ["--residual", "closed_form", "--verify", "strict", "--criterion", "last_step"]
    tree = ["--candidates", "3", "--branches", "2"]
    assert main([*command, *tree, "--batch-size", "1", "--out", str(out)]) == 0
    target, draft = load_pair()
    rule = dict(verify="strict", criterion="last_step", residual="closed_form", num_candidates=3, branches=2)
    runner = SpecDecodeRunner(draft, target, 1.0, **rule)
    made, stats = [], []
    for number, label in enumerate((3, 7)):
        made.append(runner.run(1, 6, 3, labels=torch.tensor([label]), seed=2, first_image=number))
        stats.append(runner.stats)
    for image, path in zip(made, sorted(out.glob("0*.png"))):
        assert (np.asarray(Image.open(path))[..., 0] == to_pixels(image)[0].numpy()).all()
    run = run_of(out)
    settings, told = run["settings"], run["statistics"]
    chosen = [settings[name] for name in ("verify", "candidates", "branches", "criterion")]
    assert chosen == ["strict", 3, 2, "last_step"]
    assert told["rounds"] == stats[0].rounds + stats[1].rounds
    assert told["steps_per_round"] == pytest.approx(10 / told["rounds"])  # one of six steps is pre-filled
    assert told["target_rows"] == stats[0].target_rows + stats[1].target_rows
    assert told["candidates"] == [a + b for a, b in zip(stats[0].candidates, stats[1].candidates)]
    assert f", {told['rounds']} rounds of {told['steps_per_round']:.2f} steps an image" in capsys.readouterr().out
    assert main([*command, "--prefill", "1", "--out", str(tmp_path / "alone")]) == 0
    told = run_of(tmp_path / "alone")["statistics"]
    assert (told["rounds"], told["steps_per_round"], told["acceptance"], told["candidates"]) == (0, None, None, [])


def test_the_last_step_of_the_target_alone_adds_its_noise(tmp_path, checkpoints, caplog):
    command = ["generate", *checkpoints, "--latents", "--labels", "1", "--steps", "2", "--num-sampling-steps", "3"]
    for name in ("trajectory", "last_step"):
        assert main([*command, "--criterion", name, "--out", str(tmp_path / name)]) == 0
    assert not caplog.messages  # it plays a part
    written = [load_file(tmp_path / name / "000000.safetensors")["latents"] for name in ("trajectory", "last_step")]
    assert not torch.equal(*written)


def test_balanced_classes_in_whole_batches(tmp_path, quick):
    assert main(["generate", "--num-images", "25", "--batch-size", "10", "--out", str(tmp_path)]) == 0
    assert len(contents(tmp_path)) == 25
    assert quick.runs == [(10, first, list(range(10))) for first in (0, 10, 20)]
    assert run_of(tmp_path)["settings"]["classes"] == 10
    quick.runs.clear()
    command = ["generate", "--num-images", "5", "--classes", "3", "--batch-size", "4", "--out", str(tmp_path / "few")]
    assert main(command) == 0
    assert [labels for _, _, labels in quick.runs] == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_a_line_per_minute_where_there_is_no_terminal(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr("cspd.generate.run._BETWEEN_LINES", 0.0)
    assert main(["generate", "--labels", "1,2,3", "--batch-size", "1", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "3 of 3 images"


def test_padding_is_told(tmp_path, quick, caplog):
    with caplog.at_level(logging.WARNING, "cspd"):
        assert main(["generate", "--labels", "1,2", "--batch-size", "2", "--out", str(tmp_path / "even")]) == 0
        assert not caplog.messages
        assert main(["generate", "--labels", "1,2", "--batch-size", "5", "--out", str(tmp_path / "padded")]) == 0
    assert caplog.messages == [
        "--batch-size 5 is larger than the number of images: all of the batch is computed, and 2 images are kept"
    ]


def test_other_machines_have_the_same_checkpoints(tmp_path, checkpoints, quick, monkeypatch):
    """Rank 0 says what it has seen; the first rank of every machine compares."""
    path = tmp_path / "target.safetensors"
    args = SimpleNamespace(target=path, draft=None, vae=None)
    seen = {"target": fingerprint("target", path), "draft": None, "vae": None}
    settings = SimpleNamespace(to_dict=lambda: seen)
    monkeypatch.setattr("cspd.generate.run.Models", lambda *_: "loaded")
    assert _load(args, settings, None, SimpleNamespace(rank=8, local=0)) == "loaded"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match="expected the checkpoints of rank 0 on this machine too, got others: --target"
    ):
        _load(args, settings, None, SimpleNamespace(rank=8, local=0))
    for rank, local in ((0, 0), (9, 1)):
        assert _load(args, settings, None, SimpleNamespace(rank=rank, local=local)) == "loaded"


def test_latents_from_checkpoints(tmp_path, checkpoints, capsys):
    command = ["generate", *checkpoints, "--labels", "1,2,5", "--steps", "6", "--num-sampling-steps", "5", "--cfg", "2"]
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


def test_pictures_from_checkpoints(tmp_path, checkpoints, quick):
    out = tmp_path / "out"
    command = [
        "generate",
        *checkpoints,
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


def test_a_whole_png():
    data = images.to_png(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    assert images.is_whole_png(data, 5, 7)
    assert not images.is_whole_png(data, 7, 5)
    assert not images.is_whole_png(data + b"x", 5, 7)
    for end in range(len(data)):
        assert not images.is_whole_png(data[:end], 5, 7)
    for at in range(len(data)):
        assert not images.is_whole_png(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :], 5, 7)
    assert not images.is_whole_png(data[:33] + data[-12:], 5, 7)  # no pixels


def test_a_link_to_an_image_is_that_image(tmp_path, quick, capsys):
    assert main([*TEN, str(tmp_path / "out")]) == 0
    (tmp_path / "link.png").symlink_to(tmp_path / "out" / "000003.png")
    assert main([*TEN, str(tmp_path / "out"), "--grid", str(tmp_path / "link.png")]) == 2
    assert "expected --grid to name a file that the run does not write itself" in one_line(capsys)


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path, quick, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    assert main([*TEN, str(tmp_path / "out")]) == 2
    assert one_line(capsys) == f"expected --out to name a folder, found a broken link at {tmp_path / 'out'}"


def test_what_has_no_part_without_a_draft(tmp_path, checkpoints, quick, caplog):
    command = ["generate", *checkpoints, "--latents", "--labels", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert not caplog.messages
    assert main([*command, "--gamma", "3", "--prefill", "0.5", "--relaxation", "1", "--verify", "strict"]) == 0
    assert caplog.messages == [
        "without --draft nothing is drafted; these options have no effect: --gamma, --prefill, --relaxation, --verify"
    ]


# --- refused before any work ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "3,12"], "expected labels in 0..9, got 12"),
        ([], "expected either --labels or --num-images"),
        (["--labels", "3", "--num-images", "4"], "expected either --labels or --num-images"),
        (["--labels", "3", "--classes", "4"], "expected --num-images together with --classes"),
        (["--num-images", "4", "--classes", "11"], "expected --classes at most the model's 10, got 11"),
        (["--labels", "1", "--draft", "d.pth"], "expected --target together with --draft"),
        (["--labels", "1", "--vae", "v.pth"], "expected --target together with --vae"),
        (["--labels", "1", "--num-sampling-steps", "9"], "expected --target together with --num-sampling-steps"),
        (["--labels", "1", "--target", "t.pth"], "expected --vae to decode pictures, or --latents"),
        (["--labels", "1", "--target", "t.pth", "--latents", "--npz", "x"], "expected --vae together with --npz"),
        (["--labels", "1", "--target", "t.pth", "--latents"], "expected a checkpoint, found none at t.pth"),
        (["--labels", "1", "--batch-size", "65537"], "expected --batch-size at most 65536, got 65537"),
        (["--labels", "1", "--threads", "100000"], "expected --threads at most "),
        (["--labels", "1", "--temperature", "-1"], "temperature >= 0"),
        (["--labels", "1", "--prefill", "1.5"], "expected --prefill in [0, 1], got 1.5"),
        (["--labels", "1", "--relaxation", "0"], "expected a finite --relaxation > 0, got 0.0"),
        (["--labels", "1", "--candidates", "17"], "expected --candidates at most 16, got 17"),
        (
            ["--labels", "1", "--candidates", "2", "--branches", "3"],
            "at most as many --branches as --candidates, got 3 and 2",
        ),
        (["--labels", "1", "--candidates", "2", "--branches", "2"], "expected --branches 2 together with --verify str"),
        (["--labels", "1", "--target-sigma"], "expected --target-sigma together with --residual closed_form or sev"),
        (["--labels", "1", "--device", "foo"], "that torch has on this machine, got foo: there is no such device"),
        (["--labels", "1", "--device", "meta"], "that torch has on this machine, got meta: it computes nothing"),
        (["--labels", "1", "--seed", "-1"], "seed"),
        (["--labels", "1", "--device", "cuda:77"], "expected a --device that torch has on this machine, got cuda:77: "),
        (["--labels", "1", "--grid", "no/such/x.png"], "expected a folder for x.png"),
        (
            ["--labels", "1", "--grid", "out/000000.png"],
            "expected --grid to name a file that the run does not write itself",
        ),
        (["--labels", "1", "--grid", "x", "--npz", "./x"], "expected different files for --grid and --npz"),
        (["--labels", "1", "--out", "x.png"], "expected --out to name a folder, got x.png"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--out", "out", *options]) == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_the_vae_has_no_fp16(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--labels", "1", "--out", "out", "--vae-dtype", "fp16"])
    assert stopped.value.code == 2
    assert "expected dtype as float32, bfloat16 (or fp32, float, bf16), got 'fp16'" in capsys.readouterr().err


def test_errors_have_no_bytes_for_the_terminal():
    text = cli_support.one_line(ValueError("a\x1b[31mb\n c\udcff\u2028"))
    assert text == r"a\x1b[31mb c\udcff"
    assert cli_support.one_line(OSError(2, "No such file", "x\x1b")) == r"x\x1b: No such file"


@pytest.mark.parametrize("labels", ["1,x", "", "1,,2"])
def test_labels_are_numbers(labels, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", f"--labels={labels}", "--out", "out"])
    assert stopped.value.code == 2
    assert f"expected numbers separated by commas, got {labels}" in capsys.readouterr().err


def test_models_that_do_not_fit(tmp_path, checkpoints, capsys, monkeypatch):
    save_file(small_mar(patch_size=1, img_size=3, vae_embed_dim=4).state_dict(), tmp_path / "draft.safetensors")
    command = ["generate", *checkpoints, "--labels", "1", "--out", str(tmp_path / "out")]
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
    assert one_line(capsys) == f"expected --out to name a folder, found a file at {tmp_path / 'file'}"
    assert not quick.runs
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_may_not_be_written(there, tmp_path, quick, capsys, monkeypatch):
    if there:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr("cspd.generate.folder.os.access", lambda path, mode: False)
    assert main([*TEN, str(tmp_path / "out")]) == 2
    named = tmp_path / "out" if there else tmp_path
    assert one_line(capsys) == f"expected a writable folder for --out, found one that is not writable at {named}"
