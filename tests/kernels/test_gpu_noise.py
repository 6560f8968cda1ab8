"""On a GPU: one launch gives the bits of PyTorch's own calls, and leaves the generator as they do."""

import pytest
import torch
from dispatch_modes import no_wait_for_cuda
from small_models import CSpDDiffLoss
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import cspd
from cspd_kernels import released_noise
from cspd_kernels.released_noise import randn_steps
from cspd_kernels.testing import randomize_, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("available")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = released_noise._BITS
SHAPES = [(1,), (3, 11), (255,), (257,), (4, 16), (256, 16), (8192, 16), (5, 3, 7), (100_003,)]


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def unproved(monkeypatch):
    """Nothing is known of any kernel."""
    monkeypatch.setattr(released_noise, "_chosen", {})


def by_calls(count, shape, dtype, first=None):
    calls = [torch.randn(shape, dtype=first or dtype if i == 0 else dtype, device="cuda") for i in range(count)]
    return torch.stack([call.to(dtype) for call in calls])


def assert_same(got, expected):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert torch.equal(got.view(BITS[got.dtype]), expected.view(BITS[got.dtype]))


def generator(device):
    return torch.cuda.default_generators[device.index]


def test_the_kernels_prove_themselves(backend, device, unproved):
    before = generator(device).get_state()
    assert released_noise._kernel(device, backend) is not None
    assert torch.equal(generator(device).get_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_bits_and_state_are_those_of_the_calls(backend, device, dtype, count):
    cap = 256 * released_noise._most_blocks(device)
    sizes = [(cap - 1,), (cap,), (cap + 1,), (4 * cap,), (4 * cap + 1,), (9 * cap + 5,)]
    for seed, shape in enumerate([*SHAPES, *sizes]):
        states = []
        for draw in (by_calls, lambda *call: randn_steps(*call, device, backend=backend)):
            torch.cuda.manual_seed(2**62 + seed)
            torch.rand(seed, device=device)  # an offset that is not 0, of another kind of draw
            numbers = draw(count, shape, dtype)
            states.append((numbers, generator(device).get_state(), torch.randn(5, device=device)))
        (expected, state, then), (got, state_after, then_after) = states
        assert_same(got, expected)
        assert torch.equal(state, state_after)
        assert torch.equal(then, then_after)


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("newest_first", [False, True])
def test_a_first_call_of_another_type(backend, device, first, newest_first):
    torch.cuda.manual_seed(3)
    expected = by_calls(4, (50, 16), torch.float32, first)
    torch.cuda.manual_seed(3)
    got = randn_steps(4, (50, 16), torch.float32, device, first=first, newest_first=newest_first, backend=backend)
    assert_same(got, expected.flip(0) if newest_first else expected)


def test_a_generator_of_ones_own(backend, device):
    ours, theirs = (torch.Generator(device).manual_seed(2**64 - 9) for _ in range(2))
    default = generator(device).get_state()
    for dtype in DTYPES:
        expected = torch.stack([torch.randn(33, dtype=dtype, device=device, generator=theirs) for _ in range(5)])
        assert_same(randn_steps(5, (33,), dtype, device, ours, backend=backend), expected)
        torch.rand(7, device=device, generator=ours)
        torch.rand(7, device=device, generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(generator(device).get_state(), default)
    with pytest.raises(RuntimeError, match="generator"):
        randn_steps(2, (3,), torch.float32, device, torch.Generator("cpu"), backend=backend)


def kernels_of(function):
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if "kernel" in name]


def test_it_is_one_launch(backend, device):
    def draw():
        randn_steps(100, (64, 16), torch.float32, device, newest_first=True, backend=backend)

    draw()
    assert len(kernels_of(lambda: by_calls(10, (64, 16), torch.float32))) >= 10  # the profiler sees launches
    (name,) = kernels_of(draw)
    assert "randn_kernel" in name


def test_the_host_does_not_wait_and_a_proof_is_no_wait_to_report(backend, device, unproved):
    for _ in range(2):
        with no_wait_for_cuda():
            randn_steps(10, (4, 16), torch.float32, device, backend=backend)
    assert list(released_noise._chosen.values()) != [None]


def test_a_captured_graph_holds_the_calls_and_moves_its_generator(backend, device, unproved):
    torch.randn(1, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        numbers = randn_steps(6, (40, 16), torch.float32, device, backend=backend)
    assert released_noise._chosen == {}  # no proof while a graph is captured
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        expected = [randn_steps(6, (40, 16), torch.float32, device, backend=backend) for _ in range(2)]
        state = generator(device).get_state()
        torch.cuda.manual_seed(seed)
        for wanted in expected:  # between replays the generator is the graph's and ours in turn
            graph.replay()
            assert_same(numbers, wanted)
        assert torch.equal(generator(device).get_state(), state)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_patched_head_draws_what_its_own_code_draws(backend, device, cfg):
    torch.manual_seed(0)
    head = randomize_(CSpDDiffLoss(4, 32, 2, 32, "12"), 1).to(device)
    z = torch.randn(8, 32, device=device)

    def sample():
        torch.manual_seed(5)
        tokens = head.sample(z, 1.0, cfg)
        rows = 8 if cfg == 1.0 else 4  # callers drop the unconditional half, which repeats the other one when patched
        return tokens[:rows], generator(device).get_state()

    expected, state = sample()
    cspd.patch(head, backend=backend)
    for _ in range(3):
        tokens, state_after = sample()
        assert relative_error(tokens, expected) < 1e-5
        assert torch.equal(state_after, state)
    with no_wait_for_cuda():
        sample()
