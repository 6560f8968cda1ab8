"""The command ``cspd``."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import slow
from small_models import small_mar

from cspd.cli import INTERRUPTED, main
from cspd.demo import pair, run
from cspd.speculative import SpecDecodeRunner


def test_info(capsys):
    assert main(["info"]) == 0
    assert "backends:" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["torch"] == "ok"


@pytest.mark.parametrize("module", ["cspd", "cspd.cli"])
def test_it_runs_as_a_module(module, tmp_path):
    done = python(["-m", module, "info"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "backends:" in done.stdout


def python(arguments, folder, stdout=subprocess.PIPE):
    """A run of Python, which keeps what it prints until the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    )


def test_how_the_steps_are_made(tmp_path, capsys, monkeypatch):
    command = ["generate", "--labels", "3", "--num-iter", "2", "--temperature", "0"]
    asked, init = [], SpecDecodeRunner.__init__

    def watched(self, *args, **options):
        asked.append(options["parallel_tol"])
        init(self, *args, **options)

    monkeypatch.setattr(SpecDecodeRunner, "__init__", watched)
    for i, option in enumerate(([], ["--parallel-tol=auto"], ["--parallel-tol=off"], ["--parallel-tol=1e-6"])):
        assert main([*command, *option, "--out", str(tmp_path / str(i))]) == 0
    assert asked == ["auto", "auto", None, 1e-6]
    capsys.readouterr()
    for bad in ("0", "1", "-0.1", "nan", "none", "1e-3x", ""):
        with pytest.raises(SystemExit) as ended:
            main([*command, f"--parallel-tol={bad}", "--out", str(tmp_path / "other")])
        assert ended.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.endswith(f"argument --parallel-tol: expected auto, off or a number in (0, 1), got {bad}")
    assert not (tmp_path / "other").exists()


