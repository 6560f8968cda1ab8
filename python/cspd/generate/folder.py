"""The folder of a run: images by index, and run.json, which says what they were made with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load

from ..errors import InvalidInput
from ..files import BESIDE, write_file
from .images import is_whole_png

RUN, BATCHES = "run.json", "batches.jsonl"
_OURS = re.compile(r"\d{6,}\.(png|safetensors)|run\.json|batches(-\d+)?\.jsonl")
_UNFINISHED = re.compile(rf"{re.escape(BESIDE)}[0-9a-f]{{16}}")


class RunFolder:
    """Names in the folder, and what is there already.

    Attributes:
        known: what run.json says, {} where there is none yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict = {}
        self._seen = False  # there was a folder when it was opened: nobody else has begun in it since
        self._lock: int | None = None

    def image(self, number: int) -> Path:
        """Where an image is written."""
        return self.path / f"{number:06d}.png"

    def latents(self, number: int) -> Path:
        """Where an image's latents are written."""
        return self.path / f"{number:06d}.safetensors"

    def owns(self, path: Path) -> bool:
        """Whether a path is one of the folder's own names."""
        real = Path(os.path.realpath(path))
        return real.parent == self.path.resolve() and bool(_OURS.fullmatch(real.name))

    def check(self) -> None:
        """Raise where nothing could be written; nothing is made."""
        there = self.path
        while not there.exists() and not there.is_symlink() and there != there.parent:
            there = there.parent
        if there.is_symlink() and not there.exists():
            raise NotADirectoryError(f"expected --out to name a folder, found a broken link at {there}")
        if not there.is_dir():
            raise NotADirectoryError(f"expected --out to name a folder, found a file at {there}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"expected a writable folder for --out, found one that is not writable at {there}")

    def open(self) -> None:
        """Take the folder for this run, and read what an earlier one has left; nothing where it does not exist.

        Raises:
            ValueError: another run is at work there, or there are images and no word what they were made with.
        """
        if not self.path.is_dir():
            return
        self._take()
        self._seen = True
        try:
            text = (self.path / RUN).read_text()
        except FileNotFoundError:
            if self._used():
                raise InvalidInput(
                    f"expected a new folder for --out, or the folder of an earlier run: {self.path} holds images but "
                    f"no {RUN}"
                ) from None
            return
        try:
            self.known = json.loads(text)
            dict(self.known["settings"]), list(self.known["starts"]), list(self.known["latent_size"])
            self.known["image_size"] = self.known["image_size"] and tuple(self.known["image_size"])
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput(
                f"expected the settings of an earlier run in {self.path / RUN}, could not read them"
            ) from error

    def create(self) -> None:
        """Make the folder, and clear away what killed processes left unfinished.

        Raises:
            ValueError: another run is at work there, or has begun there since the folder was opened.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if not self._seen and self._used():
            raise InvalidInput(f"expected a new folder for --out, but another run has just begun in {self.path}")
        for path in self.path.glob(f"{BESIDE}*"):
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _used(self) -> bool:
        """Whether a run has left anything here."""
        return any(_OURS.fullmatch(name) for name in os.listdir(self.path))

    def _take(self) -> None:
        """Locked as long as this process lives; where the file system or the platform has no locks, it is not."""
        if self._lock is not None:
            return
        try:
            import fcntl
        except ImportError:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InvalidInput(f"expected one run at a time in {self.path}, but another one is working there") from None
        except OSError:
            pass

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def missing_images(self, count: int, size: tuple[int, int]) -> list[int]:
        """The images that are not there whole; (height, width) is what they should have."""
        return [i for i in range(count) if not _is_whole(self.image(i), lambda data: is_whole_png(data, *size))]

    def missing_latents(self, count: int, size: list[int]) -> list[int]:
        """The images whose latents (c, h, w) are not there whole."""
        return [i for i in range(count) if not _is_whole(self.latents(i), lambda data: _latent_size(data) == size)]

    def write_run(self, run: dict) -> None:
        """Write run.json."""
        write_file(self.path / RUN, (json.dumps(run, indent=1) + "\n").encode())

    def records_of(self, rank: int) -> Path:
        """Where a process notes the batches that it has made."""
        return self.path / f"batches-{rank}.jsonl"

    def merge_records(self) -> list[dict]:
        """All notes of batches, in order, put into one file; of a batch that was made twice the later ones."""
        parts = sorted(self.path.glob("batches-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        records = {}
        for path in [self.path / BATCHES, *parts]:
            with contextlib.suppress(FileNotFoundError):
                for line in path.read_text().splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a crash has cut
                        record = json.loads(line)
                        records[record["batch"]] = record
        merged = [records[batch] for batch in sorted(records)]
        if parts:
            write_file(self.path / BATCHES, "".join(f"{json.dumps(record)}\n" for record in merged).encode())
        for path in parts:
            path.unlink()
        return merged


def check_space(needs: Iterable[tuple[Path, int]]) -> None:
    """Raise where a disk has less free space than is needed.

    Args:
        needs: (where, bytes); the folder need not exist yet.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for path, count in needs:
        while not path.is_dir():
            path = path.parent
        device = path.stat().st_dev
        disks[device] = (path, disks.get(device, (path, 0))[1] + count)
    for path, count in disks.values():
        free = shutil.disk_usage(path).free
        if count > free:
            raise OSError(f"expected {_bytes(count)} of free space at {path}, found {_bytes(free)}")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _is_whole(path: Path, looks: Callable[[bytes], bool]) -> bool:
    try:
        return looks(path.read_bytes())
    except FileNotFoundError:
        return False


def _latent_size(data: bytes) -> list[int] | None:
    try:
        tensors = load(data)
    except SafetensorError:
        return None
    return list(tensors["latents"].shape) if set(tensors) == {"label", "latents"} else None
