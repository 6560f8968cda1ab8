"""The noise of many calls of torch.randn in one launch: the numbers and the state of the calls, or the calls."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_normals import StandIn, normal_

from cspd_kernels import released_noise
from cspd_kernels.backends import log_once
from cspd_kernels.released_noise import layout, randn_steps

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
BLOCKS = 3  # of the largest launch: 768 threads
SIZES = [1, 33, 255, 256, 257, 768, 769, 1537, 3072, 3073, 7000]
SEED, OFFSET = 0xFEDC_BA98_7654_3210, 4 * (2**32 - 2)  # the counter's high word is reached


def test_blocks_and_rounds_are_those_of_a_launch():
    for numel in (*SIZES, 10**6, 2**29):
        for blocks in (1, 3, 1056):
            grid, rounds = layout(numel, blocks)
            assert grid == min((numel + 255) // 256, blocks)
            threads = 256 * grid
            assert threads * 4 * (rounds - 1) < numel <= threads * 4 * rounds


# --- the generator, and the choice of a kernel ---


@pytest.fixture
def stand_in(monkeypatch):
    """A device that is the CPU, with PyTorch's generator of a CUDA device."""
    monkeypatch.setattr(released_noise, "_most_blocks", lambda device: BLOCKS)
    monkeypatch.setattr(released_noise, "_generator", lambda device: StandIn(SEED, OFFSET, BLOCKS))
    monkeypatch.setattr(
        released_noise, "_call", lambda out, first, generator, newest: generator.fill(out, first, newest)
    )
    monkeypatch.setattr(released_noise, "_chosen", {})
    log_once.cache_clear()
    yield
    log_once.cache_clear()


def model(out, seed, counter, grid, rounds, first, newest_first):
    """A kernel that is right."""
    StandIn(seed, 4 * counter, grid).fill(out, first, newest_first)


def test_the_generator_moves_as_by_the_calls(stand_in):
    for numel in SIZES:
        ours, theirs = StandIn(5, 40, BLOCKS), StandIn(5, 40, BLOCKS)
        for newest_first in (False, True):
            got, wanted = torch.full((2, 5, numel), torch.nan)
            released_noise._draw(model, got, SINGLE, ours, newest_first)
            theirs.fill(wanted, SINGLE, newest_first)
            assert ours.offset == theirs.offset == 40 + 5 * (1 + newest_first) * normal_(numel, 0, 0, BLOCKS)[1]
            assert torch.equal(got, wanted)


def last_bit(out, *rest):
    model(out, *rest)
    out.view(released_noise._BITS[out.dtype])[-1, -1] ^= 1


WRONG = {
    "offset": lambda *a: model(*a[:2], a[2] + 1, *a[3:]),
    "seed": lambda *a: model(a[0], a[1] % 2**32, *a[2:]),
    "order": lambda *a: model(*a[:6], False),
    "first": lambda *a: model(*a[:5], a[0].dtype, a[6]),
    "nothing": lambda *a: None,
    "a last bit": last_bit,
}


@pytest.mark.parametrize("kernel", WRONG.values(), ids=WRONG)
def test_a_kernel_that_differs_is_found_out(stand_in, kernel):
    assert released_noise._difference(model, torch.device("cpu")) is None
    assert released_noise._difference(kernel, torch.device("cpu")) == "PyTorch's own calls draw different bits"


@pytest.mark.parametrize("blocks", [BLOCKS + 1, 2 * BLOCKS])
def test_a_torch_that_launches_otherwise_is_found_out(stand_in, monkeypatch, blocks):
    monkeypatch.setattr(released_noise, "_most_blocks", lambda device: blocks)
    assert "would move PyTorch's generator by another offset" in released_noise._difference(model, torch.device("cpu"))


@pytest.fixture
def kernels(stand_in, monkeypatch):
    """``kernels(cuda=, triton=)``: what is there, by name."""

    def use(**there):
        monkeypatch.setattr(released_noise, "_why_not", lambda name, device: None if name in there else "not there")
        for name in ("cuda", "triton"):
            monkeypatch.setattr(released_noise, f"_by_{name}", there.get(name))
        return lambda backend=None: released_noise._kernel(torch.device("cpu"), backend)

    return use


def broken(*arguments):
    raise RuntimeError("does not compile")


def test_the_first_kernel_that_proves_itself_is_taken_and_only_once(kernels, caplog):
    proved = []

    def right(out, *rest):
        proved.append(len(out))
        model(out, *rest)

    chosen = kernels(cuda=broken, triton=right)
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert chosen() is right
        count = len(proved)
        assert (chosen(), chosen("cuda"), chosen("torch"), len(proved)) == (right, None, None, count)
    assert [record.getMessage() for record in caplog.records] == [
        "the noise of a sampling loop is not drawn by the cuda kernel on cpu: RuntimeError: does not compile"
    ]
    assert count > 0


