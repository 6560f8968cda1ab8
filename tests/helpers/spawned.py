"""Functions of test modules in processes of their own, which cannot import those modules by name."""

from __future__ import annotations

import importlib.util


def call(path: str, name: str, *args):
    """Call a function of the module in a file."""
    spec = importlib.util.spec_from_file_location("spawned_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)(*args)
