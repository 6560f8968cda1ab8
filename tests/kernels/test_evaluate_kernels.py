"""One call of a head's network by a backend's kernels: on a GPU, or interpreted and emulated on the CPU."""

import weakref

import pytest
import torch
from chains import kernels_of

from cspd_kernels import Schedule, evaluate
from cspd_kernels.graphs import why_not_here
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.evaluate import on_device, reference
from cspd_kernels.testing import random_network, relative_error

KINDS = {
    "as MAR's": {"outputs": 8, "hidden": 48},
    "gated": {"norm": "rms", "mlp": "swiglu"},
    "given": {"given": True, "modulations": (0, 0), "times": 2},
}


@pytest.fixture
def network(kernel_device):
    """``network(...)``: a head without a schedule where the kernels run."""
    return lambda schedule=None, **options: random_network(schedule, device=kernel_device, **options)


def inputs(head, rows, seed=0):
    """(x, timesteps, cond)."""
    generator = torch.Generator().manual_seed(seed)
    x, cond = (torch.randn(rows, n, generator=generator) for n in (head.channels, head.cond_channels))
    return x.to(head.device), torch.randint(1000, (rows,), generator=generator).to(head.device), cond.to(head.device)


@pytest.fixture
def assert_agrees(backend):
    def check(head, x, timesteps, cond, tolerance=1e-5, **options):
        agrees(evaluate(head, x, timesteps, cond, backend=backend, **options), head, x, timesteps, cond, tolerance)

    return check


def agrees(out, head, x, timesteps, cond, tolerance):
    if not isinstance(timesteps, torch.Tensor):
        timesteps = torch.full((len(x),), timesteps, device=head.device)
    expected = reference.evaluate(head, x, timesteps, cond, dtype=torch.float64)
    assert out.dtype == torch.float32 and relative_error(out, expected) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7])
