"""The tiles of the Triton chains: on a GPU, or in Triton's interpreter on the CPU."""

import multiprocessing

import pytest
import torch
from chains import assert_agrees

from cspd_kernels import DiffusionHead
from cspd_kernels.testing import random_inputs

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton

from cspd_kernels.ops.denoise import triton_chain, triton_config
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.triton_config import Tile, block_tile, update_tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def backend():
    return "triton"


def guided_inputs(head, rows, seed=0):
    return random_inputs(head, rows, seed, guided=True)


def test_wide_heads(make_head, monkeypatch, shape):
    # Larger ones than there are for so few tokens: fewer programs.
    monkeypatch.setattr(triton_chain, "block_tile", lambda *_: Tile(16, 128, 128, 4, 2))
    monkeypatch.setattr(triton_chain, "update_tile", lambda tokens, channels: update_tile(256, channels))
    head = make_head(channels=4, width=1040)
    assert_agrees(head, *random_inputs(head, 5, 0), backend="triton")


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


def test_persistent_leaves_unaligned_weights_to_the_layered_chain(make_diffloss, kernel_device):
    module = make_diffloss(steps=2).to(kernel_device)
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


def test_modulations_beyond_two_to_the_31(make_head, monkeypatch, kernel_device):
    if kernel_device.type == "cuda":
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
