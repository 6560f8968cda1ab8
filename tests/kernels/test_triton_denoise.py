"""How the Triton chain divides its work: on a GPU, or in Triton's interpreter on the CPU."""

import multiprocessing

import pytest
import torch
from chains import addressed, assert_agrees
from slow import mostly_slow, slow

from cspd_kernels.testing import random_inputs, relative_error

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from cspd_kernels.ops.denoise import triton_chain, triton_config
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.triton_chain import LayeredChain
from cspd_kernels.ops.denoise.triton_config import (
    FEW_ROWS,
    Products,
    Shape,
    Tile,
    input_tile,
    power_of_two,
    products,
    update_channels,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OWN = {
    torch.float32: Tile(16, 32, 64, 4, 3),
    torch.float16: Tile(16, 32, 128, 4, 4),
    torch.bfloat16: Tile(16, 16, 128, 4, 4),
}
EVERY_TILE = [(torch.float32, tile) for tile in triton_config.FLOAT32_TILES]
EVERY_TILE += [(torch.float16, tile) for tile in triton_config.HALF_TILES]


@pytest.fixture
def backend():
    return "triton"


def guided_inputs(head, rows, seed=0):
    return random_inputs(head, rows, seed, guided=True)


@pytest.fixture
def made_by(monkeypatch):
    """``made_by(first, second)``: a tile or None (the library) for each product of a block of more than a few rows."""

    def choose(*made):
        monkeypatch.setattr(
            LayeredChain, "choose", lambda chain, head: Products(*made) if chain.rows > FEW_ROWS else None
        )

    return choose


@pytest.mark.slow
def test_wide_heads(make_head, made_by):
    tile = Tile(16, 128, 128, 4, 2)  # larger than there are for so few tokens: fewer programs
    made_by(tile, tile)
    head = make_head(channels=4, width=1040)
    assert_agrees(head, *random_inputs(head, 5, 0), backend="triton")


@pytest.mark.parametrize(
    ("dtype", "tile"),
    mostly_slow(EVERY_TILE, fast=(EVERY_TILE[0], (torch.float16, Tile(64, 32, 128, 4, 3)))),
    ids=lambda v: v.name if isinstance(v, Tile) else None,
)
def test_every_tile_of_a_block(make_head, made_by, dtype, tile):
    made_by(tile, tile)
    head = make_head(dtype, width=144)  # more than one tile of columns and of the sum, the last one cut
    assert_agrees(head, *random_inputs(head, 17, 14), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["neither", slow("first"), slow("second"), "both"])
def test_products_by_the_library_or_not(make_head, made_by, dtype, library):
    made_by(*(None if library in (name, "both") else OWN[dtype] for name in ("first", "second")))
    head = make_head(dtype, width=80, depth=2)
    assert_agrees(head, *guided_inputs(head, 3, 15), cfg_scale=2.0, backend="triton")


def test_row_tiles_in_groups(make_head, made_by):
    """More of them than share a tile of weights, and columns besides."""
    made_by(Tile(16, 16, 32, 4, 2), Tile(16, 16, 32, 4, 2))
    head = make_head(channels=1, width=32, steps=1)
    assert_agrees(head, *random_inputs(head, 130, 17), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", mostly_slow(range(1, FEW_ROWS + 2), fast=(1, FEW_ROWS + 1)))
def test_a_few_rows_and_one_more(make_head, dtype, rows):
    head = make_head(dtype, width=144)
    cond, x, _ = random_inputs(head, rows, 16)
    assert_agrees(head, cond, x, addressed(head, rows), backend="triton")


@pytest.mark.parametrize("group", [1, slow(2), slow(4), 8])
@pytest.mark.parametrize(("guided", "learned"), [(True, True), (False, False)])
def test_every_group_of_channels_of_the_update(make_head, monkeypatch, group, guided, learned):
    monkeypatch.setattr(triton_chain, "update_channels", lambda *_: group)
    head = make_head(channels=5, width=80, learn_sigma=learned)
    inputs = random_inputs(head, 2, 18, guided)
    assert_agrees(head, *inputs, cfg_scale=2.0 if guided else 1.0, backend="triton")


@pytest.mark.parametrize("tile", [(1, 64), slow((2, 32)), slow((4, 16))])
def test_every_tile_of_the_input(make_head, monkeypatch, tile):
    monkeypatch.setattr(triton_chain, "input_tile", lambda *_: tile)
    head = make_head(width=80)
    assert_agrees(head, *guided_inputs(head, 3, 18), cfg_scale=2.0, backend="triton")


@pytest.mark.parametrize("channels", [1, slow(64)])
def test_the_fewest_and_the_most_channels(make_head, channels):
    head = make_head(channels=channels, steps=3)
    assert_agrees(head, *guided_inputs(head, 2, 19), cfg_scale=2.0, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("all_rows", "some"), [(FEW_ROWS, 3), slow(9, 5)])
@torch.no_grad()
def test_a_rows_bits_are_its_own_in_any_batch(make_head, made_by, monkeypatch, dtype, all_rows, some):
    """From the modulations on, which the library makes, and for one division of the work. The first rows of a batch: a
    product of numpy, which interprets ``tl.dot``, has other bits elsewhere in the tile."""
    made_by(OWN[dtype], OWN[dtype])
    monkeypatch.setattr(triton_chain, "update_channels", lambda *_: 4)
    monkeypatch.setattr(triton_chain, "input_tile", lambda *_: (4, 32))
    head, results, torch_rng = make_head(dtype, depth=2, steps=1), [], torch.Generator().manual_seed(20)
    values = {}
    for rows in (all_rows, some):
        cond, x, noise = random_inputs(head, all_rows, 20)
        chain = LayeredChain(head, rows, 1, noise[:, :rows], 1, static=True)
        chain.load(cond[:rows], x[:rows], noise[:, :rows], 1.0, ())
        chain.start(head)
        chain.keep_modulations_in(torch.empty(chain.memory_bytes, dtype=torch.uint8, device=head.device))
        for name in ("mods", "final_mods"):
            buffer = getattr(chain, name)
            values.setdefault(name, torch.randn(buffer.shape, generator=torch_rng))
            buffer.copy_(values[name][..., :rows, :])
        chain.run_steps(head, Tables(head), 0, 1)
        results.append([v[:some].clone() for v in (chain.h, chain.result, chain.log_std)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("rows", [2, 5])
@torch.no_grad()
def test_one_block_at_a_time_is_the_chain(make_head, made_by, rows):
    """h after every block, by the definition."""
    made_by(OWN[torch.float32], None)
    head = make_head(depth=3, steps=2)
    cond, x, noise = random_inputs(head, rows, 21)
    chain = LayeredChain(head, rows, 1, noise, head.num_steps, static=True)
    chain.load(cond, x, noise, 1.0, ())
    chain.start(head)
    chain.hoist(head, 0, head.num_steps)
    first_row = (head.num_steps - 1) * rows
    wide = head.to(torch.float64)
    h = x.double() @ wide.input_weight.t() + wide.input_bias
    y = torch.nn.functional.silu(wide.time_embedding[-1] + cond.double() @ wide.cond_weight.t() + wide.cond_bias)
    chain.begin_step(head, Tables(head), first_row)
    assert relative_error(chain.h, h) <= 1e-5
    for index, b in enumerate(wide.blocks):
        shift, scale, gate = (y @ b.mod_weight.t() + b.mod_bias).chunk(3, dim=-1)
        a = torch.nn.functional.layer_norm(h, (head.width,), b.norm_weight, b.norm_bias, head.norm_eps)
        a = torch.nn.functional.silu((a * (1 + scale) + shift) @ b.weight0.t() + b.bias0)
        h = h + gate * (a @ b.weight1.t() + b.bias1)
        chain.run_block(head, index, first_row)
        assert relative_error(chain.h, h) <= 1e-5


# --- the table ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 1024, 1280, 1536, 2048])
def test_every_number_of_rows_has_its_products(dtype, width):
    shape = Shape(width, width, False)
    assert [products(rows, shape, dtype, CPU) for rows in range(1, FEW_ROWS + 1)] == [None] * FEW_ROWS
    for rows in (5, 16, 17, 100, 1000, 8192):
        for tile in filter(None, products(rows, shape, dtype, CPU)):
            assert tile in (triton_config.FLOAT32_TILES if dtype == torch.float32 else triton_config.HALF_TILES)
            assert tile.bm <= max(16, power_of_two(rows))


def test_what_was_measured_goes_before_what_was_reasoned(monkeypatch):
    tile = triton_config.HALF_TILES[0]
    entries = ((64, Products(tile, None)), (None, Products(None, tile)))
    monkeypatch.setattr(triton_config, "TILES", {((9, 0), 1024, 2): entries})
    monkeypatch.setattr(triton_config, "_capability", lambda device: (9, 0))

    def chosen(rows, width=1024, dtype=torch.float16):
        return products.__wrapped__(rows, Shape(width, width, False), dtype, CPU)

    assert [chosen(rows) for rows in (5, 64, 65, 9999)] == [entries[0][1]] * 2 + [entries[1][1]] * 2
    assert chosen(64, 1280) not in [entry for _, entry in entries]
    assert chosen(64, dtype=torch.float32) == Products(None, None)


@pytest.mark.parametrize("channels", [1, 5, 16, 64])
def test_updates_and_inputs_are_divided_by_powers_of_two(channels):
    for tokens in (1, 2, 16, 17, 64, 512, 100_000):
        divided = (update_channels(tokens, channels), *input_tile(tokens, channels))
        assert all(power_of_two(n) == n for n in divided)
        assert update_channels(tokens, channels) < 2 * channels


# --- addresses ---


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
            for mods in {"mods", "next_mods"} & set(named):
                named[mods] = Before(named[mods], away * named[mods].shape[-1])
            named["first_row"] += away
            self.kernel[grid](**named, **options)

        return launch


@pytest.mark.parametrize(("tokens", "second"), [(2, None), slow(3, OWN[torch.float32]), slow(3, None)])
def test_modulations_beyond_two_to_the_31(make_head, made_by, monkeypatch, kernel_device, tokens, second):
    if kernel_device.type == "cuda":
        pytest.skip("the launcher checks its pointers")
    kernels = ("_few_mlp0_kernel", "_few_mlp1_kernel", "_norm_kernel", "_mlp1_kernel", "_residual_kernel")
    for name in (*kernels, "_update_kernel"):
        monkeypatch.setattr(triton_chain, name, Far(getattr(triton_chain, name)))
    made_by(OWN[torch.float32], second)
    head = make_head(width=16, depth=2)
    options = {"cfg_scale": 2.0, "backend": "triton"}
    # In a process of its own, since a wrong address may end it.
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=assert_agrees, args=(head, *guided_inputs(head, tokens, 18)), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == 0
