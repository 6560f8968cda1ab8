"""Graphs of the benchmarks keep what they use; the loop that one graph can hold; one block beside its products."""

from __future__ import annotations

import contextlib
import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead
from cspd_kernels.testing import random_inputs, randomize_, relative_error

CPU = torch.device("cpu")


def fails(*_, **__):
    raise RuntimeError("made of wood")


class FakeGraph:
    """Replays by calling what was captured last: a graph that holds no reference to it."""

    replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def fake_capture(monkeypatch):
    """``torch.cuda`` as far as a capture needs it; what is captured runs once more."""
    fake = {"device": lambda device: contextlib.nullcontext(), "synchronize": lambda *_: None, "CUDAGraph": FakeGraph}
    fake["graph"] = lambda graph: contextlib.nullcontext()
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cleared = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(True), raising=False)
    return cleared


def test_a_replay_keeps_what_its_graph_reads_and_writes(benchmarks, fake_capture):
    def made():
        read, written, argument = torch.ones(3), torch.zeros(3), torch.ones(3)
        results = []

        def function(x):
            written.copy_(read)
            results.append(weakref.ref(result := x + read))
            return result

        replay = benchmarks.common.captured(function, CPU, [argument])
        return replay, [weakref.ref(read), weakref.ref(written), weakref.ref(replay.static[0]), results[-1]]

    replay, references = made()
    gc.collect()
    assert all(reference() is not None for reference in references)
    assert replay(torch.full((3,), 2.0)) is references[-1]()
    assert torch.equal(references[2](), torch.full((3,), 2.0))  # copied in before the replay
    assert replay.graph.replays == 1
    with pytest.raises(ValueError):
        replay(torch.ones(3), torch.ones(3))
    assert len(fake_capture) == 2  # workspaces, before and after
    del replay
    gc.collect()
    assert all(reference() is None for reference in references)


def test_the_products_alone_and_the_copies_live_as_long_as_their_replays(benchmarks, fake_capture, monkeypatch):
    alive = weakref.WeakSet()
    for name in ("empty_like", "randn"):
        make = getattr(torch, name)

        def kept(*arguments, make=make, **options):
            alive.add(value := make(*arguments, **options))
            return value

        monkeypatch.setattr(torch, name, kept)
    head = DiffusionHead.from_module(DiffLoss(4, 8, 1, 32, 2))
    alive.clear()
    replay = benchmarks.common.captured(benchmarks.baselines.library_products(head, 2), CPU)
    gc.collect()
    assert len(alive) >= 2
    replay()
    source, before = torch.ones(4), len(alive)
    replays = benchmarks.judging._replays(partial(benchmarks.judging._copy, torch.empty_like(source)), [(source,)], CPU)
    gc.collect()
    assert len(alive) == before + 1
    replays(source)


# --- the loop in one graph ---


