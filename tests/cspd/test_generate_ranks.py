"""`cspd generate` in several processes: byte-equal files, whoever makes them and whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_ranks
from slow import slow

from cspd.cli import main
from cspd.generate.ranks import Ranks

if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

COUNT = 10
DIGITS = ["generate", "--num-images", str(COUNT), "--steps", "4", "--gamma", "2", "--seed", "5"]
NAMES = [f"{number:06d}.png" for number in range(COUNT)]


def contents(folder):
    """The images' bytes."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The images of one process, undisturbed: folders by batch size."""
    folders = {size: tmp_path_factory.mktemp("alone") / str(size) for size in (1, 7)}
    for size, folder in folders.items():
        assert main([*DIGITS, "--batch-size", str(size), "--out", str(folder)]) == 0
        assert sorted(contents(folder)) == NAMES
    return folders


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("ranks", [slow(1), 2, slow(3)])
def test_any_number_of_processes_gives_the_same_bytes(ranks, size, alone, tmp_path):
    out = tmp_path / "out"
    extra = ["--npz", str(out / "all.npz"), "--grid", str(tmp_path / "grid.png")]
    assert run_ranks(ranks, [*DIGITS, "--batch-size", str(size), "--out", str(out), *extra]) == [(0, "")] * ranks
    assert contents(out) == contents(alone[size])
    run = json.loads((out / "run.json").read_text())
    assert run["statistics"]["batches"] == -(-COUNT // size)
    assert run["starts"][0]["ranks"] == ranks
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, "all.npz", "batches.jsonl", "run.json"])
    with np.load(out / "all.npz") as arrays:
        assert arrays["arr_0"].shape == (COUNT, 8, 8, 3)


def test_between_batch_sizes_images_agree_up_to_rounding(alone):
    one, seven = ([np.asarray(Image.open(alone[size] / name)).astype(int) for name in NAMES] for size in (1, 7))
    apart = np.abs(np.stack(one) - np.stack(seven))
    assert apart.max() <= 1  # grey level
    assert (apart > 0).sum() <= apart.size // 100  # today none of the 1920


@pytest.mark.parametrize(("ranks", "size", "died"), [(3, 1, {1: 2}), (2, 7, {0: 1})])
def test_a_killed_rank_is_made_up_for_by_a_second_run(ranks, size, died, alone, tmp_path):
    command = [*DIGITS, "--batch-size", str(size), "--out", str(tmp_path)]
    ended = run_ranks(ranks, command, die=died)
    lines = [line for _, error in ended for line in error.splitlines()]
    assert [code for code, _ in ended] == [-9 if rank in died else 2 for rank in range(ranks)]
    assert [line for line in lines if line.startswith("cspd")] == [  # torch's own words on connections aside
        "cspd generate: a process of this run ended before its work was done; what was written stays; run the same "
        "command again to make the rest"
    ]
    there = contents(tmp_path)
    assert len(there) < COUNT  # and perhaps none: who is killed may have been the first to have one
    assert there.items() <= contents(alone[size]).items()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in there}
    assert main(command) == 0
    assert contents(tmp_path) == contents(alone[size])
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in there} == before  # only what was missing
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [(start["missing"], start["ranks"]) for start in starts] == [(COUNT, ranks), (COUNT - len(there), 1)]


def test_one_ranks_failure_ends_all_with_its_error(alone, tmp_path):
    command = [*DIGITS, "--batch-size", "1", "--out", str(tmp_path / "out")]
    ended = run_ranks(2, command, most_bytes={1: 600})  # enough for an image, not for the notes of two batches
    assert [code for code, _ in ended] == [2, 2]
    (line,) = [line for _, error in ended for line in error.splitlines() if line.startswith("cspd")]
    assert line == (
        f"cspd generate: rank 1: {tmp_path}/out/batches-1.jsonl: could not write the file (File too large); what was "
        "written stays; run the same command again to make the rest"
    )
    assert 0 < len(contents(tmp_path / "out")) < COUNT
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(alone[1])


def test_wrong_input_is_told_once(tmp_path):
    out = tmp_path / "out"
    ended = run_ranks(2, ["generate", "--labels", "3,12", "--out", str(out)])
    assert ended == [(2, "cspd generate: expected labels in 0..9, got 12\n"), (2, "")]
    assert not out.exists()


def test_a_start_again_by_torchrun_sees_no_failure_of_the_one_before(monkeypatch):
    """One store for all its starts, as --max-restarts has it."""
    store, groups = torch.distributed.HashStore(), []
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cspd.generate.ranks.dist.rendezvous", lambda *_: iter([(store, 0, 2)]))
    monkeypatch.setattr("cspd.generate.ranks.dist.init_process_group", lambda *_, store, **__: groups.append(store))
    monkeypatch.setattr("cspd.generate.ranks.dist.destroy_process_group", lambda: None)
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        with pytest.raises(RuntimeError, match="rank 0: no disk"), Ranks() as ranks:
            ranks.check()
            ranks.add(3)
            assert ranks.done() == 3
            groups[-1].set("address of rank 0", start)
            raise OSError("no disk")
    assert [group.get("address of rank 0") for group in groups] == [b"0", b"1"]


@pytest.mark.slow
def test_torchrun(alone, tmp_path):
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cspd"]
    done = subprocess.run(
        [*torchrun, *DIGITS, "--batch-size", "7", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: {COUNT} images, {COUNT} made now")
    assert contents(out) == contents(alone[7])
