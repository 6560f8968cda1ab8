"""What the backends do with CUDA graphs, on a device that only writes down what it is told."""

import gc
import weakref

import pytest
import torch
from chains import BOUNDS, assert_agrees, assert_close, definition, kernels_of, workspace_of
from seeds import seed_tensor
from slow import slow, slowly_interpreted

from cspd_kernels import PhiloxNoise, denoise, graphs
from cspd_kernels.graphs import why_not_here
from cspd_kernels.ops.denoise import Denoised, on_device
from cspd_kernels.ops.denoise.chain import Chain, Tables
from cspd_kernels.ops.denoise.on_device import bucket
from cspd_kernels.ops.denoise.parallel_chain import ParallelChain
from cspd_kernels.scratch import Scratch
from cspd_kernels.testing import random_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def device(cuda, monkeypatch, kernel_device, multiprocessors):
    """The fake device, whose graphs hold chains that run on the CPU."""
    if kernel_device.type == "cuda":
        pytest.skip("the kernels run on a device here; tests/kernels/test_gpu.py has the real graphs")

    def on_cuda(launch):
        def launched(chain, head, table):
            addresses = dict(vars(chain))
            chain, head = weakref.ref(chain), weakref.ref(head)  # a graph holds neither

            def kernels():
                vars(chain()).update(addresses)  # a graph reads and writes where it did when it was captured
                launch(chain(), head(), table)

            cuda.launch("chain", kernels)

        return launched

    for kind in (Chain, ParallelChain):
        monkeypatch.setattr(kind, "launch", on_cuda(kind.launch))
    monkeypatch.setattr(on_device, "why_not_here", lambda device: why_not_here(CUDA))
    multiprocessors(1)
    return cuda


@pytest.fixture
def call(backend):
    """One call on inputs of its own, which must be right."""

    def call(head, rows, seed=0, *, guided=False, noise="stored", backend=backend, **options):
        cond, x, stored = random_inputs(head, rows, seed, guided)
        if not isinstance(noise, PhiloxNoise):
            noise = stored if noise == "stored" else PhiloxNoise(seed, torch.arange(rows) + seed)
        assert_agrees(head, cond, x, noise, cfg_scale=2.0 + seed if guided else 1.0, backend=backend, **options)

    return call


@pytest.fixture
def plans(backend):
    """The plans of a head."""
    return lambda head, backend=backend: on_device._HEADS[head][backend].plans


@pytest.mark.parametrize(("backend", "persistent"), [("triton", 0), ("cuda", 0), ("cuda", 16)], indirect=["backend"])
@pytest.mark.parametrize("noise", ["stored", "addressed"])
def test_calls_of_one_bucket_share_a_graph_and_each_gets_its_own_inputs(
    call, plans, make_head, device, monkeypatch, persistent, noise
):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", str(persistent))
    head = make_head()
    for seed, rows in enumerate((4, 3, 4, 3)):
        call(head, rows, seed, guided=True, noise=noise, temperature=0.5 + seed)
    assert len(plans(head)) == 1
    assert [line for line in device.told() if "main: " in line] == ["main: chain"] + ["main: chain replayed"] * 3


def test_calls_in_parallel_share_a_graph_likewise(backend, plans, make_head, device):
    head = make_head(width=16)
    for seed, rows in enumerate((4, 3)):
        inputs = random_inputs(head, rows, seed)
        out = denoise(head, *inputs, backend=backend, parallel_tol=1e-6)
        assert_close(Denoised(*out[:4]), definition(head, *inputs), BOUNDS[head.dtype])
    (plan,) = plans(head)._plans.values()
    assert isinstance(plan.value, ParallelChain)
    assert [line for line in device.told() if "main: " in line] == ["main: chain", "main: chain replayed"]
    network, state = plan.value.network, plan.value.state
    counted = {buffer.data_ptr() for buffer in plan.buffers}
    assert {value.data_ptr() for value in (network.h, network.out, state.before, state.sweeps)} <= counted
    shared = plan.value.memory.data_ptr()
    assert not any(shared <= at < shared + plan.value.memory_bytes for at in counted)


def test_seeds_as_numbers_and_as_tensors_share_a_graph(call, plans, make_head, device):
    """A number is not filled in again where the buffer holds it, which a tensor may have changed in between."""
    head = make_head()
    for seed in (5, seed_tensor(2**64 - 1), 5, seed_tensor(7)):
        call(head, 1, noise=PhiloxNoise(seed, torch.arange(1)))
    assert len(plans(head)) == 1


