"""The Triton chains of networks and samplers other than MAR's: on a GPU, or in Triton's interpreter on the CPU."""

import pytest
import torch
from chains import assert_agrees
from slow import mostly_slow, slow

from cspd_kernels import Schedule, denoise
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.testing import grouped_inputs, random_network

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from cspd_kernels.ops.denoise import triton_chain, triton_config
from cspd_kernels.ops.denoise.triton_chain import LayeredChain
from cspd_kernels.ops.denoise.triton_config import (
    FEW_ROWS,
    FLOAT32_TILES,
    HALF_TILES,
    FewTile,
    Products,
    Shape,
    few_tile,
    halved,
    own_products,
    products,
)

CPU = torch.device("cpu")
LINEAR = Schedule.linear(2)
PLAIN, GATED = {"norm": "layer", "mlp": "silu"}, {"norm": "rms", "mlp": "swiglu"}
OTHERS = {"norm": "layer", "mlp": "swiglu"}, {"norm": "rms", "mlp": "silu"}


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def network(kernel_device):
    """``network(schedule, ...)``: a head where the kernels run."""
    return lambda schedule=LINEAR, **options: random_network(schedule, device=kernel_device, **options)


@pytest.fixture
def made_by(monkeypatch):
    """``made_by(first, second)``: a tile or None (the library) for each product of a block of more than a few rows."""

    def choose(*made):
        monkeypatch.setattr(
            LayeredChain, "choose", lambda chain, head: Products(*made) if chain.rows > FEW_ROWS else None
        )

    return choose


# --- networks ---


