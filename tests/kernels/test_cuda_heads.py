"""The CUDA chains of networks and samplers other than MAR's: norms, MLPs, modulations that blocks share, given
conditions, wide layers; one to three groups of rows, limits of x0, steps without noise."""

from dataclasses import fields, replace

import pytest
import torch
from chains import BOUNDS, addressed, assert_close

from cspd_kernels import Schedule, denoise
from cspd_kernels.head import Block, DiffusionHead
from cspd_kernels.ops.denoise import Denoised, cuda, reference
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.cuda_config import OWN, SWIGLU, TABLE, Entry, Tile, tile_for
from cspd_kernels.ops.denoise.cuda_layered import LayeredChain
from cspd_kernels.ops.denoise.cuda_persistent import PersistentChain
from cspd_kernels.testing import relative_error

HALF = torch.bfloat16
TILES = [Tile(16, 16), Tile(32, 32), Tile(64, 64), None]
SCALES = {1: 1.0, 2: 2.5, 3: (2.0, 0.5)}
SAMPLERS = {
    "ddpm": lambda s: s,
    "ddim": lambda s: s.ddim(),
    "ddim with noise": lambda s: s.ddim(0.7),
    "euler": lambda s: Schedule.euler([0.0, 0.3, 0.7, 1.0]),
    "euler-maruyama": lambda s: Schedule.euler_maruyama([0.0, 0.2, 0.5, 0.9, 1.0]),
}


@pytest.fixture
def backend():
    return "cuda"


@pytest.fixture
def make(make_head):
    """``make(dtype, ...)``: a head of another network than MAR's, or with another sampler."""

    def of(dtype=torch.float32, *, norm="layer", mlp="silu", hidden=None, modulations=None, given=False, sampler="ddpm",
           clip=None, seed=1, **options):  # fmt: skip
        head = make_head(dtype, **{"depth": 2, "steps": 4, **options})
        generator, width = torch.Generator().manual_seed(seed), head.width
        inner = hidden or width

        def random(like, *shape, scale=1.0, mean=0.0):
            return (mean + scale * torch.randn(shape, generator=generator)).to(like)

        blocks = []
        for i, b in enumerate(head.blocks):
            rows, shared = (2 * inner if mlp == "swiglu" else inner), b
            if modulations is not None and i > 0 and modulations[i] == modulations[i - 1]:
                shared = blocks[-1]
            blocks.append(
                Block(
                    random(b.norm_weight, width, scale=0.3, mean=1.0),
                    torch.zeros_like(b.norm_bias) if norm == "rms" else b.norm_bias,
                    random(b.weight0, rows, width, scale=width**-0.5),
                    random(b.bias0, rows, scale=0.5),
                    random(b.weight1, width, inner, scale=inner**-0.5),
                    b.bias1,
                    shared.mod_weight,
                    shared.mod_bias,
                )
            )
        schedule = SAMPLERS[sampler](head.schedule)
        schedule = schedule if clip is None else schedule.clipped(*clip)
        changes = {"cond_weight": None, "cond_bias": None} if given else {}
        embedding = random(head.time_embedding, schedule.num_steps, width)
        return replace(
            head, blocks=tuple(blocks), norm=norm, mlp=mlp, schedule=schedule, time_embedding=embedding, **changes
        )

    return of


def inputs_of(head, rows, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (groups * rows, head.cond_channels), (rows, head.channels), (head.num_steps, rows, head.channels)
    return [torch.randn(shape, generator=generator).to(head.device) for shape in shapes]


def check(head, rows, groups, *, noise=None, temperature=0.9, tolerance=None, **options):
    cond, x, stored = inputs_of(head, rows, groups)
    noise = stored if noise is None else noise
    actual = denoise(head, cond, x, noise, temperature=temperature, cfg_scale=SCALES[groups], backend="cuda", **options)
    scales = reference.as_scales(SCALES[groups]) if groups > 1 else ()
    expected = Denoised(*reference.denoise(head, cond, x, noise, temperature, scales, dtype=torch.float64))
    assert_close(actual[:4], expected, tolerance or BOUNDS[head.dtype])
    return actual


NETWORKS = {
    "rms": {"norm": "rms"},
    "swiglu": {"mlp": "swiglu"},
    "narrow inside": {"hidden": 32},
    "wide inside": {"hidden": 144, "mlp": "swiglu", "norm": "rms"},
    "all share": {"modulations": (0, 0, 0), "depth": 3},
    "some share": {"modulations": (0, 0, 1, 1), "depth": 4, "mlp": "swiglu", "hidden": 80},
    "given": {"given": True},
}


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, 1), (torch.float32, 3), (HALF, 2)])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(make, dtype, groups, network):
    check(make(dtype, **NETWORKS[network]), 5, groups)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "width", "hidden"), [(3, 48, 80), (70, 16, 112)])
