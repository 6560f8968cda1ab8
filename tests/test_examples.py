"""Every public name, and every public method of a public class, has an example in its docstring, and it runs."""

from __future__ import annotations

import doctest
import inspect
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import cspd
import cspd_kernels

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def public(package) -> Iterator[tuple[str, object]]:
    """(dotted name, object) of all that a package shows, and of its classes' methods."""
    for name in package.__all__:
        value = getattr(package, name)
        dotted = f"{package.__name__}.{name}"
        if isinstance(value, types.ModuleType):
            yield from public(value)
            continue
        yield dotted, value
        if inspect.isclass(value):
            yield from methods(dotted, value)


def methods(dotted: str, kind: type) -> Iterator[tuple[str, object]]:
    """What a class defines itself, and not its bases; properties are told of in the class."""
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        called = name == "forward" and issubclass(kind, torch.nn.Module)  # the class's example calls the object
        if not name.startswith("_") and inspect.isfunction(function) and not called:
            yield f"{dotted}.{name}", function


NAMES = dict(item for package in (cspd, cspd_kernels) for item in public(package))
ONCE = {id(value): name for name, value in reversed(NAMES.items())}  # of what has several names, the first


def examples(value: object) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")


@pytest.mark.parametrize("name", sorted(ONCE.values()))
def test_the_example_runs(name, capsys):
    value = NAMES[name]
    found = examples(value)
    assert found, f"{name} has no example"
    document = inspect.getdoc(value)
    test = doctest.DocTestParser().get_doctest(document, {}, name, inspect.getsourcefile(inspect.unwrap(value)), 0)
    torch.manual_seed(0)
    np.random.seed(0)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert result.failed == 0, "".join(report)


def test_an_example_that_is_wrong_fails():
    def wrong():
        """>>> 1 + 1
        3
        """

    test = doctest.DocTestParser().get_doctest(inspect.getdoc(wrong), {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1


def test_methods_are_looked_at():
    assert {"cspd_kernels.Schedule.ddim", "cspd.SpecDecodeRunner.run", "cspd.models.MAR.sample_tokens"} <= set(NAMES)
