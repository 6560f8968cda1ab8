"""CUDA graphs on a device that only writes down what it is told: who waits for whom, what is kept, what is freed."""

import gc
import logging
import weakref

import pytest
import torch
from fake_cuda import FakeGraph

from cspd_kernels import graphs
from cspd_kernels.graphs import CudaGraph, PlanCache, why_not_here

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


PLAIN = ["main: kernel"]
REPLAYED = ["main: kernel replayed"]


def run(graph, cuda):
    graph.run(lambda: cuda.launch("kernel"), lambda: cuda.launch("warm-up"))
    return cuda.told()


def test_plain_first_captured_on_second_use_and_replayed_from_then_on(cuda):
    graph = CudaGraph(CUDA)
    assert run(graph, cuda) == PLAIN
    assert run(graph, cuda) == ["main: warm-up", "side: capture", "side: capture", *REPLAYED]
    assert [run(graph, cuda) for _ in range(3)] == [REPLAYED] * 3


def test_all_captures_of_a_device_allocate_from_the_pool_of_one_that_is_kept(cuda):
    """There libraries' workspaces lie, which others may free at any time and which graphs go on writing to."""
    made = [CudaGraph(CUDA) for _ in range(2)]
    for graph in made:
        run(graph, cuda)
    assert run(made[0], cuda).count("side: capture") == 2
    assert run(made[1], cuda).count("side: capture") == 1
    keeper = weakref.ref(graphs._captures(CUDA).keeper)
    assert [name for name, _ in keeper().launches] == ["warm-up"]
    assert all(graph.graph.pool() is keeper() for graph in made)
    del made, graph
    gc.collect()
    assert keeper() is not None


@pytest.mark.parametrize("where", ["launch", "capture_begin", "capture_end"])
def test_a_capture_that_fails_is_logged_once_and_never_tried_again(cuda, monkeypatch, caplog, where):
    def fail(graph, **_):
        cuda.capturing = None
        raise RuntimeError("operation not permitted when stream is capturing")

    if where == "launch":
        cuda.refuses_capture = True
    else:
        monkeypatch.setattr(FakeGraph, where, fail)
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        for graph in (CudaGraph(CUDA), CudaGraph(CUDA)):
            assert run(graph, cuda) == PLAIN
            told = run(graph, cuda)
            assert told[-1:] == PLAIN
            assert told[0] == "main: warm-up"
            assert run(graph, cuda) == PLAIN
            assert cuda.capturing is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not be captured: operation not permitted" in caplog.text


def test_a_capture_that_fails_costs_no_other(cuda, monkeypatch):
    """PyTorch refuses the pool of one that has failed."""
    spoilt, begin = set(), FakeGraph.capture_begin

    def begin_elsewhere(graph, pool=None, **options):
        if pool in spoilt:
            raise RuntimeError("already recording to mempool_id")
        begin(graph, pool=pool, **options)

    monkeypatch.setattr(FakeGraph, "capture_begin", begin_elsewhere)
    before, broken, after = (CudaGraph(CUDA) for _ in range(3))
    for graph in (before, before, broken, after):
        run(graph, cuda)
    keeper = graphs._captures(CUDA).keeper
    cuda.refuses_capture = True
    assert run(broken, cuda)[-1:] == PLAIN
    cuda.refuses_capture = False
    spoilt.add(keeper)
    assert run(after, cuda)[-1:] == REPLAYED
    assert run(before, cuda) == REPLAYED
    assert graphs._captures(CUDA).retired == [keeper]  # whose pool may hold what `before` writes to


def test_where_a_graph_can_be_captured(cuda):
    assert why_not_here(CUDA) is None
    assert why_not_here(CPU) == "no CUDA graphs on cpu"
    cuda.captured_by_caller = True
    assert why_not_here(CUDA) == "the caller is capturing a graph of its own"


def buffers(size):
    """What a plan of ``size`` bytes holds."""
    buffer = torch.zeros(size, dtype=torch.uint8)
    return lambda: (object(), [buffer])


def test_least_recently_used_plans_go_when_the_buffers_exceed_the_limit(cuda):
    cache = PlanCache(100)
    plans = {key: cache.get(key, buffers(40), CUDA) for key in "ab"}
    assert cache.get("a", buffers(40), CUDA) is plans["a"]
    cache.get("c", buffers(40), CUDA)
    assert (len(cache), cache.bytes) == (2, 80)
    assert cache.get("a", buffers(40), CUDA) is plans["a"]
    assert cache.get("b", buffers(40), CUDA) is not plans["b"]


def test_a_plan_beyond_the_limit_is_kept_alone(cuda):
    cache = PlanCache(100)
    cache.get("small", buffers(10), CUDA)
    large = cache.get("large", buffers(1000), CUDA)
    assert len(cache) == 1
    assert cache.get("large", buffers(1000), CUDA) is large


def test_a_dropped_plan_waits_for_the_device_and_only_where_it_was_used(cuda):
    cache = PlanCache(10)
    used = cache.get("used", buffers(10), CUDA)
    with used.in_turn():
        pass
    cache.get("unused", buffers(10), CUDA)
    assert cuda.told() == ["the host waits for the event of main"]
    cache.get("another", buffers(10), CUDA)
    assert cuda.told() == []


def test_a_forgotten_plan_waits_for_the_device(cuda):
    cache = PlanCache(10)
    with cache.get("used", buffers(10), CUDA).in_turn():
        pass
    del cache
    gc.collect()
    assert cuda.told() == ["the host waits for the event of main"]


def test_another_stream_waits_for_the_last_user_and_the_same_one_does_not(cuda):
    plan = PlanCache(10).get("key", buffers(10), CUDA)

    def use(stream):
        with cuda.stream(stream), plan.in_turn():
            cuda.launch("kernel")
        return cuda.told()

    assert use(cuda.main) == ["main: kernel"]
    assert use(cuda.main) == ["main: kernel"]
    assert use(cuda.other) == ["other waits for the event of main", "other: kernel"]
    assert use(cuda.main) == ["main waits for the event of other", "main: kernel"]


def test_plans_of_two_heads_on_two_streams_run_one_after_the_other(cuda):
    """Their graphs share the library workspaces of the stream they were captured on."""
    one, two = (PlanCache(10).get("key", buffers(10), CUDA) for _ in range(2))
    with one.in_turn():
        pass
    with cuda.stream(cuda.other), two.in_turn():
        pass
    assert cuda.told() == ["other waits for the event of main"]


def test_a_use_that_fails_is_waited_for_like_any_other(cuda):
    plan = PlanCache(10).get("key", buffers(10), CUDA)
    with pytest.raises(ValueError, match="odd"), plan.in_turn():
        raise ValueError("odd")
    with cuda.stream(cuda.other), plan.in_turn():
        pass
    assert cuda.told() == ["other waits for the event of main"]


def test_buffers_made_in_inference_mode_can_be_written_to_outside(cuda):
    def make():
        buffer = torch.zeros(3)
        return buffer, [buffer]

    with torch.inference_mode():
        plan = PlanCache(100).get("key", make, CUDA)
    plan.value.fill_(1)
    assert not plan.value.is_inference()
