"""The errors that both packages raise for a caller to catch.

All of them are a :class:`CspdError`. Each is also the built-in error that fits, so ``except ValueError`` works too::

    CspdError
        BackendUnavailable   RuntimeError   the backend asked for cannot serve this call or machine
        CallError            RuntimeError   the arguments are valid, but the call cannot be made now, or overflowed
        MissingPackage       RuntimeError   an optional package is not installed
        InvalidInput         ValueError     an argument or an environment variable has a bad value
            WrongType        TypeError      an argument has the wrong type
                WrongDtype                  a dtype is unknown, or not one that this place accepts
        UnsupportedModel     ValueError     a model or its head computes something that the kernels do not cover
            NotAModel        TypeError      the object is not such a model at all
        CheckpointError      ValueError     a file of weights does not hold what was asked for

Files that are missing or may not be read stay ``OSError``, as Python's own functions raise them.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CallError",
    "CheckpointError",
    "CspdError",
    "InvalidInput",
    "MissingPackage",
    "NotAModel",
    "UnsupportedModel",
    "WrongDtype",
    "WrongType",
]


class CspdError(Exception):
    """The base class of all errors here."""


class BackendUnavailable(CspdError, RuntimeError):
    """The backend that was asked for cannot serve this call on this machine. The message says why."""


class CallError(CspdError, RuntimeError):
    """The arguments are valid, but the call cannot be made now, or its arithmetic overflowed."""


class MissingPackage(CspdError, RuntimeError):
    """An optional package is not installed. The message says what installs it."""


class InvalidInput(CspdError, ValueError):
    """An argument or an environment variable has a bad value. The message says what was expected."""


class WrongType(InvalidInput, TypeError):
    """An argument has the wrong type."""


class WrongDtype(WrongType):
    """A dtype is unknown, or not one that this place accepts. The message lists those that it does."""


class UnsupportedModel(CspdError, ValueError):
    """A model or its head computes something that the kernels do not cover."""


class NotAModel(UnsupportedModel, TypeError):
    """The object is not such a model, head or diffusion object at all. The message says what it lacks."""


class CheckpointError(CspdError, ValueError):
    """A file of weights does not hold what was asked for, or is damaged."""
