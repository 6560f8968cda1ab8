"""What the released code calls otherwise: its names are accepted beside those of this package, and mean the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from operator import attrgetter

from .errors import WrongType


def released_names(**names: str) -> Callable[[Callable], Callable]:
    """Decorator: where a call gives the keyword ``released``, ``ours`` is meant, for every ``released="ours"``.

    The signature stays the function's own.

    Raises:
        TypeError: at a call that gives an argument by both of its names, or by its place and the released one.
    """

    def decorate(function: Callable) -> Callable:
        order = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args, **kwargs):
            for released, ours in names.items():
                if released not in kwargs:
                    continue
                if ours in kwargs or ours in order[: len(args)]:
                    raise WrongType(f"expected {ours} or {released}, its name in the released code, got both")
                kwargs[ours] = kwargs.pop(released)
            return function(*args, **kwargs)

        return call

    return decorate


def released_attribute(ours: str) -> property:
    """A read-only attribute that is another one by its name in the released code."""
    return property(attrgetter(ours), doc=f"``{ours}`` by its name in the released code; to set it, set ``{ours}``.")
