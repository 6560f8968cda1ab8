"""The backends on a GPU: the numbers of the definition, no wait for the host, and graphs that nothing spoils."""

import gc

import pytest
import torch
from chains import assert_agrees, assert_close, definition, kernels_of
from dispatch_modes import no_wait_for_cuda
from seeds import seed_tensor
from small_models import sample, small_mar

import cspd
from cspd_kernels import DiffusionHead, PhiloxNoise, accept_reject, denoise, log_density_ratio
from cspd_kernels.backends import implementation
from cspd_kernels.testing import random_chains, random_inputs, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("available")]

BACKENDS = [None, "torch", "triton", "cuda"]
# Of those with kernels, CUDA alone has a persistent one.
cuda_alone = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
PERSISTENT_OR_NOT = [("triton", "0"), ("cuda", "0"), ("cuda", "16")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = {"MAR-B": (6, 1024, 768), "MAR-L": (8, 1280, 1024), "MAR-H": (12, 1536, 1280)}  # D, W, Z


def on_gpu(chain):
    return type(chain)(*(field.cuda() for field in chain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33])
def test_denoise_agrees_with_float64(make_diffloss, backend, dtype, rows):
    head = DiffusionHead.from_module(make_diffloss().cuda(), dtype=dtype)
    assert_agrees(head, *random_inputs(head, rows, 0), backend=backend)


def test_noise_is_that_of_the_cpu():
    rows = torch.arange(1000) * 2**31
    noise = PhiloxNoise(2**63 + 5, rows)
    there = PhiloxNoise(2**63 + 5, rows.cuda())
    assert relative_error(there.x_T(7), noise.x_T(7)) < 1e-5
    assert relative_error(there.step(3), noise.step(3)) < 1e-5


def test_verdicts_are_those_of_the_cpu():
    x, draft, target = random_chains(5000, 3, 0, shift=1.0)
    here = accept_reject(x, draft, target, seed=1)
    there = accept_reject(x.cuda(), on_gpu(draft), on_gpu(target), seed=1)
    assert (here.tries != there.tries.cpu()).float().mean() < 1e-3  # within rounding of a threshold


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_and_patched_heads_do_not_wait_for_the_host(make_diffloss, backend):
    module = cspd.patch(make_diffloss().cuda(), noise="philox", backend=backend)
    head = DiffusionHead.from_module(module)
    x, draft, target = random_chains(64, head.channels, 0)
    x, draft, target = x.cuda(), on_gpu(draft), on_gpu(target)
    inputs, guided = random_inputs(head, 8, 0), random_inputs(head, 8, 0, guided=True)
    noise = PhiloxNoise(0, torch.arange(8, device="cuda"))
    on_device = PhiloxNoise(seed_tensor(2**64 - 1, "cuda"), noise.rows)
    scale = torch.linspace(1, 3, 8, device="cuda")
    rows = torch.arange(64, device="cuda")

    def everything():
        denoise(head, *inputs, backend=backend)
        denoise(head, inputs[0], noise.x_T(head.channels), noise, backend=backend)
        denoise(head, inputs[0], on_device.x_T(head.channels), on_device, backend=backend)
        denoise(head, *guided, cfg_scale=2.0, backend=backend)
        denoise(head, *guided, cfg_scale=scale, temperature=0.5, backend=backend)
        module.sample(inputs[0])
        log_density_ratio(x, draft, target, backend=backend)
        accept_reject(x, draft, target, seed=1, rows=rows, backend=backend)

    everything()  # compiles, and uploads the tables of the heads
    for _ in range(3):  # captures, then replays
        with no_wait_for_cuda():
            everything()


def test_guidance_scale_may_lie_on_the_cpu(make_diffloss):
    head = DiffusionHead.from_module(make_diffloss().cuda())
    inputs = random_inputs(head, 5, 0, guided=True)
    expected = denoise(head, *inputs, cfg_scale=3.0).sample
    for scale in (torch.tensor([3.0]), torch.tensor(3.0).cuda()):
        assert relative_error(denoise(head, *inputs, cfg_scale=scale).sample, expected) <= 1e-6


# --- the backends with kernels ---


@pytest.fixture
def module(make_diffloss):
    return make_diffloss(channels=16, width=64, scale=0.125).cuda()


@pytest.fixture
def small(module):
    return DiffusionHead.from_module(module)


_MODULES = {}


@pytest.fixture
def mar_head(make_diffloss):
    """``mar_head(name, dtype)``: a head of a released size with random weights and 10 steps."""

    def make(name, dtype=torch.float32):
        if name not in _MODULES:
            depth, width, cond = HEADS[name]
            size = dict(channels=16, cond_channels=cond, width=width, steps=10, scale=width**-0.5)
            _MODULES[name] = make_diffloss("mild", depth, **size).cuda()
        return DiffusionHead.from_module(_MODULES[name], dtype=dtype)

    return make


def call(backend, head, rows, seed=0, guided=False):
    """A call on inputs of its own."""
    return denoise(head, *random_inputs(head, rows, seed, guided), cfg_scale=2.5 if guided else 1.0, backend=backend)


def assert_equal(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 64, 512])
def test_the_automatic_backend_has_kernels(kernel_backends, small, rows):
    """Which one it is, the table of the fastest says; its bits are those of asking for it by name."""
    head = small.to(torch.bfloat16)
    chosen = implementation("denoise", None, head.device, head, rows)
    (name,) = (name for name in kernel_backends if implementation("denoise", name) is chosen)
    inputs = random_inputs(head, rows, 0)
    assert_equal(denoise(head, *inputs), denoise(head, *inputs, backend=name))


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64, 100, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_the_released_sizes(backend, mar_head, monkeypatch, name, dtype, rows):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "0")
    head = mar_head(name, dtype)
    for seed in range(3):  # plain, captured, replayed
        assert_agrees(head, *random_inputs(head, rows, seed), backend=backend)
        assert_agrees(head, *random_inputs(head, rows, seed, guided=True), cfg_scale=2.5, backend=backend)


