"""The released code's names of arguments. They are accepted beside those of this package, and mean the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar

from .errors import WrongType

_P = ParamSpec("_P")
_R = TypeVar("_R")


def released_names(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: for every ``released="ours"``, a call may give the keyword ``released`` in place of ``ours``.

    The signature stays the function's own.

    Raises:
        TypeError: at a call that gives an argument by both of its names, or by its place and the released one.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        order = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> _R:
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
