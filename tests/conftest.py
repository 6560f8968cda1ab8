"""Fixtures that every test directory shares."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from building import emulation

from cspd.models import DiffLoss, GaussianDiffusion
from cspd_kernels import DiffusionHead, Schedule
from cspd_kernels.backends import interpreting, why_unavailable
from cspd_kernels.cuda_support import emulated
from cspd_kernels.testing import randomize_

# The models here are small: more threads only get in each other's way, above all on a busy machine. All processes that
# are started from here inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Without a device the Triton kernels run in Triton's interpreter. It is chosen once and for all when a kernel is
# defined, so before the first test module imports Triton. Processes that tests start inherit the choice. The CUDA
# kernels run in their emulation, which takes half a minute to compile the first time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "CSPD_CUDA_EMULATION" not in os.environ and (module := emulation()):
        os.environ["CSPD_CUDA_EMULATION"] = str(module)
if interpreting() and why_unavailable("triton") is None:
    from interpreter import change_the_language_once_a_launch

    change_the_language_once_a_launch()

MOST_PROCESSES = 4  # each takes about a gigabyte, and all share the GPU where there is one


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Folders are tested by a process a core, and each file by one of them, so that what a file prepares is prepared
    once. Files that are named are tested in this process. ``-n 8`` or ``-n 0`` says otherwise.
    """
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # xdist's own way to say it
    if config.option.dist == "no":
        config.option.dist = "loadfile"
    config.option.loadscopereorder = False  # by the time that files take, not by how many tests they have
    paths = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES) if all(path.is_dir() for path in paths) else 0


# Files that take the longest come first, so that the processes end together.
LONGEST = (
    *("test_cuda_compile", "test_triton_denoise", "test_sweep_kernels", "test_verdict_kernels", "test_demo"),
    *("test_cli", "test_strict", "test_denoise_kernels", "test_triton_heads", "test_states_faults", "test_typing"),
    *("test_speculative", "test_parallel_steps", "test_packaging", "test_benchmarks", "test_graphs_of_chains"),
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    """The longest files first. Tests marked gpu are skipped without a GPU. Those marked slow are skipped without
    ``--slow``, unless they are marked gpu or ``-m`` names them.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    no_gpu = not torch.cuda.is_available()
    no_slow = not config.option.slow and "slow" not in config.option.markexpr
    for item in items:
        if item.get_closest_marker("gpu"):
            if no_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif no_slow and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def automatic_backend(monkeypatch):
    """No test depends on the caller's choices of a backend and of a kernel."""
    monkeypatch.delenv("CSPD_BACKEND", raising=False)
    monkeypatch.delenv("CSPD_PERSISTENT_MAX_TOKENS", raising=False)
    monkeypatch.delenv("CSPD_PARALLEL", raising=False)


@pytest.fixture
def device_of():
    """``device_of(backend)``: where it runs here: on the GPU; else on the CPU, its kernels interpreted or emulated."""

    def device(backend):
        if reason := why_unavailable(backend):
            pytest.skip(reason)
        on_cpu = {"torch": not torch.cuda.is_available(), "triton": interpreting(), "cuda": emulated()}
        return torch.device("cpu" if on_cpu[backend] else "cuda")

    return device


@pytest.fixture
def triton_device(device_of):
    """Where the Triton kernels run here."""
    return device_of("triton")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """A backend; unless parametrised otherwise (indirectly), each of those with kernels."""
    return request.param


@pytest.fixture
def kernel_device(backend, device_of):
    """Where the backend runs here."""
    return device_of(backend)


@pytest.fixture
def make_diffloss():
    """Build a small DiffLoss with non-trivial weights; ``schedule`` is one of cosine, linear, mild.

    An untrained head under cosine or linear blows x up by 1/sqrt(acp), which hides the noise of the
    last steps; under ``mild`` x stays near 1, so that every step counts. ``scale`` is that of the
    parameters that start as constants, among them the modulations and the last layer.
    """

    def make(
        schedule="mild", depth=2, *, channels=5, cond_channels=7, width=48, steps=None, seed=0, scale=0.02, **options
    ):
        steps = steps or {"cosine": 100, "linear": 7, "mild": 12}[schedule]
        kind = "linear" if schedule == "mild" else schedule
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = DiffLoss(channels, cond_channels, depth, width, steps, schedule=kind, **options)
        if schedule == "mild":
            module.gen_diffusion = GaussianDiffusion(
                Schedule.diffusion(np.linspace(0.01, 0.1, steps), 3 * np.arange(steps))
            )
        return randomize_(module, seed, scale)

    return make


@pytest.fixture
def make_head(make_diffloss, kernel_device):
    """Build a small head for the backend's kernels, whose every layer has its share in the result."""

    def make(dtype=torch.float32, schedule="mild", *, depth=1, width=48, steps=2, **options):
        module = make_diffloss(schedule, depth, width=width, steps=steps, scale=width**-0.5, **options)
        return DiffusionHead.from_module(module.to(kernel_device), dtype=dtype)

    return make


class _Modules:
    """The modules of a folder as attributes, imported when they are asked for."""

    def __getattr__(self, name: str):
        return __import__(name)  # tests replace importlib's function


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of the folder of benchmarks, by name."""
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield _Modules()
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def python_philox():
    """Philox 4x32-10 in Python integers, written from the paper: ``f(key, counter) -> 4 words``."""

    def philox(key, counter):
        (k0, k1), (c0, c1, c2, c3) = key, counter
        for _ in range(10):
            hi0, lo0 = divmod(0xD2511F53 * c0, 1 << 32)
            hi1, lo1 = divmod(0xCD9E8D57 * c2, 1 << 32)
            c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
            k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
        return c0, c1, c2, c3

    return philox


@pytest.fixture
def head(make_diffloss):
    """The packed head of a small mild DiffLoss."""
    return DiffusionHead.from_module(make_diffloss("mild", 2))
