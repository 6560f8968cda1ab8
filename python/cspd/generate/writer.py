"""Files of a batch, written by a thread of their own while the next batch is made."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from safetensors.torch import save

from ..files import append_line, write_file
from .folder import RunFolder
from .images import to_png
from .models import Batch
from .settings import Settings


class Writer:
    """A context manager: at its end all is written. One batch at a time; the next one waits for it.

    Args:
        images, latents: numbers of those to write; the others of a batch are there already, or padding.
        rank: whose notes these are.
    """

    def __init__(self, folder: RunFolder, settings: Settings, images: set[int], latents: set[int], rank: int):
        self._folder, self._settings, self._rank = folder, settings, rank
        self._images, self._latents = images, latents
        self._thread = ThreadPoolExecutor(1, "cspd-writer")
        self._files = ThreadPoolExecutor(4, "cspd-files")  # compressing holds no lock of Python's
        self._pending: Future | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)  # what was made stays, whatever stopped the run
            self._files.shutdown(wait=True)

    def put(self, batch: Batch) -> int:
        """Have a batch written. Returns how many images of the one before it were."""
        before = self.wait()
        self._pending = self._thread.submit(self._write, batch)
        return before

    def wait(self) -> int:
        """Wait for the last batch. Returns how many images of it were written.

        Raises:
            OSError: it could not be.
        """
        pending, self._pending = self._pending, None
        return 0 if pending is None else pending.result()

    def _write(self, batch: Batch) -> int:
        start, first = time.perf_counter(), batch.number * len(batch.latents)
        written = sum(self._files.map(lambda i: self._write_image(first + i, i, batch), range(len(batch.latents))))
        record = {
            "batch": batch.number,
            "written": written,
            "rank": self._rank,
            "statistics": batch.statistics,
            "seconds": batch.seconds | {"write": time.perf_counter() - start},
        }
        append_line(self._folder.records_of(self._rank), json.dumps(record))
        return written

    def _write_image(self, number: int, i: int, batch: Batch) -> bool:
        """Write what is missing of an image, the batch's i-th. Returns whether anything was."""
        if number in self._images:
            write_file(self._folder.image(number), to_png(batch.pixels[i]))
        if number in self._latents:
            label = torch.tensor(self._settings.label(number))
            write_file(self._folder.latents(number), save({"latents": batch.latents[i].contiguous(), "label": label}))
        return number in self._images or number in self._latents
