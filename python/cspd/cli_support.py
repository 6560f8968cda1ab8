"""What the commands share: values of the command line, errors in one line. Nothing here imports torch."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TextIO

from cspd_kernels.dtype_names import full_name


def positive(text: str) -> int:
    """An int >= 1."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text}")


def tolerance(text: str) -> float | str | None:
    """``parallel_tol``: auto, off or a number in (0, 1)."""
    if text in ("auto", "off"):
        return text if text == "auto" else None
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"expected auto, off or a number in (0, 1), got {text}")


def dtype(*accepted: str) -> Callable[[str], str]:
    """A reader of dtypes: PyTorch's name of what was given, if it is an accepted one."""

    def read(text: str) -> str:
        try:
            return full_name(text, "cspd", accepted)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def labels(text: str) -> list[int]:
    """Class labels with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text}") from None


def one_line(error: BaseException) -> str:
    """An error's message for people, in one line. What cannot be printed is escaped: names may come from a file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print the progress, on stdout or this stream. The work goes on if nothing can be printed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream or sys.stdout, flush=True)