def test_the_networks_output(network, assert_agrees, kind, rows):
    assert_agrees(head := network(**KINDS[kind]), *inputs(head, rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(network, assert_agrees, dtype):
    assert_agrees(head := network(**KINDS["gated"], dtype=dtype), *inputs(head, 5), 2e-2)


@pytest.mark.parametrize("times", [1, 2])
def test_every_form_of_timesteps(backend, network, assert_agrees, times):
    head = network(depth=1, width=16, hidden=16, times=times)
    x, t, cond = inputs(head, 3)
    fractions = torch.rand(3, times, generator=torch.Generator().manual_seed(1)).to(head.device)
    for timesteps in (t, t.int(), t / 999, (t / 999).double(), fractions, 0.25, 999):
        assert_agrees(head, x, timesteps, cond)
    for one in (t[:1], t[1].cpu(), t[:1].expand(3)):
        out = evaluate(head, x, one, cond, backend=backend)
        own = evaluate(head, x, one.to(head.device).reshape(-1)[:1].repeat(3), cond, backend=backend)
        assert relative_error(out, own) <= 1e-6


def test_a_head_with_a_schedule_and_no_rows(backend, network, assert_agrees):
    head = network(Schedule.linear(2), depth=1, width=16, hidden=16, outputs=8)
    assert_agrees(head, *inputs(head, 2))
    assert evaluate(head, *inputs(head, 0), backend=backend).shape == (0, 8)


def test_blocks_of_rows(network, assert_agrees):
    head = network(depth=1, width=16, hidden=16)
    for rows, workspace_bytes in ((3, 1), (5, 2 * 16 * 6 * 4)):
        assert_agrees(head, *inputs(head, rows), workspace_bytes=workspace_bytes)


def test_a_call_leaves_nothing_to_the_next(backend, network):
    """Of fewer rows, other times and another condition in the same buffers."""
    head, t = network(depth=1, width=16, hidden=16), torch.zeros(4, dtype=torch.int64)
    call, tables = on_device.NetworkCall(kernels_of(backend), head, 4, t.to(head.device), True), Tables(head)
    for rows in (4, 2, 3):
        x, t, cond = inputs(head, rows, rows)
        call.load(x, t, cond)
        call.launch(head, tables)
        expected = reference.evaluate(head, x, t, cond, dtype=torch.float64)
        assert relative_error(call.results(rows), expected) <= 1e-5
    kept = call.results(3)
    call.load(*inputs(head, 4, 9))
    call.launch(head, tables)
    assert relative_error(kept, expected) <= 1e-5


# --- graphs ---


@pytest.fixture
def device(cuda, monkeypatch, kernel_device):
    """The fake device, whose graphs hold calls that run on the CPU."""
    if kernel_device.type == "cuda":
        pytest.skip("the kernels run on a device here; the tests below have the real graphs")
    launch = on_device.NetworkCall.launch

    def launched(call, head, tables):
        call, head = weakref.ref(call), weakref.ref(head)  # a graph holds neither
        cuda.launch("call", lambda: launch(call(), head(), tables))

    monkeypatch.setattr(on_device.NetworkCall, "launch", launched)
    monkeypatch.setattr(on_device, "why_not_here", lambda device: why_not_here(torch.device("cuda")))
    return cuda


def test_calls_of_one_bucket_share_a_graph(backend, network, assert_agrees, device):
    head = network(depth=1, width=16, hidden=16)
    for seed, rows in enumerate((4, 3, 4, 3)):
        assert_agrees(head, *inputs(head, rows, seed))
    plans = on_device._HEADS[head][backend].plans
    assert len(plans) == 1
    assert [line for line in device.told() if "main: " in line] == ["main: call"] + ["main: call replayed"] * 3
    x, t, cond = inputs(head, 3)
    assert_agrees(head, x, 7, cond)  # one timestep for all rows
    assert_agrees(head, x, t / 7, cond)  # of another type
    assert len(plans) == 3


def test_inside_a_capture_of_the_caller_the_buffers_are_the_calls_own(backend, network, assert_agrees, device):
    head = network(depth=1, width=16, hidden=16)
    device.captured_by_caller = True
    with pytest.raises(
        RuntimeError, match="evaluate expected a first call with this head before you capture a CUDA graph"
    ):
        evaluate(head, *inputs(head, 2), backend=backend)
    device.captured_by_caller = False
    assert_agrees(head, *inputs(head, 2))
    device.told()
    device.captured_by_caller = True
    for seed in range(2):
        assert_agrees(head, *inputs(head, 3, seed))
    assert device.told() == ["main: call"] * 2
    assert len(on_device._HEADS[head][backend].plans) == 1


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 33, 600])
def test_launched_captured_and_replayed(network, assert_agrees, kind, rows):
    head = network(**KINDS[kind])
    for seed in range(4):
        assert_agrees(head, *inputs(head, rows, seed))
        assert_agrees(head, *(v[: max(1, rows - 1)] for v in inputs(head, rows, seed + 10)))


@pytest.mark.gpu
def test_in_a_graph_of_the_callers(backend, network):
    """Replays read the inputs anew."""
    head = network(**KINDS["gated"])
    x, t, cond = inputs(head, 5)
    with pytest.raises(RuntimeError, match="expected a first call"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        evaluate(head, x, t, cond, backend=backend)
    torch.cuda.synchronize()
    evaluate(head, x, t, cond, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = evaluate(head, x, t, cond, backend=backend)
    for seed in range(3):
        for value, new in zip((x, t, cond), inputs(head, 5, seed)):
            value.copy_(new)
        graph.replay()
        expected = reference.evaluate(head, x, t, cond, dtype=torch.float64)
        assert relative_error(out, expected) <= 1e-5


@pytest.mark.gpu
def test_the_host_does_not_wait(backend, network):
    from dispatch_modes import no_wait_for_cuda

    head = network(**KINDS["as MAR's"])
    x, t, cond = inputs(head, 4)
    for _ in range(3):
        with no_wait_for_cuda():
            evaluate(head, x, t, cond, backend=backend)
            evaluate(head, x, 0.5, cond, backend=backend)