@pytest.mark.parametrize("mlp", ["silu", "swiglu"])
def test_products_of_every_tile(make, monkeypatch, used, tile, rows, width, hidden, mlp):
    monkeypatch.setattr(LayeredChain, "table", (Entry(1 << 20, 1 << 20, tile),))
    check(make(HALF, mlp=mlp, width=width, hidden=hidden, norm="rms", steps=2), rows, 1)
    assert {chain.tile for chain in used} == {tile}


@pytest.mark.parametrize(("groups", "philox"), [(1, True), (2, False), (3, False), (3, True)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(make, groups, sampler, philox):
    head = make(sampler=sampler, learn_sigma=sampler == "ddpm")
    check(head, 3, groups, noise=addressed(head, 3) if philox else None)


@pytest.mark.parametrize("parallel", [None, 1e-6])
@pytest.mark.parametrize("clip", [(-0.3, 0.3), ([-0.2, -0.4, -9.0, -0.1, -0.3], [0.1, 0.2, 9.0, 0.3, 0.05])])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_limits(make, groups, clip, parallel):
    head, free = make(clip=clip), make()
    limited = check(head, 4, groups, parallel_tol=parallel)
    assert relative_error(limited[0], check(free, 4, groups, parallel_tol=parallel)[0]) > 0.01


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    ("network", "sampler"), [("wide inside", "ddpm"), ("some share", "ddim"), ("given", "euler-maruyama")]
)
def test_sweeps(make, groups, network, sampler):
    head = make(sampler=sampler, learn_sigma=sampler == "ddpm", clip=(-1.0, 1.0), **NETWORKS[network])
    actual = check(head, 3, groups, parallel_tol=1e-6)
    assert (actual.sweeps <= head.num_steps).all()


def test_the_products_of_sweeps_are_never_the_librarys_in_half_precision(make, monkeypatch):
    made = []
    monkeypatch.setattr(
        LayeredChain, "evaluate", lambda self, *given, run=LayeredChain.evaluate: made.append(self) or run(self, *given)
    )
    check(make(HALF, mlp="swiglu", hidden=2064, width=16, depth=1, steps=2), 1, 1, parallel_tol=1e-3)
    assert {chain.tile for chain in made} == {OWN[-1].tile}


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("parallel", [None, 1e-6])
def test_a_step_without_noise_reads_none(make, sampler, parallel):
    """Whatever lies there, and no NaN comes of its log standard deviation."""
    head = make(sampler=sampler, learn_sigma=False)
    cond, x, noise = inputs_of(head, 3, 1)
    call = dict(backend="cuda", parallel_tol=parallel)
    expected = denoise(head, cond, x, noise, **call)
    actual = denoise(head, cond, x, torch.full_like(noise, 3e38), **call)
    assert all(map(torch.equal, actual, expected))
    assert torch.equal(expected.path_log_std, torch.full_like(expected.path_log_std, -torch.inf))
    assert not any(value.isnan().any() for value in expected)


def test_a_wide_head(make):
    """Beyond a width of 2048 a block has one token, however many there are."""
    check(make(width=2064, hidden=48, mlp="swiglu", norm="rms", depth=1, steps=1), 66, 1)


def test_a_head_with_wide_blocks(make):
    check(make(hidden=12288, mlp="swiglu", norm="rms", depth=1), 2, 2)


@pytest.mark.parametrize("channels", [65, 256])
def test_many_channels(make, channels):
    head = make(channels=channels)
    check(head, 3, 2)
    check(head, 2, 1, parallel_tol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("table", [TABLE, ()])
@pytest.mark.parametrize(("network", "groups"), [("wide inside", 3), ("some share", 2), ("rms", 1)])
def test_kernels_that_start_early_give_the_same_bits_every_time(make, monkeypatch, used, table, network, groups):
    """Launched one by one, and as a graph over and over: what starts too early would show now and then."""
    monkeypatch.setattr(LayeredChain, "table", table)
    head = make(HALF, **{**NETWORKS[network], "width": 1024, "hidden": 1536, "channels": 16, "steps": 25})
    cond, x, noise = inputs_of(head, 20, groups)
    options = dict(cfg_scale=SCALES[groups], backend="cuda")
    first = denoise(head, cond, x, noise, **options)
    for _ in range(50):
        assert all(map(torch.equal, denoise(head, cond, x, noise, **options), first))
    assert {type(chain) for chain in used} == {LayeredChain}


# --- one call of the network ---


@pytest.mark.parametrize(("dtype", "embeddings"), [(torch.float32, 1), (torch.float32, 5), (HALF, 5)])
@pytest.mark.parametrize("network", ["given", "wide inside", "some share"])
def test_one_call(make, dtype, embeddings, network):
    head = replace(make(dtype, **NETWORKS[network]), schedule=None, time_embedding=None)
    generator = torch.Generator().manual_seed(3)
    cond, x, embedding = (
        torch.randn(shape, generator=generator).to(head.device)
        for shape in ((5, head.cond_channels), (5, head.channels), (embeddings, head.width))
    )
    chain, tables = LayeredChain(head, 5, 1, None, 1, static=True), Tables(head)
    chain.take_memory(head)
    chain.cond[0].copy_(cond)
    chain.x.copy_(x)
    tables.refresh(head)
    chain.project(head)
    chain.embed_rows(embedding)
    chain.modulate(head, 5)
    chain.evaluate(head, tables)
    wide = head.to(torch.float64)
    expected = reference.network(wide, x.double(), embedding.double() + reference.embedded(wide, cond.double()))
    assert chain.out.shape == (1, 5, head.outputs)
    assert relative_error(chain.out[0], expected) < BOUNDS[dtype]


# --- the persistent kernel ---


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, 1), (HALF, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {"clip": (-0.8, 0.9)},
        {"sampler": "ddim", "learn_sigma": False, "clip": (-0.8, 0.9)},
        {"sampler": "euler-maruyama", "learn_sigma": False},
        {"modulations": (0, 0, 0), "depth": 3},
        {"given": True},
    ],
    ids=["clip", "ddim", "euler-maruyama", "shared", "given"],
)
def test_the_persistent_kernel(make, persistent, dtype, groups, options):
    persistent(3)
    check(make(dtype, **options), 3, groups)


