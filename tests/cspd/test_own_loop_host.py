"""Networks under ``loop="own"``: what the host waits for, ``torch.compile``, graphs, wrappers."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn as nn
from foreign import CHANNELS, COND, Net, conditions
from own_loops import SolverHead, SpeechNet, ready
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import cspd
from cspd_kernels.live import LiveWeights
from cspd_kernels.testing import relative_error

Z = conditions()


class HostReads(TorchDispatchMode):
    """Counts the tensors read by the host; what the op does inside is its own matter."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("t", [torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1, 5, 9])])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_host_reads_nothing(t, dtype, monkeypatch):
    net = cspd.patch(ready(Net), loop="own", dtype=dtype)
    monkeypatch.setattr(LiveWeights, "_compare", lambda self, heads: None)  # on a device a kernel compares the weights
    x, c = torch.randn(3, CHANNELS), torch.randn(3, COND)
    net(x, t, c)
    with HostReads() as host:
        for _ in range(3):
            net(x, t, c)
    assert host.count == 0
    assert net.evaluations == 0


def loop(net, x, t, c, steps=4):
    """A sampler that a graph can hold: calls with one condition, times in tensors."""
    for i in range(steps):
        x = x + 0.25 * net(x, t + i, c)
    return x


def in_place(head, compiled):
    head.net.compile(**compiled.keywords)


def wrapped(head, compiled):
    head.net = compiled(head.net)


def method(head, compiled):
    head.net.forward = compiled(head.net.forward)


def a_layers(head, compiled):
    layer = head.net.cond_embed
    layer.forward = compiled(layer.forward)


def sample(head, compiled):
    head.sample = compiled(head.sample)


class Short(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(learned=False)

    def sample(self, z):
        return loop(self.net, torch.randn(len(z), CHANNELS), torch.arange(len(z)), z, steps=1)


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (wrapped, "before"), (in_place, "before"), (a_layers, "before"), (sample, "before"), (method, "before"),
        (method, "after"), (wrapped, "after"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_compiled_parts(how, when):
    torch._dynamo.reset()
    head, twin = ready(Short), ready(Short)
    net, calls = head.net, []
    if when == "after":
        cspd.patch(head, loop="own")
    how(head, partial(torch.compile, backend="eager"))
    if when == "before":
        head.sample(Z)  # so that it is compiled
        cspd.patch(head, loop="own")
    counted = net.evaluations
    for each in (head, twin):
        torch.manual_seed(0)
        calls.append(each.sample(Z))
    assert net.evaluations == counted
    assert relative_error(*calls) < 1e-5
    cspd.unpatch(head)
    torch.manual_seed(0)
    assert relative_error(head.sample(Z), calls[1]) < 1e-5
    assert net.evaluations > counted


class Compiled(Net):
    """Like networks whose class has its forward compiled."""

    forward = torch.compile(Net.forward, backend="eager")


@torch.no_grad()
def test_a_class_whose_forward_is_compiled():
    torch._dynamo.reset()
    net, twin = ready(Compiled), ready(Net)
    x, t, c = torch.randn(3, CHANNELS), torch.tensor([1.0, 5.0, 9.0]), torch.randn(3, COND)
    net(x, t, c)
    counted = net.evaluations
    cspd.patch(net, loop="own")
    assert relative_error(net(x, t, c), twin(x, t, c)) < 1e-5
    assert net.evaluations == counted


@torch.no_grad()
def test_a_compiled_caller_breaks_its_graph_at_the_network_and_sees_changed_weights():
    torch._dynamo.reset()

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cspd.patch(ready(SpeechNet), loop="own")

        def forward(self, x, t, c):
            return self.net(2 * x, t, condition=c) + 1

    model, counter = Around(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    x, t, c = torch.randn(3, CHANNELS), torch.tensor([1.0, 5.0, 9.0]), torch.randn(3, COND)
    for _ in range(2):
        assert relative_error(compiled(x, t, c), model(x, t, c)) < 1e-6
        model.net.final_layer.linear.weight.data.mul_(1.5)
    assert counter.frame_count == 2
    assert model.net.evaluations == 0


def test_a_replica_has_its_own_forward():
    net = ready(Net)
    before = set(vars(net))
    cspd.patch(net, loop="own")
    replica = net._replicate_for_data_parallel()
    assert not {"forward", "_apply", "_replicate_for_data_parallel"} & set(vars(replica))
    assert "forward" in vars(net)
    cspd.unpatch(net)
    assert set(vars(net)) == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overlapping_patches_leave_nothing(order):
    net = ready(Net)
    before = set(vars(net))
    blocks = [cspd.patched(net, loop="own"), cspd.patched(net, loop="own", dtype=torch.bfloat16)]
    for block in blocks:
        block.__enter__()
    for i in order:
        blocks[i].__exit__(None, None, None)
        assert cspd.is_patched(net) == (i == order[0])
    assert set(vars(net)) == before


def test_a_solver_of_a_copied_model_is_its_own():
    head = cspd.patch(ready(SolverHead), loop="own")
    twin = copy.deepcopy(head)
    cspd.unpatch(head)
    assert cspd.is_patched(twin)
    torch.manual_seed(0)
    tokens = twin.sample(Z)
    assert twin.net.evaluations == 0
    torch.manual_seed(0)
    assert relative_error(tokens, head.sample(Z)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [partial(Net, learned=False), SpeechNet])
@torch.no_grad()
def test_a_callers_graph_follows_what_changes_before_a_replay(kind, dtype):
    net, twin = (kind().eval().requires_grad_(False).cuda().to(dtype) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    x, c = torch.randn(3, CHANNELS).cuda().to(dtype), torch.randn(3, COND).cuda().to(dtype)
    t = torch.tensor([1.0, 5.0, 9.0]).cuda().to(dtype)
    cspd.patch(net, loop="own")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="expected a first call like this one before you capture a CUDA graph"):  # noqa: SIM117
        with torch.cuda.graph(graph):
            loop(net, x, t, c)
    loop(net, x, t, c)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = loop(net, x, t, c)
    bound = 1e-5 if dtype == torch.float32 else 3e-2

    def change_weights():
        for each in (net, twin):
            each.final_layer.linear.weight.data.mul_(1.5)

    changes = [lambda: None, lambda: x.neg_(), lambda: c.mul_(0.5), lambda: t.add_(3), change_weights]
    for change in changes:
        change()
        graph.replay()
        assert relative_error(result, loop(twin, x, t, c)) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@torch.no_grad()
def test_on_a_gpu_the_host_waits_for_nothing(rows):
    net = cspd.patch(ready(Net).cuda(), loop="own")
    x, t, c = torch.randn(rows, CHANNELS).cuda(), torch.ones(rows).cuda(), torch.randn(rows, COND).cuda()
    expected = cspd.unpatch(net)(x, t, c)
    cspd.patch(net, loop="own")
    for _ in range(3):  # packs, captures
        net(x, t, c)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = net(x, t, c)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(actual, expected) < 1e-5