class Devices(TorchDispatchMode):
    """The types of devices that results of operations lie on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {leaf.device.type for leaf in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(leaf)}
        return out


def loop(steps=9):
    torch.manual_seed(0)
    return randomize_(DiffLoss(4, 8, 2, 32, steps), 1).eval()


def test_the_loop_for_one_graph_computes_what_the_eager_one_does(benchmarks):
    module, baselines = loop(), benchmarks.baselines
    inputs = random_inputs(DiffusionHead.from_module(module), 5, 0)
    expected = baselines.eager_denoise(module, *inputs)
    assert relative_error(baselines.graphable_denoise(module, torch.float32)(*inputs), expected) < 1e-6
    narrow = baselines.graphable_denoise(module, torch.bfloat16)(*inputs)
    assert narrow.dtype == torch.float32
    assert 1e-6 < relative_error(narrow, expected) < 5e-2
    for size in (256, 31):
        embedder = benchmarks.baselines.TimestepEmbedder(32, size)
        t = torch.tensor([0, 1, 37, 999])
        assert torch.equal(baselines.EmbeddingOnDevice(embedder)(t), embedder(t))
    assert all(p.dtype == torch.float32 for p in module.parameters())  # of a copy


def test_the_loop_for_one_graph_takes_nothing_from_the_host(benchmarks):
    module = loop().to("meta")
    inputs = [value.to("meta") for value in (torch.ones(5, 8), torch.ones(5, 4), torch.ones(9, 5, 4))]
    function = benchmarks.baselines.graphable_denoise(module, torch.bfloat16)
    with Devices() as devices:
        function(*inputs)
    assert devices.seen == {"meta"}
    with Devices() as devices:
        module.net.time_embed(torch.ones(5, device="meta"))
    assert devices.seen == {"meta", "cpu"}  # which is why a graph cannot hold the other


def test_the_baselines_of_a_gpu(benchmarks, fake_capture):
    module, denoising, gpu = loop(), benchmarks.denoising, SimpleNamespace(type="cuda")
    head = DiffusionHead.from_module(module, dtype=torch.bfloat16)
    inputs = random_inputs(head, 2, 0)
    makers = denoising.baselines(module, head, 2, [inputs], gpu, benchmarks.baselines.Compilations(gpu))
    names = benchmarks.registry.ON_GPU["bfloat16"]
    assert set(names) <= set(makers)
    assert set(names[1:]) == set(benchmarks.report_tables.BASELINES)  # which the pages' tables know by name
    expected = denoising.reference.denoise(head, *inputs, 1.0, None, dtype=torch.float64)[0]
    for name in names[:3]:
        assert relative_error(makers[name]()(*inputs), expected) <= denoising.BASELINE_BOUND
    assert makers[names[4]]()(*inputs) is None


# --- single calls ---


def test_the_baselines_of_a_single_call(benchmarks, fake_capture, monkeypatch):
    evaluating, registry = benchmarks.evaluating, benchmarks.registry
    monkeypatch.setitem(registry.HEADS, "small", (2, 32, 16))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    names = ("eager bfloat16", "eager in a CUDA graph bfloat16", "torch.compile reduce-overhead bfloat16")
    case = registry.Case("evaluate", "small", 3, "bfloat16", "torch", names, 2, "cpu")
    group = evaluating.group([case], CPU, benchmarks.baselines.Compilations(CPU))
    monkeypatch.setattr(benchmarks.baselines.Compilations, "why_not", lambda self: None)
    for name in names:
        result = group.baselines[name]()(*group.inputs[0])
        group.check(result)
        with pytest.raises(ValueError, match="expected what the network computes within"):
            group.check(result.flip(0))
    ((contender),) = group.contenders
    error, _ = contender.error(contender.make())
    assert 0 < error <= contender.bound


# --- one block ---


def test_one_block_beside_its_two_products(benchmarks, fake_capture, monkeypatch, capsys):
    """With a chain that computes the definition, and one that does not."""
    blocks, common = benchmarks.blocks, benchmarks.common

    class Chain:
        wrong = 1.0

        def __init__(self, head, tokens, groups, noise, steps, static):
            assert (groups, steps, static) == (1, 1, True)
            self.h, self.done = None, []

        def load(self, cond, x, noise, temperature, cfg_scale):
            self.inputs = cond[0], x

        def start(self, head):
            pass

        def hoist(self, head, start, stop):
            assert (start, stop) == (blocks.STEPS - 1, blocks.STEPS)

        def begin_step(self, head, tables, first_row):
            assert first_row == 0

        def run_block(self, head, index, first_row):
            self.done.append((index, first_row))
            before, added = blocks.definition(head, len(self.inputs[1]))
            self.h = (before + self.wrong * added).float()

    kernels = SimpleNamespace(KERNELS=SimpleNamespace(layered=Chain))
    monkeypatch.setattr(blocks.importlib, "import_module", lambda name: kernels)
    head = blocks.block_head(3, 32, 16, CPU)
    assert relative_error(*blocks.definition(head, 5)) > 0.1  # what a block adds is no small part
    timed = []
    monkeypatch.setattr(common, "_time", lambda function, *_: timed.append(function()) or 3.0)
    registry, report = benchmarks.registry, benchmarks.rows.Report()
    monkeypatch.setitem(registry.HEADS, "small", (3, 32, 16))
    monkeypatch.setattr(blocks, "block_head", lambda *_: head)
    case = registry.Case("one block", "small", 5, "bfloat16", "triton", registry.TWO_PRODUCTS, 4, "cuda")

    def measured():
        benchmarks.groups.measure_group(blocks.group([case], CPU, None), 4, CPU, report)

    measured()
    ((row,), failures) = report.rows, report.failures
    assert failures == []
    assert (row.seconds, row.baseline_seconds, row.correct) == (1.0, 1.0, True)  # three blocks in three seconds
    Chain.wrong = 1.1
    measured()
    assert not report.rows[1].correct
    monkeypatch.setattr(Chain, "run_block", fails)
    measured()
    assert [failure["name"] for failure in report.failures] == ["triton bfloat16"]
    assert len(report.rows) == 2


@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("rows", [2, 5])
def test_one_block_of_the_chains_is_right(benchmarks, backend, kernel_device, rows):
    head = benchmarks.blocks.block_head(2, 48, 16, kernel_device)
    assert 0 < benchmarks.blocks.error_of(backend, head, rows) <= benchmarks.blocks.BOUND
