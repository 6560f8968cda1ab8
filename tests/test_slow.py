"""Which tests ``--slow``, ``-m`` and a GPU run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SLOW, GPU = pytest.mark.slow, pytest.mark.gpu


class Item:
    """What the hook asks of a test."""

    def __init__(self, *marks, file: str = "test_a.py"):
        self.marks, self.skipped, self.path = {mark.name for mark in marks}, None, Path(file)

    def get_closest_marker(self, name):
        return name in self.marks

    def add_marker(self, mark):
        self.skipped = mark.kwargs["reason"]


@pytest.fixture
def collected(request, monkeypatch):
    """``collected(items, gpu, slow, markexpr)``: the reasons that they are skipped for, by the suite's own hook."""
    plugins = request.config.pluginmanager.get_plugins()
    here = Path(__file__).with_name("conftest.py")
    (conftest,) = (p for p in plugins if getattr(p, "__file__", None) and Path(p.__file__) == here)

    def collect(items, gpu=False, slow=False, markexpr=""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        option = SimpleNamespace(slow=slow, markexpr=markexpr)
        conftest.pytest_collection_modifyitems(SimpleNamespace(option=option), items)
        return [item.skipped for item in items]

    return collect


NO_GPU, WITHOUT_SLOW = "no CUDA device", "slow: run with --slow"


@pytest.mark.parametrize(
    ("options", "plain", "slow", "gpu", "both"),
    [
        ({}, None, WITHOUT_SLOW, NO_GPU, NO_GPU),
        ({"slow": True}, None, None, NO_GPU, NO_GPU),
        ({"markexpr": "slow"}, None, None, NO_GPU, NO_GPU),
        ({"markexpr": "gpu", "gpu": True}, None, WITHOUT_SLOW, None, None),
        ({"gpu": True}, None, WITHOUT_SLOW, None, None),
    ],
    ids=str,
)
def test_what_is_skipped(collected, options, plain, slow, gpu, both):
    assert collected([Item(), Item(SLOW), Item(GPU), Item(GPU, SLOW)], **options) == [plain, slow, gpu, both]


def test_the_longest_files_come_first_and_keep_their_order(collected):
    files = ["test_b.py", "test_sweep_kernels.py", "test_a.py", "test_sweep_kernels.py"]
    items = [Item(file=file) for file in files]
    was = list(items)
    collected(items)
    assert items == [was[1], was[3], was[0], was[2]]