@slowly_interpreted
def test_every_kind_of_call_has_a_plan_of_its_own(backend, call, plans, make_head, device, monkeypatch):
    head = make_head()
    kinds = [{}, {"guided": True}, {"noise": "addressed"}, {"workspace_bytes": 3 * 48 * 6 * 4}]
    for _ in range(2):
        for i, options in enumerate(kinds):
            call(head, 2, i, **options)
    call(head, 1)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    call(head, 1)
    assert len(plans(head)) == len(kinds) + (2 if kernels_of(backend).persistent else 1)


@pytest.mark.parametrize(
    ("fit", "steps"), [(1, 1), slow(4, 4), (5, 4), slow(6, 6), slow(7, 6), slow(11, 6), (12, 12), slow(99, 12)]
)
def test_a_graph_holds_the_modulations_of_as_many_steps_as_fit_evenly(call, plans, make_head, device, fit, steps):
    head = make_head(steps=12)
    call(head, 2, workspace_bytes=fit * 2 * 48 * 6 * 4)
    assert [plan.value.steps for plan in plans(head)._plans.values()] == [steps]


@slowly_interpreted
def test_graphs_share_the_memory_of_their_modulations(call, plans, make_head, device):
    """They run one after the other; each call is right whatever the others left there."""
    heads = make_head(seed=0, steps=3), make_head(seed=1, steps=3)
    for seed in range(3):
        for head in heads:
            for rows in (4, 1, 2):
                call(head, rows, seed, guided=rows == 2)
    chains = [plan.value for head in heads for plan in plans(head)._plans.values()]
    assert len(chains) == 6
    assert len({chain.memory.data_ptr() for chain in chains}) == 1
    assert all(chain.mods.data_ptr() == chain.memory.data_ptr() + 4 * chain.embedded.numel() for chain in chains)
    inside = [b for chain in chains for b in chain.buffers() if b.data_ptr() == chain.embedded.data_ptr()]
    assert not inside  # what is shared counts for no head's limit


def test_memory_for_modulations_is_taken_in_turn(call, make_head, device, monkeypatch):
    """Who takes a block that another stream has made waits for that stream."""
    taken, take = [], Scratch.take

    def in_turn(memory, *sizes):
        taken.append(graphs._turn(CPU).lock._is_owned())
        return take(memory, *sizes)

    monkeypatch.setattr(Scratch, "take", in_turn)
    head = make_head()
    for _ in range(3):
        call(head, 2)
    assert taken == [True]


def test_plans_go_before_what_their_graphs_read(make_head, device):
    assert list(vars(on_device.HeadPlans(make_head())))[:2] == ["plans", "tables"]


def test_the_tables_of_a_head_are_copies(make_head, device):
    head = make_head(channels=1)
    assert Tables(head).input_weight.data_ptr() != head.input_weight.data_ptr()


@slowly_interpreted
def test_a_number_that_stays_is_filled_in_once(backend, call, make_head, device, monkeypatch):
    fills, fill = [], Chain._fill

    def counted(chain, name, buffer, value, n=None):
        before = buffer._version
        fill(chain, name, buffer, value, n)
        fills.append((name, buffer._version - before))

    monkeypatch.setattr(Chain, "_fill", counted)
    head = make_head()
    for seed, temperature in ((1, 0.5), (1, 0.5), (1, 2.0), (3, 2.0)):
        call(head, 2, seed, guided=True, noise="addressed", temperature=temperature)
    assert [count for name, count in fills if name == "temperature"] == [1, 0, 1, 0]
    assert [count for name, count in fills if name == ("scale", 0)] == [1, 0, 0, 1]
    assert [count for name, count in fills if name == "seed"] == [1, 0, 0, 1]
    head = make_head(seed=1)
    cond, x, noise = random_inputs(head, 2, 0, guided=True)
    for scale in (2.0, torch.tensor([1.5, 3.0]), 2.0):  # a tensor in between leaves other numbers there
        assert_agrees(head, cond, x, noise, cfg_scale=scale, backend=backend)


@slowly_interpreted
def test_two_heads_in_turn_keep_apart(call, plans, make_head, device):
    heads = make_head(seed=0), make_head(seed=1)
    for seed in range(3):
        for head in heads:
            call(head, 2, seed)
    assert plans(heads[0]) is not plans(heads[1])


def test_two_backends_of_one_head_keep_apart(make_head, device, device_of, backend, call, plans):
    other = {"triton": "cuda", "cuda": "triton"}[backend]
    device_of(other)
    head = make_head()
    for seed in range(3):
        for one in (backend, other):
            call(head, 2, seed, backend=one)
    assert plans(head) is not plans(head, other)
    assert [len(plans(head, one)) for one in (backend, other)] == [1, 1]


