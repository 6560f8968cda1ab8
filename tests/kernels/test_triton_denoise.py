"""The Triton chains against their definition in float64: on a GPU, or in Triton's interpreter on the CPU."""

import multiprocessing

import pytest
import torch
from chains import assert_agrees, assert_close, definition, workspace_of

from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.testing import random_inputs, relative_error

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton

from cspd_kernels.ops.denoise import triton_chain, triton_config, triton_persistent
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.triton_chain import LayeredChain
from cspd_kernels.ops.denoise.triton_config import Tile, block_tile, update_tile
from cspd_kernels.ops.denoise.triton_persistent import PersistentChain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def here(triton_device):
    """Every test needs a place where the kernels run."""


@pytest.fixture
def multiprocessors(monkeypatch, triton_device):
    """``multiprocessors(n)``: in the interpreter the persistent chain takes n programs, and a single one has its
    barriers and all steps in one launch, as on a GPU."""

    def use(count):
        if triton_device.type == "cpu":
            monkeypatch.setattr(triton_persistent, "multiprocessors", lambda device: count)

    return use


@pytest.fixture(params=["layered", "persistent"])
def shape(request, monkeypatch, multiprocessors):
    """Run a test with each shape of the chain, and see to it that this one was taken."""
    used = []
    for kind in (LayeredChain, PersistentChain):
        monkeypatch.setattr(kind, "run_steps", counted(kind.run_steps, used))
    if request.param != "layered":
        monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
        multiprocessors(1)
    yield request.param
    assert {type(chain) for chain in used} == {LayeredChain if request.param == "layered" else PersistentChain}


def counted(run_steps, used):
    def run(self, *arguments):
        used.append(self)
        return run_steps(self, *arguments)

    return run


def addressed(head, rows, seed=2**63 + 5):
    return PhiloxNoise(seed, torch.arange(rows, device=head.device) * 2**33 + 2**32 - 1)


def guided_inputs(head, rows, seed=0):
    return random_inputs(head, rows, seed, guided=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "width", "depth", "steps", "guided"),
    [(1, 4, 16, 1, 1, False), (1, 16, 48, 1, 7, True), (2, 5, 80, 3, 2, True), (17, 4, 16, 1, 2, False)],
)
def test_agrees_with_float64(make_head, dtype, rows, channels, width, depth, steps, guided):
    head = make_head(dtype, channels=channels, width=width, depth=depth, steps=steps)
    assert_agrees(head, *random_inputs(head, rows, 0, guided), cfg_scale=2.5 if guided else 1.0, backend="triton")


@pytest.mark.parametrize(
    ("rows", "channels", "width", "guided"),
    [(3, 64, 144, False), (5, 33, 48, True), (17, 5, 16, True), (33, 5, 80, False), (257, 4, 16, False)],
)
def test_sizes(make_head, rows, channels, width, guided):
    head = make_head(channels=channels, width=width)
    assert_agrees(head, *random_inputs(head, rows, 0, guided), cfg_scale=2.5 if guided else 1.0, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("programs", "rows", "steps", "guided"), [(1, 3, 7, True), (2, 5, 2, True), (3, 1, 2, False)])
def test_persistent_agrees_with_float64(make_head, monkeypatch, multiprocessors, dtype, programs, rows, steps, guided):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    multiprocessors(programs)
    head = make_head(dtype, depth=3, steps=steps)
    inputs = random_inputs(head, rows, 0, guided)
    assert_agrees(head, *inputs, cfg_scale=2.5 if guided else 1.0, backend="triton")


@pytest.mark.parametrize(("rows", "channels", "width"), [(1, 4, 16), (2, 33, 80), (16, 5, 144)])
def test_persistent_sizes(make_head, monkeypatch, multiprocessors, rows, channels, width):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    multiprocessors(5)
    head = make_head(channels=channels, width=width)
    assert_agrees(head, *random_inputs(head, rows, 0), backend="triton")


