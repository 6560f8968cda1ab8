"""Loops and branches of CUDA graphs that a flag in device memory decides, on a device."""

import pytest
import torch
from dispatch_modes import no_wait_for_cuda

from cspd_kernels import DiffusionHead, conditional, cuda_support, denoise
from cspd_kernels.conditional import run_if, run_while
from cspd_kernels.graphs import CudaGraph, captures_ours
from cspd_kernels.testing import random_inputs

pytestmark = pytest.mark.gpu


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


def user(device, launch):
    """A graph of launches, and what uses it once."""
    graph, other = CudaGraph(device), torch.zeros(1, device=device)
    return graph, lambda: graph.run(launch, other.zero_)


def captured(device, launch):
    """What uses a graph of launches, of which the plain use and the capture are done."""
    graph, use = user(device, launch)
    use(), use()
    assert graph.graph is not None
    return use


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


def test_a_body_may_copy(device, numbers):
    """A copy as it is, which is no kernel, and one by a kernel of PyTorch's."""
    flags, counts = numbers
    before, square = torch.zeros_like(counts), torch.zeros(40, 30, device=device)
    source = torch.rand(30, 40, device=device)

    def body():
        before.copy_(counts)
        square.copy_(source.t())
        count(flags, counts, 0, until=5)

    run = captured(device, lambda: run_while(flags[:1], body, 9, own=True))
    for _ in range(2):
        for buffer in (counts, before, square):
            buffer.zero_()
        flags.fill_(1)
        run()
        assert (counts.tolist(), before.tolist()) == ([5, 0, 0], [4, 0, 0])
        assert torch.equal(square, source.t())


def test_in_a_graph_of_the_caller_all_is_launched(device, numbers):
    flags, counts = numbers
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run_while(flags[:1], lambda: count(flags, counts, 0), 6, own=True)
    counts.zero_()
    graph.replay()
    assert counts.tolist() == [6, 0, 0]


def test_a_body_that_fails_on_a_device_costs_its_graph_alone(device, numbers):
    flags, counts = numbers

    def body():
        if captures_ours():
            raise RuntimeError("no such kernel")
        count(flags, counts, 0)

    graph, use = user(device, lambda: run_while(flags[:1], body, 2, own=True))
    for _ in range(3):
        use()
    assert graph.graph is None
    assert counts.tolist() == [6, 0, 0]
    run = captured(device, lambda: run_while(flags[1:2], lambda: count(flags, counts, 1, 3), 4, own=True))
    counts.zero_()
    flags.fill_(1)
    run()
    assert counts.tolist() == [0, 3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_sweeps_in_a_loop_give_the_bits_of_plain_launches(
    make_diffloss, device_of, device, monkeypatch, backend, dtype, rows, cfg_scale
):
    """Tokens that settle, and where none can be near enough the sequential chain."""
    device_of(backend)
    loops, add = [], conditional.Nodes.add

    def counted(nodes, flag, body, loop):
        loops.append(loop)
        add(nodes, flag, body, loop)

    monkeypatch.setattr(conditional.Nodes, "add", counted)
    head = DiffusionHead.from_module(make_diffloss(width=256, steps=60).to(device), dtype=dtype)
    inputs = random_inputs(head, rows, 0, guided=cfg_scale != 1)
    for tolerance in (1e-2, 1e-30):
        plain, *others = (
            denoise(head, *inputs, cfg_scale=cfg_scale, backend=backend, parallel_tol=tolerance) for _ in range(4)
        )
        for other in others:
            assert all(torch.equal(got, wanted) for got, wanted in zip(other, plain))
    if backend == "triton":  # whose sweeps call no library
        assert True in loops