@pytest.mark.parametrize("kind", [PLAIN, GATED, *OTHERS], ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("rows", [1, slow(3)])
def test_few_rows(network, kind, rows):
    assert_agrees(head := network(**kind), *grouped_inputs(head, rows), backend="triton")


@pytest.mark.parametrize("kind", [PLAIN, GATED], ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("part", [16, 32])
def test_few_rows_in_parts_of_a_sum(network, monkeypatch, kind, part):
    """A last part that is whole, and one that is cut."""
    monkeypatch.setattr(triton_chain, "few_tile", lambda *_: FewTile(part, 4))
    assert_agrees(head := network(**kind, depth=1), *grouped_inputs(head, 2), backend="triton")


@pytest.mark.parametrize("kind", [PLAIN, GATED], ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("library", ["neither", slow("both")])
def test_more_rows(network, made_by, monkeypatch, kind, library):
    tile = FLOAT32_TILES[-1]
    made_by(*((None, None) if library == "both" else (tile, tile)))
    monkeypatch.setattr(triton_chain, "SWIGLU_COLUMNS", 32)  # the last program's are cut
    assert_agrees(head := network(**kind), *grouped_inputs(head, 17), backend="triton")


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: "-".join(kind.values()))
def test_more_rows_of_other_mixtures(network, kind):
    assert_agrees(head := network(**kind, depth=1), *grouped_inputs(head, 5), backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, slow(9)])
def test_half_precision(network, dtype, rows):
    assert_agrees(head := network(**GATED, dtype=dtype), *grouped_inputs(head, rows), backend="triton")


@pytest.mark.parametrize(("modulations", "distinct"), [slow((0, 0, 0), 1), ((0, 1, 1), 2), slow(None, 3)])
def test_blocks_that_share_a_modulation_have_it_made_once(network, monkeypatch, modulations, distinct):
    head, made, addmm = network(depth=3, given=True, modulations=modulations), [], torch.addmm
    inputs = grouped_inputs(head, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", lambda *a, **out: made.append(addmm(*a, **out)))
        denoise(head, *inputs, backend="triton", parallel_tol=None)
    assert len(made) == distinct + 1  # the last layer's, and no product for a given condition
    assert_agrees(head, *inputs, backend="triton")


@pytest.mark.parametrize("hidden", [40, 12304])
def test_hidden_widths_that_are_not_covered(network, hidden):
    head = network(hidden=hidden, width=16, depth=1)
    with pytest.raises(RuntimeError, match=f"hidden widths .* this head's is {hidden}: use backend='torch'"):
        denoise(head, *grouped_inputs(head, 1), backend="triton")


# --- samplers ---

SAMPLERS = {
    "limits": Schedule.linear(3).clipped(-0.4, 0.5),
    "limits by channel": Schedule.linear(2).clipped([-0.4, -9, -1, 0], [0.5, 9, 1, 0.25]),
    "DDIM": Schedule.linear(3).ddim(),
    "DDIM with noise": Schedule.linear(3).ddim(0.6),
    "Euler": Schedule.euler([0.0, 0.4, 1.0]),
    "Euler-Maruyama": Schedule.euler_maruyama([0.0, 0.5, 0.8, 1.0]),
}


@pytest.mark.parametrize("sampler", mostly_slow(SAMPLERS, fast=("DDIM with noise", "limits by channel")))
def test_samplers(network, sampler):
    head = network(SAMPLERS[sampler], depth=1, width=16, hidden=16, outputs=8)
    out = denoise(head, *(inputs := grouped_inputs(head, 2, 2)), cfg_scale=1.5, backend="triton", parallel_tol=None)
    assert not any(value.isnan().any() for value in out)
    assert_agrees(head, *inputs, cfg_scale=1.5, backend="triton")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scales", [(2.0, 0.5), "one a token"])
def test_three_groups(network, rows, scales):
    if scales == "one a token":
        scales = torch.linspace(0.5, 3, rows), torch.linspace(2, 1, rows)
        scales = tuple(scale.to(network().device) for scale in scales)
    head = network(outputs=8, depth=1, width=16, hidden=32)
    assert_agrees(head, *grouped_inputs(head, rows, 3), cfg_scale=scales, backend="triton")


@pytest.mark.parametrize("temperature", [slow(0.0), 0.7])
def test_a_temperature_may_be_a_tensor(network, temperature):
    head = network(depth=1, width=16, hidden=16)
    inputs, options = grouped_inputs(head, 2), {"backend": "triton", "parallel_tol": None}
    there = torch.tensor([temperature], device=head.device)
    for tensor in (there, torch.tensor(temperature, dtype=torch.float64)):
        for out, expected in zip(
            denoise(head, *inputs, temperature=tensor, **options),
            denoise(head, *inputs, temperature=temperature, **options),
        ):
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
    # As on a device, where the op cannot look at its value.
    cond, x, noise = inputs
    chain = LayeredChain(head, 2, 1, noise, 2, static=True)
    for value in (there, 0.3, there):
        chain.load(cond[None], x, noise, value, ())
        chain.launch(head, tables := Tables(head))
        out = chain.results(2, value, tables)
        expected = denoise(head, *inputs, temperature=float(value), **options)
        for a, b in zip(out, expected):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_what_is_not_a_number_passes_the_limits(network):
    """In its own row alone."""
    head = network(SAMPLERS["limits"], depth=1, width=16, hidden=16)
    cond, x, noise = grouped_inputs(head, 3)
    alone = denoise(head, cond, x, noise, backend="triton", parallel_tol=None).mean
    noise[2, 1, 0] = torch.nan  # of the first step; values of a call on a device are not looked at
    chain = LayeredChain(head, 3, 1, noise, 3, static=True)
    chain.load(cond[None], x, noise, 1.0, ())
    chain.launch(head, Tables(head))
    assert chain.x[1].isnan().any()
    assert torch.equal(chain.x[[0, 2]], alone[[0, 2]])


# --- the table ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(896, 2688, True), (1024, 1536, True), (3584, 10752, True), (4096, 12288, False)])
def test_every_number_of_rows_has_its_products(dtype, shape):
    tiles = FLOAT32_TILES if dtype == torch.float32 else HALF_TILES
    for rows in (5, 16, 100, 1000, 8192):
        made = own_products(rows, Shape(*shape), dtype, CPU)
        assert made.first in (halved(tiles) if shape[2] else tiles) and made.second in tiles
        assert products(rows, Shape(*shape), dtype, CPU) in (made, Products(None, None))
        assert all(tile.bm * tile.bn < triton_config.SPILLING for tile in made)


def test_what_was_measured_is_of_square_weights(monkeypatch):
    entries = ((None, Products(None, HALF_TILES[0])),)
    monkeypatch.setattr(triton_config, "TILES", {((9, 0), 1024, 2): entries})
    monkeypatch.setattr(triton_config, "_capability", lambda device: (9, 0))
    for shape, measured in (((1024, 1024, False), True), ((1024, 1536, False), False), ((1024, 1024, True), False)):
        assert (products.__wrapped__(64, Shape(*shape), torch.bfloat16, CPU) == entries[0][1]) == measured


@pytest.mark.parametrize("width", [16, 896, 1024, 1536, 2048, 3584, 4096])
def test_a_program_for_few_rows_holds_no_more_than_its_registers(width):
    for sum_of in (width, 3 * width):
        one, two = few_tile(sum_of, width), few_tile(sum_of, width, True)
        assert one.bk <= 256 * one.warps and two.bk <= 128 * two.warps
        assert one.bk >= sum_of or one.bk == 128 * one.warps  # whole, or in parts
