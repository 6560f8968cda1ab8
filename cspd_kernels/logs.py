"""What the packages log, by the loggers "cspd" and "cspd_kernels".

They are ordinary loggers. Nothing is set up unless ``CSPD_LOG_LEVEL`` says so, and an application that configures
logging keeps the last word. Without any setup Python prints warnings and errors to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Protocol

VARIABLE = "CSPD_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOGGERS = ("cspd", "cspd_kernels")
_logger = logging.getLogger("cspd_kernels")


class _Device(Protocol):
    @property
    def type(self) -> str: ...


class _LogOnce:
    """Log what holds for every later call, too. A process is told each message once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._causes: list[str] = []

    def __call__(self, message: str, *, slow_on: _Device | None = None, cause: str = "") -> None:
        """Log a message at INFO, or at WARNING where it slows a CUDA device down.

        Args:
            slow_on: the device that takes a slower path. A CPU has no faster path.
            cause: why. A second message of one cause is no warning any more.
        """
        if message in self._told:
            return
        with self._lock:
            if message in self._told:  # by another thread, meanwhile
                return
            self._told.add(message)
            slow = slow_on is not None and slow_on.type == "cuda"
            known = bool(cause) and any(cause in other for other in self._causes)
            if slow and cause:
                self._causes.append(cause)
        _logger.log(logging.WARNING if slow and not known else logging.INFO, "%s", message)

    def cache_clear(self) -> None:
        """Forget what was told, for tests."""
        with self._lock:
            self._told.clear()
            self._causes.clear()


log_once = _LogOnce()


class _ToStderr(logging.StreamHandler):  # type: ignore[type-arg]  # not subscriptable in Python 3.10
    """Prints what no other handler prints: where the application adds a handler later, nothing is printed twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if _own_handlers(record.name.partition(".")[0]):
            return
        self.stream = sys.stderr  # as it is now
        super().emit(record)


def _own_handlers(name: str) -> list[logging.Handler]:
    """The application's handlers of a logger."""
    handlers = [*logging.getLogger(name).handlers, *logging.getLogger().handlers]
    return [handler for handler in handlers if not isinstance(handler, (_ToStderr, logging.NullHandler))]


def set_up() -> None:
    """Follow ``CSPD_LOG_LEVEL``: DEBUG, INFO, WARNING, ERROR, CRITICAL or a number. Unset or empty changes nothing.

    The level is set, unless the application has set one. One handler prints to stderr where the application has none.
    A value that means nothing is logged as a warning, and ignored: an import never fails by it.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return
    if not text.isdecimal() and text.upper() not in LEVELS:
        _logger.warning("expected %s as %s or a number, got %r: it is ignored", VARIABLE, ", ".join(LEVELS), text)
        return
    level = int(text) if text.isdecimal() else text.upper()
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    for logger in map(logging.getLogger, LOGGERS):
        if logger.level == logging.NOTSET:
            logger.setLevel(level)
        if not any(isinstance(other, _ToStderr) for other in logger.handlers):
            logger.addHandler(handler)
