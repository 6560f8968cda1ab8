"""`cspd generate` stopped and started again: it makes what is missing, and nothing else."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from runs import GOES_ON, TEN, Runner, contents, one_line, run_of

from cspd.cli import INTERRUPTED, main
from cspd.generate import models
from cspd.generate.models import Models


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
    (tmp_path / ".cspd-mine").write_bytes(b"somebody's")
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in ("000001.png", "000004.png", "000006.png")}
    quick.runs.clear()
    assert main([*TEN, str(tmp_path)]) == 0
    assert [first for _, first, _ in quick.runs] == [0, 4]
    assert contents(tmp_path) == before
    assert contents(tmp_path, "safetensors") == latents
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert [path.name for path in tmp_path.glob(".*")] == [".cspd-mine"]
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
        rounds=6,
        steps_per_round=1.5,
        target_rows=6,
        candidates=[18],
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


def test_a_run_keeps_its_number_of_threads(tmp_path, checkpoints, quick, monkeypatch):
    """With another one, images made on a CPU are rounded otherwise."""
    seen, run = [], Runner.run
    monkeypatch.setattr(Runner, "run", lambda *a, **o: seen.append(torch.get_num_threads()) or run(*a, **o))
    command = ["generate", *checkpoints, "--latents", "--labels", "1", "--out", str(tmp_path / "out")]
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
    assert f"got others: {difference}. Choose another --out, or repeat the earlier settings" in one_line(capsys)
    assert not quick.runs
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_an_earlier_version_goes_on(tmp_path, quick, capsys):
    """Its settings know nothing of verification: it was run with what is the default now."""
    assert main([*TEN, str(tmp_path)]) == 0
    run = run_of(tmp_path)
    for name in ("verify", "candidates", "branches", "criterion"):
        del run["settings"][name]
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "000005.png").unlink()
    notes = [json.loads(line) for line in (tmp_path / "batches.jsonl").read_text().splitlines()]
    for name in ("rounds", "steps_per_round", "target_rows", "candidates"):
        del notes[0]["statistics"][name]
    (tmp_path / "batches.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    quick.runs.clear()
    assert main([*TEN, str(tmp_path)]) == 0
    assert [first for _, first, _ in quick.runs] == [4]
    assert run_of(tmp_path)["statistics"]["rounds"] is None
    assert run_of(tmp_path)["statistics"]["drafted"] == 36
    capsys.readouterr()
    changed = ["--verify", "strict", "--candidates", "2", "--branches", "2", "--criterion", "last_step"]
    assert main([*TEN, str(tmp_path), *changed]) == 2
    assert (
        "--verify was window, is strict; --candidates was 1, is 2; --branches was 1, is 2; --criterion was "
        "trajectory, is last_step"
    ) in one_line(capsys)


def test_checkpoints_are_known_by_their_contents(tmp_path, checkpoints, quick, capsys, monkeypatch):
    command = ["generate", *checkpoints, "--latents", "--labels", "1", "--out", str(tmp_path / "out")]
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


def test_what_a_file_beside_the_weights_tells_may_not_change(tmp_path, checkpoints, quick, capsys, monkeypatch):
    hub = tmp_path / "hub"
    hub.mkdir()
    (tmp_path / "target.safetensors").rename(hub / "model.safetensors")
    facts = {"patch_size": 1, "vae_stride": 2}
    (hub / "config.json").write_text(json.dumps(facts))
    command = ["generate", "--target", str(hub), "--latents", "--labels", "1,2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    settings = run_of(tmp_path / "out")["settings"]
    assert (settings["patch_size"], settings["vae_stride"]) == (1, 2)
    assert main([*command, "--patch-size", "1", "--vae-stride", "2"]) == 0  # told otherwise, but the same
    (tmp_path / "out" / "000001.safetensors").unlink()
    (hub / "config.json").write_text(json.dumps(facts | {"patch_size": 2}))
    capsys.readouterr()
    assert main(command) == 2
    assert ", with a config.json " in one_line(capsys)
    monkeypatch.setattr("cspd.generate.settings.config_beside", lambda path: None)
    monkeypatch.setattr("cspd.generate.settings._content", lambda value: None if isinstance(value, dict) else value)
    capsys.readouterr()
    assert main(command) == 2  # whoever tells it: it is seen when the models are loaded
    assert "got others: --patch-size was 1, is 2; the latent size was [4, 4, 4], is [1, 8, 8]. Choose" in one_line(
        capsys
    )


def test_a_checkpoint_is_the_file_that_is_read(tmp_path, checkpoints, quick, capsys):
    """A folder and the file in it are the same; what else lies there plays no part."""
    hub = tmp_path / "hub"
    hub.mkdir()
    path = (tmp_path / "target.safetensors").rename(hub / "model.safetensors")
    command = ["generate", "--latents", "--patch-size", "1", "--labels", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--target", str(hub)]) == 0
    (hub / "README.md").write_text("new")
    assert main([*command, "--target", str(hub)]) == 0
    assert main([*command, "--target", str(path)]) == 0
    # Another file of the same size and time, as `cp -p` or another snapshot brings.
    state, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    (hub / "new").write_bytes(data)
    os.utime(hub / "new", ns=(state.st_atime_ns, state.st_mtime_ns))
    (hub / "new").replace(path)
    capsys.readouterr()
    assert main([*command, "--target", str(hub)]) == 2
    assert "got others: --target was " in one_line(capsys)


def test_a_folder_of_others_is_left_alone(tmp_path, quick, capsys):
    (tmp_path / "000000.png").write_bytes(b"somebody's")
    assert main([*TEN, str(tmp_path)]) == 2
    assert one_line(capsys).endswith(f"{tmp_path} holds images but no run.json")
    (tmp_path / "run.json").write_text("{")
    assert main([*TEN, str(tmp_path)]) == 2
    assert (
        one_line(capsys) == f"expected the settings of an earlier run in {tmp_path / 'run.json'}, could not read them"
    )
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
    assert one_line(capsys) == f"expected one run at a time in {tmp_path}, but another one is working there"
    assert main([*TEN, str(tmp_path)]) == 0


def test_another_run_begins_while_this_one_loads(tmp_path, quick, capsys, monkeypatch):
    """The folder does not exist when both look, so neither can hold its lock."""
    out, load = tmp_path / "out", Models.__init__

    def late(self, *arguments):
        load(self, *arguments)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Models, "__init__", load)
            assert main([*TEN, str(out)]) == 0

    monkeypatch.setattr(Models, "__init__", late)
    assert main([*TEN, str(out), "--seed", "1"]) == 2
    assert one_line(capsys) == f"expected a new folder for --out, but another run has just begun in {out}"
    monkeypatch.setattr(Models, "__init__", load)
    before = contents(out)
    shutil.rmtree(out)
    assert main([*TEN, str(out)]) == 0
    assert contents(out) == before
    assert run_of(out)["settings"]["seed"] == 0


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

    def interrupted(self, number, pixels, callback=None):
        if number == 2:
            raise KeyboardInterrupt
        return make(self, number, pixels, callback)

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


class Gone(io.StringIO):
    """Nobody reads it any more, as behind `| head`."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_the_work_goes_on_where_nobody_reads_how_it_stands(tmp_path, checkpoints, quick, capsys, monkeypatch):
    command = ["generate", *checkpoints, "--latents", "--labels", "1,2", "--batch-size", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Gone())
        assert main(command) == 0
    assert len(contents(tmp_path, "safetensors")) == 2
    assert run_of(tmp_path)["statistics"]["batches"] == 2
    assert capsys.readouterr().err == ""


def test_a_pipe_that_nobody_reads_is_no_failure_to_tell(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr(Models, "make", lambda *_: Gone().write(""))
    assert main([*TEN, str(tmp_path)]) == 2
    assert capsys.readouterr().err == ""


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
