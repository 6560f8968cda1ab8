"""Launches that are looked up rather than bound anew; needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cspd_kernels.backends import why_unavailable

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
if "is older than" in (reason := why_unavailable("triton") or ""):
    pytest.skip(reason, allow_module_level=True)

from triton.runtime.jit import JITFunction

from cspd_kernels import triton_launch

SCRIPT = Path(__file__).parents[1] / "helpers" / "prepared.py"


@pytest.mark.slow
def test_a_prepared_launch_is_the_one_that_triton_binds():
    """Through the real launcher, on a driver that runs nothing, in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "22 compilations" in done.stdout


def test_alignment_is_that_of_every_tensor():
    whole = torch.zeros(64)
    assert whole.data_ptr() % 16 == 0
    assert triton_launch.aligned(whole, whole[4:], whole[8:])
    for first in (1, 2, 3, 5):
        assert not triton_launch.aligned(whole, whole[first:])
        assert not triton_launch.aligned(whole[first:], whole)


class Compiled:
    """Stands in for a kernel and for its compilation."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((grid, args, kwargs))
            return self.result

        return launch


@pytest.fixture
def kernel(monkeypatch):
    class Kernel(Compiled):
        result = Compiled()

    Kernel.result.result = None
    monkeypatch.setattr(triton_launch, "JITFunction", Kernel)
    monkeypatch.setattr(Kernel, "run", triton_launch._RUN, raising=False)
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return Kernel()


def test_a_call_with_a_known_key_goes_to_the_compilation(kernel):
    for programs in (3, 4, 5):
        triton_launch.launch(kernel, programs, (programs, None), {"C": 16, "R": 2}, {"num_warps": 4}, ("key",))
    assert kernel.launches == [((3,), (3, None), {"C": 16, "R": 2, "num_warps": 4})]
    assert kernel.result.launches == [((p, 1, 1), (p, None, 16, 2), {}) for p in (4, 5)]


def test_another_key_or_constant_or_kernel_is_another_compilation(kernel):
    for key, constant in (("a", 1), ("b", 1), ("a", 2)):
        triton_launch.launch(kernel, 1, (), {"C": constant}, {}, key)
    other = type(kernel)()
    triton_launch.launch(other, 1, (), {"C": 1}, {}, "a")
    assert [len(k.launches) for k in (kernel, other, kernel.result)] == [3, 1, 0]


def test_without_a_key_triton_finds_the_compilation(kernel):
    for _ in range(2):
        triton_launch.launch(kernel, 1, (), {}, {})
    assert [len(k.launches) for k in (kernel, kernel.result)] == [2, 0]


def test_who_replaces_the_launcher_sees_every_launch(kernel, monkeypatch):
    for _ in range(2):
        triton_launch.launch(kernel, 1, (), {}, {}, "key")
    monkeypatch.setattr(type(kernel), "run", lambda *_: None)
    triton_launch.launch(kernel, 1, (), {}, {}, "key")
    assert [len(k.launches) for k in (kernel, kernel.result)] == [2, 1]


def test_the_launcher_is_known_as_it_was():
    assert triton_launch._RUN is JITFunction.run