def test_a_device_whose_noise_takes_calls_is_a_warning_and_a_cpu_is_none(stand_in, caplog):
    for device, level in (("cuda", "WARNING"), ("cpu", "INFO")):
        for slow in (False, True):
            log_once.cache_clear()
            caplog.clear()
            with caplog.at_level(logging.INFO, "cspd_kernels"):
                released_noise._log({"triton": "it is of wood"}, torch.device(device), slow)
            assert [record.levelname for record in caplog.records] == [level if slow else "INFO"]


def test_without_a_kernel_that_proves_itself_the_calls_are_made(kernels, monkeypatch):
    assert kernels(cuda=WRONG["offset"], triton=broken)() is None
    released_noise._chosen.clear()
    assert kernels()() is None
    released_noise._chosen.clear()
    monkeypatch.setenv("CSPD_BACKEND", "torch")
    assert kernels(cuda=model)() is None
    monkeypatch.setenv("CSPD_BACKEND", "cuda")
    assert kernels(cuda=model)() is model


def test_a_device_without_room_for_a_proof_gets_another_chance(kernels):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("full")

    chosen = kernels(cuda=full)
    assert chosen() is None
    assert released_noise._chosen == {}
    assert kernels(cuda=model)() is model


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_kernels_cannot_stand_in_for(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def needed(out, first=None, generator=None):
        return released_noise._watched() or released_noise._needs_calls(out, first or out.dtype, generator)

    out = torch.empty(3, 5)
    for dtype in (SINGLE, HALF, BRAIN):
        assert not needed(out.to(dtype))
        assert not needed(out, dtype)
    assert needed(out.double())
    assert needed(out, torch.float64)
    assert needed(torch.empty(1, 2**29, device="meta"))  # PyTorch fills it in parts
    assert not needed(torch.empty(1, 2**29 - 1, device="meta"))
    assert needed(torch.empty(2**31, 1, device="meta"))  # more blocks than a launch has
    assert not needed(out, generator=torch.Generator("cpu"))
    assert needed(torch.empty(3, 5, device="meta"), generator=torch.Generator("cpu"))
    for mode in (Seen(), SeenFunctions()):
        with mode:
            assert needed(out)
    assert torch.func.vmap(lambda x: x + needed(out))(torch.zeros(2)).all()
    with torch.device("cpu"):
        assert not needed(out)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert needed(out)


def test_where_pytorch_does_not_tell_who_watches_the_calls_are_made(monkeypatch):
    assert not released_noise._watched()
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert released_noise._watched()


def test_a_fake_tensor_asks_for_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    with FakeTensorMode():
        assert randn_steps(2, (3, 5), SINGLE, torch.device("cuda")).shape == (2, 3, 5)


def test_steps_are_drawn_by_the_kernel_or_by_calls_and_the_state_tells_no_difference(kernels, monkeypatch):
    launches = []

    def right(out, *rest):
        launches.append(len(out))
        model(out, *rest)

    kernels(triton=right)
    monkeypatch.setattr(released_noise, "_SERVED", "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    theirs = StandIn(3, 8, BLOCKS)
    wanted = torch.empty(4, 7, 5)
    theirs.fill(wanted, BRAIN, True)

    def draw(**options):
        ours, count = StandIn(3, 8, BLOCKS), len(launches)
        device = torch.device("cpu")
        got = randn_steps(4, (7, 5), SINGLE, device, ours, first=BRAIN, newest_first=True, **options)
        assert torch.equal(got, wanted)
        assert ours.offset == theirs.offset
        return len(launches) - count

    assert draw() > 1  # and the proof
    assert draw() == 1
    assert draw(backend="torch") == 0
    with Seen():
        assert draw() == 0


@pytest.mark.parametrize("generator", [None, torch.Generator()])
@pytest.mark.parametrize(("dtype", "first"), [(SINGLE, None), (torch.float64, BRAIN), (SINGLE, HALF)])
def test_without_a_device_the_calls_are_made(dtype, first, generator):
    def seeded():
        return (generator or torch.default_generator).manual_seed(3)

    seeded()
    calls = [torch.randn(2, 5, dtype=first or dtype, generator=generator).to(dtype)]
    calls += [torch.randn(2, 5, dtype=dtype, generator=generator) for _ in range(3)]
    after = torch.randn(3, generator=generator)
    for newest_first in (False, True):
        seeded()
        got = randn_steps(4, (2, 5), dtype, torch.device("cpu"), generator, first=first, newest_first=newest_first)
        assert torch.equal(got, torch.stack(calls[::-1] if newest_first else calls))
        assert torch.equal(torch.randn(3, generator=generator), after)


@pytest.mark.parametrize("shape", [(0, (2, 3)), (3, (0, 16)), (0, (0, 0))])
def test_no_numbers(shape):
    state = torch.get_rng_state()
    assert randn_steps(*shape, SINGLE, torch.device("cpu")).shape == (shape[0], *shape[1])
    assert torch.equal(torch.get_rng_state(), state)