@pytest.mark.parametrize("rows", [1, 8, 9, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_the_released_sizes_by_the_automatic_choice(mar_head, name, dtype, rows):
    """Of backend and kernel: what a user gets without an option."""
    head = mar_head(name, dtype)
    for seed in range(3):
        assert_agrees(head, *random_inputs(head, rows, seed))
        assert_agrees(head, *random_inputs(head, rows, seed, guided=True), cfg_scale=2.5)


@cuda_alone
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("guided", [False, True])
def test_persistent_kernel_agrees_with_the_layered_ones_and_float64(
    backend, mar_head, monkeypatch, used, dtype, rows, guided
):
    head = mar_head("MAR-B", dtype)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "0")
    layered = call(backend, head, rows, 2, guided)
    assert {type(chain) for chain in used} == {kernels_of(backend).layered}
    used.clear()
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    for seed in range(3):
        inputs = random_inputs(head, rows, seed, guided)
        assert_agrees(head, *inputs, cfg_scale=2.5 if guided else 1.0, backend=backend)
    assert_close(call(backend, head, rows, 2, guided), layered, 1e-5 if dtype == torch.float32 else 2e-2)
    kernels, beyond = kernels_of(backend), guided and rows > 8  # of a tile of 16 rows
    assert {type(chain) for chain in used} == {kernels.layered if beyond else kernels.persistent}


@cuda_alone
@pytest.mark.parametrize("busy", [False, True])
def test_persistent_kernel_many_times(backend, make_diffloss, monkeypatch, used, busy):
    """Its blocks find each other every time, also where another stream keeps the device busy."""
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    module = make_diffloss("mild", 6, channels=16, cond_channels=768, width=1024, steps=2, scale=1 / 32).cuda()
    head, other = DiffusionHead.from_module(module, dtype=torch.bfloat16), torch.cuda.Stream()
    inputs, a = random_inputs(head, 2, 0), torch.randn(2048, 2048, device="cuda")
    expected = denoise(head, *inputs, backend=backend)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for i in range(10_000):
        if busy:
            with torch.cuda.stream(other):
                a @ a
        out = denoise(head, *inputs, backend=backend)
        wrong += sum((a != b).any() for a, b in zip(out, expected))
        if i % 1000 == 0:
            torch.cuda.synchronize()  # or one stream would run far ahead of the other
    assert int(wrong) == 0
    assert {type(chain) for chain in used} == {kernels_of(backend).persistent}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("rows", [33, 200])
def test_every_tile_at_a_released_width(mar_head, device_of, monkeypatch, dtype, rows):
    device_of("triton")
    from cspd_kernels.ops.denoise.triton_chain import LayeredChain
    from cspd_kernels.ops.denoise.triton_config import FLOAT32_TILES, HALF_TILES, Products

    for tile in FLOAT32_TILES if dtype == torch.float32 else HALF_TILES:
        for made in (Products(tile, tile), Products(tile, None), Products(None, tile)):
            monkeypatch.setattr(LayeredChain, "choose", lambda chain, head, made=made: made)
            head = mar_head("MAR-B", dtype)  # without the plans of the others
            for seed in range(3):  # plain, captured, replayed
                assert_agrees(head, *random_inputs(head, rows, seed), backend="triton")


@pytest.mark.parametrize("rows", [2, 64, 512])
def test_kernels_that_start_early_give_the_bits_of_those_that_do_not(mar_head, device_of, monkeypatch, rows):
    device_of("triton")
    from cspd_kernels.ops.denoise import triton_chain

    head = mar_head("MAR-B", torch.bfloat16)
    if not triton_chain.starts_early(head.device):
        pytest.skip("kernels do not start early on this device")
    inputs, wrong = random_inputs(head, rows, 0), torch.zeros((), dtype=torch.int64, device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(triton_chain, "starts_early", lambda device: False)
        expected = denoise(head, *inputs, backend="triton")
    head = mar_head("MAR-B", torch.bfloat16)  # without the plans of the other
    for _ in range(500):
        out = denoise(head, *inputs, backend="triton")
        wrong += sum((a != b).any() for a, b in zip(out, expected))
    assert int(wrong) == 0


def test_a_block_that_stays_silent_is_noticed(mar_head, device_of, monkeypatch):
    device_of("cuda")
    from cspd_kernels.ops.denoise.cuda_persistent import PersistentChain

    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    head = mar_head("MAR-B", torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(PersistentChain, "silent", 0)
        patch.setattr(PersistentChain, "timeout_ns", 50_000_000)
        assert call("cuda", head, 2).sample.isnan().all()  # not captured: a first call
    with pytest.raises(RuntimeError, match=r"gave up waiting .* Set CSPD_PERSISTENT_MAX_TOKENS=0"):
        call("cuda", head, 2)
    for seed in range(3):
        assert_agrees(head, *random_inputs(head, 2, seed), backend="cuda")


@pytest.mark.parametrize(("backend", "persistent"), PERSISTENT_OR_NOT, indirect=["backend"])
def test_replays_see_what_changes_between_calls(backend, small, monkeypatch, persistent):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", persistent)
    for seed, rows in enumerate((8, 5, 7, 8, 6)):
        cond, x, stored = random_inputs(small, rows, seed, guided=True)
        addressed = PhiloxNoise(2**63 + seed, torch.arange(rows, device="cuda") * 2**33 + seed)
        scale = torch.linspace(seed, 4, rows, device="cuda") if seed % 2 else 1.5 + seed
        for noise in (stored, addressed):
            options = {"temperature": 0.5 + seed, "cfg_scale": scale}
            assert_agrees(small, cond, x, noise, **options, backend=backend)


def test_replays_read_the_inputs_that_earlier_work_on_the_stream_writes(backend, small):
    inputs = random_inputs(small, 8, 0)
    expected = denoise(small, *(2 * v for v in inputs), backend=backend)
    for _ in range(3):
        late = [v.clone() for v in inputs]
        torch.cuda._sleep(10**8)
        for v in late:
            v.mul_(2)
        assert_equal(denoise(small, *late, backend=backend), expected)


def test_a_patched_module_follows_its_weights(backend, make_diffloss, module):
    other = make_diffloss(channels=16, width=64, scale=0.125, seed=1).cuda()
    z = torch.randn(8, 7, device="cuda")

    def samples(module):
        torch.manual_seed(0)
        return [module.sample(z) for _ in range(4)]

    expected = samples(cspd.patch(other, backend=backend))
    cspd.patch(module, backend=backend)
    before = samples(module)
    module.load_state_dict(other.state_dict())
    assert_equal(samples(module), expected)
    assert relative_error(before[0], expected[0]) > 1e-2


def test_two_heads_in_turn(backend, make_diffloss):
    heads = [DiffusionHead.from_module(make_diffloss(seed=seed).cuda()) for seed in range(2)]
    for seed in range(4):
        for head in heads:
            assert_agrees(head, *random_inputs(head, 5, seed), backend=backend)


def test_two_streams_in_turn(backend, small):
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [random_inputs(small, 5, seed) for seed in range(20)]
    torch.cuda.synchronize()
    out = []
    for i, one in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            out.append(denoise(small, *one, backend=backend))
    torch.cuda.synchronize()
    for one, result in zip(inputs, out):
        assert_close(result, definition(small, *one), 1e-5)


def test_two_heads_and_two_sizes_on_two_streams(backend, make_diffloss):
    heads = [DiffusionHead.from_module(make_diffloss(seed=seed).cuda()) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    cases = [(i % 2, 5 + 100 * (i // 2 % 2), i) for i in range(24)]
    inputs = [random_inputs(heads[which], rows, seed) for which, rows, seed in cases]
    torch.cuda.synchronize()
    out = []
    for (which, _, _), one in zip(cases, inputs):
        with torch.cuda.stream(streams[which]):
            out.append(denoise(heads[which], *one, backend=backend))
    torch.cuda.synchronize()
    for (which, _, _), one, result in zip(cases, inputs, out):
        assert_close(result, definition(heads[which], *one), 1e-5)


def test_memory_is_stable(backend, small):
    inputs = random_inputs(small, 5, 0)

    def calls(count):
        for _ in range(count):
            denoise(small, *inputs, backend=backend)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = calls(5)
    assert calls(1000) == before


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        lambda: torch.autocast("cuda", dtype=torch.bfloat16),
        lambda: torch.autocast("cuda", dtype=torch.float16),
        lambda: torch.cuda.stream(torch.cuda.Stream()),
    ],
    ids=["inference_mode", "autocast bfloat16", "autocast float16", "side stream"],
)
@pytest.mark.parametrize("calls_inside", [1, 2, 3])
def test_captured_or_not_in_a_context_of_the_caller(backend, small, context, calls_inside):
    inputs = random_inputs(small, 5, 0)
    torch.cuda.synchronize()
    with context():
        out = [denoise(small, *inputs, backend=backend) for _ in range(calls_inside)]
    torch.cuda.synchronize()
    out += [denoise(small, *inputs, backend=backend) for _ in range(3)]
    for result in out:
        assert_close(result, definition(small, *inputs), 1e-5)


@pytest.mark.parametrize(("backend", "persistent"), [("torch", "0"), *PERSISTENT_OR_NOT])
@pytest.mark.parametrize("rows", [1, 5, 100, 250])
def test_inside_a_graph_of_the_caller(small, monkeypatch, backend, rows, persistent):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", persistent)
    static = random_inputs(small, rows, 0)
    denoise(small, *static, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = denoise(small, *static, backend=backend)
    for seed in range(1, 4):
        inputs = random_inputs(small, rows, seed)
        for to, value in zip(static, inputs):
            to.copy_(value)
        graph.replay()
        assert_close(out, definition(small, *inputs), 1e-5)
        assert_agrees(small, *inputs, backend=backend)  # calls in between do not disturb it


@pytest.mark.parametrize(("backend", "persistent"), [("torch", "0"), *PERSISTENT_OR_NOT])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_graph_of_the_caller_reads_seed_and_scale_at_every_replay(small, monkeypatch, backend, rows, persistent):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", persistent)
    cond = random_inputs(small, rows, 0, guided=True)[0]
    addresses, scale = torch.arange(rows, device="cuda") * 2**33, torch.linspace(1.5, 3, rows, device="cuda")
    seed = seed_tensor(3, "cuda")

    def call(seed):
        noise = PhiloxNoise(seed, addresses)
        x = noise.x_T(small.channels)
        return x, denoise(small, cond, x, noise, temperature=0.9, cfg_scale=scale, backend=backend)

    call(seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, out = call(seed)
    before = None
    for number in (5, 2**63 + 5, 2**64 - 1):
        seed.copy_(seed_tensor(number))
        for step in (0.0, 0.5):  # with the scale of before, then with another
            scale.add_(step)
            graph.replay()
            expected_x, expected = call(number)
            assert torch.equal(x, expected_x)
            assert_close(out, expected, 1e-5)
            assert before is None or relative_error(out.sample, before) > 1e-3
            before = out.sample.clone()


def test_an_image_is_reproducible_bit_by_bit(backend):
    model = cspd.patch(small_mar().cuda(), backend=backend)
    options = {"labels": torch.tensor([1, 4, 9], device="cuda"), "cfg": 2.0}
    one, two, three = (sample(model, seed, **options) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    eager = sample(cspd.unpatch(model), 0, **options)
    assert relative_error(one, eager) < 1e-3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_caller(backend, small, mode):
    def function(cond, x, noise):
        out = denoise(small, cond.tanh(), x * 2, noise, backend=backend)
        return out.sample * 3 + out.log_std, (out.path_log_std / 100).exp()  # a sum of some -260, whose exp is 0

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for seed, rows in enumerate((5, 5, 8, 8, 8)):
        inputs = random_inputs(small, rows, seed)
        other = function(*random_inputs(small, rows, seed + 100))
        for a, b, c in zip(compiled(*inputs), function(*inputs), other, strict=True):
            assert relative_error(a, b) <= 1e-5
            assert relative_error(c, b) > 1e-4  # of other inputs


def test_graphs_go_with_their_head(backend, make_diffloss):
    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def life(seed):
        head = DiffusionHead.from_module(make_diffloss(seed=seed).cuda())
        alone = allocated()
        for rows in (1, 5, 100):
            for _ in range(3):
                call(backend, head, rows, guided=True)
        assert allocated() > alone  # there is something that must go

    life(0)  # the workspaces of the library stay with their stream
    before = allocated()
    life(1)
    assert allocated() == before
