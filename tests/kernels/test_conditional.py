"""Launches that a flag in memory decides: read by the host, as nodes of a graph, or all of them."""

import logging
from types import SimpleNamespace

import pytest
import torch
from chains import kernels_of
from fake_cuda import FakeExtension, Node

from cspd_kernels import conditional
from cspd_kernels.backends import log_once
from cspd_kernels.conditional import run_if, run_while
from cspd_kernels.graphs import CudaGraph, captures_ours
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.triton_config import Products

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
    """The nodes know no limit: that is the kernels' own."""
    loop, graph = Flag(1), CudaGraph(CUDA)
    for rounds in (2, 7, 7):  # plain, captured, replayed
        loop.set(1)
        graph.run(lambda: run_while(loop, lambda: counts(loop, 7), 2, own=True), lambda: None)
        assert loop.counted == rounds


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
        "wrong": "gave a wrong count",
        "error": "ZeroDivisionError",
    }[why]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (wanted is not None)
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


def always(node, right):
    node.body.replay()


def once(node, right):
    if node.condition:
        node.body.replay()


def never(node, right):
    pass


def first_replay_only(node, right):
    if not node.ran:
        right(node)
    node.ran = True


@pytest.mark.parametrize("wrong", [always, once, never, first_replay_only])
def test_nodes_that_count_wrongly_are_found_out(extension, monkeypatch, wrong):
    right = Node.run
    assert conditional._difference(conditional.Nodes(CUDA), CPU) is None
    monkeypatch.setattr(Node, "ran", False, raising=False)
    monkeypatch.setattr(Node, "run", lambda node: wrong(node, right))
    assert (
        conditional._difference(conditional.Nodes(CUDA), CPU)
        == "a test graph with loops and branches gave a wrong count"
    )


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
    assert not conditional.surely_wanted()


def test_kernels_need_no_flag_in_a_body_alone(cuda, extension, counts):
    flag, wanted = Flag(1), []

    def body():
        wanted.append((captures_ours(), conditional.surely_wanted()))
        counts(flag)

    conditional._prove(CUDA)
    in_a_graph(cuda, lambda: run_while(flag, body, 1, own=True))
    assert set(wanted) == {(False, False), (True, True)}
    assert not conditional.surely_wanted()


# --- which chains may be loops ---


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_chains_that_call_a_library_say_so(backend, make_head, monkeypatch, library, tokens):
    head, kind = make_head(torch.bfloat16, steps=1), kernels_of(backend).layered
    if library and backend == "cuda":
        monkeypatch.setattr(kind, "table", ())
    elif library:
        monkeypatch.setattr(kind, "choose", lambda chain, head: Products(None, None))
    chain = kind(head, tokens, 1, torch.zeros(1, tokens, head.channels), 1, static=True)
    tables, called, mm = Tables(head), [], torch.mm
    chain.start(head)
    chain.hoist(head, 0, 1)
    monkeypatch.setattr(torch, "mm", lambda *operands, **out: called.append(mm(*operands, **out)))
    chain.run_steps(head, tables, 0, 1)
    assert chain.own == (not called)
    assert chain.own == (not library)