def test_wide_heads(make_head, monkeypatch, shape):
    # Larger ones than there are for so few tokens: fewer programs.
    monkeypatch.setattr(triton_chain, "block_tile", lambda *_: Tile(16, 128, 128, 4, 2))
    monkeypatch.setattr(triton_chain, "update_tile", lambda tokens, channels: update_tile(256, channels))
    head = make_head(channels=4, width=1040)
    assert_agrees(head, *random_inputs(head, 5, 0), backend="triton")


def test_no_blocks(make_head):
    head = make_head(depth=0)
    assert_agrees(head, *guided_inputs(head, 3), cfg_scale=2.5, backend="triton")


def test_rows_so_alike_that_the_epsilon_of_the_norms_counts(make_diffloss, triton_device, shape):
    module = make_diffloss(steps=2, scale=0.15).to(triton_device)
    for parameter in module.net.input_proj.parameters():
        parameter.data *= 1e-3
    assert_agrees(head := DiffusionHead.from_module(module), *random_inputs(head, 3, 0), backend="triton")


@pytest.mark.parametrize("guided", [False, True])
def test_fixed_variance(make_head, shape, guided):
    head = make_head(learn_sigma=False)
    assert not head.learned_variance
    assert_agrees(head, *random_inputs(head, 5, 1, guided), cfg_scale=3.0 if guided else 1.0, backend="triton")


@pytest.mark.parametrize("guided", [False, True])
def test_addressed_noise(make_head, shape, guided):
    head = make_head(steps=3)
    cond, x, _ = random_inputs(head, 5, 2, guided)
    assert_agrees(head, cond, x, addressed(head, 5), cfg_scale=3.0 if guided else 1.0, backend="triton")


@pytest.mark.parametrize(
    "scale", [0.0, -1.5, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([2.5, 0.0, 1.0, -1.5, 4.0])]
)
def test_guidance_scales(make_head, scale):
    head = make_head()
    scale = scale.to(head.device) if isinstance(scale, torch.Tensor) else scale
    assert_agrees(head, *guided_inputs(head, 5, 3), cfg_scale=scale, backend="triton")


def test_guidance_scale_per_token(make_head, shape):
    head = make_head()
    scale = torch.tensor([2.5, 0.0, 1.0, -1.5, 4.0], device=head.device)
    assert_agrees(head, *guided_inputs(head, 5, 3), cfg_scale=scale, backend="triton")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_temperatures(make_head, shape, temperature):
    head = make_head()
    assert_agrees(head, *random_inputs(head, 3, 4), temperature=temperature, backend="triton")


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noise", ["stored", "addressed"])
def test_no_rows(make_head, guided, noise):
    head = make_head()
    cond, x, stored = random_inputs(head, 0, 0, guided)
    noise = stored if noise == "stored" else addressed(head, 0)
    out = denoise(head, cond, x, noise, cfg_scale=2.0 if guided else 1.0, backend="triton")
    assert [v.shape for v in out] == [(0, 5), (0, 5), (0, 5), (0,)]


def test_inputs_need_not_be_contiguous(make_head, shape):
    head = make_head()
    strided = [v.transpose(0, -1).contiguous().transpose(0, -1) for v in guided_inputs(head, 5, 5)]
    assert not any(v.is_contiguous() for v in strided)
    assert_agrees(head, *strided, cfg_scale=2.0, backend="triton")


def test_inputs_may_be_narrower_than_the_arithmetic(make_head, shape):
    head = make_head()
    assert_agrees(head, *(v.bfloat16() for v in guided_inputs(head, 5, 6)), cfg_scale=2.0, backend="triton")


