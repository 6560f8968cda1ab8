"""The noise of many calls of torch.randn in one launch: the numbers and the state of the calls, or the calls."""

import logging
import random

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_normals import StandIn, normal_, philox

from cspd_kernels import released_noise
from cspd_kernels.backends import log_once
from cspd_kernels.released_noise import layout, randn_steps

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
BLOCKS = 3  # of the largest launch: 768 threads
SIZES = [1, 33, 255, 256, 257, 768, 769, 1537, 3072, 3073, 7000]
SEED, OFFSET = 0xFEDC_BA98_7654_3210, 4 * (2**32 - 2)  # the counter's high word is reached


def fill(backend, device, numel, *, calls=3, dtype=SINGLE, first=None, newest_first=False, seed=SEED, offset=OFFSET):
    out = torch.full((calls, numel), torch.nan, dtype=dtype, device=device)
    kernel = {"cuda": released_noise._by_cuda, "triton": released_noise._by_triton}[backend]
    kernel(out, seed, offset // 4, *layout(numel, BLOCKS), first or dtype, newest_first)
    return out.cpu()


def expected(numel, *, calls=3, seed=SEED, offset=OFFSET):
    generator = StandIn(seed, offset, BLOCKS)
    return torch.stack([generator.normal(numel) for _ in range(calls)])


def assert_close(got, wanted, device):
    # A device's sine is an approximation, off by up to 2^-20.9, times a radius of up to 6.7.
    atol = 1e-6 if device.type == "cpu" else 5e-6
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=atol)


def test_the_model_draws_philox(python_philox):
    draw = random.Random(0)
    for _ in range(20):
        key, counter = [draw.getrandbits(32) for _ in range(2)], [draw.getrandbits(32) for _ in range(4)]
        words = philox(key, [np.uint64([word]) for word in counter])
        assert tuple(int(word[0]) for word in words) == python_philox(tuple(key), tuple(counter))


@pytest.mark.parametrize("numel", SIZES)
def test_a_kernel_fills_in_what_the_calls_would(backend, kernel_device, numel):
    assert_close(fill(backend, kernel_device, numel), expected(numel), kernel_device)


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (5, 8), (2**63, 2**35), (2**64 - 1, 2**63 - 8), (2**32, 4)])
def test_every_word_of_the_state_counts(backend, kernel_device, seed, offset):
    got = fill(backend, kernel_device, 900, seed=seed, offset=offset)
    assert_close(got, expected(900, seed=seed, offset=offset), kernel_device)


def test_many_calls_and_the_first_one_last(backend, kernel_device):
    got = fill(backend, kernel_device, 33, calls=100, newest_first=True)
    assert_close(got, expected(33, calls=100).flip(0), kernel_device)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("numel", [33, 3080])
def test_narrow_types_are_float32_rounded(backend, kernel_device, dtype, numel):
    single = fill(backend, kernel_device, numel)
    # Triton's interpreter cuts bfloat16 off where a device rounds it.
    cut = backend == "triton" and kernel_device.type == "cpu" and dtype is BRAIN
    one_place = {"rtol": 2.0**-7 if cut else 0, "atol": 0}
    torch.testing.assert_close(fill(backend, kernel_device, numel, dtype=dtype), single.to(dtype), **one_place)
    for newest_first in (False, True):
        got = fill(backend, kernel_device, numel, first=dtype, newest_first=newest_first)
        wanted = single.clone()
        wanted[0] = wanted[0].to(dtype).float()
        torch.testing.assert_close(got, wanted.flip(0) if newest_first else wanted, **one_place)
        assert torch.equal(got[1], single[1])
        narrow = got[-1 if newest_first else 0]
        assert torch.equal(narrow, narrow.to(dtype).float())


def test_no_zero_is_negative(backend, kernel_device):
    # Found by search: a uniform that rounds to 1, so that the radius is -0, and a positive sine.
    got = fill(backend, kernel_device, 256, calls=1, seed=7, offset=4 * 231335)[0]
    assert got[200] == 0
    assert not torch.signbit(got[200])


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
    assert released_noise._difference(kernel, torch.device("cpu")) == "PyTorch's own calls draw other bits"


@pytest.mark.parametrize("blocks", [BLOCKS + 1, 2 * BLOCKS])
def test_a_torch_that_launches_otherwise_is_found_out(stand_in, monkeypatch, blocks):
    monkeypatch.setattr(released_noise, "_most_blocks", lambda device: blocks)
    assert "would move PyTorch's generator otherwise" in released_noise._difference(model, torch.device("cpu"))


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
        return released_noise._needs_calls(out, first or out.dtype, generator)

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
