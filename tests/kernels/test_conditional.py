"""Launches that a flag in memory decides: read by the host, as nodes of a graph, or all of them."""

import logging
from types import SimpleNamespace

import pytest
import torch
from chains import kernels_of
from dispatch_modes import no_wait_for_cuda
from fake_cuda import FakeExtension, Node

from cspd_kernels import DiffusionHead, conditional, cuda_support, denoise
from cspd_kernels.backends import log_once
from cspd_kernels.conditional import run_if, run_while
from cspd_kernels.graphs import CudaGraph, captures_ours
from cspd_kernels.testing import random_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("start", "at_most", "rounds"), [(0, 9, 0), (1, 9, 1), (3, 9, 3), (3, 2, 2), (3, 0, 0)])
@pytest.mark.parametrize("own", [False, True])
def test_without_a_device_the_host_reads_the_flag(start, at_most, rounds, own):
    flag, done = torch.tensor([start], dtype=torch.int32), []

    def body():
        flag.sub_(1)
        done.append(True)

    run_while(flag, body, at_most, own=own)
    assert len(done) == rounds
    flag.fill_(start)
    done.clear()
    run_if(flag, body, own=own)
    assert len(done) == (start != 0)


# --- on a device that only writes down what it is told ---


class Flag:
    """An int32 that the host cannot see."""

    def __init__(self, value=0):
        self.memory, self.device = torch.tensor([value, 0], dtype=torch.int32), CUDA

    def data_ptr(self):
        return self.memory.data_ptr()

    def set(self, value):
        self.memory[0], self.memory[1] = value, 0

    @property
    def counted(self):
        return self.memory[1].item()


@pytest.fixture
def extension(cuda, monkeypatch):
    """The fake device with an extension that adds nodes; nothing has been proved."""
    extension = FakeExtension(cuda)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: getattr(cuda, handle))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA.index)
    monkeypatch.setattr(conditional, "_proved", {})
    monkeypatch.setattr(
        conditional,
        "cuda_support",
        SimpleNamespace(
            extension=lambda: extension,
            launch_stream=lambda device: cuda.current.name,
            why_unavailable=lambda: None,
            why_unsupported_here=lambda device: None,
        ),
    )
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    log_once.cache_clear()
    return extension


@pytest.fixture
def counts(cuda, extension):
    """``counts(flag, until)``: a kernel that counts and ends loops; beside what stands in ``flag``."""

    def launch(flag, until=0):
        extension.count(flag.data_ptr() + 4, until, flag.data_ptr(), cuda.current.name)

    return launch


def in_a_graph(cuda, launch, times=3):
    """The log of a replay, the last of so many uses."""
    graph = CudaGraph(CUDA)
    for _ in range(times):
        cuda.told()
        graph.run(launch, lambda: None)
    return cuda.told()


def test_in_a_graph_of_our_own_the_device_decides(cuda, extension, counts):
    loop, branch = Flag(1), Flag()

    def launch():
        run_while(loop, lambda: counts(loop, 4), 4, own=True)
        run_if(branch, lambda: counts(branch), own=True)

    graph = CudaGraph(CUDA)
    graph.run(launch, lambda: None)
    assert (loop.counted, branch.counted) == (4, 1)  # all that may be needed
    assert extension.prepared == 1
    loop.set(1), branch.set(0)
    cuda.told()
    graph.run(launch, lambda: None)
    assert (loop.counted, branch.counted) == (4, 0)
    for start, wanted in ((1, (4, 1)), (0, (0, 1))):
        loop.set(start), branch.set(1)
        cuda.told()
        graph.run(launch, lambda: None)
        assert (loop.counted, branch.counted) == wanted
    assert cuda.told() == [f"main: {name} replayed" for name in ("condition", "loop", "condition", "branch", "count")]
    assert extension.prepared == 1
    assert cuda.current is cuda.main


def test_a_loop_ends_by_its_own_count(cuda, extension, counts):
    loop = Flag(1)
    told = in_a_graph(cuda, lambda: run_while(loop, lambda: counts(loop, 10**6 if loop.counted < 0 else 3), 5, own=True))
    assert told.count("main: loop replayed") == 1
    assert told.count("main: condition replayed") == 1 + told.count("main: count replayed")