@pytest.mark.parametrize("kind", ["stored", "addressed", "scale per token"])
@pytest.mark.parametrize("workspace", [1, 5_000, 25_000])  # a row, two rows, two steps of all rows
def test_small_workspace_bounds_the_modulations_and_changes_nothing(make_head, monkeypatch, kind, workspace):
    head = make_head(steps=3)
    cond, x, noise = guided_inputs(head, 5, 7)
    noise = addressed(head, 5) if kind == "addressed" else noise
    scale = torch.linspace(0, 4, 5, device=head.device) if kind == "scale per token" else 2.0
    sizes, run_steps = [], LayeredChain.run_steps

    def measured(chain, *arguments):
        sizes.append(workspace_of(chain))
        return run_steps(chain, *arguments)

    monkeypatch.setattr(LayeredChain, "run_steps", measured)
    assert_agrees(head, cond, x, noise, cfg_scale=scale, workspace_bytes=workspace, backend="triton")
    assert len(sizes) > 1
    assert workspace == 1 or max(sizes) <= workspace


@pytest.mark.parametrize("steps_at_once", [1, 2, 4])
def test_persistent_in_chunks_of_steps(make_head, monkeypatch, multiprocessors, steps_at_once):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    multiprocessors(1)
    head = make_head(steps=5)
    workspace = 3 * 2 * head.width * 6 * 4 * steps_at_once
    assert_agrees(head, *guided_inputs(head, 3, 8), cfg_scale=2.0, workspace_bytes=workspace, backend="triton")


def test_inputs_and_weights_are_not_modified(make_diffloss, triton_device, shape):
    module = make_diffloss(steps=2).to(triton_device)
    head = DiffusionHead.from_module(module)
    kept = [*guided_inputs(head, 3, 9), torch.linspace(1, 2, 3, device=triton_device), head.time_embedding]
    kept += module.parameters()
    before = [v.detach().clone() for v in kept]
    denoise(head, *kept[:3], cfg_scale=kept[3], backend="triton")
    assert all(map(torch.equal, kept, before))


def test_inference_mode_and_then_none(make_head):
    head = make_head()
    inputs = random_inputs(head, 3, 10)
    with torch.inference_mode():
        inner = [denoise(head, *inputs, backend="triton") for _ in range(2)]
    outer = denoise(head, *inputs, backend="triton")
    for out in inner:
        assert all(map(torch.equal, out, outer))


def test_autocast_of_the_caller_changes_nothing(make_head):
    head = make_head()
    inputs = random_inputs(head, 3, 11)
    expected = denoise(head, *inputs, backend="triton")
    with torch.autocast(head.device.type, dtype=torch.bfloat16):
        assert all(map(torch.equal, denoise(head, *inputs, backend="triton"), expected))


def test_weights_that_are_transposed_views(make_diffloss, triton_device, shape):
    module = make_diffloss(steps=2, scale=0.15).to(triton_device)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()
    head = DiffusionHead.from_module(module)
    assert_agrees(head, *random_inputs(head, 3, 12), backend="triton")


def test_float16_holds_under_a_badly_conditioned_schedule(make_head, shape):
    """x exceeds float16's range here; it is never rounded to it."""
    head = make_head(torch.float16, "cosine", steps=5)
    cond, x, noise = random_inputs(head, 3, 13)
    assert definition(head, cond, 3 * x, noise).sample.abs().max() > 65504
    assert_agrees(head, cond, 3 * x, noise, backend="triton")