def test_a_patch_size_is_asked_for_where_it_is_in_doubt(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cspd.mar_sizes._HEADS", {32: 2})
    save_file(small_mar(patch_size=2, img_size=8, vae_embed_dim=1).state_dict(), tmp_path / "t.safetensors")
    out = tmp_path / "out"
    command = ["generate", "--target", str(tmp_path / "t.safetensors"), "--labels", "1", "--steps", "2", "--latents"]
    command += ["--num-sampling-steps", "3", "--out", str(out)]
    assert main(command) == 2
    assert "--patch-size" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--patch-size", "2"]) == 0
    assert load_file(out / "000000.safetensors")["latents"].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["demo", "--out", "no/such/folder/x.png"], "expected a folder for x.png"),
        (["demo", "--out", "x.jpg"], "expected --out with the ending .png"),
        (["demo", "--num-images", "3"], "expected --num-images >= 4"),
        (["demo", "--out", "x.png", "--json", "no/such/x.json"], "expected a folder for x.json"),
        (["demo", "--out", "x.png", "--json", "./x.png"], "expected --json as another file than --out"),
        (["demo", "--out", "x.png", "--html", "no/such/x.html"], "expected a folder for x.html"),
        (["demo", "--json", "x", "--html", "./x"], "expected --html as another file than --json"),
        (["demo", "--seed", "-1"], "expected --seed in [0, 2^64), got -1"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "required: command"),
        (["demo", "--gamma", "0"], "argument --gamma: expected a whole number >= 1, got 0"),
        (["demo", "--gamma", "4", "four"], "argument --gamma: expected a whole number >= 1, got four"),
        (["demo", "--num-images", "0"], "argument --num-images: expected a whole number >= 1, got 0"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_usage_errors(command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["junk.pth", "junk.safetensors", "other.safetensors"])
def test_unreadable_checkpoints_are_one_line(tmp_path, capsys, name):
    path = tmp_path / name
    if name.startswith("junk"):
        path.write_bytes(b"this is no checkpoint" * 10)
    else:
        state = small_mar(width=768, patch_size=1, img_size=4, vae_embed_dim=4).state_dict()
        state.pop("diffloss.net.cond_embed.weight")
        save_file(state, path)
    command = ["generate", "--target", str(path), "--labels", "1", "--latents", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1


# --- outputs ---


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be loaded, as all work begins with that."""
    monkeypatch.setattr("cspd.demo.run.load_pair", lambda: pytest.fail("the work began"))
    monkeypatch.setattr(pair, "load_pair", lambda: pytest.fail("the work began"))


GENERATE = ["generate", "--labels", "1", "--steps", "1", "--out"]
OUTPUTS = [["demo", "--out"], ["demo", "--json"], ["demo", "--html"], [*GENERATE, "run", "--grid"]]


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_folder_in_the_place_of_an_output_is_noticed_before_the_work(command, tmp_path, capsys, monkeypatch, no_work):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").mkdir()
    assert main([*command, "x.png"]) == 2
    assert (
        capsys.readouterr().err
        == f"cspd {command[0]}: expected {command[-1]} to name a file, found a folder at x.png\n"
    )


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize("there", [False, True])
def test_what_may_not_be_written_is_noticed_before_the_work(command, there, tmp_path, capsys, monkeypatch, no_work):
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "x.png").touch()
    monkeypatch.setattr("cspd.files.os.access", lambda path, mode: path == tmp_path if there else path.name == "x.png")
    assert main([*command, "x.png"]) == 2
    error = capsys.readouterr().err
    assert "that is not writable" in error
    assert error.count("\n") == 1


def test_the_checkpoint_is_no_output(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"weights")
    command = [*GENERATE, str(tmp_path / "run"), "--target", str(path), "--vae", str(path), "--grid", str(path)]
    assert main(command) == 2
    assert "expected different files for --grid and --target" in capsys.readouterr().err
    assert path.read_bytes() == b"weights"


@pytest.mark.parametrize("command", [OUTPUTS[0], *map(slow, OUTPUTS[1:3])])
def test_a_full_disk_destroys_nothing(command, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"before")
    monkeypatch.setattr("cspd.files.os.fsync", full)
    monkeypatch.setattr("cspd.demo.run.ways", lambda *_: [run.Way("target, 2 steps", "target", 2)])
    assert main([*command, "x.png", "--num-images", "4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cspd {command[0]}: ")
    assert "could not write the file (No space left on device)" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.png": b"before"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_that_is_full(tmp_path, capsys):
    (tmp_path / "x.png").symlink_to("/dev/full")
    assert main([*GENERATE, str(tmp_path / "run"), "--grid", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert (tmp_path / "x.png").is_symlink()
    assert os.path.exists("/dev/full")
    with open("/dev/full", "wb") as full:
        done = python(["-m", "cspd", "info"], tmp_path, stdout=full)
    assert (done.returncode, done.stderr) == (2, "cspd info: No space left on device\n")


def test_nobody_reads_what_is_printed(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = python(["-m", "cspd", "info"], tmp_path, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, "")


# --- Ctrl-C ---


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_interrupt_is_one_line_and_status_130(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cspd.demo.run.generate", interrupted)
    assert main(["demo"]) == INTERRUPTED == 130
    assert capsys.readouterr().err == "cspd demo: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_a_command_imports(capsys, monkeypatch):
    imported = builtins.__import__

    def importing(name, *arguments):
        return interrupted() if name.startswith("torch") else imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert main(["demo"]) == INTERRUPTED
    assert capsys.readouterr().err == "cspd demo: interrupted\n"


def test_torch_is_not_imported_before_a_command_runs(tmp_path):
    code = "import sys, cspd.cli; print([name for name in sys.modules if name.startswith(('torch', 'numpy'))])"
    assert python(["-c", code], tmp_path).stdout == "[]\n"


def test_an_interrupt_ends_the_progress_bar(capsys, monkeypatch, tmp_path):
    models = pair.load_pair()
    models[0].decoder_blocks[0].register_forward_pre_hook(interrupted)
    monkeypatch.setattr(pair, "load_pair", lambda: models)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*GENERATE, str(tmp_path)]) == INTERRUPTED
    bar, last, end = capsys.readouterr().err.split("\n")
    assert "0/1 [00:00<?, ?img/s]" in bar
    assert last.startswith("cspd generate: interrupted; ")
    assert end == ""


def test_a_signal_ends_the_process_with_one_line(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "import cspd.demo.run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs behind ignore it\n"
        "def load_pair():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)  # it may come a moment later\n"
        "cspd.demo.run.load_pair = load_pair\n"
        "from cspd.cli import main\n"
        "sys.exit(main(['demo']))\n"
    )
    done = python(["-c", code], tmp_path)
    assert (done.returncode, done.stderr) == (130, "cspd demo: interrupted\n")


# --- threads ---


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("", 1), ("3", 3)])
def test_the_digits_take_one_thread_and_the_caller_keeps_its_own(variable, threads, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("cspd.demo.run.run_demo", lambda *_, **__: seen.append(torch.get_num_threads()))
    monkeypatch.setattr("cspd.generate.run._finish", lambda *_: seen.append(torch.get_num_threads()))
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(["demo"]) == main([*GENERATE, str(tmp_path)]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [threads, threads]
