"""What is written takes the place of what was there, whole or not at all."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from cspd.files import check_output, write_file


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_file(tmp_path / "new", b"data")
    assert (tmp_path / "new").read_bytes() == b"data"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_older_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a longer text")
    path.chmod(0o640)
    write_file(path, b"data")
    assert path.read_bytes() == b"data"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_followed(tmp_path, there):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    if there:
        target.write_bytes(b"before")
    link.symlink_to(target)
    check_output(link, "--out")
    write_file(link, b"data")
    assert link.is_symlink()
    assert target.read_bytes() == b"data"


def test_a_link_into_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "no folder" / "target")
    with pytest.raises(FileNotFoundError, match=r"expected a folder for link to exist, found none at .*no folder"):
        check_output(tmp_path / "link", "--out")


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for call in (check_output, write_file):
        with pytest.raises(OSError, match="symbolic links"):
            call(tmp_path / "a", b"--out")
    assert (tmp_path / "a").is_symlink()


def test_a_pipe_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_file(tmp_path / "pipe", b"data")
    reader.join()
    assert read == [b"data"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_what_could_not_be_finished_leaves_nothing(tmp_path, monkeypatch, stop):
    (tmp_path / "file").write_bytes(b"before")

    def broken(descriptor):
        assert len(list(tmp_path.iterdir())) == 2  # beside it
        raise stop

    monkeypatch.setattr("cspd.files.os.fsync", broken)
    with pytest.raises(stop):
        write_file(tmp_path / "file", b"data")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"before")]