@pytest.mark.parametrize(
    ("dtype", "tile"),
    [(torch.float32, t) for t in triton_config._FLOAT32] + [(torch.float16, t) for t in triton_config._HALF],
    ids=lambda v: f"{v.bm}x{v.bn}" if isinstance(v, Tile) else None,
)
def test_every_tile_of_a_block(make_head, monkeypatch, dtype, tile):
    monkeypatch.setattr(triton_chain, "block_tile", lambda *_: tile)
    monkeypatch.setattr(triton_chain, "update_tile", lambda tokens, channels: update_tile(256, channels))
    head = make_head(dtype, width=144)  # more than one tile of columns and of the sum, the last one cut
    assert_agrees(head, *random_inputs(head, 17, 14), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_sums_of_a_few_rows_in_several_parts(make_head, monkeypatch, dtype, rows):
    tile = Tile(triton_config.power_of_two(rows), 32, 64, 4, 2, by_sum=True)
    monkeypatch.setattr(triton_chain, "block_tile", lambda *_: tile)
    head = make_head(dtype, width=144)
    assert_agrees(head, *random_inputs(head, rows, 15), backend="triton")


@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("channels", [5, 64])
def test_every_tile_of_the_update(make_head, monkeypatch, tokens, channels):
    tile = update_tile(tokens, channels)
    monkeypatch.setattr(triton_chain, "update_tile", lambda *_: tile)
    head = make_head(channels=channels, width=272)  # the sum takes several parts
    assert_agrees(head, *guided_inputs(head, 3, 16), cfg_scale=2.0, backend="triton")


@pytest.mark.parametrize("guided", [False, True])
def test_the_final_layer_by_tensor_cores(make_head, monkeypatch, guided):
    """No entry of the table does so yet."""
    monkeypatch.setattr(triton_chain, "update_tile", lambda *_: Tile(16, 16, 32, 4, 2))
    head = make_head()
    inputs = guided_inputs(head, 19) if guided else random_inputs(head, 19, 0)
    assert_agrees(head, *inputs, cfg_scale=2.0 if guided else 1.0, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_serve_all_rows_and_few_rows_are_summed(dtype):
    for rows in (1, 2, 3, 4, 5, 16, 17, 100, 1000, 8192):
        tile = block_tile(rows, 1024, dtype)
        assert tile.by_sum == (rows <= triton_config.BY_SUM_ROWS)
        assert tile.bm <= max(16, triton_config.power_of_two(rows))
        assert not tile.by_sum or tile.bm >= rows


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("width", [16, 1024, 1280, 2048])
@pytest.mark.parametrize("count", [1, 108, 132])
def test_persistent_tiles_hold_all_rows_and_every_program_has_a_multiprocessor(rows, width, count):
    tile = triton_config.persistent_tile(rows, width, count)
    assert tile.bm >= rows
    assert triton.cdiv(width, tile.bn) <= count


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch.empty hands out holds NaN, so that what nobody has written shows."""
    empty = torch.empty

    def poison(*arguments, **options):
        value = empty(*arguments, **options)
        return value.fill_(float("nan")) if value.is_floating_point() else value

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_is_read_before_it_is_written(make_head, shape, poisoned, steps):
    head = make_head(steps=steps)
    assert_agrees(head, *guided_inputs(head, 5, 17), cfg_scale=2.0, backend="triton")


def run_chain(chain, head, inputs, temperature=0.9, cfg_scale=None):
    """What a chain puts out for inputs of at most its number of tokens."""
    chain.load(*inputs, temperature, cfg_scale)
    tables = Tables(head)
    chain.launch(head, tables)
    return chain.results(len(inputs[1]), temperature, tables)


@pytest.mark.parametrize("kind", [LayeredChain, PersistentChain])
@pytest.mark.parametrize("noise", ["stored", "addressed"])
@torch.no_grad()
def test_a_chain_serves_fewer_tokens_than_it_has_and_one_call_after_the_other(
    make_head, multiprocessors, poisoned, kind, noise
):
    multiprocessors(1)
    head, chain = make_head(steps=3), None
    for seed, rows in enumerate((3, 4, 1)):
        cond, x, stored = guided_inputs(head, rows, seed)
        inputs = cond, x, stored if noise == "stored" else addressed(head, rows, seed)
        scale = torch.linspace(0, 4, rows, device=head.device)[:, None] if seed % 2 else 2.0 + seed
        chain = chain or kind(head, 4, True, inputs[2], 2, static=True)
        out = run_chain(chain, head, inputs, 0.9 + seed, scale)
        assert_close(out, definition(head, *inputs, 0.9 + seed, scale), 1e-5)


@torch.no_grad()
def test_results_are_copies(make_head):
    head = make_head()
    one, two = (random_inputs(head, 3, seed) for seed in (0, 1))
    chain = LayeredChain(head, 3, False, one[2], 2, static=True)
    out = run_chain(chain, head, one)
    kept = [v.clone() for v in out]
    run_chain(chain, head, two)
    assert all(map(torch.equal, out, kept))


@torch.no_grad()
def test_a_chain_that_stopped_waiting_gives_nan_and_the_next_call_says_so(make_head, multiprocessors):
    multiprocessors(1)
    head = make_head(steps=3)
    inputs = random_inputs(head, 3, 0)
    chain = PersistentChain(head, 3, False, inputs[2], 3, static=True)
    chain.load(*inputs, 0.9, None)
    chain.error.fill_(1)
    tables = Tables(head)
    chain.launch(head, tables)
    sample, mean, *_ = chain.results(3, 0.9, tables)
    assert sample.isnan().all()
    assert mean.isnan().all()
    if head.device.type == "cuda":
        torch.cuda.synchronize()  # the next call may come before the host knows
    with pytest.raises(RuntimeError, match=r"gave up waiting .* Set CSPD_PERSISTENT_MAX_TOKENS=0"):
        tables.check()
    tables.check()  # said once
    assert_close(run_chain(chain, head, inputs), definition(head, *inputs, 0.9), 1e-5)


def test_persistent_leaves_unaligned_weights_to_the_layered_chain(make_diffloss, triton_device):
    module = make_diffloss(steps=2).to(triton_device)
    assert Tables(DiffusionHead.from_module(module)).serves_persistent
    bias = module.net.res_blocks[0].mlp[0].bias
    bias.data = torch.cat([bias.data, bias.data])[1 : 1 + len(bias)]
    assert not Tables(DiffusionHead.from_module(module)).serves_persistent
    assert not Tables(DiffusionHead.from_module(make_diffloss(depth=0, steps=2))).serves_persistent


class Before:
    """A pointer to ``elements`` before a tensor, for the interpreter, which computes addresses as they are."""

    def __init__(self, tensor, elements):
        self.tensor, self.elements, self.dtype = tensor, elements, tensor.dtype

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    def data_ptr(self):
        return self.tensor.data_ptr() - self.elements * self.tensor.element_size()

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self


class Far:
    """A layered kernel whose modulations begin beyond 2**31 elements, as those of many steps of many rows do."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            named = dict(zip(self.kernel.arg_names, arguments))
            away = 2**31 // named["mods"].shape[-1] + 1
            named["mods"] = Before(named["mods"], away * named["mods"].shape[-1])
            named["first_row"] += away
            self.kernel[grid](**named, **options)

        return launch


def test_modulations_beyond_two_to_the_31(make_head, monkeypatch, triton_device):
    if triton_device.type == "cuda":
        pytest.skip("the launcher checks its pointers")
    for name in ("_mlp0_kernel", "_mlp1_kernel", "_update_kernel"):
        monkeypatch.setattr(triton_chain, name, Far(getattr(triton_chain, name)))
    head = make_head(width=16)
    options = {"cfg_scale": 2.0, "backend": "triton"}
    # In a process of its own, since a wrong address may end it.
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=assert_agrees, args=(head, *guided_inputs(head, 2, 18)), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_persistent_takes_up_to_the_given_number_of_tokens(make_head, monkeypatch, multiprocessors):
    multiprocessors(1)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "2")
    used = []
    monkeypatch.setattr(PersistentChain, "run_steps", counted(PersistentChain.run_steps, used))
    head = make_head()
    for rows, taken in ((2, 1), (3, 1)):
        assert (
            relative_error(
                denoise(head, *random_inputs(head, rows, 0), backend="triton").sample,
                definition(head, *random_inputs(head, rows, 0)).sample,
            )
            <= 1e-5
        )
        assert len(used) == taken