@pytest.mark.parametrize("why", ["library", "caller", "not built", "driver", "unavailable", "device", "wrong", "error"])
def test_elsewhere_all_is_launched(cuda, extension, counts, monkeypatch, caplog, why):
    if why == "not built":
        extension.CONDITIONAL_NODES = False
    elif why == "driver":
        extension.driver_version = lambda: 12030
    elif why == "unavailable":
        conditional.cuda_support.why_unavailable = lambda: "it is not there"
    elif why == "device":
        conditional.cuda_support.why_unsupported_here = lambda device: "not for this device"
    elif why == "wrong":
        monkeypatch.setattr(Node, "set", lambda node, condition: None)
    elif why == "error":
        extension.prepare_conditional = lambda: 1 / 0
    flags = Flag(1), Flag()

    def launch():
        run_while(flags[0], lambda: counts(flags[0]), 3, own=why != "library")
        run_if(flags[1], lambda: counts(flags[1]), own=why != "library")

    with caplog.at_level(logging.INFO, "cspd_kernels"):
        if why == "caller":
            conditional._prove(CUDA)
            cuda.captured_by_caller = True
            cuda.told()
            launch()
            assert cuda.told() == ["main: count"] * 4
        else:
            assert in_a_graph(cuda, launch) == ["main: count replayed"] * 4
    wanted = {
        "library": None,
        "caller": None,
        "not built": "a toolkit before CUDA 12.4",
        "driver": "the driver is older",
        "unavailable": "it is not there",
        "device": "not for this device",
        "wrong": "counts wrongly",
        "error": "ZeroDivisionError",
    }[why]
    assert len(caplog.messages) == (wanted is not None)
    assert wanted is None or wanted in caplog.text
    assert (conditional._proved.get(CUDA) is not None) == (why == "caller")


def test_nothing_is_proved_in_a_capture(cuda, extension, counts):
    flag = Flag(1)
    for ours in (True, False):
        cuda.captured_by_caller = not ours
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            in_a_graph(cuda, lambda: run_while(flag, lambda: counts(flag), 2, own=True))
    assert (extension.prepared, conditional._proved) == (0, {})


def always(node):
    node.body.replay()


def once(node):
    if node.condition:
        node.body.replay()


def never(node):
    pass


def keeps(node):
    """A condition that stays from the replay before."""
    Node.ran = getattr(Node, "ran", 0) + 1
    if Node.ran <= 3:
        right(node)


right = Node.run


@pytest.mark.parametrize("wrong", [always, once, never, keeps])
def test_nodes_that_count_wrongly_are_found_out(extension, monkeypatch, wrong):
    assert conditional._difference(conditional.Nodes(CUDA), CPU) is None
    monkeypatch.setattr(Node, "run", wrong)
    assert conditional._difference(conditional.Nodes(CUDA), CPU) == "a graph with such nodes counts wrongly"
    monkeypatch.delattr(Node, "ran", raising=False)


def test_a_proof_is_made_once_and_a_lack_of_memory_is_none(extension, monkeypatch):
    def full():
        raise torch.cuda.OutOfMemoryError("full")

    prepare, extension.prepare_conditional = extension.prepare_conditional, full
    conditional._prove(CUDA)
    assert conditional._proved == {}
    extension.prepare_conditional = prepare
    conditional._prove(CUDA)
    conditional._prove(CUDA)
    assert extension.prepared == 1
    assert isinstance(conditional._proved[CUDA], conditional.Nodes)


def test_a_body_that_fails_leaves_no_capture_open_and_is_what_the_log_tells(cuda, extension, counts, caplog):
    flag = Flag(1)

    def body():
        if captures_ours():
            assert cuda.current is cuda.body
            raise RuntimeError("no such kernel")
        counts(flag)

    ended = extension.end_conditional

    def end(*arguments):
        ended(*arguments)
        raise RuntimeError("end_conditional failed")

    conditional._prove(CUDA)
    extension.end_conditional = end
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert in_a_graph(cuda, lambda: run_while(flag, body, 2, own=True)) == ["main: count"] * 2
    assert "could not be captured: no such kernel" in caplog.text
    assert (extension.open, cuda.capturing, cuda.current) == ([], None, cuda.main)
    assert not captures_ours()


@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 4, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chains_that_call_a_library_say_so(make_head, backend, monkeypatch, tokens, dtype):
    """By what they launch: a product of PyTorch's in the steps, or none."""
    head = make_head(dtype, steps=1)
    chain = kernels_of(backend).layered(head, tokens, False, torch.zeros(1, tokens, head.channels), 1, static=True)
    chain.keep_modulations_in(torch.zeros(chain.memory_bytes, dtype=torch.uint8, device=head.device))
    called = []
    monkeypatch.setattr(torch, "mm", lambda *_, **__: called.append(True))
    for name in ("run_first", "run_second"):
        monkeypatch.setattr(type(chain), name, getattr(type(chain), name, None), raising=False)
    chain.warm_up_products(head)
    assert chain.own == (not called)


# --- on a device ---