@pytest.mark.parametrize("network", ["rms", "swiglu", "narrow inside", "some share"])
def test_what_the_persistent_kernel_leaves_to_the_layered_chain(make, monkeypatch, used, network):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    head = make(**NETWORKS[network])
    assert not PersistentChain.serves(head, 2, 1)
    assert "its persistent kernel is for" in cuda.why_not_persistent(head, 2, 1)
    check(head, 2, 1)
    assert {type(chain) for chain in used} == {LayeredChain}


def test_three_groups_are_left_to_the_layered_chain(make, monkeypatch, multiprocessors, used):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    multiprocessors(2)
    head = make()
    assert [PersistentChain.serves(head, 2, groups) for groups in (1, 2, 3)] == [True, True, False]
    check(head, 2, 3)
    assert {type(chain) for chain in used} == {LayeredChain}


# --- what is chosen ---


def test_tiles_by_the_wider_of_the_network_and_its_blocks():
    for rows in (1, 40, 100, 128):
        tile = tile_for(rows, 1024, HALF, TABLE)
        assert tile_for(rows, 1024, HALF, TABLE, swiglu=True) == (tile if tile in SWIGLU else Tile(64, 64))
        assert tile_for(rows, 4608, HALF, TABLE) is None
        assert tile_for(rows, 4608, HALF, OWN, swiglu=True) == Tile(64, 64)
        assert tile_for(rows, 4608, torch.float32, OWN) is None


def test_every_field_is_looked_at(make):
    """A tensor of a head that does not lie on a boundary of 16 bytes is found, whatever the network."""
    head = make(**NETWORKS["some share"])
    assert cuda.why_unsupported(head) is None
    for name in (f.name for f in fields(Block)):
        weight = getattr(head.blocks[1], name)
        shifted = weight.new_empty(weight.numel() + 1)[1:].view_as(weight)
        blocks = (head.blocks[0], replace(head.blocks[1], **{name: shifted}), *head.blocks[2:])
        assert f"blocks[1].{name} lies 4 bytes after one" in cuda.why_unsupported(replace(head, blocks=blocks))
    assert isinstance(head, DiffusionHead)