@slowly_interpreted
@pytest.mark.parametrize("workspace", [1, 2 * 2 * 48 * 6 * 4, 5 * 2 * 48 * 6 * 4])  # a row, two rows, five rows a step
def test_blocks_of_rows_and_steps_from_graphs(call, plans, make_head, device, workspace):
    head = make_head(steps=3)
    for seed in range(3):
        call(head, 5, seed, guided=True, workspace_bytes=workspace)
    assert any("replayed" in line for line in device.told())
    used = [workspace_of(plan.value) for plan in plans(head)._plans.values()]
    assert workspace == 1 or max(used) <= workspace


def test_a_call_in_inference_mode_leaves_a_plan_for_calls_outside(backend, call, plans, make_head, device):
    head = make_head()
    with torch.inference_mode():
        inputs = random_inputs(head, 2, 0)
        denoise(head, *inputs, backend=backend)
    for seed in range(2):
        call(head, 2, seed)
    assert len(plans(head)) == 1


def test_a_capture_that_fails_costs_no_result(call, make_head, device):
    device.refuses_capture = True
    head = make_head()
    for seed in range(3):
        call(head, 2, seed)
    assert [line for line in device.told() if "main: " in line] == ["main: chain"] * 3


def test_inside_a_capture_of_the_caller_the_buffers_are_the_calls_own(call, plans, make_head, device):
    head = make_head()
    call(head, 2)
    device.told()
    device.captured_by_caller = True
    for seed in range(2):
        call(head, 3, seed)
    assert len(plans(head)) == 1
    assert device.told() == ["main: chain"] * 2


def test_a_first_call_inside_a_capture_of_the_caller_is_refused(call, make_head, device):
    head = make_head()
    device.captured_by_caller = True
    with pytest.raises(RuntimeError, match="expected a first call with this head before you capture a CUDA graph"):
        call(head, 2)


@pytest.mark.parametrize(
    ("backend", "persistent_tokens"), [("triton", 0), ("cuda", 0), ("cuda", 16)], indirect=["backend"]
)
def test_a_capture_of_the_caller_runs_what_an_earlier_call_has_compiled(
    backend, call, make_head, device, monkeypatch, persistent_tokens
):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", str(persistent_tokens))
    chains, build = [], Chain.__init__

    def built(chain, head, tokens, *arguments, **options):
        chains.append((type(chain), tokens))
        build(chain, head, tokens, *arguments, **options)

    monkeypatch.setattr(Chain, "__init__", built)
    head = make_head()
    call(head, 3)
    device.captured_by_caller = True
    call(head, 3)
    kernels = kernels_of(backend)
    kind = kernels.persistent if persistent_tokens else kernels.layered
    assert chains == [(kind, 4)] * 2


def test_noise_too_large_to_copy_is_read_where_it_is(call, plans, make_head, device, monkeypatch):
    head = make_head()
    monkeypatch.setattr(on_device, "GRAPH_BYTES", 2 * 4 * 2 * 2 * 5 - 2)  # half of it is a byte less than T N C
    call(head, 2)
    assert len(plans(head)) == 0
    call(head, 1)
    assert len(plans(head)) == 1


def test_the_graphs_of_a_head_stay_within_their_bytes(call, plans, make_head, device):
    head = make_head()
    call(head, 1)
    plans(head).max_bytes = plans(head).bytes
    for rows in (2, 1, 2):
        call(head, rows)
        assert len(plans(head)) == 1


def test_plans_live_and_die_with_their_head(call, plans, make_head, device):
    head, other = make_head(), make_head()
    for _ in range(2):
        call(head, 2)
    call(other, 2)
    (plan,) = plans(head)._plans.values()
    kept = [weakref.ref(v) for v in (plan, plan.value, plan.graph.graph, plans(head))]
    del plan
    gc.collect()
    assert all(reference() is not None for reference in kept)
    device.told()
    del head
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4
    assert device.told() == ["the host waits for the event of main"]
    assert len(plans(other)) == 1


def test_buckets_hold_their_tokens_waste_little_and_are_their_own_bucket():
    buckets = [bucket(n) for n in range(1, 5000)]
    assert buckets == sorted(buckets)
    for n, size in enumerate(buckets, 1):
        assert size >= n
        assert bucket(size) == size
        assert size - n <= max(15, n / 8) if n > 16 else size < 2 * n
    assert len(set(buckets)) < 70