@pytest.fixture
def device():
    """A device whose nodes have proved themselves, which they must where the extension and the driver can."""
    if reason := cuda_support.why_unavailable():
        pytest.skip(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := conditional._why_not(device):
        pytest.skip(reason)
    conditional._prove(device)
    assert conditional._proved[device] is not None
    return device


@pytest.fixture
def numbers(device):
    """(flags, counts) of three places."""
    return torch.zeros(2, 3, dtype=torch.int32, device=device).unbind()


def count(flags, counts, i, until=0):
    stream = cuda_support.launch_stream(flags.device)
    cuda_support.extension().count(counts[i].data_ptr(), until, flags[i].data_ptr(), stream)


def captured(device, launch):
    """A graph of launches, two of whose uses are behind it."""
    graph = CudaGraph(device)
    for _ in range(2):
        graph.run(launch, lambda: None)
    assert graph.graph is not None
    return lambda: graph.run(launch, lambda: None)


@pytest.mark.gpu
@pytest.mark.parametrize("rounds", [1, 2, 7, 300])
@pytest.mark.parametrize("kernels", [1, 5])
def test_a_loop_on_a_device_ends_by_its_flag(device, numbers, rounds, kernels):
    """Of kernels that start early, also in the second round and right behind the loop."""
    flags, counts = numbers

    def body():
        for _ in range(kernels):
            count(flags, counts, 0, rounds * kernels)

    def launch():
        run_while(flags[:1], body, 400, own=True)
        count(flags, counts, 0)

    run = captured(device, launch)
    for start, wanted in ((1, rounds * kernels + 1), (0, 1), (1, rounds * kernels + 1)):
        counts.zero_()
        flags.fill_(start)
        with no_wait_for_cuda():
            run()
        assert counts.tolist() == [wanted, 0, 0]


@pytest.mark.gpu
def test_branches_on_a_device_follow_their_flags(device, numbers):
    flags, counts = numbers

    def launch():
        for i in range(3):
            run_if(flags[i : i + 1], lambda i=i: count(flags, counts, i, until=100), own=True)

    run = captured(device, launch)
    for pattern in ((0, 1, 0), (1, 0, 1), (0, 0, 0), (7, -1, 1)):
        counts.zero_()
        flags.copy_(torch.tensor(pattern))
        run()
        assert counts.tolist() == [int(flag != 0) for flag in pattern]


@pytest.mark.gpu
def test_a_body_on_a_device_may_be_torchs_own_kernels(device, numbers):
    flags, counts = numbers
    ones = torch.ones_like(counts)

    def body():
        counts.add_(ones)
        torch.lt(counts, 5, out=flags)

    run = captured(device, lambda: run_while(flags[:1], body, 9, own=True))
    for _ in range(2):
        counts.zero_()
        flags.fill_(1)
        run()
        assert counts.tolist() == [5, 5, 5]


@pytest.mark.gpu
def test_in_a_graph_of_the_caller_all_is_launched(device, numbers):
    flags, counts = numbers
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run_while(flags[:1], lambda: count(flags, counts, 0), 6, own=True)
    counts.zero_()
    graph.replay()
    assert counts.tolist() == [6, 0, 0]


@pytest.mark.gpu
def test_a_body_that_fails_on_a_device_costs_its_graph_alone(device, numbers):
    flags, counts = numbers

    def body():
        if captures_ours():
            raise RuntimeError("no such kernel")
        count(flags, counts, 0)

    graph = CudaGraph(device)
    for _ in range(3):
        graph.run(lambda: run_while(flags[:1], body, 2, own=True), lambda: None)
    assert graph.graph is None
    assert counts.tolist() == [6, 0, 0]
    run = captured(device, lambda: run_while(flags[:1], lambda: count(flags, counts, 1, 3), 4, own=True))
    counts.zero_()
    flags.fill_(0)
    flags[0] = 1
    del run  # whose loop would have no end: its body sets another flag


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_sweeps_in_a_loop_give_the_bits_of_plain_launches(make_diffloss, device_of, backend, device, dtype, rows, cfg_scale):
    """Rows that settle, and with a tolerance that none can keep, the sequential chain as a branch."""
    device_of(backend)
    head = DiffusionHead.from_module(make_diffloss(width=256, steps=20).to(device), dtype=dtype)
    inputs = random_inputs(head, rows, 0, guided=cfg_scale != 1)
    for tolerance in (1e-2, 1e-30):
        results = [
            denoise(head, *inputs, cfg_scale=cfg_scale, backend=backend, parallel_tol=tolerance) for _ in range(4)
        ]
        for result in results[1:]:
            for got, wanted in zip(result, results[0]):
                assert torch.equal(got, wanted)
