"""The CUDA chains beyond what every backend is tested for: whose products the layered one takes, how the persistent
kernel divides its work, its watchdog, and that nothing depends on the order in which threads run."""

import pytest
import torch
import torch.nn.functional as F
from chains import BOUNDS, addressed, assert_agrees, kernels_of
from slow import mostly_slow, slow

from cspd_kernels import denoise
from cspd_kernels.ops.denoise import cuda_layered, cuda_persistent
from cspd_kernels.ops.denoise.cuda_config import TABLE, Entry, Tile, tile_for
from cspd_kernels.ops.denoise.cuda_layered import LayeredChain
from cspd_kernels.ops.denoise.cuda_persistent import PersistentChain, plan_of
from cspd_kernels.testing import random_inputs, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]
TILES = [Tile(16, 16), Tile(32, 32), Tile(64, 32), Tile(64, 64)]


@pytest.fixture
def backend():
    return "cuda"


def call(head, rows, guided, seed=0):
    inputs = random_inputs(head, rows, seed, guided)
    return denoise(head, *inputs, cfg_scale=2.5 if guided else 1.0, backend="cuda")


def check(head, rows, guided, seed=0):
    inputs = random_inputs(head, rows, seed, guided)
    assert_agrees(head, *inputs, cfg_scale=2.5 if guided else 1.0, backend="cuda")


@pytest.fixture
def products(monkeypatch, used):
    """``products(tile)``: every product is the extension's own, in such tiles, or (None) the library's."""
    wanted = []

    def take(tile):
        monkeypatch.setattr(LayeredChain, "table", (Entry(1 << 20, 2048, tile),))
        wanted.append(tile)

    yield take
    assert used
    assert [chain.tile for chain in used] == [wanted[-1]] * len(used)


def test_the_library_makes_the_products_of_many_rows_and_of_float32():
    assert [tile_for(1, 1024, dtype) for dtype in DTYPES] == [None, Tile(16, 16), Tile(16, 16)]
    for width, most in ((1024, 240), (1280, 128), (1536, 128)):
        tiles = [tile_for(rows, width, torch.bfloat16) for rows in range(1, 600)]
        assert tiles.index(None) == most
        assert set(tiles[:most]) <= set(TILES)
        assert set(tiles[most:]) == {None}
    assert tile_for(1, 1024, torch.bfloat16, ()) is None
    assert {entry.tile for entry in TABLE} <= {*TILES, None}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tile", [*TILES, None])
@pytest.mark.parametrize(
    ("rows", "width", "depth", "guided"),
    [(1, 16, 1, False), (3, 80, 3, True), slow(17, 144, 2, False), slow(40, 48, 2, True), slow(65, 272, 1, False)],
)
def test_products(make_head, products, dtype, tile, rows, width, depth, guided):
    products(tile)
    check(make_head(dtype, width=width, depth=depth), rows, guided)


@pytest.mark.parametrize("tile", TILES)
def test_products_of_a_fixed_variance_and_addressed_noise(make_head, products, tile):
    products(tile)
    head = make_head(torch.bfloat16, learn_sigma=False, steps=3, depth=2)
    cond, x, _ = random_inputs(head, 5, 2, guided=True)
    assert_agrees(head, cond, x, addressed(head, 5), cfg_scale=3.0, temperature=0.7, backend="cuda")


@pytest.mark.parametrize(("width", "rows"), [(1024, 2), (1536, 20)])
def test_products_as_the_table_has_them(make_head, used, width, rows):
    check(make_head(torch.bfloat16, width=width, channels=16), rows, False)
    assert {chain.tile for chain in used} == {tile_for(rows, width, torch.bfloat16)} != {None}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 60, 120, 240, 512])
@pytest.mark.parametrize("table", [TABLE, ()])
def test_kernels_that_start_early_give_the_same_bits_every_time(make_head, monkeypatch, used, rows, table):
    """Launched one by one, and as a graph over and over: what starts too early would show now and then."""
    monkeypatch.setattr(LayeredChain, "table", table)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "0")
    head = make_head(torch.bfloat16, width=1024, channels=16, depth=3, steps=25)
    first = call(head, rows, False)
    for _ in range(50):
        assert all(map(torch.equal, call(head, rows, False), first))
    assert {type(chain) for chain in used} == {LayeredChain}


def test_the_first_kernel_of_every_group_of_steps_is_not_early(make_head, monkeypatch):
    """What came before it may have written weights, and library products stand between two groups."""
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "0")
    steps, kernels = [], cuda_layered.extension()

    class Kernels:
        def __getattr__(self, name):
            return getattr(kernels, name)

        def input(self, *arguments):
            steps.append(arguments[-2])
            kernels.input(*arguments)

    monkeypatch.setattr(cuda_layered, "extension", Kernels)
    head = make_head(steps=5)
    denoise(head, *random_inputs(head, 2, 0), backend="cuda", workspace_bytes=2 * 2 * 48 * 6 * 4)  # two steps
    assert steps == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [TABLE, ()])
