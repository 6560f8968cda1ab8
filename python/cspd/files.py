"""Writing results: refused before the work where it cannot succeed, and never half done."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BESIDE = ".cspd-"  # what names of unfinished files begin with; a killed process leaves them


def check_output(path: Path, option: str) -> None:
    """Raise where :func:`write_file` could not write ``path``, as far as can be known without writing.

    Args:
        option: the name of the option that named the file, for the message.

    Raises:
        OSError: it is a folder, its folder does not exist, or one of them may not be written.
    """
    target = _target(path)
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"expected {option} to name a file, found a folder at {path}")
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder for {path.name} to exist, found none at {folder}")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"expected a writable file for {option}, found one that is not writable at {path}")
    if _replaceable(target) and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"expected a writable folder for {option}, found one that is not writable at {folder}")


def write_file(path: Path, data: bytes) -> None:
    """Write beside ``path`` and rename: what was there stays whole until the new file is. A link is followed.

    Raises:
        OSError: it could not be written; nothing has changed, and nothing is left beside it.
    """
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the place of ``path`` when the block has ended well: :func:`write_file` in pieces."""
    target = _target(path)
    beside = target.parent / f"{BESIDE}{secrets.token_hex(8)}"
    try:
        if not _replaceable(target):  # a device or a pipe
            with target.open("wb") as file:
                yield file
            return
        try:
            with beside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                beside.chmod(target.stat().st_mode & 0o7777)
            beside.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(target), str(beside)):  # the caller's own
            raise
        raise _could_not(error, path) from error


def append_line(path: Path, text: str) -> None:
    """Add a line to a file of notes, which is made where there is none.

    Raises:
        OSError: it could not be written, or not whole.
    """
    try:
        with path.open("a") as file:
            file.write(f"{text}\n")
    except OSError as error:
        raise _could_not(error, path) from error


def _could_not(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"could not write the file ({error.strerror})", str(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _target(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _replaceable(target: Path) -> bool:
    return target.is_file() or not target.exists()
