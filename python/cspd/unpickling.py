"""What ``torch.load(weights_only=True)`` takes of training checkpoints beside tensors, and why it refuses others."""

from __future__ import annotations

import argparse
import contextlib
import re
import threading
from _codecs import encode
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

_lock = threading.Lock()


@contextlib.contextmanager
def plain_values_allowed() -> Iterator[None]:
    """Allow the unpickler the training arguments (a Namespace) and NumPy's numbers and arrays of numbers.

    PyTorch's list is one for the whole process: what is added here goes again, and what was there stays.
    """
    with _lock:
        added = [value for value in (argparse.Namespace, encode, *_NUMPY) if value not in get_safe_globals()]
        with getattr(torch.serialization, "safe_globals", _allowed)(added):
            yield


@contextlib.contextmanager
def _allowed(added: list) -> Iterator[None]:
    """``torch.serialization.safe_globals`` for PyTorch 2.4, which lacks it."""
    add_safe_globals(added)
    try:
        yield
    finally:
        kept = [value for value in get_safe_globals() if value not in added]
        clear_safe_globals()
        add_safe_globals(kept)


def _named(function: Callable, module: str) -> Callable:
    """The function as pickles of either NumPy, 1 or 2, name it."""

    def call(*args):
        return function(*args)

    call.__module__, call.__name__, call.__qualname__ = module, function.__name__, function.__name__
    return call


_NUMPY = (
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdFD"},  # numbers: an array of objects or of records is refused
    *(
        _named(value.__reduce__()[0], f"numpy.{core}.multiarray")
        for value in (np.float64(0), np.zeros(0))
        for core in ("core", "_core")
    ),
)


def why_unreadable(error: Exception) -> str:
    """One plain line for what ``torch.load(weights_only=True)`` raised, whose own messages are pages in colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if found := re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", text):
        name = found[1] or found[2]
        kind = "a NumPy value that is no number, " if name.startswith("numpy.") else ""
        return (
            f"it holds {kind}{name}, which weights_only loading refuses because it may run code: "
            "save the model's state dict alone"
        )
    found = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    reason = (found[1] if found else next(iter(text.splitlines()), "")).split(". This is an internal miniz")[0].strip()
    if isinstance(error, (KeyError, EOFError)):  # whose message is a bare number, or nothing
        reason = ""
    return f"it was not written by torch.save, or is damaged{reason and f' ({reason})'}"