def test_one_block(make_head, monkeypatch, kernel_device, dtype, table):
    """``run_block`` is a block of the network, with the modulations of the step whose first row it is told."""
    monkeypatch.setattr(LayeredChain, "table", table)
    head = make_head(dtype, width=80, depth=3, steps=2)
    chain = LayeredChain(head, 5, 2, random_inputs(head, 5, 0, guided=True)[2], 2, static=False)
    chain.keep_modulations_in(torch.empty(chain.memory_bytes, dtype=torch.uint8, device=head.device))
    block, following = head.blocks[1], head.blocks[2]
    for buffer in (chain.h, chain.operand, chain.mods):
        buffer.normal_()
    h, operand, first_row = chain.h.double(), chain.operand.double(), 10  # of step 1
    chain.run_block(head, 1, first_row)

    def modulations(index):
        return chain.mods[index, first_row : first_row + 10].double().chunk(3, dim=1)

    hidden = F.silu(F.linear(operand, block.weight0.double(), block.bias0.double()))
    h += modulations(1)[2] * F.linear(hidden, block.weight1.double(), block.bias1.double())
    shift, scale, _ = modulations(2)
    normal = F.layer_norm(h, (80,), following.norm_weight.double(), following.norm_bias.double(), head.norm_eps)
    bound = BOUNDS[dtype]
    assert relative_error(chain.h, h) < bound
    assert relative_error(chain.operand, normal * (1 + scale) + shift) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "guided"), [(n, False) for n in (1, 2, 3, 4, 5, 8, 9, 16)] + [(1, True), (8, True)])
def test_every_number_of_rows(make_head, persistent, dtype, rows, guided):
    persistent(3)
    check(make_head(dtype, width=112), rows, guided)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", mostly_slow([16, 48, 208, 1024, 1040, 1280, 1536, 2048], fast=(16, 48, 208)))
def test_every_width(make_head, persistent, dtype, width):
    persistent(10)
    check(make_head(dtype, width=width, channels=16), 2, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [slow(1), slow(2), 5, slow(9)])
@pytest.mark.parametrize("channels", [1, 17, 64])
def test_every_division_of_columns_and_channels(make_head, persistent, dtype, programs, channels):
    persistent(programs)
    check(make_head(dtype, width=144, channels=channels), 3, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [3, 4])  # fewer layers take less than the ring that others pass through
def test_weights_stay_in_shared_memory_or_pass_through_it(make_head, persistent, monkeypatch, dtype, depth):
    persistent(4)
    head = make_head(dtype, width=144, depth=depth, steps=3)
    plan = plan_of(head, 2, 2)
    assert plan.resident
    monkeypatch.setattr(cuda_persistent, "shared_limit", lambda device: plan.shared_bytes)
    assert plan_of(head, 2, 2).resident
    check(head, 2, True)
    monkeypatch.setattr(cuda_persistent, "shared_limit", lambda device: plan.shared_bytes - 1)
    assert plan_of(head, 2, 2).blocks
    assert not plan_of(head, 2, 2).resident
    check(head, 2, True)


def test_what_fits_no_shared_memory_is_left_to_the_layered_chain(make_head, monkeypatch, used):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    monkeypatch.setattr(cuda_persistent, "shared_limit", lambda device: 1 << 10)
    check(make_head(), 2, False)
    assert {type(chain) for chain in used} == {kernels_of("cuda").layered}


def test_more_rows_than_a_tile_are_left_to_the_layered_chain(make_head, monkeypatch, multiprocessors, used):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    multiprocessors(2)
    head, kernels = make_head(), kernels_of("cuda")
    for rows, guided, kind in ((8, True, "persistent"), (9, True, "layered"), (16, False, "persistent")):
        used.clear()
        check(head, rows, guided)
        assert {type(chain) for chain in used} == {getattr(kernels, kind)}


@pytest.mark.parametrize("shape", ["layered", "persistent"], indirect=True)
@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, fast=DTYPES[:1]))
def test_the_order_of_threads_changes_nothing(make_head, monkeypatch, shape, kernel_device, dtype):
    """The emulation draws it anew for every seed; on a device it is what it is."""
    head = make_head(dtype, depth=2, steps=3, width=80)
    cond, x, _ = random_inputs(head, 3, 0, guided=True)
    first = None
    for seed in range(6):
        monkeypatch.setenv("CSPD_EMULATION_SEED", str(seed))
        out = denoise(head, cond, x, addressed(head, 3), cfg_scale=2.5, backend="cuda")
        first = first or out
        assert all(map(torch.equal, out, first))


@pytest.mark.parametrize("silent", [0, 2])
def test_a_block_that_stays_silent_is_noticed(make_head, persistent, monkeypatch, silent):
    persistent(3)
    head = make_head(width=48, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(PersistentChain, "silent", silent)
        patch.setattr(PersistentChain, "timeout_ns", 20_000_000)
        assert call(head, 2, False).sample.isnan().all()  # not captured: a first call
    if head.device.type == "cuda":
        torch.cuda.synchronize()  # the next call may come before the host knows
    with pytest.raises(RuntimeError, match=r"gave up waiting .* Set CSPD_PERSISTENT_MAX_TOKENS=0"):
        call(head, 2, False)
    check(head, 2, False)
