"""Triton's interpreter, with less to do: the same language for every call of a launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


def change_the_language_once_a_launch() -> None:
    """The interpreter looks through all of ``triton.language`` and puts its own functions in the place of Triton's, at
    every launch and again at every call of a device function: half of the time of small kernels. Those further times
    change nothing, and are left out. A Triton that works otherwise is left alone.
    """
    names = ("_patch_lang", "_LangPatchScope", "GridExecutor")
    if not all(hasattr(interpreter, name) for name in names):
        return
    _look_types_up_once()
    change, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    changed: set[str] = set()  # in the launch that runs; after it the language is Triton's again

    def change_once(function: Callable):
        modules = {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= changed:
            return interpreter._LangPatchScope()
        scope = change(function)
        changed.update(modules)
        return scope

    def launch_anew(self, *args, **kwargs):
        changed.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            changed.clear()

    interpreter._patch_lang = change_once
    interpreter.GridExecutor.__call__ = launch_anew


def _look_types_up_once() -> None:
    """The interpreter makes a table of all types at every operation."""
    if not hasattr(interpreter, "_get_np_dtype"):
        return
    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)

    def np_dtype(kind):
        kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return look_up(kind) if isinstance(kind, tl.pointer_type) else known(kind)

    interpreter._get_np_dtype = np_dtype
